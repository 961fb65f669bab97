"""Key-value caches in pages of one pool, so that a decode step of a fixed shape can serve any sequences.

Paged attention: Kwon et al. 2023 (arXiv 2309.06180). `paged_attention` is the reference in torch's operators,
`model.decode.triton_attention` has the kernels, and `choose_paged_attention` chooses.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.base.attention import AttentionFn, causal_mask, first_key
from model.base.config import ModelConfig
from model.base.kv_cache import Device, KVCache
from model.device import upload
from model.memory.pool import CellIndices, FreeList
from model.triton_check import has_triton, passes_check

PAGE_SIZE = 32  # tokens


class PagedAttentionBackend(Protocol):
    """Attention of one decode step over pages."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: Tensor,
        values: Tensor,
        tables: Tensor,
        sequences: Tensor,
        positions: Tensor,
        page: int,
        window: int | None = None,
    ) -> Tensor:
        """Store k and v at their positions, then return the attended values `[B, H, hd]`.

        Row b attends to positions 0 to `positions[b]` of sequence `sequences[b]`, or to the last `window` of them,
        including the tokens of other rows in this step. No shape depends on the positions and nothing waits for the
        device, so that a CUDA graph can capture the call.

        q: queries `[B, H, hd]`. k, v: keys and values `[B, H_kv, hd]` of the same tokens.
        keys, values: slots of one layer `[slots, H_kv, hd]`; the call writes one slot for each row.
        tables: int32 `[S, pages]`, the pages of each sequence in order; slots `p * page` to `(p + 1) * page - 1`
            belong to page p.
        sequences, positions: long `[B]`.
        page: number of slots of a page.
        """
        ...


