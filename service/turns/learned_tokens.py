"""The tokens of a learning turn, packed so that unlearning can learn them again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from service.engine import Segment


def pack_learned_tokens(parts: Sequence[Segment], learned_completions: Mapping[int, Sequence[int]]) -> bytes:
    """The tokens of a turn that taught something: int32, how many parts, their lengths, then their tokens, each as
    itself if it was learned, else as its complement. said: what was generated and learned, by part."""
    kept = []
    for number, part in enumerate(parts):
        reply, learn = learned_completions.get(number, ()), part.learn or [False] * len(part.token_ids)
        if any(learn) or reply:
            tokens = [token if new else ~token for token, new in zip(part.token_ids, learn, strict=True)]
            kept.append([*tokens, *reply])
    numbers = [len(kept), *map(len, kept), *(token for part in kept for token in part)]
    return np.array(numbers, "<i4").tobytes()


def unpack_learned_tokens(packed: bytes) -> list[Segment]:
    numbers = np.frombuffer(packed, "<i4")
    ends = 1 + numbers[0] + np.cumsum(numbers[1 : 1 + numbers[0]])
    segments = []
    for end, length in zip(ends.tolist(), numbers[1 : 1 + numbers[0]].tolist(), strict=True):
        tokens = numbers[end - length : end]
        segments.append(Segment(np.where(tokens < 0, ~tokens, tokens).tolist(), learn=(tokens >= 0).tolist()))
    return segments


def digest(packed: bytes) -> str:
    return hashlib.sha256(packed).hexdigest()[:32]
