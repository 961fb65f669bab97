"""The tokens of a learning turn, packed so that unlearning can learn them again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from service.engine import Segment


def pack_learned_tokens(parts: Sequence[Segment], learned_completions: Mapping[int, Sequence[int]]) -> bytes:
    """Pack the segments of a turn that learned something, as little-endian int32.

    The numbers are: the number of packed segments, the length of each, then all tokens; a token that was not learned
    is stored as its complement. learned_completions: the generated tokens that were learned, by segment.
    """
    kept = []
    for number, part in enumerate(parts):
        reply, learn = learned_completions.get(number, ()), part.learn or [False] * len(part.token_ids)
        if any(learn) or reply:
            tokens = [token if new else ~token for token, new in zip(part.token_ids, learn, strict=True)]
            kept.append([*tokens, *reply])
    head = [len(kept), *map(len, kept)]
    return np.concatenate([np.array(part, "<i4") for part in (head, *kept)]).tobytes()


def unpack_learned_tokens(packed: bytes) -> list[Segment]:
    """Return the segments that `pack_learned_tokens` packed, ready to be learned again."""
    numbers = np.frombuffer(packed, "<i4")
    ends = 1 + numbers[0] + np.cumsum(numbers[1 : 1 + numbers[0]])
    segments = []
    for end, length in zip(ends.tolist(), numbers[1 : 1 + numbers[0]].tolist(), strict=True):
        tokens = numbers[end - length : end]
        segments.append(Segment(np.where(tokens < 0, ~tokens, tokens).tolist(), learn=(tokens >= 0).tolist()))
    return segments


def digest(packed: bytes) -> str:
    """Return the digest of packed tokens: 32 hexadecimal digits of their SHA-256."""
    return hashlib.sha256(packed).hexdigest()[:32]