class PagePool:
    """A pool of pages that sequences reserve, and the keys and values in the pages.

    keys, values: `[L, slots, H_kv, hd]`; a page is `PAGE_SIZE` neighbouring slots.
    tables: int32 `[sequences + 1, pages]`, the pages of each sequence in order.
    Page 0 and sequence 0 belong to no request: the rows that pad a batch write to them.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        tokens: int,
        sequences: int,
        device: Device,
        dtype: torch.dtype,
        attend: PagedAttentionBackend | None = None,
    ) -> None:
        """tokens: number that all sequences together may reserve, each rounded up to whole pages. attend: by default
        the fastest on the device."""
        self.device = torch.device(device)
        self.max_sequence_tokens = config.max_context  # checked here, for a captured step checks nothing
        self.windows = [layer.window for layer in config.layers]
        self.attend = attend or choose_paged_attention(self.device)
        pages = -(-tokens // PAGE_SIZE) + sequences
        shape = (len(config.layers), (pages + 1) * PAGE_SIZE, config.num_kv_heads, config.head_dim)
        # Zeros, because masked slots must not hold NaN.
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.tables = torch.zeros(sequences + 1, -(-config.max_context // PAGE_SIZE), dtype=torch.int32, device=device)
        self._pages, self._sequences = FreeList(pages), FreeList(sequences)

    @property
    def token_bytes(self) -> int:
        """Return the bytes of one token's keys and values."""
        return 2 * self.keys[:, 0].nbytes

    @property
    def utilization(self) -> float:
        """Return the share of the pages that sequences have reserved."""
        return self._pages.utilization

    def allocate(self, tokens: int) -> tuple[int, CellIndices]:
        """Reserve a sequence and pages for a number of tokens. Returns the sequence and its pages, on the host.

        Raises `PoolFullError`, and `ValueError` for more tokens than the context; nothing is reserved then.
        """
        if tokens > self.max_sequence_tokens:
            raise ValueError(
                f"capacity must be at most the {self.max_sequence_tokens} tokens of the context, got {tokens}"
            )
        pages = self._pages.allocate(-(-tokens // PAGE_SIZE))
        try:
            sequence = int(self._sequences.allocate(1)[0])
        except RuntimeError:
            self._pages.release(pages)
            raise
        self.tables[sequence, : len(pages)] = upload(pages, self.device)
        return sequence, pages

    def release(self, sequence: int, pages: CellIndices) -> None:
        """Free a sequence and its pages, and leave nothing of the keys and values that they held."""
        freed = upload(pages, self.device)
        for field in (self.keys, self.values):
            field.unflatten(1, (-1, PAGE_SIZE))[:, freed] = 0
        self._pages.release(pages)
        self._sequences.release(np.array([sequence]))


class PagedCache(KVCache):
    """The cache of one sequence in pages of a pool. The pages are freed when the cache is garbage collected."""

    def __init__(self, pages: PagePool, capacity: int) -> None:
        """Raises `PoolFullError`, and `ValueError` for more tokens than the context."""
        self.pages = pages
        self.capacity = capacity
        self.length = 0
        self.sequence, self.page_ids = pages.allocate(capacity)
        weakref.finalize(self, pages.release, self.sequence, self.page_ids).atexit = False

    @property
    def nbytes(self) -> int:
        return len(self.page_ids) * PAGE_SIZE * self.pages.token_bytes

    def fork(self, capacity: int) -> PagedCache:
        self._check_fork(capacity)
        copy = PagedCache(self.pages, capacity)
        copy.length, used = self.length, -(-self.length // PAGE_SIZE)
        source, destination = (upload(cache.page_ids[:used], self.pages.device) for cache in (self, copy))
        for field in (self.pages.keys, self.pages.values):
            by_page = field.unflatten(1, (-1, PAGE_SIZE))
            by_page[:, destination] = by_page[:, source]
        return copy

    def append(self, keys: Tensor, values: Tensor) -> None:
        T = keys.shape[2]
        self.check_capacity(T)
        slots = upload(self._slots(self.length + T)[-T:], self.pages.device)
        for field, new in ((self.pages.keys, keys), (self.pages.values, values)):
            field.index_copy_(1, slots, new.transpose(1, 2).to(field.dtype))
        self.length += T

    def _slots(self, end: int) -> CellIndices:
        """Return the slots of the first `end` tokens."""
        pages = self.page_ids[: -(-end // PAGE_SIZE), None]
        return (pages * PAGE_SIZE + np.arange(PAGE_SIZE)).flatten()[:end]

    def attention(self, caches: Sequence[PagedCache], T: int) -> AttentionFn:
        for cache in caches:
            cache.check_capacity(T)
        if T > 1:
            return _Prefill(self, T)
        sequence_state = [[cache.sequence for cache in caches], [cache.length for cache in caches]]
        sequences, positions = upload(torch.tensor(sequence_state), self.pages.device)
        return PagedAttention(self.pages, sequences, positions)


class PagedAttention:
    """Attention of a decode step over a pool's pages, as an `AttentionFn`, for tokens at `positions` `[B]` of
    `sequences` `[B]`."""

    def __init__(self, pages: PagePool, sequences: Tensor, positions: Tensor) -> None:
        self._pages, self._sequences, self._positions = pages, sequences, positions

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pages = self._pages
        kv_args = (pages.keys[layer], pages.values[layer], pages.tables, self._sequences, self._positions)
        attended = pages.attend(q[:, :, 0], k[:, :, 0], v[:, :, 0], *kv_args, PAGE_SIZE, pages.windows[layer])
        return attended[:, :, None]


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    sequences: Tensor,
    positions: Tensor,
    page: int,
    window: int | None = None,
) -> Tensor:
    """Run one step in torch's operators: see `PagedAttentionBackend`.

    This reference reads every page that a sequence might have, which is too slow to serve with.
    """
    table = tables[sequences].long()
    new = table.gather(1, positions[:, None] // page)[:, 0] * page + positions % page
    keys.index_copy_(0, new, k)
    values.index_copy_(0, new, v)
    slots = (table[:, :, None] * page + torch.arange(page, device=q.device)).flatten(1)
    slot_positions = torch.arange(slots.shape[1], device=q.device)
    known = slot_positions <= positions[:, None]
    if window is not None:
        known &= slot_positions > positions[:, None] - window
    attended = F.scaled_dot_product_attention(
        q[:, :, None],
        keys[slots].transpose(1, 2),
        values[slots].transpose(1, 2),
        attn_mask=known[:, None, None],
        enable_gqa=True,
    )
    return attended[:, :, 0]


@functools.cache
def choose_paged_attention(device: torch.device) -> PagedAttentionBackend:
    """Return the Triton kernels where Triton is installed and the kernels pass their check, else `paged_attention`."""
    if has_triton(device):
        # Triton is installed on GPU machines only: elsewhere this module cannot be imported.
        from model.decode import triton_attention

        check = functools.partial(triton_attention.check_paged_attention, reference=paged_attention)
        if passes_check(check, device):
            return triton_attention.paged_attention
    return paged_attention


class _Prefill:
    """Attention of the next T tokens of one sequence, as an `AttentionFn`."""

    def __init__(self, cache: PagedCache, T: int) -> None:
        pages = cache.pages
        self._pages, slots = pages, upload(cache._slots(cache.length + T), pages.device)
        self._new_slots = slots[-T:]
        # By window: the slots that the tokens attend to, and the mask.
        self._visible: dict[int | None, tuple[Tensor, Tensor]] = {}
        for window in dict.fromkeys(pages.windows):
            seen = slots[first_key(cache.length, window) :]
            self._visible[window] = seen, causal_mask(pages.keys.new_empty(1, 1, len(seen), 0), T, window)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slots, mask = self._visible[self._pages.windows[layer]]
        keys = self._extended(self._pages.keys[layer], k, slots)
        values = self._extended(self._pages.values[layer], v, slots)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)

    def _extended(self, field: Tensor, new: Tensor, slots: Tensor) -> Tensor:
        """Append the new keys or values `[1, H_kv, T, hd]` and return those of the slots `[1, H_kv, S, hd]`."""
        field.index_copy_(0, self._new_slots, new[0].transpose(0, 1))
        return field[slots].transpose(0, 1)[None]
