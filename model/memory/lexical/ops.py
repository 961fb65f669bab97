"""The equations of the lexical memory in batched torch operators: pure functions that backends and sites share.

Equations L1–L7 and S1 are those of model/memory/README.md; `lexical/reference.py` defines them in plain loops. The
lexical memory is a neural cache (Grave et al. 2017, arXiv 1612.04426) of constant size and cost, whose entries lie in
the cells of an inverted file (Jégou et al. 2011).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.memory.config import GATE_CLOSED, TRUST
from model.memory.lexical.types import (
    HASH_MULTIPLIER,
    KEY_SCALE,
    MAX_GAMMA,
    NGRAM_SIZES,
    QUERY_SCALE,
    SIMILARITY_STEP,
    Candidates,
    GatedMixture,
    GateWeights,
    HeadParams,
    LexicalRows,
    RowMatches,
)
from model.memory.numerics import TINY, rowwise_matmul
from model.memory.prediction import Prediction

# --- L1: the context of a token -------------------------------------------------------------------------------------


def context_keys(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the keys q = Norm(W_k h + b_k) [n, d_k] of final hidden states [n, d] (equation L1)."""
    return F.normalize(rowwise_matmul(hidden.float(), weight) + bias, dim=-1)


def quantise_keys(keys: Tensor) -> Tensor:
    """Return unit vectors [..., d_k] as int8 in steps of 1 / KEY_SCALE; components beyond ±0.5 are clipped."""
    return (keys * KEY_SCALE).round().clamp(-127, 127).to(torch.int8)


def hash_ngrams(token_ids: Tensor) -> Tensor:
    """Return the hashes [n, R] int16 of the last 2, 4 and 8 of token_ids [7 + n] at each of n positions (equation L1).

    A hash is 0 where the n-gram begins before its request; ids of −1 stand for tokens before the request. Equal n-grams
    have equal hashes; two different n-grams have the same hash once in 65,535 times.
    """
    return hash_last_ngrams(token_ids.unfold(0, max(NGRAM_SIZES), 1))


def hash_last_ngrams(last_tokens: Tensor) -> Tensor:
    """Return the hashes [n, R] int16 at the ends of n sequences, given the last tokens [n, 8] of each."""
    window = last_tokens.flip(1)
    powers = torch.full((max(NGRAM_SIZES),), HASH_MULTIPLIER, device=last_tokens.device).cumprod(0)
    sums = _at_ngram_ends(((window + 1) * powers).cumsum(1))
    # The high bits of a product depend on all bits below them.
    ngram_hashes = (((sums ^ (sums >> 29)) * HASH_MULTIPLIER) >> 48).to(torch.int16)
    whole = _at_ngram_ends(window) >= 0
    return torch.where(ngram_hashes == 0, torch.ones_like(ngram_hashes), ngram_hashes) * whole


def hash_request_ngrams(targets: Tensor, bos: int) -> Tensor:
    """Return the hashes [n, R] of the tokens before each target [n] of a request that began with `bos`."""
    return hash_ngrams(torch.cat([targets.new_tensor([-1] * (max(NGRAM_SIZES) - 1) + [bos]), targets[:-1]]))


def _at_ngram_ends(values: Tensor) -> Tensor:
    """Return the values [n, R] at which an n-gram ends, of values [n, 8] by distance from the end."""
    # A list as an index would wait for the device.
    return torch.stack([values[:, ngram_size - 1] for ngram_size in NGRAM_SIZES], dim=1)


# --- L2: the cells of a context -------------------------------------------------------------------------------------


def nearest_cells(keys: Tensor, centres: Tensor, k: int) -> Tensor:
    """Return the k cells [n, k] long whose centres [C, d_k] are nearest to keys [n, d_k], the nearest first."""
    return rowwise_matmul(keys, centres.T).topk(k, dim=-1).indices


# --- L3: rows compared with a context -------------------------------------------------------------------------------


def count_ngram_matches(ngram_hashes: Tensor, context: Tensor) -> Tensor:
    """Return how many n-grams (0 … R) of a context rows repeat; hashes of both int16 [..., R]."""
    return ((ngram_hashes == context) & (context != 0)).sum(-1)


def scale_query(query: Tensor) -> Tensor:
    """Return queries [..., d_k] of unit length in whole steps of 1 / QUERY_SCALE.

    fp32 then sums their products with keys exactly: the similarity has the same bits in any order, batch and backend.
    """
    return (query.float() * QUERY_SCALE).round()


def similarity(rows: LexicalRows, query: Tensor) -> Tensor:
    """Return ⟨query, key⟩ [n, K] of the rows [n, k, P] of the addressed cells; query [n, d_k] of unit length."""
    keys = rows.keys.flatten(1, 2).float()
    return torch.bmm(scale_query(query)[:, None], keys.transpose(1, 2))[:, 0] * SIMILARITY_STEP


