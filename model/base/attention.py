"""Attention without a cache, the causal mask, and the call that a layer makes for its attention.

Caches bring an attention of their own: `model.base.kv_cache`, `model.decode.paged_cache`.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class AttentionFn(Protocol):
    """Attention of one forward pass, which a layer calls once."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, /) -> Tensor:
        """Return the attended values `[B, H, T, hd]`.

        layer: index of the layer.
        q: rotated queries `[B, H, T, hd]`.
        k, v: rotated keys and the values of the same tokens, `[B, H_kv, T, hd]`. An attention over a cache appends
            both to the cache.
        """
        ...


def causal_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend within each row of the batch, as an `AttentionFn`."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def causal_mask(keys: Tensor, T: int) -> Tensor:
    """Return the mask `[T, S]` to add to the scores of the last `T` of the `S` positions in `keys` `[B, H_kv, S, hd]`.

    The mask is −inf where a key comes after the query, and 0 elsewhere.
    """
    S = keys.shape[2]
    future = torch.ones(T, S, dtype=torch.bool, device=keys.device).triu(S - T + 1)
    return keys.new_zeros(T, S).masked_fill(future, -math.inf)
