"""Key-value caches in pages of one pool: what a decoding step of a fixed shape reads, whichever sequences are in it.

Paged attention: Kwon et al. 2023 (arXiv 2309.06180).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.base.attention import AttentionFn, causal_mask
from model.base.config import ModelConfig
from model.base.kv_cache import Device, KVCache
from model.device import upload
from model.memory.pool import CellIndices, FreeList
from model.triton_check import has_triton, passes_check

PAGE_SIZE = 32  # tokens of a page


class PagePool:
    """keys and values `[L, page_ids, H_kv, hd]`, a page being `PAGE_SIZE` places in a row; tables `[sequences + 1,
    pages]`: where each sequence's tokens lie, in order. Page 0 and sequence 0 are nobody's: the rows that fill up a
    batch write there.

    tokens: that all sequences together may reserve, each rounded up to whole pages.
    """

    def __init__(self, config: ModelConfig, *, tokens: int, sequences: int, device: Device, dtype: torch.dtype) -> None:
        self.device = torch.device(device)
        self.max_sequence_tokens = config.max_context  # a captured step checks nothing, and reads what it is told to
        self.attend = choose_paged_attention(self.device)
        pages = -(-tokens // PAGE_SIZE) + sequences
        shape = (config.num_layers, (pages + 1) * PAGE_SIZE, config.num_kv_heads, config.head_dim)
        # Zeros: what is hidden by a mask must still be a number.
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.tables = torch.zeros(sequences + 1, -(-config.max_context // PAGE_SIZE), dtype=torch.int32, device=device)
        self._pages, self._sequences = FreeList(pages), FreeList(sequences)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return 2 * self.keys[:, 0].nbytes

    @property
    def utilization(self) -> float:
        """The share of the pages that sequences have reserved."""
        return self._pages.utilization

    def allocate(self, tokens: int) -> tuple[int, CellIndices]:
        """A sequence and its pages on the host, for so many tokens. Raises PoolFullError, and `ValueError` for more
        than the context, changing nothing."""
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
        """Frees what was taken."""
        self._pages.release(pages)
        self._sequences.release(np.array([sequence]))


class PagedCache(KVCache):
    """The pages of one sequence; they are free again as soon as nobody refers to it."""

    def __init__(self, pages: PagePool, capacity: int) -> None:
        """Raises PoolFullError, and `ValueError` for more than the context."""
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
        mine, theirs = (upload(cache.page_ids[:used], self.pages.device) for cache in (self, copy))
        for field in (self.pages.keys, self.pages.values):
            by_page = field.unflatten(1, (-1, PAGE_SIZE))
            by_page[:, theirs] = by_page[:, mine]
        return copy

    def attention(self, caches: Sequence[PagedCache], T: int) -> AttentionFn:
        for cache in caches:
            cache.check_capacity(T)
        if T > 1:
            return _Prefill(self, T)
        sequence_state = [[cache.sequence for cache in caches], [cache.length for cache in caches]]
        sequences, positions = upload(torch.tensor(sequence_state), self.pages.device)
        return PagedAttention(self.pages, sequences, positions)


class PagedAttention:
    """Attention of one token of each of B sequences at positions `[B]`, all shapes fixed; it adds the tokens."""

    def __init__(self, pages: PagePool, sequences: Tensor, positions: Tensor) -> None:
        self._pages, self._sequences, self._positions = pages, sequences, positions

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pages = self._pages
        kv_args = (pages.keys[layer], pages.values[layer], pages.tables, self._sequences, self._positions)
        attended = pages.attend(q[:, :, 0], k[:, :, 0], v[:, :, 0], *kv_args, PAGE_SIZE)
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
) -> Tensor:
    """q `[B, H, hd]` attends to what its sequence `[B]` holds before its position `[B]`, and to k and v
    `[B, H_kv, hd]`, which are stored there. keys and values `[slots, H_kv, hd]`; tables `[S, pages]`. Returns
    `[B, H, hd]`.

    It reads every page that a sequence might have: the twin of a kernel, and no way to serve.
    """
    table = tables[sequences].long()
    new = table.gather(1, positions[:, None] // page)[:, 0] * page + positions % page
    keys.index_copy_(0, new, k)
    values.index_copy_(0, new, v)
    slots = (table[:, :, None] * page + torch.arange(page, device=q.device)).flatten(1)
    known = torch.arange(slots.shape[1], device=q.device) <= positions[:, None]
    attended = F.scaled_dot_product_attention(
        q[:, :, None],
        keys[slots].transpose(1, 2),
        values[slots].transpose(1, 2),
        attn_mask=known[:, None, None],
        enable_gqa=True,
    )
    return attended[:, :, 0]


@functools.cache
def choose_paged_attention(device: torch.device) -> Callable[..., Tensor]:
    """Return the Triton kernel of `paged_attention` where Triton is installed and the kernel passes its check, else
    `paged_attention` itself."""
    if has_triton(device):
        # Triton is installed on GPU machines only: elsewhere this module cannot be imported.
        from model.decode import triton_attention

        check = functools.partial(triton_attention.check_paged_attention, reference=paged_attention)
        if passes_check(check, device):
            return triton_attention.paged_attention
    return paged_attention


class _Prefill:
    """Attention of the next T tokens of one sequence."""

    def __init__(self, cache: PagedCache, T: int) -> None:
        end, pages = cache.length + T, cache.pages
        every = (cache.page_ids[: -(-end // PAGE_SIZE), None] * PAGE_SIZE + np.arange(PAGE_SIZE)).flatten()[:end]
        self._pages, self._all = pages, upload(every, pages.device)
        self._new = self._all[-T:]
        self._mask = causal_mask(pages.keys.new_empty(1, 1, end, 0), T)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._extended(self._pages.keys[layer], k), self._extended(self._pages.values[layer], v)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=self._mask, enable_gqa=True)

    def _extended(self, field: Tensor, new: Tensor) -> Tensor:
        """Adds what is new `[1, H_kv, T, hd]` and returns all that is there, `[1, H_kv, S, hd]`."""
        field.index_copy_(0, self._new, new[0].transpose(0, 1))
        return field[self._all].transpose(0, 1)[None]
