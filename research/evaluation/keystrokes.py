"""Keystrokes saved when a person types a text and accepts the shown completion where the completion is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from model.adaptive_lm import AdaptiveLM
from model.memory import Pool
from research.evaluation.prequential import score_blocks


def keystrokes(typed: Sequence[bytes], shown: Sequence[bytes]) -> tuple[int, int]:
    """Return the keys saved and the keys without completions (one for each character).

    typed: bytes of each token of a text; shown: bytes of the likeliest token at each position

    A word is a token with the following tokens that begin with a letter or a digit. Before each token of a word the
    greedy completion up to the next word is shown. The first completion that equals the rest of the word is accepted
    with one key; the tokens before it, and the last word of the text, are typed in full. A greedy completion that is
    right so far is conditioned on the true text, so no decoding is needed.
    """
    saved = sum(keys for _, keys in accepted_keys(typed, shown))
    return saved, _characters(b"".join(typed))


def accepted_keys(typed: Sequence[bytes], shown: Sequence[bytes]) -> Iterator[tuple[bytes, int]]:
    """Yield each word of a text but the last, and the keys that a completion saves there, as in `keystrokes`."""
    starts = [i for i, piece in enumerate(typed) if i == 0 or not _continues_word(piece)]
    for start, end in pairwise(starts):
        first = end
        # A completion that continues after the end of the word is not accepted.
        while not _continues_word(shown[end]) and first > start and shown[first - 1] == typed[first - 1]:
            first -= 1
        yield b"".join(typed[start:end]), max(0, _characters(b"".join(typed[first:end])) - 1)


def greedy_predictions(lm: AdaptiveLM, pool: Pool, session: int, token_ids: Sequence[int], bos: int) -> list[int]:
    """Return the likeliest token at each of the n positions of a request. The session learns nothing."""
    scored = score_blocks(lm, pool, session, [bos, *token_ids], learn=False, top=1)
    return [token for scores in scored if scores.top is not None for token in scores.top[1][:, 0].tolist()]


def saved_share(token_ids: Sequence[int], predicted: Sequence[int], token_bytes: Callable[[int], bytes]) -> float:
    """Return the share of keys saved on a text, given the likeliest token at each position.

    token_bytes: returns the bytes of a token
    """
    saved, total = keystrokes([token_bytes(token) for token in token_ids], [token_bytes(token) for token in predicted])
    return saved / max(1, total)


def _continues_word(piece: bytes) -> bool:
    """Return whether a token begins with a letter or a digit, or inside a character."""
    return piece[:1].isalnum() or piece[:1] >= b"\x80"


def _characters(text: bytes) -> int:
    return sum(byte & 0xC0 != 0x80 for byte in text)
