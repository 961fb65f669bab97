"""Address, read and write of the memory: pure functions, batched over tokens. Their twins are in `naive.py`.

Letters: n tokens, N slots, k slots or cells a token, d hidden size, V vocabulary, P rows a lexical cell, d_k numbers of
their keys, R runs of tokens that end a context, K = k·P candidates a token, H heads, d_v width of a hidden row, U
touched cells.

The formulation is Imprint's own: product keys as in Lample et al. 2019 (arXiv 1907.05242), fast weights written
sparsely after the idea of Sparse Meta Networks (arXiv 2009.01803); the lexical site is a neural cache (arXiv
1612.04426) of constant size and cost, whose entries lie in the cells of an inverted file (Jégou et al. 2011).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.device import load, upload
from model.memory.config import GATE_CLOSED, NGRAM_SIZES, TRUST

TINY = torch.finfo(torch.float32).tiny
GUARD_DECAY_TOKENS, GUARD_LIMIT_NATS = 1024, 8.0
MAX_GAMMA = 1.0 - 1e-6  # of γ: however sure a memory is, it makes no token impossible
KEY_SCALE = 254  # of a key's component, between −0.5 and 0.5
QUERY_SCALE = 32767  # of a query's component: products with keys, and sums of them, are then whole and below 2²⁴
SIMILARITY_STEP = 1.0 / (KEY_SCALE * QUERY_SCALE)
HASH_MULTIPLIER = -7046029254386353131  # 2⁶⁴ / φ: odd, its powers spread tokens over 64 bits


class LexicalRows(NamedTuple):
    """Cells of lexical rows: `ages` int32 [..., P] (0 = no row, else the higher the younger), `tokens` int32 [..., P],
    and of the contexts that they followed `ngram_hashes` int16 [..., P, R] and `keys` int8 [..., P, d_k]."""

    ages: Tensor
    tokens: Tensor
    ngram_hashes: Tensor
    keys: Tensor


class RowMatches(NamedTuple):
    """The K rows in the cells of each of n contexts, beside that context: their tokens [n, K] long, the cosine [n, K]
    of their keys and its key, how many of its runs they repeat [n, K] long, and where there is no row [n, K]."""

    tokens: Tensor
    cosines: Tensor
    ngram_matches: Tensor
    missing: Tensor


class Candidates(NamedTuple):
    """What a lexical read found: tokens [n, K] long (one may come more than once), p_mem as seen by each of H heads as
    shares [n, H, K] of them (they sum to 1, or are all 0 where nothing was found), evidence [n, (4 + R)·H] of how far
    to believe each head, and repeats [n] long: how many runs of its context the first head's best match repeats."""

    tokens: Tensor
    shares: Tensor
    gate_features: Tensor
    ngram_matches: Tensor


class HeadParams(NamedTuple):
    """What H heads think of rows: sharpness [H] of likeness, prior [H], the exponent of p_LM, and a bonus [H, R] for
    each run of the context that is repeated."""

    sharpness: Tensor
    prior: Tensor
    bonus: Tensor


class GateWeights(NamedTuple):
    """The small network that judges what was found: from E inputs (`gate_inputs`) to the logit of γ and H heads by way
    of G numbers; weight [E, G], bias [G], out_weight [G, 1 + H], out_bias [1 + H]."""

    weight: Tensor
    bias: Tensor
    out_weight: Tensor
    out_bias: Tensor


class GatedMixture(NamedTuple):
    """How far what was found is believed: p_mem as shares [n, K], the weight γ [n] that counts, and the one that would
    if the session's guards were open."""

    shares: Tensor
    gamma: Tensor
    unguarded_gamma: Tensor


class Prediction(NamedTuple):
    """What the base says of n next tokens: logits [n, V], log Σ exp(logits) [n] and the entropy [n] (nats)."""

    logits: Tensor
    log_z: Tensor
    entropy: Tensor

    def log_prob(self, tokens: Tensor) -> Tensor:
        """log p_LM of tokens [n] or [n, K], long."""
        if tokens.dim() == 1:
            return self.log_prob(tokens[:, None])[:, 0]
        return self.logits.gather(1, tokens) - self.log_z[:, None]

    def select(self, mask: Tensor) -> Prediction:
        """The prediction of some of the tokens; mask [n]."""
        return Prediction(*(part[mask] for part in self))


