"""The twins of `ops.py`: the same names and arguments, one token and one slot at a time, in plain Python loops.

Slow on purpose, and the definition: where `ops.py` and this file disagree, this file is right.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.memory.ops import Candidates, Rows


def address(keys: Tensor, k: int, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Scores all N slots of each token; keys [n, 2, √N] → slots [n, k], w [n, k]."""
    all_slots, all_weights = [], []
    for s1, s2 in keys:
        scores, slots = (s1[:, None] + s2[None, :]).flatten().topk(k)
        a = torch.softmax(temperature * scores, dim=-1)
        all_slots.append(slots)
        all_weights.append(a / a.norm())
    return torch.stack(all_slots), torch.stack(all_weights)


def read_lexical(rows: Rows, w: Tensor) -> Candidates:
    """A dictionary token → Σ_i w_i·strength for each token of the batch; rows [n, k, P], w [n, k]."""
    n, k, pairs = rows.tokens.shape
    tokens = torch.zeros(n, k * pairs, dtype=torch.long)
    scores = torch.zeros(n, k * pairs, dtype=w.dtype)
    for t in range(n):
        found: dict[int, float] = {}
        for i in range(k):
            for token, strength in zip(rows.tokens[t, i].tolist(), rows.strengths[t, i].tolist(), strict=True):
                found[token] = found.get(token, 0.0) + w[t, i].item() * strength
        for place, token in enumerate(sorted(found)):
            tokens[t, place], scores[t, place] = token, found[token] ** 2
    return Candidates(tokens, scores)


def mix(logits: Tensor, found: Candidates, gamma: Tensor) -> Tensor:
    """The mixture over the whole vocabulary, one token at a time; logits [n, V] → log-probabilities [n, V]."""
    out = logits.clone()
    for t in range(len(logits)):
        if gamma[t] > 0:
            memory = torch.zeros_like(logits[t])
            for token, score in zip(found.tokens[t].tolist(), found.scores[t], strict=True):
                memory[token] += score
            out[t] = ((1 - gamma[t]) * torch.softmax(logits[t], -1) + gamma[t] * memory / memory.sum()).log()
    return out


def write_lexical(old: Rows, at: Tensor, w: Tensor, beta: Tensor, targets: Tensor, *, decay: float, cap: float) -> Rows:
    """Row by row with dictionaries; arguments and result as in `ops.write_lexical`."""
    pairs = old.tokens.shape[1]
    new = Rows(torch.zeros_like(old.tokens), torch.zeros_like(old.strengths))
    for u in range(len(old.tokens)):
        writes = [
            (int(targets[t]), (beta[t] * w[t, i]).item())
            for t in range(at.shape[0])
            for i in range(at.shape[1])
            if at[t, i] == u
        ]
        forget = 1.0 - decay * min(1.0, sum(amount for _, amount in writes))
        row = {
            token: strength * forget
            for token, strength in zip(old.tokens[u].tolist(), old.strengths[u].tolist(), strict=True)
            if strength > 0
        }
        for token, amount in writes:
            row[token] = row.get(token, 0.0) + amount
        kept = sorted((item for item in row.items() if item[1] > 0), key=lambda item: (-item[1], item[0]))[:pairs]
        scale = min(1.0, cap / max(sum(strength for _, strength in kept), 1e-30))
        for place, (token, strength) in enumerate(kept):
            new.tokens[u, place], new.strengths[u, place] = token, strength * scale
    return new


def read_hidden(rows: Tensor, w: Tensor) -> Tensor:
    """norm(Σ_i w_i·M_i), one token at a time; rows [n, k, d_v], w [n, k] → [n, d_v]."""
    out = torch.zeros(len(rows), rows.shape[-1], dtype=rows.dtype)
    for t in range(len(rows)):
        o = sum((w[t, i] * rows[t, i] for i in range(w.shape[1])), start=torch.zeros_like(out[t]))
        size = math.sqrt((o @ o).item() / len(o))
        out[t] = o / max(size, 1e-6) if size > 0 else o
    return out


def write_hidden(
    old: Tensor, at: Tensor, w: Tensor, beta: Tensor, values: Tensor, *, decay: float, cap: float
) -> Tensor:
    """The delta rule token by token from the block's start; arguments and result as in `ops.write_hidden`."""
    spread = torch.zeros(len(at), len(old), dtype=old.dtype)
    for t in range(len(at)):
        spread[t, at[t]] = w[t]
    new = old.clone()
    for t in range(len(at)):
        read = sum((w[t, j] * old[at[t, j]] for j in range(at.shape[1])), start=torch.zeros_like(old[0]))
        crowd = max(1.0, sum((spread[t] @ spread[u]).item() for u in range(len(at))))
        for i in range(at.shape[1]):
            new[at[t, i]] += beta[t] / crowd * w[t, i] * (values[t] - decay * read)
    for u in range(len(old)):
        size = new[u].norm().item()
        if size > cap:
            new[u] *= cap / size
    return new
