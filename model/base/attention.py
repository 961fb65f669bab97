"""Attention without a cache, the causal mask, and the call that a layer makes for its attention.

Caches bring an attention of their own: `model.base.kv_cache`, `model.decode.paged_cache`.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.base.config import ModelConfig


class AttentionFn(Protocol):
    """Attention of one forward pass, which a layer calls once."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, /) -> Tensor:
        """Return the attended values `[B, H, T, hd]`.

        layer: index of the layer, whose description bounds what a token attends to.
        q: rotated queries `[B, H, T, hd]`.
        k, v: rotated keys and the values of the same tokens, `[B, H_kv, T, hd]`. An attention over a cache appends
            both to the cache.
        """
        ...


class CausalAttention:
    """Attention within each row of the batch, as an `AttentionFn`."""

    def __init__(self, config: ModelConfig) -> None:
        self._layers = config.layers

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window = self._layers[layer].window
        if window is None or window >= q.shape[2]:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        mask = causal_mask(k, q.shape[2], window)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def causal_mask(keys: Tensor, T: int, window: int | None = None) -> Tensor:
    """Return the mask `[T, S]` to add to the scores of the last `T` of the `S` positions in `keys` `[B, H_kv, S, hd]`.

    The mask is −inf where a key comes after the query or is not among the `window` newest, and 0 elsewhere.
    """
    S = keys.shape[2]
    hidden = torch.ones(T, S, dtype=torch.bool, device=keys.device).triu(S - T + 1)
    if window is not None:
        hidden |= torch.ones_like(hidden).tril(S - T - window)
    return keys.new_zeros(T, S).masked_fill(hidden, -math.inf)


def first_key(start: int, window: int | None) -> int:
    """Return the position of the oldest key that the query at position `start` attends to."""
    return 0 if window is None else max(0, start + 1 - window)
