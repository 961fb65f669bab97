"""Rows of the lexical memory name the text that wrote them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from model.memory import Pool
from model.memory.lexical.origin import rows_of_texts
from tests.model.tiny_lm import LEXICAL, build, learn, new_pool, text, tiny_backbone

FIRST, SECOND, THIRD = text(1), text(2), text(3)
Rows = NDArray[np.uint8]


def rows_after(*texts: list[int]) -> tuple[Rows, Rows]:
    """Return the stored rows [n, row_bytes] of a session that has learned texts: those of the last one, and all."""
    lm = build(tiny_backbone(), LEXICAL)
    pool = new_pool(lm)
    session, before = pool.open(), set[bytes]()
    for ids in texts:
        before = {row.tobytes() for row in dump(pool, session)}
        learn(lm, pool, session, ids)
    rows = dump(pool, session)
    return np.stack([row for row in rows if row.tobytes() not in before]), rows


def dump(pool: Pool, session: int) -> Rows:
    site = pool.dump(session).get(LEXICAL.name)
    return np.zeros((0, 1), np.uint8) if site is None else site.data.numpy()


def token_of(row: Rows) -> int:
    return int.from_bytes(row[4:8].tobytes(), "little")


def test_all_rows_of_a_text_are_found() -> None:
    written, rows = rows_after(FIRST, THIRD, SECOND)
    found = {row.tobytes() for row in rows[rows_of_texts(rows, [SECOND], [FIRST, THIRD])]}
    missed = [row for row in written if row.tobytes() not in found]
    assert len(written) > 10 and {token_of(row) for row in missed} <= set(SECOND[:2]), "others may explain first words"
    assert not [row for row in written if not rows_of_texts(row[None], [SECOND], [])[0]]


def test_rows_of_other_texts_stay_unless_they_repeat_a_context_or_a_first_word() -> None:
    written, rows = rows_after(FIRST, THIRD, SECOND)
    own = {row.tobytes() for row in written}
    mask = rows_of_texts(rows, [SECOND], [FIRST, THIRD])
    wrong = [row for row, is_found in zip(rows, mask, strict=True) if is_found and row.tobytes() not in own]
    thirds = {tuple(ids[n - 2 : n + 1]) for ids in (FIRST, THIRD) for n in range(2, len(ids))}
    repeated = {third[-1] for third in thirds & {tuple(SECOND[n - 2 : n + 1]) for n in range(2, len(SECOND))}}
    assert {token_of(row) for row in wrong} <= repeated | set(SECOND[:2])
    assert (~mask).sum() > 10


def test_no_text_has_no_rows() -> None:
    _, rows = rows_after(FIRST)
    assert not rows_of_texts(rows, [], [FIRST]).any() and not rows_of_texts(rows, [], []).any()
    assert rows_of_texts(rows[:0], [FIRST], []).shape == (0,)
