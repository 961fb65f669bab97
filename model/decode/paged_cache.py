"""Key-value caches in pages of one pool: what a decoding step of a fixed shape reads, whichever sequences are in it.

Paged attention: Kwon et al. 2023 (arXiv 2309.06180).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.base.backbone import Attend, Device, KVCache, causal_mask
from model.base.config import ModelConfig
from model.device import kernels_for, upload
from model.memory.pool import Cells, Free

PAGE = 32  # tokens of a page


class Pages:
    """keys and values `[L, places, H_kv, hd]`, a page being `PAGE` places in a row; tables `[sequences + 1, pages]`:
    where each sequence's tokens lie, in order. Page 0 and sequence 0 are nobody's: the rows that fill up a batch write
    there.

    tokens: that all sequences together may reserve, each rounded up to whole pages.
    """

    def __init__(self, config: ModelConfig, *, tokens: int, sequences: int, device: Device, dtype: torch.dtype) -> None:
        self.device = torch.device(device)
        self.longest = config.max_context  # a captured step checks nothing, and reads what it is told to
        self.kernels = kernels_for(self.device)
        pages = -(-tokens // PAGE) + sequences
        shape = (config.num_layers, (pages + 1) * PAGE, config.num_kv_heads, config.head_dim)
        # Zeros: what is hidden by a mask must still be a number.
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.tables = torch.zeros(sequences + 1, -(-config.max_context // PAGE), dtype=torch.int32, device=device)
        self._pages, self._sequences = Free(pages), Free(sequences)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return 2 * self.keys[:, 0].nbytes

    @property
    def taken(self) -> float:
        """The share of the pages that sequences have reserved."""
        return self._pages.taken

    def take(self, tokens: int) -> tuple[int, Cells]:
        """A sequence and its pages on the host, for so many tokens. Raises PoolFullError, and `ValueError` for more
        than the context, changing nothing."""
        if tokens > self.longest:
            raise ValueError(f"capacity must be at most the {self.longest} tokens of the context, got {tokens}")
        pages = self._pages.take(-(-tokens // PAGE))
        try:
            sequence = int(self._sequences.take(1)[0])
        except RuntimeError:
            self._pages.give(pages)
            raise
        self.tables[sequence, : len(pages)] = upload(pages, self.device)
        return sequence, pages

    def give(self, sequence: int, pages: Cells) -> None:
        """Frees what was taken."""
        self._pages.give(pages)
        self._sequences.give(np.array([sequence]))


class PagedCache(KVCache):
    """The pages of one sequence; they are free again as soon as nobody refers to it."""

    def __init__(self, pages: Pages, capacity: int) -> None:
        """Raises PoolFullError, and `ValueError` for more than the context."""
        self.pages = pages
        self.capacity = capacity
        self.length = 0
        self.sequence, self.places = pages.take(capacity)
        weakref.finalize(self, pages.give, self.sequence, self.places).atexit = False

    @property
    def nbytes(self) -> int:
        return len(self.places) * PAGE * self.pages.token_bytes

    def fork(self, capacity: int) -> PagedCache:
        self._check_fork(capacity)
        copy = PagedCache(self.pages, capacity)
        copy.length, used = self.length, -(-self.length // PAGE)
        mine, theirs = (upload(cache.places[:used], self.pages.device) for cache in (self, copy))
        for field in (self.pages.keys, self.pages.values):
            by_page = field.unflatten(1, (-1, PAGE))
            by_page[:, theirs] = by_page[:, mine]
        return copy

    def attention(self, caches: Sequence[PagedCache], T: int) -> Attend:
        for cache in caches:
            cache.check_room(T)
        if T > 1:
            return _Prefill(self, T)
        told = [[cache.sequence for cache in caches], [cache.length for cache in caches]]
        sequences, positions = upload(torch.tensor(told), self.pages.device)
        return PagedAttention(self.pages, sequences, positions)


class PagedAttention:
    """Attention of one token of each of B sequences at positions `[B]`, all shapes fixed; it adds the tokens."""

    def __init__(self, pages: Pages, sequences: Tensor, positions: Tensor) -> None:
        self._pages, self._sequences, self._positions = pages, sequences, positions

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pages = self._pages
        attend = attend_in_pages if pages.kernels is None else pages.kernels.attend_in_pages
        place = (pages.keys[layer], pages.values[layer], pages.tables, self._sequences, self._positions)
        attended: Tensor = attend(q[:, :, 0], k[:, :, 0], v[:, :, 0], *place, PAGE)
        return attended[:, :, None]


def attend_in_pages(
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
    `[B, H_kv, hd]`, which are stored there. keys and values `[places, H_kv, hd]`; tables `[S, pages]`. Returns
    `[B, H, hd]`.

    It reads every page that a sequence might have: the twin of a kernel, and no way to serve.
    """
    table = tables[sequences].long()
    new = table.gather(1, positions[:, None] // page)[:, 0] * page + positions % page
    keys.index_copy_(0, new, k)
    values.index_copy_(0, new, v)
    places = (table[:, :, None] * page + torch.arange(page, device=q.device)).flatten(1)
    known = torch.arange(places.shape[1], device=q.device) <= positions[:, None]
    attended = F.scaled_dot_product_attention(
        q[:, :, None],
        keys[places].transpose(1, 2),
        values[places].transpose(1, 2),
        attn_mask=known[:, None, None],
        enable_gqa=True,
    )
    return attended[:, :, 0]


class _Prefill:
    """Attention of the next T tokens of one sequence."""

    def __init__(self, cache: PagedCache, T: int) -> None:
        end, pages = cache.length + T, cache.pages
        every = (cache.places[: -(-end // PAGE), None] * PAGE + np.arange(PAGE)).flatten()[:end]
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