def match_rows(rows: LexicalRows, query: Tensor, context: Tensor) -> RowMatches:
    """Compare the rows [n, k, P] of the addressed cells with a context (equation L3).

    query: [n, d_k] of unit length. context: int16 [n, R], the n-gram hashes of the context.
    """
    ngram_matches = count_ngram_matches(rows.ngram_hashes.flatten(1, 2), context[:, None])
    return RowMatches(rows.tokens.flatten(1).long(), similarity(rows, query), ngram_matches, rows.ages.flatten(1) == 0)


# --- L4: the distribution of each head ------------------------------------------------------------------------------


def cumulative_bonus(bonus: Tensor) -> Tensor:
    """Return the bonus [H, R + 1] of a row by the number of n-grams that the row repeats; bonus [H, R]."""
    return F.pad(bonus.cumsum(1), (1, 0))


def score_candidates(
    tokens: Tensor,
    cosines: Tensor,
    ngram_matches: Tensor,
    log_probs: Tensor,
    missing: Tensor,
    sharpness: Tensor,
    prior: Tensor,
    bonus: Tensor,
) -> Candidates:
    """Return each head's p_mem(x) ∝ p_LM(x)^prior · Σ exp(sharpness · ⟨query, key⟩ + Σ bonus) (equation L4).

    The sums are over the rows of token x in the k cells; a row earns a bonus for each n-gram that the row repeats.
    The gate features of a head are, scaled to about 1: log Σ exp(score), the cosine and the agreement of its best match
    (the share of the head that goes to the token of this match), the log of the agreement, and for each n-gram size
    whether the match repeats the n-gram.

    tokens: long [n or 1, K]. cosines, ngram_matches, log_probs (of p_LM) and missing: [n, K]. sharpness and prior: [H].
    bonus: [H, R].
    """
    scores = sharpness[:, None] * cosines[:, None] + prior[:, None] * log_probs[:, None]
    scores = scores + cumulative_bonus(bonus)[:, ngram_matches].transpose(0, 1)
    scores = scores.masked_fill(missing[:, None], -torch.inf)
    best, at = scores.max(dim=-1, keepdim=True)
    known = best > -torch.inf
    weights = (scores - best.masked_fill(~known, 0.0)).exp()
    total = weights.sum(dim=-1, keepdim=True)
    shares = weights / torch.where(known, total, torch.ones_like(total))
    tokens = tokens.expand(len(scores), -1)
    agreement = (shares * (tokens[:, None] == tokens.gather(1, at[:, :, 0])[:, :, None])).sum(-1)
    log_total = torch.where(known, best + total.log(), torch.zeros_like(best))[:, :, 0]
    cosine = torch.where(known[:, :, 0], cosines.gather(1, at[:, :, 0]), torch.zeros_like(log_total))
    matches = torch.where(known[:, :, 0], ngram_matches.gather(1, at[:, :, 0]), torch.zeros_like(at[:, :, 0]))
    matched_ngrams = [(matches > j).to(cosine.dtype) for j in range(bonus.shape[1])]
    gate_features = torch.stack(
        [log_total / 10, cosine, agreement, (agreement + 1e-4).log() / 3, *matched_ngrams], dim=-1
    )
    return Candidates(tokens, shares, gate_features.flatten(1), matches[:, 0])


def score_row_matches(rows: RowMatches, prediction: Prediction, head_params: HeadParams) -> Candidates:
    """Return the `score_candidates` of rows that were compared with n contexts, with the base's `prediction`."""
    return score_candidates(*rows[:3], prediction.log_prob(rows.tokens), rows.missing, *head_params)


# --- L5: the gate ---------------------------------------------------------------------------------------------------


def gate_inputs(found: Candidates, entropy: Tensor, keys: Tensor) -> Tensor:
    """Return the inputs [n, (4 + R)·H + 1 + d_k] of the gate; entropy [n] of the base, keys [n, d_k]."""
    return torch.cat([found.gate_features, entropy[:, None] / 4, keys], dim=1)


def gate_logits(inputs: Tensor, gate: GateWeights) -> tuple[Tensor, Tensor]:
    """Return the logit of γ [n] before trust, and the weights of the heads [n, H], from `gate_inputs`."""
    inner = torch.tanh(rowwise_matmul(inputs, gate.weight) + gate.bias)
    out = rowwise_matmul(inner, gate.out_weight) + gate.out_bias
    return out[:, 0], torch.softmax(out[:, 1:], dim=1)


def gate_mixture(
    found: Candidates,
    entropy: Tensor,
    keys: Tensor,
    gate: GateWeights,
    session_scalars: Tensor,
    session: Tensor,
    trust: Tensor,
) -> GatedMixture:
    """Return p_mem and its weight γ (equation L5); arguments as in `MemoryBackend.gate_mixture`."""
    logit, heads = gate_logits(gate_inputs(found, entropy, keys), gate)
    shares = (heads[:, :, None] * found.shares).sum(1)
    scalars = session_scalars[session, :, found.ngram_matches]
    logit = logit + scalars[:, TRUST] + trust.gather(1, found.ngram_matches[:, None])[:, 0]
    unguarded_gamma = torch.sigmoid(logit).clamp_max(MAX_GAMMA) * shares.any(-1)
    return GatedMixture(shares, unguarded_gamma * (scalars[:, GATE_CLOSED] == 0), unguarded_gamma)