def predict(logits: Tensor) -> Prediction:
    """logits [n, V] → what they say."""
    probs = torch.softmax(logits, -1)
    log_z = logits.amax(-1) - probs.amax(-1).log()
    # Several threads share the sum of a lone row, and round it differently; two rows are each summed whole.
    pair = (probs.expand(2, -1), logits.expand(2, -1)) if len(logits) == 1 else (probs, logits)
    return Prediction(logits, log_z, log_z - torch.linalg.vecdot(*pair)[: len(logits)])


def rowwise_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight for x [n, a], weight [a, b], each row rounded as if it were alone: no neighbours, not in the last bit.

    Where gradients must reach the weight it is the plain product, whose backward does not need n copies of the weight.
    """
    if weight.requires_grad and torch.is_grad_enabled():
        return x @ weight
    return torch.bmm(x[:, None], weight.expand(len(x), -1, -1))[:, 0]


def product_key_topk(keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Product-key top-k: the slots [n, k] long that a token selects and their scores, the highest first.

    keys [n, 2, √N]: the two halves of s. Slot i·√N + j scores s1_i + s2_j.
    """
    side = keys.shape[-1]
    m = min(k, side)
    top1, index1 = keys[:, 0].topk(m)
    top2, index2 = keys[:, 1].topk(m)
    scores, best = (top1[:, :, None] + top2[:, None, :]).flatten(1).topk(k)
    return index1.gather(1, best // m) * side + index2.gather(1, best % m), scores


def address(keys: Tensor, k: int, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """`product_key_topk` slots [n, k] and w = a / ‖a‖₂ [n, k], a = softmax(temperature · their scores)."""
    slots, scores = product_key_topk(keys, k)
    a = torch.softmax(temperature * scores, dim=-1)
    return slots, a / a.norm(dim=-1, keepdim=True)


# --- lexical rows ---------------------------------------------------------------------------------------------------


def quantise_keys(keys: Tensor) -> Tensor:
    """Unit vectors [..., d_k] as int8, in steps of 1 / KEY_STEPS; components beyond ±0.5 are clipped."""
    return (keys * KEY_SCALE).round().clamp(-127, 127).to(torch.int8)


def hash_ngrams(token_ids: Tensor) -> Tensor:
    """int16 [n, R] of the last 2, 4, 8 of token_ids [..., 7 + n] at each of n places; 0 where a run begins before its
    request does, which ids of −1 stand for. Equal runs have equal ones, others differ but for one time in 65,535."""
    return hash_last_ngrams(token_ids.unfold(0, max(NGRAM_SIZES), 1))


def hash_last_ngrams(last_tokens_batch: Tensor) -> Tensor:
    """`hash_ngrams` [n, R] at the ends of n sequences, of their last tokens [n, 8] each."""
    window = last_tokens_batch.flip(1)
    powers = torch.full((max(NGRAM_SIZES),), HASH_MULTIPLIER, device=last_tokens_batch.device).cumprod(0)
    sums = _at_ngram_ends(((window + 1) * powers).cumsum(1))
    # The high bits of a product depend on all bits below them.
    ngram_hashes = (((sums ^ (sums >> 29)) * HASH_MULTIPLIER) >> 48).to(torch.int16)
    whole = _at_ngram_ends(window) >= 0
    return torch.where(ngram_hashes == 0, torch.ones_like(ngram_hashes), ngram_hashes) * whole


def _at_ngram_ends(values: Tensor) -> Tensor:
    """Of values [n, 8] by distance, those at which a run ends [n, R]. A list as an index would wait for the device."""
    return torch.stack([values[:, ngram_size - 1] for ngram_size in NGRAM_SIZES], dim=1)


def hash_request_ngrams(targets: Tensor, bos: int) -> Tensor:
    """`hash_ngrams` [n, R] of what stands before each target [n] of a request that began with `bos`."""
    return hash_ngrams(torch.cat([targets.new_tensor([-1] * (max(NGRAM_SIZES) - 1) + [bos]), targets[:-1]]))


def count_ngram_matches(ngram_hashes: Tensor, context: Tensor) -> Tensor:
    """How many runs (0 … R) of a context are repeated: int16 prints [..., R] of rows, context [..., R]."""
    return ((ngram_hashes == context) & (context != 0)).sum(-1)


def scale_query(query: Tensor) -> Tensor:
    """Queries [..., d_k] of unit length in whole steps of 1 / QUERY_STEPS: fp32 then sums their products with keys
    exactly, so likeness is the same to the last bit in any order, batch and kernel."""
    return (query.float() * QUERY_SCALE).round()


def similarity(rows: LexicalRows, query: Tensor) -> Tensor:
    """⟨query, key⟩ [n, K] of the rows [n, k, P] of the addressed cells; query [n, d_k] of unit length."""
    keys = rows.keys.flatten(1, 2).float()
    return torch.bmm(scale_query(query)[:, None], keys.transpose(1, 2))[:, 0] * SIMILARITY_STEP


def match_rows(rows: LexicalRows, query: Tensor, context: Tensor) -> RowMatches:
    """The rows [n, k, P] of the addressed cells, beside a query [n, d_k] of unit length and the fingerprints of a
    context [n, R]."""
    ngram_matches = count_ngram_matches(rows.ngram_hashes.flatten(1, 2), context[:, None])
    return RowMatches(rows.tokens.flatten(1).long(), similarity(rows, query), ngram_matches, rows.ages.flatten(1) == 0)


def cumulative_bonus(bonus: Tensor) -> Tensor:
    """What a row earns with each head by the number of runs that it repeats [H, R + 1]; bonus [H, R]."""
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
    """Each head's p_mem(x) ∝ p_LM(x)^prior · Σ exp(sharpness · ⟨query, key⟩ + Σ bonus), over the rows of token x in k
    cells; a bonus for each run of the context that is repeated.

    With it, the evidence for each head: log Σ exp(score), the cosine and the agreement (what share of the head goes to
    the same token) of its best match, and the log of that, all scaled to about 1, and which runs of the context that
    match repeats.

    tokens [n or 1, K] long; cosines, repeats, log_probs (of p_LM) and missing [n, K]; sharpness and prior [H]; bonus
    [H, R].
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
    same = torch.where(known[:, :, 0], ngram_matches.gather(1, at[:, :, 0]), torch.zeros_like(at[:, :, 0]))
    matched_ngrams = [(same > i).to(cosine.dtype) for i in range(bonus.shape[1])]
    gate_features = torch.stack(
        [log_total / 10, cosine, agreement, (agreement + 1e-4).log() / 3, *matched_ngrams], dim=-1
    )
    return Candidates(tokens, shares, gate_features.flatten(1), same[:, 0])


def score_row_matches(rows: RowMatches, base: Prediction, head_params: HeadParams) -> Candidates:
    """`score_candidates`, of rows beside a context for which the base predicts `base`."""
    return score_candidates(*rows[:3], base.log_prob(rows.tokens), rows.missing, *head_params)


def gate_inputs(found: Candidates, entropy: Tensor, keys: Tensor) -> Tensor:
    """What a gate looks at [n, (4 + R)·H + 1 + d_k]; entropy [n] of the base, keys [n, d_k]."""
    return torch.cat([found.gate_features, entropy[:, None] / 4, keys], dim=1)


def gate_logits(inputs: Tensor, gate: GateWeights) -> tuple[Tensor, Tensor]:
    """The logit of γ [n] before trust, and the heads' weights [n, H], from `gate_inputs`."""
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
    """How far to believe what sessions [n] of `session_scalars` [S, 3, R + 1] hold; trust [n, R + 1] of the requests,
    and the rest as in `gate_inputs`."""
    logit, heads = gate_logits(gate_inputs(found, entropy, keys), gate)
    shares = (heads[:, :, None] * found.shares).sum(1)
    mine = session_scalars[session, :, found.ngram_matches]
    logit = logit + mine[:, TRUST] + trust.gather(1, found.ngram_matches[:, None])[:, 0]
    unguarded_gamma = torch.sigmoid(logit).clamp_max(MAX_GAMMA) * shares.any(-1)
    return GatedMixture(shares, unguarded_gamma * (mine[:, GATE_CLOSED] == 0), unguarded_gamma)


def mix(base: Prediction, tokens: Tensor, shares: Tensor, gamma: Tensor) -> Tensor:
    """log p [n, V] up to a constant a row, p = (1 − γ)·p_LM + γ·p_mem: logits that change at p_mem's tokens alone.

    Rows with γ = 0 keep them all, bit for bit. p_mem: shares [n, K] of tokens [n, K] long, which may repeat.
    """
    share = torch.zeros_like(base.logits).scatter_add_(1, tokens, shares).gather(1, tokens)
    at = base.log_prob(tokens) + torch.log1p(-gamma)[:, None]
    gain = torch.logaddexp(at, (gamma[:, None] * share).log()) - at
    # A token that comes more than once gets the same score each time.
    return base.logits.scatter(1, tokens, base.logits.gather(1, tokens) + gain)


def memory_prob(targets: Tensor, tokens: Tensor, shares: Tensor) -> Tensor:
    """p_mem(target) [n] from shares [n, K] of tokens [n or 1, K]."""
    return (shares * (tokens == targets[:, None])).sum(-1)


def target_log_prob(frozen: Tensor, memory_probs: Tensor, gamma: Tensor) -> Tensor:
    """log p(target) [n] under the mixture, from the target's frozen log-probability and p_mem: no [n, V] needed."""
    mixed = torch.logaddexp(frozen + torch.log1p(-gamma), (gamma * memory_probs).log())
    return torch.where(gamma > 0, mixed, frozen)


def trust_gradient(frozen: Tensor, adapted: Tensor, memory_probs: Tensor, gamma: Tensor) -> Tensor:
    """∂ log p_t / ∂ bias = γ_t (1 − γ_t) (p_mem − p_LM)(target) / p_t [n]: how each token judges the gate.

    frozen and adapted: log-probabilities [n] of the targets; in_memory: their p_mem [n].
    """
    odds = (memory_probs - frozen.exp()) / adapted.exp().clamp_min(TINY)
    return gamma * (1.0 - gamma) * odds


def assign_cells(cells: Tensor, num_empty_rows: Tensor) -> Tensor:
    """Where each token is written [n]: the nearest of its cells [n, k] in which the tokens before it left an empty row;
    the nearest of all if there is none. room [n, k]: the empty rows of these cells before the block."""
    left: dict[int, int] = {}
    chosen = []
    for mine, num_empty in zip(cells.tolist(), num_empty_rows.tolist(), strict=True):
        left.update((cell, free) for cell, free in zip(mine, num_empty, strict=True) if cell not in left)
        cell = next((cell for cell in mine if left[cell] > 0), mine[0])
        left[cell] -= 1
        chosen.append(cell)
    return torch.tensor(chosen, dtype=torch.long, device=cells.device)


def write_lexical(old: LexicalRows, at: Tensor, keys: Tensor, ngram_hashes: Tensor, targets: Tensor) -> LexicalRows:
    """One block's write: each token takes one row of its cell, an empty one or the oldest.

    old [U, P]: the touched cells; at [n]: index into them of each token's cell, in the tokens' order; keys [n, d_k]
    int8; prints [n, R] int16; targets [n] long. Returns the new cells [U, P].
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


def guard_step(balance: Tensor, closed: Tensor, gain: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Law 12, never worse for long: counts a session's gain over the frozen base, and says whether its gate is shut.

    balance: the summed gain (nats) of what was learned, fading over GUARD_TOKENS and at most GUARD_NATS, so that no
    text earns a credit for later harm; gain: that of the next `tokens`, with the gate open. A gate shuts (1.0) when
    the balance falls below −GUARD_NATS and opens (0.0) when it is above 0.
    """
    balance = (balance * (1.0 - 1.0 / GUARD_DECAY_TOKENS) ** tokens + gain).clamp_max(GUARD_LIMIT_NATS)
    return balance, torch.where(balance < -GUARD_LIMIT_NATS, torch.ones_like(closed), closed * (balance <= 0))


# --- rows as bytes --------------------------------------------------------------------------------------------------


def as_bytes(values: Tensor) -> Tensor:
    """Rows [..., w] of numbers as uint8 [..., bytes of a row]."""
    # A copy: `contiguous` would leave no or one row with strides that `view` refuses.
    return values.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def load_rows(fields: Sequence[Tensor], physical_cells: Tensor, cell: Tensor, row: Tensor, data: Tensor) -> None:
    """Puts stored rows, data uint8 [n, row_bytes] of the host, into fields, each [C, P, w]: row `row` [n] of the cell
    at places[cell [n]]. What else is in the cells at `physical_cells` [m] becomes 0."""
    P, device = fields[0].shape[1], fields[0].device
    rows = data.new_zeros(len(physical_cells) * P, data.shape[1])
    rows[cell * P + row] = data
    physical_cells, parts = (
        upload(physical_cells, device),
        load(rows, device).split([field[0, 0].nbytes for field in fields], dim=1),
    )
    for field, part in zip(fields, parts, strict=True):
        field[physical_cells] = as_bytes(part).view(field.dtype).view(len(physical_cells), *field.shape[1:])


# --- hidden rows ----------------------------------------------------------------------------------------------------


def _weighted_read(rows: Tensor, w: Tensor) -> Tensor:
    """Σ_i w_i·M_i [n, d_v]; rows [n, k, d_v], w [n, k]."""
    return torch.einsum("nk,nkv->nv", w, rows)


def read_delta(rows: Tensor, w: Tensor) -> Tensor:
    """o = norm(Σ_i w_i·M_i) [n, d_v] with norm(0) = 0; rows [n, k, d_v], w [n, k]."""
    o = _weighted_read(rows, w)
    square = o.square().mean(-1, keepdim=True)  # the root of an exact 0 has no gradient
    return torch.where(square > 0, o / square.clamp_min(1e-12).sqrt(), torch.zeros_like(o))


def delta_read_magnitude(rows: Tensor, w: Tensor) -> Tensor:
    """How much `read_delta` leaves out: log(1 + rms(Σ_i w_i·M_i)) [n]; rows [n, k, d_v], w [n, k]."""
    square = _weighted_read(rows, w).square().mean(-1)
    return torch.where(square > 0, square.clamp_min(TINY).sqrt().log1p(), torch.zeros_like(square))


def write_delta(
    old: Tensor, at: Tensor, w: Tensor, beta: Tensor, values: Tensor, *, decay: float, cap: float
) -> Tensor:
    """One block's delta rule: M_i ← M_i + Σ_t β_t/c_t · w_ti (v_t − λ Σ_j w_tj M_j), then ‖M_i‖ ≤ cap.

    old [U, d_v]; at [n, k] index into old; w [n, k]; beta [n]; values [n, d_v]; λ = decay. c_t = max(1, Σ_u w_t·w_u)
    counts the tokens of the block that crowd at t's address. Those of one address thus write their mean, and no
    eigenvalue of c⁻¹WWᵀ is above 1: a block of any size is stable. Returns the new rows [U, d_v].
    """
    error = values - decay * _weighted_read(old[at], w)
    row = at.flatten()
    address_load = torch.zeros(len(old), dtype=old.dtype, device=old.device).index_add_(0, row, w.flatten())
    collisions = (w * address_load[at]).sum(-1).clamp_min(1.0)
    steps = (beta / collisions)[:, None, None] * w[:, :, None] * error[:, None, :]
    new = old.index_add(0, row, steps.flatten(0, 1))
    norms: Tensor = new.norm(dim=-1, keepdim=True)
    return new * (cap / norms.clamp_min(cap))
