"""Address, read and write of the memory: pure functions, batched over tokens. Their twins are in `naive.py`.

Letters: n tokens, N slots, k slots a token, d hidden size, V vocabulary, P pairs a lexical row, d_v width of a hidden
row, K = k·P candidates a token, U touched rows. Fast weights are fp32 everywhere.

The formulation is Imprint's own (docs/design of the memory: product keys as in Lample et al. 2019, arXiv 1907.05242;
fast weights written sparsely after the idea of Sparse Meta Networks, arXiv 2009.01803; the lexical site is a neural
cache, arXiv 1612.04426, of constant size).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny


class Rows(NamedTuple):
    """Lexical rows: `tokens` int32 [..., P] and `strengths` fp32 [..., P]; a pair of strength 0 is empty (token 0)."""

    tokens: Tensor
    strengths: Tensor


class Candidates(NamedTuple):
    """What a lexical read found. tokens [n, K] long, distinct where scores > 0; scores [n, K] fp32, 0 = no
    candidate."""

    tokens: Tensor
    scores: Tensor


def rowwise(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight for x [n, a], weight [a, b], each row rounded as if it were alone: no neighbours, not in the last bit.

    Where gradients must reach the weight it is the plain product, whose backward does not need n copies of the weight.
    """
    if weight.requires_grad and torch.is_grad_enabled():
        return x @ weight
    return torch.bmm(x[:, None], weight.expand(len(x), -1, -1))[:, 0]


