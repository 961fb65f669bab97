"""Prequential evaluation: a stream is read request by request, and each token is scored before a memory learns it.

A stream stands for a user: a book, the messages of an author, a repository. Attention ends at the edges of requests,
so only the state of an arm links them. The outputs of the frozen base on a stream are computed once, as a `Trace`.
Arms that need only final hidden states work on the trace.
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
from model.memory.lexical import ops
from model.memory.prediction import base_prediction

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Stream:
    """A named text as requests of token ids.

    kind: common property of similar streams (author, genre, language)
    """

    name: str
    kind: str
    requests: list[list[int]]

    @property
    def half(self) -> int:
        """Return the number of requests in the first half."""
        return len(self.requests) // 2

    @property
    def past(self) -> int:
        """Return the number of tokens in the first half."""
        return sum(map(len, self.requests[: self.half]))


@dataclass(frozen=True)
class Passage:
    """The outputs of the frozen base on one request of n targets, in fp32.

    states [n, d]: final hidden state before each target
    targets [n]: token ids
    log_probs [n]: log p of each target, in nats
    entropy [n]: entropy of each prediction, in nats
    """

    states: Tensor
    targets: Tensor
    log_probs: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class Trace:
    """The outputs of the frozen base on a stream of n targets.

    states [n, d] fp32: final hidden state before each target
    targets [n] int64: token ids
    log_probs [n] fp32: log p of each target, in nats
    entropy [n] fp32: entropy of each prediction, in nats
    widths [n] int32: bytes of each target
    lengths: number of targets of each request
    """

    states: Tensor
    targets: Tensor
    log_probs: Tensor
    entropy: Tensor
    widths: Tensor
    lengths: list[int]

    def parts(self) -> Iterator[slice]:
        """Yield the slice of each request."""
        start = 0
        for length in self.lengths:
            yield slice(start, start + length)
            start += length

    def passages(self) -> Iterator[Passage]:
        """Yield the requests in order."""
        for part in self.parts():
            yield Passage(self.states[part], self.targets[part], self.log_probs[part], self.entropy[part])


def cut(token_ids: Sequence[int], window: int, limit: int) -> list[list[int]]:
    """Return at most `limit` requests of `window` tokens without BOS. A partial request at the end is dropped."""
    parts = [list(token_ids[i : i + window]) for i in range(0, min(len(token_ids), limit * window), window)]
    return [part for part in parts if len(part) == window]


@torch.inference_mode()
def read_passage(backbone: Backbone, token_ids: Sequence[int], bos: int) -> Passage:
    """Run the base over one request. Every token is a target; the first one is predicted from BOS."""
    targets = torch.tensor(token_ids)
    states = backbone(torch.tensor([[bos, *token_ids[:-1]]]))[0]
    base = base_prediction(backbone.logits(states))
    return Passage(states.float(), targets, base.log_prob(targets), base.entropy)


def read_trace(
    backbone: Backbone, stream: Stream, bos: int, width: Callable[[int], int], progress: Progress = lambda _: None
) -> Trace:
    """Run the base over a stream, and report each request to `progress`.

    width: returns the number of bytes of a token
    """
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
    """Return a pool with room for `sessions` full sessions and one draft."""
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
    """Score one request block by block in a session, learn each block after its scores, and commit at the end.

    token_ids: the request after BOS, which is no target
    frozen, top: as in `AdaptiveLM.block`
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
            score_frozen=frozen,
            frozen_cache=frozen_cache,
            top=top,
        )
        if scores is not None:
            yield scores
    if draft is not None:
        draft.commit()


def read(lm: AdaptiveLM, pool: Pool, session: int, token_ids: Sequence[int], bos: int, *, learn: bool) -> Tensor:
    """Return log p [n] of one request of n tokens in a session, which learns each block after its scores."""
    scored = score_blocks(lm, pool, session, [bos, *token_ids], learn=learn)
    return torch.cat([scores.adapted for scores in scored])


def needs_final_states_only(memory: Memory) -> bool:
    """Return whether the memory needs only final hidden states of the base. `replay` then equals `read`."""
    return not any(isinstance(site, DeltaSite) for site in memory.sites.values())


@torch.inference_mode()
def replay(lm: AdaptiveLM, pool: Pool, session: int, passage: Passage, bos: int, *, learn: bool) -> Tensor:
    """Return log p [n] of one request as `read` does, from the precomputed outputs of the base.

    BOS is the first token of the first block, so the first block has one target less.
    """
    site, block, n = lm.memory.lexical, lm.memory.config.block, len(passage.targets)
    if site is None:
        return passage.log_probs
    draft = pool.draft(session) if learn else None
    index, found = session if draft is None else draft.index, []
    ngram_hashes, trust = ops.hash_request_ngrams(passage.targets, bos), site.initial_trust()
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
        memory_probs = ops.memory_prob(targets, readout.tokens, readout.shares)
        found.append(ops.target_log_prob(frozen, memory_probs, readout.gamma))
        if draft is not None:
            site.learn(draft, readout, targets, frozen)
    if draft is not None:
        draft.commit()
    return torch.cat(found)


def score_request(lm: AdaptiveLM, pool: Pool, session: int, passage: Passage, bos: int, *, learn: bool) -> Tensor:
    """Return log p [n] of one request in a session, by `replay` where it equals `read`, else by `read`."""
    if needs_final_states_only(lm.memory):
        return replay(lm, pool, session, passage, bos, learn=learn)
    return read(lm, pool, session, passage.targets.tolist(), bos, learn=learn)


class Clock:
    """A stopwatch that starts when it is created."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self._start
