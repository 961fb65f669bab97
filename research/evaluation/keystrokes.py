"""Keystrokes saved: a person types a text and takes the shown completion where it is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from model.adaptive_lm import AdaptiveLM
from model.memory import Pool
from research.evaluation.prequential import score_blocks


def keystrokes(typed: Sequence[bytes], shown: Sequence[bytes]) -> tuple[int, int]:
    """Keys saved, and keys without help (one a character), for the tokens of a text and the likeliest token at each.

    The rule: a word is a token and those after it that go on with a letter or a digit. Before each token of a word the
    greedy completion up to the next word is shown. The first time that it is the rest of the word exactly, it is taken
    with one key. Until then each token is typed as it is; the text's last word is typed in full. As long as a greedy
    completion is right it is what is likeliest after the true text, so no decoding is needed.
    """
    starts = [at for at, piece in enumerate(typed) if at == 0 or not _goes_on(piece)]
    saved, total = 0, _characters(b"".join(typed))
    for start, end in pairwise(starts):
        if _goes_on(shown[end]):
            continue  # the completion runs on where the word ends
        first = end
        while first > start and shown[first - 1] == typed[first - 1]:
            first -= 1
        saved += max(0, _characters(b"".join(typed[first:end])) - 1)
    return saved, total


def greedy_predictions(lm: AdaptiveLM, pool: Pool, session: int, token_ids: Sequence[int], bos: int) -> list[int]:
    """The likeliest token at each of the n tokens of a request, in a session that learns nothing."""
    scored = score_blocks(lm, pool, session, [bos, *token_ids], learn=False, top=1)
    return [token for scores in scored if scores.top is not None for token in scores.top[1][:, 0].tolist()]


def saved_share(token_ids: Sequence[int], predicted: Sequence[int], text: Callable[[int], bytes]) -> float:
    """The share of keys saved on a text, given the likeliest token at each of its tokens. text: a token's bytes."""
    saved, total = keystrokes([text(token) for token in token_ids], [text(token) for token in predicted])
    return saved / max(1, total)


def _goes_on(piece: bytes) -> bool:
    """Whether a token continues the word before it: it begins with a letter or a digit (or inside a character)."""
    return piece[:1].isalnum() or piece[:1] >= b"\x80"


def _characters(text: bytes) -> int:
    return sum(byte & 0xC0 != 0x80 for byte in text)
