"""Decode steps of fixed shapes, between buffers at fixed addresses.

On a GPU each shape is captured once as a CUDA graph, and a step is then one launch. On other devices the same step
runs operator by operator, for tests. The reference is `AdaptiveLM`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from model.adaptive_lm import EMPTY_SESSION, AdaptiveLM, DecodeState
from model.base.kv_cache import KVCache
from model.decode.paged_cache import (
    PagedAttention,
    PagedAttentionBackend,
    PagedCache,
    PagePool,
    choose_paged_attention,
    paged_attention,
)
from model.device import upload
from model.memory import Pool, choose_backend
from model.memory.lexical.types import NGRAM_SIZES

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrecomputedDecodeState(DecodeState):
    """The state after a step that has also computed the scores `[V]` of the next token."""

    scores: Tensor = field(kw_only=True)


class DecodeStep:
    """A decode step of a fixed size: one token of each of up to `size` sequences, and the scores of the next tokens.

    Rows without a sequence are padding: they use sequence 0 of the pages and the empty session.
    """

    def __init__(self, lm: AdaptiveLM, pages: PagePool, pool: Pool, size: int, *, reads_memory: bool) -> None:
        """reads_memory: whether the step reads the memory of any session."""
        self._lm, self._pages, self._pool, self._size, self._reads_memory = lm, pages, pool, size, reads_memory
        # Rows: token, sequence, position, session.
        self._step_inputs = torch.zeros(4, size, dtype=torch.long, device=lm.device)
        self._last_tokens = torch.full((size, max(NGRAM_SIZES)), -1, device=lm.device)
        self._trust = torch.zeros(size, len(NGRAM_SIZES) + 1, device=lm.device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def capture(self, memory: Any) -> None:
        """Capture the step as a CUDA graph.

        memory: handle of the memory pool that all graphs share, since one graph runs at a time.
        """
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):  # kernels must be compiled and workspaces allocated before the capture
            self._compute()
        torch.cuda.current_stream().wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
            self._compute()
        self._graph = graph

    def __call__(
        self,
        tokens: Sequence[int],
        caches: Sequence[PagedCache],
        decode_states: Sequence[DecodeState],
        index: Sequence[int],
    ) -> list[DecodeState]:
        """Decode one token of each of at most `size` sequences and return their new states.

        The caches must have room for the token; the step extends them.
        """
        n, padding = len(tokens), [0] * (self._size - len(tokens))
        columns = (tokens, [cache.sequence for cache in caches], [cache.length for cache in caches], index)
        self._step_inputs.copy_(upload(torch.tensor([[*column, *padding] for column in columns]), self._lm.device))
        self._last_tokens[:n] = torch.stack([state.last_tokens for state in decode_states])
        self._trust[:n] = torch.stack([state.trust for state in decode_states])
        if self._graph is None:
            self._compute()
        else:
            self._graph.replay()
        for cache in caches:
            cache.length += 1
        return self._new_states(decode_states)

    def _new_states(self, decode_states: Sequence[DecodeState]) -> list[DecodeState]:
        """Copy the results out of the buffers, into which the next step writes."""
        n = len(decode_states)
        hidden, last_tokens, scores = (
            x[:n].clone().unbind() for x in (self._states, self._new_last_tokens, self._scores)
        )
        inputs = {layer: x[:n].clone().unbind() for layer, x in self._inputs.items()}
        return [
            PrecomputedDecodeState(
                hidden[b],
                last_tokens[b],
                state.trust,
                {layer: x[b] for layer, x in inputs.items()},
                scores=scores[b],
            )
            for b, state in enumerate(decode_states)
        ]

    def _compute(self) -> None:
        lm, (tokens, sequences, positions, sessions) = self._lm, self._step_inputs
        self._inputs: dict[int, Tensor] = {}
        attend = PagedAttention(self._pages, sequences, positions)
        hooks = lm.hooks(self._pool, sessions, self._inputs)
        self._states = lm.decoder.forward_at(tokens[:, None], positions[:, None], attend, hooks)[:, 0]
        self._new_last_tokens = torch.cat([self._last_tokens[:, 1:], tokens[:, None]], dim=1)
        if self._reads_memory:
            self._scores = lm.mixture(self._states, self._new_last_tokens, self._trust, self._pool, sessions)
        else:
            self._scores = lm.decoder.logits(self._states)


class CudaGraphLM(AdaptiveLM):
    """The adaptive model on a GPU: its caches are paged, and a decode step also computes the result of `predict`."""

    def __init__(
        self, lm: AdaptiveLM, *, kv_tokens: int, max_batch: int, attend: PagedAttentionBackend | None = None
    ) -> None:
        """kv_tokens: tokens that all caches together may hold. max_batch: sequences of one step, at most. attend: by
        default the fastest on the device."""
        super().__init__(lm.backbone, lm.memory, decoder=lm.decoder, episodes=lm.episodes)
        # With memory below the output, each sequence has a second cache, without memory, of the same size.
        num_caches = 2 if self.needs_frozen_cache else 1
        self.pages = PagePool(
            lm.backbone.config,
            tokens=num_caches * kv_tokens,
            # A request that recalls has two caches: one to learn from and one with episodes. Its job counts both.
            sequences=(num_caches + (self.episodes is not None)) * max_batch,
            device=lm.device,
            dtype=lm.backbone.embedding.dtype,
            attend=attend,
        )
        self.sizes = [2**i for i in range((max_batch - 1).bit_length() + 1)]
        self._steps: dict[tuple[int, bool], DecodeStep] = {}
        self._pool: Pool | None = None
        self._graph_pool: Any = None

    def new_cache(self, capacity: int) -> KVCache:
        return PagedCache(self.pages, capacity)

    def prepare(self, pool: Pool) -> None:
        """Capture the graph of every step, the largest first, so that the smaller graphs fit into its memory."""
        super().prepare(pool)
        for size in reversed(self.sizes):
            for reads_memory in (True, False):
                self._step(pool, size, reads_memory)

    def decode(
        self,
        token_ids: Sequence[int],
        caches: Sequence[KVCache],
        decode_states: Sequence[DecodeState],
        pool: Pool,
        index: Sequence[int],
    ) -> list[DecodeState]:
        paged = [cache for cache in caches if isinstance(cache, PagedCache)]
        if len(paged) < len(caches) or len(caches) > self.sizes[-1]:
            return super().decode(token_ids, caches, decode_states, pool, index)
        for cache in paged:
            cache.check_capacity(1)
        size = next(size for size in self.sizes if size >= len(caches))
        return self._step(pool, size, any(i != EMPTY_SESSION for i in index))(token_ids, paged, decode_states, index)

    def predict(self, decode_states: Sequence[DecodeState], pool: Pool, index: Sequence[int]) -> Tensor:
        scores = {b: c.scores for b, c in enumerate(decode_states) if isinstance(c, PrecomputedDecodeState)}
        others = [b for b in range(len(decode_states)) if b not in scores]
        if others:
            computed = super().predict([decode_states[b] for b in others], pool, [index[b] for b in others])
            scores |= dict(zip(others, computed, strict=True))
        return torch.stack([scores[b] for b in range(len(decode_states))])

    def _step(self, pool: Pool, size: int, reads_memory: bool) -> DecodeStep:
        if pool is not self._pool:
            self._pool, self._steps = pool, {}
        if (size, reads_memory) not in self._steps:
            step = DecodeStep(self, self.pages, pool, size, reads_memory=reads_memory)
            if self.device.type == "cuda":
                self._graph_pool = self._graph_pool or torch.cuda.graph_pool_handle()
                try:
                    step.capture(self._graph_pool)
                except RuntimeError as error:
                    log.warning("a step of %d sequences is not captured, and slower for it: %s", size, error)
            self._steps[size, reads_memory] = step
        return self._steps[size, reads_memory]


def wrap_for_serving(lm: AdaptiveLM, *, kv_tokens: int, max_batch: int) -> AdaptiveLM:
    """Return the model that serves fastest: captured steps on a GPU where all Triton kernels run, else `lm` itself.

    Without the kernels, a fixed shape only adds work.
    """
    attend = choose_paged_attention(lm.device)
    if attend is paged_attention or choose_backend(lm.device).name != "triton":
        return lm
    return CudaGraphLM(lm, kv_tokens=kv_tokens, max_batch=max_batch, attend=attend)
