"""Key-value caches: the interface `KVCache`, and `DenseCache`, which holds one sequence in one tensor.

`model.decode.paged_cache` has the cache that shares a pool of pages.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from model.base.attention import AttentionFn, causal_mask, first_key
from model.base.config import ModelConfig

Device = torch.device | str


class KVCache(ABC):
    """Keys and values of one sequence.

    capacity: number of tokens that fit.
    length: number of tokens whose keys and values are stored.
    """

    capacity: int
    length: int

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Return the reserved memory in bytes."""

    @abstractmethod
    def fork(self, capacity: int) -> KVCache:
        """Return an independent copy of the stored tokens. Raises `ValueError` if they exceed `capacity`."""

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add the rotated keys and the values of T tokens, each `[L, H_kv, T, hd]`, and advance `length`.

        Raises `ValueError` if the cache has no room for them.
        """

    @abstractmethod
    def attention(self, caches: Sequence[Any], T: int) -> AttentionFn:
        """Return the attention of one forward pass, in which row `b` extends `caches[b]` by `T` tokens.

        All caches are of this class. The attention appends keys and values behind `length`; the caller advances
        `length` after the pass. Raises `ValueError` if a cache has no room for `T` tokens.
        """

    def advanced(self, tokens: int) -> Self:
        """Return a view of this cache that is longer by `tokens`, on the same memory.

        In a decode step, a row on `cache.advanced(1)` follows the row on `cache` in the same sequence.
        """
        later = copy.copy(self)
        later.length += tokens
        return later

    def truncate(self, length: int) -> None:
        """Drop all tokens after the first `length`. Raises `ValueError` if the cache stores fewer."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length must be between 0 and the {self.length} cached tokens, got {length}")
        self.length = length

    def check_capacity(self, T: int) -> None:
        """Raise `ValueError` if the cache has no room for `T` more tokens."""
        if self.length + T > self.capacity:
            raise ValueError(f"cache must have room for {self.length + T} tokens, its capacity is {self.capacity}")

    def _check_fork(self, capacity: int) -> None:
        if capacity < self.length:
            raise ValueError(f"capacity must be at least the {self.length} cached tokens, got {capacity}")


class DenseCache(KVCache):
    """Keys and values of one sequence in one tensor each, `[L, H_kv, slots, hd]` with `slots >= capacity`.

    The memory is reserved but not touched: on a CPU, the system provides a page when the sequence reaches the page.
    """

    def __init__(self, config: ModelConfig, capacity: int, *, device: Device, dtype: torch.dtype) -> None:
        # Kernels round by how memory is aligned: every head starts at a cache line, whatever the capacity.
        slots = -(-capacity // 32) * 32
        shape = (len(config.layers), config.num_kv_heads, slots, config.head_dim)
        self._config = config
        self.capacity = capacity
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def fork(self, capacity: int) -> DenseCache:
        self._check_fork(capacity)
        copied = DenseCache(self._config, capacity, device=self.keys.device, dtype=self.keys.dtype)
        copied.keys[:, :, : self.length] = self.keys[:, :, : self.length]
        copied.values[:, :, : self.length] = self.values[:, :, : self.length]
        copied.length = self.length
        return copied

    def append(self, keys: Tensor, values: Tensor) -> None:
        T = keys.shape[2]
        self.check_capacity(T)
        self.keys[:, :, self.length : self.length + T] = keys
        self.values[:, :, self.length : self.length + T] = values
        self.length += T

    def attention(self, caches: Sequence[DenseCache], T: int) -> AttentionFn:
        return _DenseCacheAttention(self._config, caches, T)


class _DenseCacheAttention:
    """Attention over dense caches, as an `AttentionFn`.

    The views into a cache are cut for all layers of one window at once, which is cheaper than layer by layer.
    """

    def __init__(self, config: ModelConfig, caches: Sequence[DenseCache], T: int) -> None:
        self._tails = []
        for cache in caches:
            cache.check_capacity(T)
            end = cache.length + T
            keys, values = cache.keys[:, :, cache.length : end], cache.values[:, :, cache.length : end]
            self._tails.append((keys.unbind(), values.unbind()))
        by_window = {
            window: _VisibleKeys(caches, T, window) for window in dict.fromkeys(each.window for each in config.layers)
        }
        self._visible = [by_window[each.window] for each in config.layers]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        new = [tail[layer] for tails in self._tails for tail in tails]
        torch._foreach_copy_(new, [part for row in zip(k.unbind(), v.unbind(), strict=True) for part in row])
        visible = self._visible[layer]
        attended = [
            F.scaled_dot_product_attention(row, keys[layer], values[layer], attn_mask=visible.mask, enable_gqa=True)
            for row, (keys, values) in zip(q[:, None].unbind(), visible.rows, strict=True)
        ]
        return attended[0] if len(attended) == 1 else torch.cat(attended)


class _VisibleKeys:
    """The keys and values that T new tokens of each cache attend to in the layers of one window, and their mask."""

    def __init__(self, caches: Sequence[DenseCache], T: int, window: int | None) -> None:
        self.rows = []
        for cache in caches:
            seen = slice(first_key(cache.length, window), cache.length + T)
            keys, values = cache.keys[:, None, :, seen], cache.values[:, None, :, seen]
            self.rows.append((keys.unbind(), values.unbind()))
        self.mask = causal_mask(self.rows[0][0][0], T, window) if T > 1 else None