def address(keys: Tensor, k: int, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Product-key top-k: the slots a token selects and their weights.

    keys [n, 2, √N]: the two halves of s. Slot i·√N + j scores s1_i + s2_j; a = softmax(temperature · top-k scores).
    Returns slots [n, k] long and w = a / ‖a‖₂ [n, k].
    """
    side = keys.shape[-1]
    top1, index1 = keys[:, 0].topk(k)
    top2, index2 = keys[:, 1].topk(k)
    scores, best = (top1[:, :, None] + top2[:, None, :]).flatten(1).topk(k)
    slots = index1.gather(1, best // k) * side + index2.gather(1, best % k)
    a = torch.softmax(temperature * scores, dim=-1)
    return slots, a / a.norm(dim=-1, keepdim=True)


# --- lexical rows ---------------------------------------------------------------------------------------------------


def read_lexical(rows: Rows, w: Tensor) -> Candidates:
    """score(x) = (Σ_i w_i · strength_i(x))² over the k rows of each token; squaring sharpens the match.

    rows [n, k, P] of the addressed slots, w [n, k].
    """
    tokens, order = rows.tokens.flatten(1).long().sort(dim=1, stable=True)
    parts = (rows.strengths * w[:, :, None]).flatten(1).gather(1, order)
    starts = torch.ones_like(tokens, dtype=torch.bool)
    starts[:, 1:] = tokens[:, 1:] != tokens[:, :-1]
    segment = starts.cumsum(1) - 1
    scores = torch.zeros_like(parts).scatter_add_(1, segment, parts).square()
    # Every member of a segment writes the same token, so the scatter has one outcome in any order.
    distinct = torch.zeros_like(tokens).scatter_(1, segment, tokens)
    return Candidates(distinct, scores)


def mixing_weight(found: Candidates, gate: Tensor, bias: Tensor) -> Tensor:
    """γ [n] = σ(g0 + g1·log S + g2·max/S + bias), S = Σ scores; exactly 0 where nothing was found.

    gate [3]; bias [n]: what the hidden state and the session's trust add. γ stays below 1: however sure a memory is, it
    makes no token impossible.
    """
    total = found.scores.sum(-1)
    known = total >= TINY
    safe = torch.where(known, total, torch.ones_like(total))
    agreement = found.scores.amax(-1) / safe
    gamma = torch.sigmoid(gate[0] + gate[1] * safe.log() + gate[2] * agreement + bias)
    gamma = gamma.clamp_max(1.0 - torch.finfo(gamma.dtype).eps)
    return torch.where(known, gamma, torch.zeros_like(gamma))


def mix(logits: Tensor, found: Candidates, gamma: Tensor) -> Tensor:
    """p = (1 − γ)·softmax(logits) + γ·p_mem as log-probabilities [n, V]; rows with γ = 0 keep their logits, bit for
    bit."""
    log_z = logits.logsumexp(-1, keepdim=True)
    g = gamma[:, None]
    share = found.scores / found.scores.sum(-1, keepdim=True).clamp_min(TINY)
    base = logits - log_z + torch.log1p(-g)
    at = base.gather(1, found.tokens)
    # γ·share = 0 on empty candidates: they add exactly nothing, whichever token they point at.
    gain = torch.logaddexp(at, (g * share).log()) - at
    gain = torch.where(share > 0, gain, torch.zeros_like(gain))
    return torch.where(g > 0, base.scatter_add(1, found.tokens, gain), logits)


def memory_prob(targets: Tensor, found: Candidates) -> Tensor:
    """p_mem(target) [n], 0 where nothing was found."""
    hit = (found.scores * (found.tokens == targets[:, None])).sum(-1)
    return hit / found.scores.sum(-1).clamp_min(TINY)


def target_log_prob(frozen: Tensor, targets: Tensor, found: Candidates, gamma: Tensor) -> Tensor:
    """log p(target) [n] under the mixture, from the frozen log-probabilities [n] of the targets [n]: no [n, V]
    needed."""
    share = memory_prob(targets, found)
    mixed = torch.logaddexp(frozen + torch.log1p(-gamma), (gamma * share).log())
    return torch.where(gamma > 0, mixed, frozen)


def trust_step(frozen: Tensor, adapted: Tensor, targets: Tensor, found: Candidates, gamma: Tensor) -> Tensor:
    """Σ_t ∂ log p_t / ∂ bias = Σ_t γ_t (1 − γ_t) (p_mem − p_LM)(target) / p_t: one number, how the block judges the
    gate.

    frozen and adapted: log-probabilities [n] of the targets [n].
    """
    odds = (memory_prob(targets, found) - frozen.exp()) / adapted.exp().clamp_min(TINY)
    return (gamma * (1.0 - gamma) * odds).sum()


def write_lexical(old: Rows, at: Tensor, w: Tensor, beta: Tensor, targets: Tensor, *, decay: float, cap: float) -> Rows:
    """One block's write: M_i ← (1 − decay·min(1, Σ_t β_t w_ti))·M_i + Σ_t β_t w_ti·onehot(x_{t+1}).

    old [U, P]: the rows of the touched slots; at [n, k]: index into them of each address; w [n, k]; beta [n];
    targets [n] long. Each row keeps its P strongest pairs (ties: the smaller token) and is scaled so that
    its strengths sum to at most `cap`. Returns the new rows [U, P].
    """
    num_rows, pairs = old.tokens.shape
    row = at.flatten()
    amount = (beta[:, None] * w).flatten()
    written = torch.zeros(num_rows, dtype=amount.dtype, device=amount.device).index_add_(0, row, amount)
    kept = old.strengths * (1.0 - decay * written.clamp_max(1.0))[:, None]

    # One list of (row, token, strength): what was there, then what is new; equal (row, token) are summed in that order.
    span = int(max(int(old.tokens.max()), int(targets.max()))) + 1
    key_old = torch.arange(num_rows, device=row.device)[:, None] * span + old.tokens.long()
    key_new = row * span + targets.repeat_interleave(at.shape[1])
    keys, segment = torch.unique(torch.cat([key_old.flatten(), key_new]), return_inverse=True)
    sums = torch.zeros(len(keys), dtype=amount.dtype, device=amount.device)
    sums.index_add_(0, segment, torch.cat([kept.flatten(), amount]))

    # The P strongest of each row: `keys` is sorted by (row, token), so two stable sorts give (row, −strength, token).
    order = sums.argsort(descending=True, stable=True)
    order = order[(keys[order] // span).argsort(stable=True)]
    keys, sums = keys[order], sums[order]
    of_row = keys // span
    rank = torch.arange(len(keys), device=row.device) - torch.searchsorted(of_row, of_row)
    keep = (rank < pairs) & (sums > 0)
    place = of_row[keep] * pairs + rank[keep]
    tokens = torch.zeros(num_rows * pairs, dtype=torch.int32, device=row.device)
    tokens[place] = (keys[keep] % span).int()
    strengths = torch.zeros(num_rows * pairs, dtype=torch.float32, device=row.device)
    strengths[place] = sums[keep].float()
    strengths = strengths.view(num_rows, pairs)
    strengths = strengths * (cap / strengths.sum(-1, keepdim=True).clamp_min(cap))
    return Rows(tokens.view(num_rows, pairs), strengths)


# --- hidden rows ----------------------------------------------------------------------------------------------------


def read_hidden(rows: Tensor, w: Tensor) -> Tensor:
    """o = norm(Σ_i w_i·M_i) [n, d_v] with norm(0) = 0; rows [n, k, d_v], w [n, k]."""
    o = torch.einsum("nk,nkv->nv", w, rows)
    scale = o.square().mean(-1, keepdim=True).sqrt()
    return torch.where(scale > 0, o / scale.clamp_min(1e-6), torch.zeros_like(o))


def write_hidden(
    old: Tensor, at: Tensor, w: Tensor, beta: Tensor, values: Tensor, *, decay: float, cap: float
) -> Tensor:
    """One block's delta rule: M_i ← M_i + Σ_t β_t/c_t · w_ti (v_t − λ Σ_j w_tj M_j), then ‖M_i‖ ≤ cap.

    old [U, d_v]; at [n, k] index into old; w [n, k]; beta [n]; values [n, d_v]; λ = decay. c_t = max(1, Σ_u w_t·w_u)
    counts the tokens of the block that crowd at t's address. Those of one address thus write their mean, and no
    eigenvalue of c⁻¹WWᵀ is above 1: a block of any size is stable. Returns the new rows [U, d_v].
    """
    error = values - decay * torch.einsum("nk,nkv->nv", w, old[at])
    row = at.flatten()
    load = torch.zeros(len(old), dtype=old.dtype, device=old.device).index_add_(0, row, w.flatten())
    crowd = (w * load[at]).sum(-1).clamp_min(1.0)
    steps = (beta / crowd)[:, None, None] * w[:, :, None] * error[:, None, :]
    new = old.index_add(0, row, steps.flatten(0, 1))
    norms: Tensor = new.norm(dim=-1, keepdim=True)
    return new * (cap / norms.clamp_min(cap))