# --- L6: the mixture ------------------------------------------------------------------------------------------------


def mix(prediction: Prediction, tokens: Tensor, shares: Tensor, gamma: Tensor) -> Tensor:
    """Return log p [n, V] up to a constant per row, p = (1 − γ)·p_LM + γ·p_mem (equation L6).

    Only the logits of p_mem's tokens change; a row with γ = 0 keeps the bits of all its logits (law 1). p_mem is given
    as shares [n, K] of tokens [n, K] long, which may repeat.
    """
    share = torch.zeros_like(prediction.logits).scatter_add_(1, tokens, shares).gather(1, tokens)
    at = prediction.log_prob(tokens) + torch.log1p(-gamma)[:, None]
    gain = torch.logaddexp(at, (gamma[:, None] * share).log()) - at
    # A token that occurs more than once gets the same score each time.
    return prediction.logits.scatter(1, tokens, prediction.logits.gather(1, tokens) + gain)


def memory_prob(targets: Tensor, tokens: Tensor, shares: Tensor) -> Tensor:
    """Return p_mem(target) [n] from shares [n, K] of tokens [n or 1, K]."""
    return (shares * (tokens == targets[:, None])).sum(-1)


def target_log_prob(unmixed_log_probs: Tensor, memory_probs: Tensor, gamma: Tensor) -> Tensor:
    """Return log p(target) [n] under the mixture without the [n, V] logits (equation L6).

    unmixed_log_probs: log p_LM of the targets [n]. memory_probs: p_mem of the targets [n].
    """
    mixed = torch.logaddexp(unmixed_log_probs + torch.log1p(-gamma), (gamma * memory_probs).log())
    return torch.where(gamma > 0, mixed, unmixed_log_probs)


# --- S1: the gradient of trust --------------------------------------------------------------------------------------


def trust_gradient(unmixed_log_probs: Tensor, adapted: Tensor, memory_probs: Tensor, gamma: Tensor) -> Tensor:
    """Return ∂ log p_t / ∂ trust = γ_t (1 − γ_t) (p_mem − p_LM)(target) / p_t [n] (equation S1).

    unmixed_log_probs and adapted: log-probabilities [n] of the targets. memory_probs: p_mem of the targets [n].
    """
    odds = (memory_probs - unmixed_log_probs.exp()) / adapted.exp().clamp_min(TINY)
    return gamma * (1.0 - gamma) * odds


# --- L7: the write --------------------------------------------------------------------------------------------------


def assign_cells(cells: Tensor, num_empty_rows: Tensor) -> Tensor:
    """Return the cell [n] to which each token is written (equation L7).

    A token goes to the nearest of its cells [n, k] in which the tokens before it left an empty row, or to the nearest
    of all if all are full. num_empty_rows: [n, k], empty rows of these cells before the block.
    """
    left: dict[int, int] = {}
    chosen = []
    for near, num_empty in zip(cells.tolist(), num_empty_rows.tolist(), strict=True):
        left.update((cell, free) for cell, free in zip(near, num_empty, strict=True) if cell not in left)
        cell = next((cell for cell in near if left[cell] > 0), near[0])
        left[cell] -= 1
        chosen.append(cell)
    return torch.tensor(chosen, dtype=torch.long, device=cells.device)


def write_lexical(old: LexicalRows, at: Tensor, keys: Tensor, ngram_hashes: Tensor, targets: Tensor) -> LexicalRows:
    """Return the cells [U, P] after one block's write: each token takes one row, an empty one or the oldest (L7).

    old: the touched cells [U, P]. at: [n], index into these of each token's cell, in the order of the tokens.
    keys: int8 [n, d_k]. ngram_hashes: int16 [n, R]. targets: long [n].
    """
    P, device = old.ages.shape[1], at.device
    at, order = at.sort(stable=True)
    rank = torch.arange(len(at), device=device) - torch.searchsorted(at, at)  # a cell's first, second, … write
    count = torch.bincount(at, minlength=len(old.ages))[at]
    surviving = rank >= count - P  # the others would be overwritten in this block
    at, rank, order = at[surviving], rank[surviving], order[surviving]
    row = old.ages.argsort(dim=1, stable=True)[at, rank % P]
    new = LexicalRows(*(part.clone() for part in old))
    new.ages[at, row] = old.ages.amax(dim=1)[at] + 1 + rank.int()
    new.tokens[at, row] = targets[order].int()
    new.ngram_hashes[at, row] = ngram_hashes[order]
    new.keys[at, row] = keys[order]
    return new
