"""The reference of `delta/torch_ops.py`: the same equations, one token and one slot at a time, in plain loops.

The reference is slow on purpose and is the definition: where the two files disagree, the reference is right.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def product_key_topk(keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Score all N slots of each token (equation D1); keys [n, 2, √N] → slots [n, k] and scores [n, k]."""
    best = [(s1[:, None] + s2[None, :]).flatten().topk(k) for s1, s2 in keys]
    return torch.stack([b.indices for b in best]), torch.stack([b.values for b in best])


def read_delta(rows: Tensor, w: Tensor) -> Tensor:
    """Return norm(Σ_i w_i·M_i) [n, d_v] of rows [n, k, d_v] and weights w [n, k] (equation D2)."""
    out = torch.zeros(len(rows), rows.shape[-1], dtype=rows.dtype)
    for t in range(len(rows)):
        o = sum((w[t, i] * rows[t, i] for i in range(w.shape[1])), start=torch.zeros_like(out[t]))
        size = math.sqrt((o @ o).item() / len(o))
        out[t] = o / max(size, 1e-6) if size > 0 else o
    return out


def delta_read_magnitude(rows: Tensor, w: Tensor) -> Tensor:
    """Return log(1 + rms(Σ_i w_i·M_i)) [n] of rows [n, k, d_v] and weights w [n, k]."""
    out = torch.zeros(len(rows), dtype=rows.dtype)
    for t in range(len(rows)):
        o = [sum(float(w[t, i] * rows[t, i, v]) for i in range(w.shape[1])) for v in range(rows.shape[2])]
        out[t] = math.log1p(math.sqrt(sum(number**2 for number in o) / len(o)))
    return out


def write_delta(
    old: Tensor, at: Tensor, w: Tensor, beta: Tensor, values: Tensor, *, decay: float, cap: float
) -> Tensor:
    """Return the rows [U, d_v] after the delta rule of each token from the block's start (equation D3); arguments as in
    `torch_ops.write_delta`."""
    spread = torch.zeros(len(at), len(old), dtype=old.dtype)
    for t in range(len(at)):
        spread[t, at[t]] = w[t]
    new = old.clone()
    for t in range(len(at)):
        read = sum((w[t, j] * old[at[t, j]] for j in range(at.shape[1])), start=torch.zeros_like(old[0]))
        collisions = max(1.0, sum((spread[t] @ spread[u]).item() for u in range(len(at))))
        for i in range(at.shape[1]):
            new[at[t, i]] += beta[t] / collisions * w[t, i] * (values[t] - decay * read)
    for u in range(len(old)):
        size = new[u].norm().item()
        if size > cap:
            new[u] *= cap / size
    return new
