"""Test, then train: how a stream is read, request by request, each token scored before anything learns from it.

A stream is a user: a book, an author's messages, a repository. It is cut into requests whose attention ends at their
edges, so that only what an arm carries over links them. What the frozen base makes of a stream is computed once, as its
`Trace`; whatever only needs final hidden states works on that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.adaptive_lm import AdaptiveLM, Scores
from model.base.backbone import Backbone
from model.memory import DeltaSite, Memory, Pool
from model.memory.lexical import torch_backend
from model.memory.prediction import base_prediction

Progress = Callable[[int], None]


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

    @property
    def past(self) -> int:
        """The number of tokens in the first half."""
        return sum(map(len, self.requests[: self.half]))


@dataclass(frozen=True)
class Passage:
    """What the frozen base makes of one request of n targets: the final states before them [n, d], the targets [n],
    their log p [n] (nats) and the entropy [n] of each whole prediction, all fp32."""

    states: Tensor
    targets: Tensor
    log_probs: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class Trace:
    """What the frozen base makes of a stream of n targets.

    states [n, d] fp32: the final hidden state before each target; targets [n] long; log_probs [n] fp32 (nats);
    entropy [n] fp32 of the whole prediction; widths [n] int32: bytes of each target's text; lengths: targets of each
    request.
    """

    states: Tensor
    targets: Tensor
    log_probs: Tensor
    entropy: Tensor
    widths: Tensor
    lengths: list[int]

    def parts(self) -> Iterator[slice]:
        """Where each request lies."""
        start = 0
        for length in self.lengths:
            yield slice(start, start + length)
            start += length

    def passages(self) -> Iterator[Passage]:
        """The requests in order."""
        for part in self.parts():
            yield Passage(self.states[part], self.targets[part], self.log_probs[part], self.entropy[part])


def cut(token_ids: Sequence[int], window: int, limit: int) -> list[list[int]]:
    """At most `limit` requests of `window` tokens, BOS not counted among them; a last partial one is dropped."""
    parts = [list(token_ids[i : i + window]) for i in range(0, min(len(token_ids), limit * window), window)]
    return [part for part in parts if len(part) == window]


@torch.inference_mode()
def read_passage(backbone: Backbone, token_ids: Sequence[int], bos: int) -> Passage:
    """Runs the base over one request; every token is a target, the first one predicted from BOS."""
    targets = torch.tensor(token_ids)
    states = backbone(torch.tensor([[bos, *token_ids[:-1]]]))[0]
    base = base_prediction(backbone.logits(states))
    return Passage(states.float(), targets, base.log_prob(targets), base.entropy)


def read_trace(
    backbone: Backbone, stream: Stream, bos: int, width: Callable[[int], int], progress: Progress = lambda _: None
) -> Trace:
    """Runs the base over a stream. width: the bytes of a token; progress is told of each request."""
    passages = []
    for request in stream.requests:
        passages.append(read_passage(backbone, request, bos))
        progress(1)
    widths = torch.tensor([width(token) for request in stream.requests for token in request], dtype=torch.int32)
    return Trace(
        torch.cat([passage.states for passage in passages]),
        torch.cat([passage.targets for passage in passages]),
        torch.cat([passage.log_probs for passage in passages]),
        torch.cat([passage.entropy for passage in passages]),
        widths,
        [len(request) for request in stream.requests],
    )


def new_pool(lm: AdaptiveLM, sessions: int = 1) -> Pool:
    """Room for so many full sessions and the draft of one."""
    slots = max((site.slots for site in lm.memory.config.sites), default=1)
    return lm.new_pool(rows=(sessions + 1) * slots, sessions=sessions + 1)


@torch.inference_mode()
def score_blocks(
    lm: AdaptiveLM,
    pool: Pool,
    session: int,
    token_ids: Sequence[int],
    *,
    learn: bool,
    frozen: bool = False,
    top: int = 0,
) -> Iterator[Scores]:
    """Scores one request block by block in a session, learning each block after it is scored; the last one commits.

    token_ids begin with BOS, which is no target. frozen and top: as in `AdaptiveLM.block`.
    """
    cache = lm.backbone.new_cache(len(token_ids))
    frozen_cache = lm.backbone.new_cache(len(token_ids)) if frozen and lm.needs_frozen_cache else None
    draft = pool.draft(session) if learn else None
    index, decode_state, block = session if draft is None else draft.index, None, lm.memory.config.block
    for start in range(0, len(token_ids), block):
        part = token_ids[start : start + block]
        mask = [True] * len(part)
        decode_state, scores = lm.block(
            part,
            cache,
            pool,
            index,
            decode_state=decode_state,
            score=mask,
            learn=mask if learn else None,
            draft=draft,
            frozen=frozen,
            frozen_cache=frozen_cache,
            top=top,
        )
        if scores is not None:
            yield scores
    if draft is not None:
        draft.commit()


def read(lm: AdaptiveLM, pool: Pool, session: int, token_ids: Sequence[int], bos: int, *, learn: bool) -> Tensor:
    """Scores one request of n tokens in a session, learning each block after it is scored; returns log p [n]."""
    scored = score_blocks(lm, pool, session, [bos, *token_ids], learn=learn)
    return torch.cat([scores.adapted for scores in scored])


def needs_final_states_only(memory: Memory) -> bool:
    """Whether final hidden states are all that the memory needs of the base: `replay` then equals `read`."""
    return not any(isinstance(site, DeltaSite) for site in memory.sites.values())


@torch.inference_mode()
def replay(lm: AdaptiveLM, pool: Pool, session: int, passage: Passage, bos: int, *, learn: bool) -> Tensor:
    """What `read` does, from what the base made of the request before; returns log p [n].

    BOS is the first token of the first block, so that block has one target less.
    """
    site, block, n = lm.memory.lexical, lm.memory.config.block, len(passage.targets)
    if site is None:
        return passage.log_probs
    draft = pool.draft(session) if learn else None
    index, found = session if draft is None else draft.index, []
    ngram_hashes, trust = torch_backend.hash_request_ngrams(passage.targets, bos), site.initial_trust()
    for start in range(0, n + 1, block):
        part = slice(max(0, start - 1), min(n, start + block - 1))
        if part.start == part.stop:
            continue
        states, targets = passage.states[part], passage.targets[part]
        base = base_prediction(lm.backbone.logits(states))
        session_of, trust_of = torch.full((len(targets),), index), trust.expand(len(targets), -1)
        readout = site.read(pool, session_of, states, ngram_hashes[part], base, trust_of)
        frozen = base.log_prob(targets)
        trust = site.updated_trust(trust, readout, targets, frozen)
        memory_probs = torch_backend.memory_prob(targets, readout.tokens, readout.shares)
        found.append(torch_backend.target_log_prob(frozen, memory_probs, readout.gamma))
        if draft is not None:
            site.learn(draft, readout, targets, frozen)
    if draft is not None:
        draft.commit()
    return torch.cat(found)


def score_request(lm: AdaptiveLM, pool: Pool, session: int, passage: Passage, bos: int, *, learn: bool) -> Tensor:
    """`replay` where that is the same, else `read`: log p [n] of one request in a session."""
    if needs_final_states_only(lm.memory):
        return replay(lm, pool, session, passage, bos, learn=learn)
    return read(lm, pool, session, passage.targets.tolist(), bos, learn=learn)


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start
