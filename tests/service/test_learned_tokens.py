"""Undo data, compared with a model that remembers every version, and the learned tokens that make up a version."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from model.memory.episodic.borrowed import LEARNED, REPLY
from service.engine import LearnedCompletion, Segment
from service.errors import Conflict
from service.store import CommitMetadata, RetentionConfig, RowBatch
from service.store.base import History, UndoStep
from service.store.embedded import EmbeddedValkey
from service.store.redis.store import RedisStore
from service.turns.state_delta import (
    VERSIONED_FIELDS,
    StateDelta,
    full_state_delta,
    pack_learned_tokens,
    state_delta_at,
    unpack_learned_tokens,
)
from service.versions.lineage import plan_unlearn
from tests.service.store_backends import new_meta

Model = dict[str, dict[int, bytes]]
NO_NUMBERS = {"digests": (), "action_tags": (), "loss_sum": 0.0, "frozen_loss_sum": 0.0}
WIDTHS = {"a": 8, "a_own": 12, "b": 4}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    valkey = EmbeddedValkey(tmp_path_factory.mktemp("data"))
    yield valkey.start()
    valkey.stop()


def batch(cells: dict[int, bytes], width: int) -> RowBatch:
    slots = sorted(cells)
    data = np.frombuffer(b"".join(cells[slot] for slot in slots), np.uint8).reshape(-1, width)
    return RowBatch(np.array(slots, np.int32), data)


def as_model(sites: dict[str, RowBatch]) -> Model:
    by_slot = {
        site: {int(slot): row.tobytes() for slot, row in zip(rows.slots, rows.data, strict=True)}
        for site, rows in sites.items()
    }
    return {site: cells for site, cells in by_slot.items() if cells}


async def test_every_kept_version_can_be_restored_after_random_changes(url: str) -> None:
    """Apply writes, rollbacks and replacements at random; the model keeps a copy of every version."""
    rng, keep = random.Random(0), 8
    store = RedisStore.from_url(url, RetentionConfig(versions=keep))
    contents: list[tuple[Model, dict[str, Any]]] = [
        ({}, {name: getattr(new_meta("s"), name) for name in VERSIONED_FIELDS})
    ]
    contents[0][1].update(
        dict.fromkeys(VERSIONED_FIELDS, 0) | {"digests": (), "action_tags": (), "loss_sum": 0.0, "frozen_loss_sum": 0.0}
    )

    def some_rows() -> dict[str, RowBatch]:
        sites = rng.sample(sorted(WIDTHS), rng.randint(0, 3))
        return {
            site: batch({slot: rng.randbytes(WIDTHS[site]) for slot in rng.sample(range(12), 4)}, WIDTHS[site])
            for site in sites
        }

    for version in range(1, 80):
        current = contents[-1][0]
        values: dict[str, Any] = {name: rng.randint(0, 9) for name in VERSIONED_FIELDS}
        values["action_tags"] = ((rng.randint(0, 9), rng.randbytes(6).hex()),)
        values["digests"] = (rng.randbytes(8).hex(),) * 2
        match rng.random():
            case x if x < 0.6:
                state_delta = StateDelta(values, some_rows(), {})
                written = {
                    site: {**current.get(site, {}), **as_model({site: b}).get(site, {})}
                    for site, b in state_delta.sites.items()
                }
                expected = {**current, **written}
            case x if x < 0.85:
                history = await store.history("t", "s", undo=True)
                oldest = max(0, version - 1 - keep)
                target = rng.randint(oldest, version - 1)
                if history is None:
                    state_delta, expected = StateDelta(values, {}, {}), current
                else:
                    state_delta = state_delta_at(history, target)
                    expected, values = contents[target]
                    assert state_delta.meta == values
                    with pytest.raises(Conflict):
                        state_delta_at(history, oldest - 1)
            case _:
                stored = await store.load("t", "s")
                sites = some_rows()
                state_delta = full_state_delta(values, sites, stored.sites if stored else {}, 1)
                expected = as_model(sites)
        meta = replace(new_meta("s", version), **values)
        await store.commit(
            "t",
            meta,
            state_delta.sites,
            cleared_slots=state_delta.cleared_slots,
            commit_metadata=CommitMetadata({"kind": "learn"}),
        )
        loaded = await store.load("t", "s")
        assert loaded is not None and loaded.meta == meta
        assert as_model(loaded.sites) == {site: cells for site, cells in expected.items() if cells}
        contents.append((as_model(loaded.sites), values))
    assert state_delta.with_rows({}) is state_delta
    await store.close()


def test_a_state_delta_is_applied_to_stored_rows() -> None:
    stored = {"a": batch({1: b"1" * 8, 2: b"2" * 8, 3: b"3" * 8}, 8), "b": batch({1: b"bbbb"}, 4)}
    state_delta = StateDelta(
        {},
        {"a": batch({2: b"x" * 8}, 8), "b": batch({}, 4)},
        {"a": np.array([3], np.int32), "b": np.array([1], np.int32)},
    )
    assert as_model(state_delta.apply_to_rows(stored)) == {"a": {1: b"1" * 8, 2: b"x" * 8}}
    extended = state_delta.with_rows({"a": batch({3: b"y" * 8}, 8)})
    assert as_model(extended.sites) == {"a": {2: b"x" * 8, 3: b"y" * 8}}
    assert {site: cleared_slots.tolist() for site, cleared_slots in extended.cleared_slots.items()} == {
        "a": [],
        "b": [1],
    }


def test_learned_tokens_are_unpacked_as_they_were_packed() -> None:
    parts = [
        Segment([5, 0, 7], learn=[0, LEARNED, REPLY]),
        Segment([1, 2]),
        Segment([9], learn=[False]),
        Segment([3, 4], learn=None),
    ]
    unpacked = unpack_learned_tokens(pack_learned_tokens(parts, {3: LearnedCompletion([8, 0], [REPLY, 0])}))
    assert [(list(part.token_ids), list(part.learn or ())) for part in unpacked] == [
        ([5, 0, 7], [0, LEARNED, REPLY]),
        ([3, 4, 8, 0], [0, 0, REPLY, 0]),
    ]
    assert unpack_learned_tokens(pack_learned_tokens([], {})) == []


def make_history(*entries: tuple[str, int | None], kept: int = 99, texts: bool = True) -> History:
    """Return the history of a session whose versions have these kinds and origins.

    Args:
        entries: the kind of each version, and the version that it refers to.
        kept: number of versions that can be undone.
        texts: whether the session keeps its texts.
    """
    log = [{"version": v, "kind": kind, "of": of} for v, (kind, of) in enumerate(entries, 1)]
    text = [f"{v}".encode() if texts and kind == "learn" else b"" for v, (kind, _) in enumerate(entries, 1)]
    undo = [UndoStep(v, {}, {}, {}, text[v - 1]) for v in range(len(entries), max(0, len(entries) - kept), -1)]
    return History(new_meta("s", len(entries)), log, undo)


LEARN = ("learn", None)


@pytest.mark.parametrize(
    ("history", "version", "expected"),
    [
        (make_history(LEARN, LEARN, LEARN), 3, (2, [])),
        (make_history(LEARN, LEARN, LEARN), 1, (0, [b"2", b"3"])),
        (make_history(LEARN, LEARN, LEARN, ("unlearn", 2)), 3, (1, [])),
        (make_history(LEARN, LEARN, LEARN, LEARN, ("unlearn", 3)), 2, (1, [b"4"])),
        (make_history(LEARN, LEARN, LEARN, LEARN, ("unlearn", 2)), 4, (1, [b"3"])),
        (make_history(LEARN, LEARN, LEARN, ("rollback", 1), LEARN), 5, (4, [])),
        (make_history(LEARN, LEARN, LEARN, ("rollback", 1), LEARN), 1, (0, [b"5"])),
        (make_history(LEARN, ("import", None), LEARN, LEARN), 3, (2, [b"4"])),
        (make_history(LEARN, LEARN, LEARN, LEARN, kept=2), 3, (2, [b"4"])),
    ],
)
def test_unlearning_begins_at_the_longest_beginning_that_is_kept(
    history: History, version: int, expected: tuple[int, list[bytes]]
) -> None:
    base, tokens = expected
    assert plan_unlearn(history, {version}) == (base, [(int(packed), packed) for packed in tokens])


@pytest.mark.parametrize(
    ("history", "version", "code"),
    [
        (make_history(LEARN, LEARN, LEARN, kept=1), 2, "version_not_kept"),
        (make_history(LEARN, LEARN, ("rollback", 1)), 2, "version_not_kept"),
        (make_history(LEARN, ("import", None), LEARN), 1, "version_not_kept"),
        (make_history(LEARN, ("import", None), LEARN), 2, "version_not_kept"),
        (make_history(LEARN, LEARN), 3, "version_not_kept"),
        (make_history(LEARN, LEARN), 0, "version_not_kept"),
        (make_history(LEARN, LEARN, texts=False), 1, "text_not_kept"),
    ],
)
def test_unlearning_what_cannot_be_unlearned_is_a_conflict(history: History, version: int, code: str) -> None:
    with pytest.raises(Conflict) as error:
        plan_unlearn(history, {version})
    assert error.value.code == code
