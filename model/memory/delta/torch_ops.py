"""The equations of the delta memory in batched torch operators.

Equations D1–D3 are those of model/memory/README.md; `delta/reference.py` computes the same in plain loops. The address
is a product key (Lample et al. 2019, arXiv 1907.05242); the write is a delta rule on the rows that a token selects
(fast weights: Schlag et al. 2021, arXiv 2102.11174).
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.memory.numerics import TINY

# --- D1: the address ------------------------------------------------------------------------------------------------


def product_key_topk(keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k slots [n, k] long of the highest score and their scores [n, k], the highest first (equation D1).

    keys: [n, 2, √N], the two halves of s. Slot i·√N + j scores s1_i + s2_j.
    """
    side = keys.shape[-1]
    m = min(k, side)
    top1, index1 = keys[:, 0].topk(m)
    top2, index2 = keys[:, 1].topk(m)
    scores, best = (top1[:, :, None] + top2[:, None, :]).flatten(1).topk(k)
    return index1.gather(1, best // m) * side + index2.gather(1, best % m), scores


def address(keys: Tensor, k: int, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return the slots [n, k] of keys [n, 2, √N] and w = a / ‖a‖₂ [n, k], a = softmax(temperature · scores) (D1)."""
    slots, scores = product_key_topk(keys, k)
    a = torch.softmax(temperature * scores, dim=-1)
    return slots, a / a.norm(dim=-1, keepdim=True)


# --- D2: the read ---------------------------------------------------------------------------------------------------


def _weighted_read(rows: Tensor, w: Tensor) -> Tensor:
    """Return Σ_i w_i·M_i [n, d_v] of rows [n, k, d_v] and weights w [n, k]."""
    return torch.einsum("nk,nkv->nv", w, rows)


def read_delta(rows: Tensor, w: Tensor) -> Tensor:
    """Return o = norm(Σ_i w_i·M_i) [n, d_v], norm(0) = 0, of rows [n, k, d_v] and weights w [n, k] (equation D2)."""
    o = _weighted_read(rows, w)
    square = o.square().mean(-1, keepdim=True)  # the root of an exact 0 has no gradient
    return torch.where(square > 0, o / square.clamp_min(1e-12).sqrt(), torch.zeros_like(o))


def delta_read_magnitude(rows: Tensor, w: Tensor) -> Tensor:
    """Return log(1 + rms(Σ_i w_i·M_i)) [n], the magnitude that `read_delta` removes; rows [n, k, d_v], w [n, k]."""
    square = _weighted_read(rows, w).square().mean(-1)
    return torch.where(square > 0, square.clamp_min(TINY).sqrt().log1p(), torch.zeros_like(square))


# --- D3: the write --------------------------------------------------------------------------------------------------


def write_delta(
    old: Tensor, at: Tensor, w: Tensor, beta: Tensor, values: Tensor, *, decay: float, cap: float
) -> Tensor:
    """Return the rows [U, d_v] after one block's delta rule (equation D3):
    M_i ← M_i + Σ_t β_t/c_t · w_ti (v_t − λ Σ_j w_tj M_j), then ‖M_i‖ ≤ cap.

    old: [U, d_v]. at: [n, k], indices into old. w: [n, k]. beta: [n]. values: [n, d_v]. λ = decay.
    c_t = max(1, Σ_u w_t·w_u) counts the tokens of the block that share t's address. Tokens of one address thus write
    their mean, and no eigenvalue of c⁻¹WWᵀ is above 1: a block of any size is stable.
    """
    error = values - decay * _weighted_read(old[at], w)
    row = at.flatten()
    address_load = torch.zeros(len(old), dtype=old.dtype, device=old.device).index_add_(0, row, w.flatten())
    collisions = (w * address_load[at]).sum(-1).clamp_min(1.0)
    steps = (beta / collisions)[:, None, None] * w[:, :, None] * error[:, None, :]
    new = old.index_add(0, row, steps.flatten(0, 1))
    norms: Tensor = new.norm(dim=-1, keepdim=True)
    return new * (cap / norms.clamp_min(cap))
