"""Decoding in steps of fixed shapes, from buffers that stay where they are to buffers that stay where they are.

On a GPU each shape is captured once as a CUDA graph, and a step is then one launch; elsewhere the same step can be run
as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from model.adaptive_lm import EMPTY, AdaptiveLM, Carry
from model.base.backbone import KVCache
from model.decode.paged_cache import PagedAttention, PagedCache, Pages
from model.device import kernels_for, upload
from model.memory import Pool
from model.memory.config import RUNS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Foreseen(Carry):
    """The carry of a step that has computed what comes next as well: its scores [V]."""

    scores: Tensor = field(kw_only=True)


class Step:
    """One token of each of `size` sequences: their new states, and what comes next. Rows that are not used belong to
    nobody's sequence and to the empty session. reads: whether any session's memory is read."""

    def __init__(self, lm: AdaptiveLM, pages: Pages, pool: Pool, size: int, *, reads: bool) -> None:
        self._lm, self._pages, self._pool, self._size, self._reads = lm, pages, pool, size, reads
        self._told = torch.zeros(4, size, dtype=torch.long, device=lm.device)  # token, sequence, position, session
        self._trails = torch.full((size, max(RUNS)), -1, device=lm.device)
        self._trust = torch.zeros(size, len(RUNS) + 1, device=lm.device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def capture(self, memory: Any) -> None:
        """Makes a CUDA graph of it. memory: a pool that graphs share, for one runs at a time."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # kernels are compiled and workspaces made before a capture, not in it
            self._compute()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
            self._compute()
        self._graph = graph

    def __call__(
        self, tokens: Sequence[int], caches: Sequence[PagedCache], carries: Sequence[Carry], index: Sequence[int]
    ) -> list[Carry]:
        """Decodes one token of each of at most `size` sequences. The caches must have room for it."""
        n, rest = len(tokens), [0] * (self._size - len(tokens))
        columns = (tokens, [c.sequence for c in caches], [c.length for c in caches], index)
        self._told.copy_(upload(torch.tensor([[*column, *rest] for column in columns]), self._lm.device))
        self._trails[:n] = torch.stack([carry.trail for carry in carries])
        self._trust[:n] = torch.stack([carry.trust for carry in carries])
        if self._graph is None:
            self._compute()
        else:
            self._graph.replay()
        # Copies: the next step writes into the same memory.
        states, trails, scores = (x[:n].clone().unbind() for x in (self._states, self._new_trails, self._scores))
        inputs = {layer: x[:n].clone().unbind() for layer, x in self._inputs.items()}
        for cache in caches:
            cache.length += 1
        return [
            Foreseen(states[b], trails[b], carry.trust, {layer: x[b] for layer, x in inputs.items()}, scores=scores[b])
            for b, carry in enumerate(carries)
        ]

    def _compute(self) -> None:
        lm, (tokens, sequences, positions, sessions) = self._lm, self._told
        self._inputs: dict[int, Tensor] = {}
        attend = PagedAttention(self._pages, sequences, positions)
        hooks = lm.hooks(self._pool, sessions, self._inputs)
        self._states = lm.decoder.run(tokens[:, None], positions[:, None], attend, hooks)[:, 0]
        self._new_trails = torch.cat([self._trails[:, 1:], tokens[:, None]], dim=1)
        if self._reads:
            self._scores = lm.mixture(self._states, self._new_trails, self._trust, self._pool, sessions)
        else:
            self._scores = lm.decoder.logits(self._states)


class SteppedLM(AdaptiveLM):
    """The same model for a GPU: caches are paged, and each decoding step also foresees what `predict` will be asked."""

    def __init__(self, lm: AdaptiveLM, *, kv_tokens: int, max_batch: int) -> None:
        """kv_tokens: that all caches together may hold. max_batch: sequences of one step, at most."""
        super().__init__(lm.backbone, lm.memory, decoder=lm.decoder)
        # What a memory below the output needs beside its caches is of the same size.
        both = 2 if self.needs_frozen_cache else 1
        self.pages = Pages(
            lm.backbone.config,
            tokens=both * kv_tokens,
            sequences=both * max_batch,
            device=lm.device,
            dtype=lm.backbone.embedding.dtype,
        )
        self.sizes = [2**i for i in range((max_batch - 1).bit_length() + 1)]
        self._steps: dict[tuple[int, bool], Step] = {}
        self._pool: Pool | None = None
        self._memory: Any = None

    def new_cache(self, capacity: int) -> KVCache:
        return PagedCache(self.pages, capacity)

    def prepare(self, pool: Pool) -> None:
        """Captures every step's graph, the largest first: smaller ones then fit into its memory."""
        super().prepare(pool)
        for size in reversed(self.sizes):
            for reads in (True, False):
                self._step(pool, size, reads)

    def decode(
        self,
        token_ids: Sequence[int],
        caches: Sequence[KVCache],
        carries: Sequence[Carry],
        pool: Pool,
        index: Sequence[int],
    ) -> list[Carry]:
        paged = [cache for cache in caches if isinstance(cache, PagedCache)]
        if len(paged) < len(caches) or len(caches) > self.sizes[-1]:
            return super().decode(token_ids, caches, carries, pool, index)
        for cache in paged:
            cache.check_room(1)
        size = next(size for size in self.sizes if size >= len(caches))
        return self._step(pool, size, any(i != EMPTY for i in index))(token_ids, paged, carries, index)

    def predict(self, carries: Sequence[Carry], pool: Pool, index: Sequence[int]) -> Tensor:
        others = [b for b, carry in enumerate(carries) if not isinstance(carry, Foreseen)]
        new: dict[int, Tensor] = {}
        if others:
            scores = super().predict([carries[b] for b in others], pool, [index[b] for b in others])
            new = dict(zip(others, scores, strict=True))
        return torch.stack([c.scores if isinstance(c, Foreseen) else new[b] for b, c in enumerate(carries)])

    def _step(self, pool: Pool, size: int, reads: bool) -> Step:
        if pool is not self._pool:
            self._pool, self._steps = pool, {}
        if (size, reads) not in self._steps:
            step = Step(self, self.pages, pool, size, reads=reads)
            if self.device.type == "cuda":
                self._memory = self._memory or torch.cuda.graph_pool_handle()
                try:
                    step.capture(self._memory)
                except RuntimeError as error:
                    log.warning("a step of %d sequences is not captured, and slower for it: %s", size, error)
            self._steps[size, reads] = step
        return self._steps[size, reads]


def for_serving(lm: AdaptiveLM, *, kv_tokens: int, max_batch: int) -> AdaptiveLM:
    """The model as it serves best: in captured steps on a GPU where our kernels run, as it is elsewhere, where a fixed
    shape would only be more work."""
    if kernels_for(lm.device) is None:
        return lm
    return SteppedLM(lm, kv_tokens=kv_tokens, max_batch=max_batch)
