"""Test, then train: a stream is read request by request, each scored before it is learned.

A stream is a user: a book, an author's messages, a repository. It is cut into requests whose attention ends at their
edges, so that the memory is the only link between them. The first half of a stream also serves as a past: what its
second half is worth to it with its own past, with another stream's, and with none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from model.lm import AdaptiveLM
from model.memory import Pool


@dataclass(frozen=True)
class Stream:
    """A named text as requests of token ids. kind: what streams of one sort have in common (author, genre,
    language)."""

    name: str
    kind: str
    requests: list[list[int]]

    @property
    def half(self) -> int:
        """The number of requests that are the past."""
        return len(self.requests) // 2


@dataclass(frozen=True)
class Losses:
    """Mean nats per token, by request."""

    by_request: list[float]
    tokens: list[int]

    def mean(self, start: int = 0) -> float:
        """Over the requests from `start` on, every token counting alike."""
        weighted = (loss * n for loss, n in zip(self.by_request[start:], self.tokens[start:], strict=True))
        return sum(weighted) / sum(self.tokens[start:])


@dataclass(frozen=True)
class StreamReport:
    """One stream's arms. frozen, online: all requests; the others: the second half, nothing learned in it.

    own: with the memory of the first half; same_kind, other_kind: with another stream's (None: there is none).
    """

    name: str
    kind: str
    frozen: Losses
    online: Losses
    own: Losses
    same_kind: Losses | None
    other_kind: Losses | None


def cut(token_ids: Sequence[int], window: int, limit: int) -> list[list[int]]:
    """At most `limit` requests of `window` tokens, BOS not counted among them; a last partial one is dropped."""
    parts = [list(token_ids[i : i + window]) for i in range(0, len(token_ids), window)]
    return [part for part in parts if len(part) == window][:limit]


@torch.inference_mode()
def read(
    lm: AdaptiveLM, pool: Pool, session: int, token_ids: Sequence[int], bos: int, *, learn: bool
) -> tuple[float, float]:
    """Scores one request in a session, learning each block after it is scored; returns the summed losses with memory
    and without."""
    ids = [bos, *token_ids]
    cache = lm.backbone.new_cache(len(ids))
    frozen_cache = lm.backbone.new_cache(len(ids)) if lm.needs_frozen_cache else None
    draft = pool.draft(session) if learn else None
    carry, adapted, frozen = None, 0.0, 0.0
    block = lm.memory.config.block
    for start in range(0, len(ids), block):
        part = ids[start : start + block]
        mask = [True] * len(part)
        carry, scores = lm.block(
            part,
            cache,
            pool,
            session if draft is None else draft.index,
            carry=carry,
            score=mask,
            learn=mask if learn else None,
            draft=draft,
            frozen=True,
            frozen_cache=frozen_cache,
        )
        if scores is not None and scores.frozen is not None:
            adapted -= float(scores.adapted.double().sum())
            frozen -= float(scores.frozen.double().sum())
    if draft is not None:
        draft.commit()
    return adapted, frozen


def evaluate(
    lm: AdaptiveLM, streams: Sequence[Stream], bos: int, *, progress: Callable[[str, int], None] = lambda *_: None
) -> list[StreamReport]:
    """Runs every arm of every stream. progress is told the stream's name and the number of requests just read."""
    slots = max((site.slots for site in lm.memory.config.sites), default=1)
    pool = lm.new_pool(rows=(len(streams) + 3) * slots, sessions=len(streams) + 3)
    pasts = {}
    online: dict[str, tuple[Losses, Losses]] = {}
    for stream in streams:
        session, past, losses = pool.open(), None, []
        for number, request in enumerate(stream.requests):
            if number == stream.half:
                past = pool.open(pool.dump(session))
            losses.append(read(lm, pool, session, request, bos, learn=True))
            progress(stream.name, 1)
        pool.close(session)
        pasts[stream.name] = past
        online[stream.name] = (_losses(stream.requests, losses, 0), _losses(stream.requests, losses, 1))

    def with_past(stream: Stream, past: Stream | None) -> Losses | None:
        if past is None:
            return None
        session = pasts[past.name]
        assert session is not None
        requests = stream.requests[stream.half :]
        losses = []
        for request in requests:
            losses.append(read(lm, pool, session, request, bos, learn=False))
            progress(stream.name, 1)
        return _losses(requests, losses, 0)

    reports = []
    for number, stream in enumerate(streams):
        others = [*streams[number + 1 :], *streams[:number]]
        adapted, frozen = online[stream.name]
        own = with_past(stream, stream)
        assert own is not None
        same = with_past(stream, next((s for s in others if s.kind == stream.kind), None))
        other = with_past(stream, next((s for s in others if s.kind != stream.kind), None))
        reports.append(StreamReport(stream.name, stream.kind, frozen, adapted, own, same, other))
    return reports


def arms(streams: Sequence[Stream]) -> int:
    """How many requests `evaluate` reads in all, for a progress bar."""
    kinds = [stream.kind for stream in streams]
    total = 0
    for stream in streams:
        half = len(stream.requests) - stream.half
        others = (kinds.count(stream.kind) > 1) + (len(set(kinds)) > 1)
        total += len(stream.requests) + half * (1 + others)
    return total


def ratio(adapted: Losses, frozen: Losses, start: int = 0) -> float:
    """Perplexity over perplexity, on the requests of `adapted` and the frozen ones from `start` on."""
    return math.exp(adapted.mean() - frozen.mean(start))


def _losses(requests: Sequence[Sequence[int]], sums: Sequence[tuple[float, float]], arm: int) -> Losses:
    tokens = [len(request) for request in requests]
    return Losses([pair[arm] / n for pair, n in zip(sums, tokens, strict=True)], tokens)
