"""The reference of the lexical memory's backends: the same equations, one token and one row at a time, in plain loops.

The reference is slow on purpose and is the definition: where a backend and this file disagree, this file is right.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from model.memory.config import GATE_CLOSED, TRUST
from model.memory.lexical.types import (
    HASH_MULTIPLIER,
    MAX_GAMMA,
    NGRAM_SIZES,
    QUERY_SCALE,
    SIMILARITY_STEP,
    Candidates,
    GatedMixture,
    GateWeights,
    LexicalRows,
)
from model.memory.prediction import Prediction


def hash_ngrams(token_ids: Tensor) -> Tensor:
    """Return the hashes [n, R] of the n-grams at each position, in Python's own integers (equation L1); the argument is
    that of `ops.hash_ngrams`."""
    out = []
    for end in range(max(NGRAM_SIZES), len(token_ids) + 1):
        ngram_hashes = []
        for ngram_size in NGRAM_SIZES:
            last = token_ids[end - ngram_size : end].tolist()[::-1]
            total = sum((token + 1) * pow(HASH_MULTIPLIER, j + 1) for j, token in enumerate(last)) % 2**64
            signed = total - 2**64 if total >= 2**63 else total
            high = ((signed ^ (signed >> 29)) * HASH_MULTIPLIER) % 2**64 >> 48
            ngram_hash = high - 2**16 if high >= 2**15 else high
            ngram_hashes.append(0 if -1 in last else ngram_hash or 1)
        out.append(ngram_hashes)
    return torch.tensor(out, dtype=torch.int16).view(-1, len(NGRAM_SIZES))


def nearest_cells(keys: Tensor, centres: Tensor, k: int) -> Tensor:
    """Return the k cells [n, k] nearest to each key [n, d_k], one dot product at a time (equation L2)."""
    out = []
    for key in keys.tolist():
        scores = [sum(a * b for a, b in zip(key, centre, strict=True)) for centre in centres.tolist()]
        out.append(sorted(range(len(scores)), key=lambda cell: -scores[cell])[:k])
    return torch.tensor(out, dtype=torch.long)


def read_lexical(
    rows: LexicalRows,
    query: Tensor,
    context: Tensor,
    prediction: Prediction,
    sharpness: Tensor,
    prior: Tensor,
    bonus: Tensor,
) -> Candidates:
    """Return the candidates, row by row (equations L3 and L4); arguments and result as in `ops.match_rows`
    and `ops.score_candidates`."""
    n, k, P = rows.tokens.shape
    heads, log_probs = len(sharpness), prediction.logits.log_softmax(-1)
    tokens, shares = rows.tokens.flatten(1).long(), torch.zeros(n, heads, k * P, dtype=query.dtype)
    num_ngrams, ngram_matches = context.shape[1], torch.zeros(n, dtype=torch.long)
    gate_features = torch.zeros(n, heads, 4 + num_ngrams, dtype=query.dtype)
    gate_features[:, :, 3] = math.log(1e-4) / 3
    for t, h in itertools.product(range(n), range(heads)):
        scaled_query, found = (query[t].float() * QUERY_SCALE).round(), []
        for candidate in range(k * P):
            i, row = divmod(candidate, P)
            if rows.ages[t, i, row] > 0:
                cosine = float(scaled_query @ rows.keys[t, i, row].float()) * SIMILARITY_STEP
                pairs = zip(rows.ngram_hashes[t, i, row].tolist(), context[t].tolist(), strict=True)
                matches = sum(stored == wanted and wanted != 0 for stored, wanted in pairs)
                score = float(sharpness[h]) * cosine + float(prior[h]) * float(log_probs[t, tokens[t, candidate]])
                score += float(bonus[h, :matches].sum())
                found.append((score, cosine, matches, candidate))
        if not found:
            continue
        total = math.log(sum(math.exp(score) for score, *_ in found))
        for score, *_, candidate in found:
            shares[t, h, candidate] = math.exp(score - total)
        _, cosine, matches, best = max(found, key=lambda item: item[0])
        agreement = float(
            sum(shares[t, h, candidate] for *_, candidate in found if tokens[t, candidate] == tokens[t, best])
        )
        matched_ngrams = [float(matches > j) for j in range(num_ngrams)]
        gate_features[t, h] = torch.tensor(
            [total / 10, cosine, agreement, math.log(agreement + 1e-4) / 3, *matched_ngrams]
        )
        if h == 0:
            ngram_matches[t] = matches
    return Candidates(tokens, shares, gate_features.flatten(1), ngram_matches)


def gate_mixture(
    found: Candidates,
    entropy: Tensor,
    keys: Tensor,
    gate: GateWeights,
    session_scalars: Tensor,
    session: Tensor,
    trust: Tensor,
) -> GatedMixture:
    """Return p_mem and γ, one token at a time (equation L5); arguments as in `MemoryBackend.gate_mixture`."""
    n, heads, K = found.shares.shape
    shares, gamma, unguarded_gamma = torch.zeros(n, K), torch.zeros(n), torch.zeros(n)
    for t in range(n):
        inputs = [*found.gate_features[t].tolist(), float(entropy[t]) / 4, *keys[t].tolist()]
        inner = [
            math.tanh(float(bias) + sum(x * float(w) for x, w in zip(inputs, column, strict=True)))
            for bias, column in zip(gate.bias, gate.weight.T, strict=True)
        ]
        logit, *head_logits = [
            float(bias) + sum(x * float(w) for x, w in zip(inner, column, strict=True))
            for bias, column in zip(gate.out_bias, gate.out_weight.T, strict=True)
        ]
        total = sum(math.exp(head_logit) for head_logit in head_logits)
        for h in range(heads):
            shares[t] += math.exp(head_logits[h]) / total * found.shares[t, h]
        scalars, matches = session_scalars[session[t]], int(found.ngram_matches[t])
        logit += float(scalars[TRUST, matches]) + float(trust[t, matches])
        if shares[t].any():
            unguarded_gamma[t] = min(1 / (1 + math.exp(-logit)), MAX_GAMMA)
        if scalars[GATE_CLOSED, matches] == 0:
            gamma[t] = unguarded_gamma[t]
    return GatedMixture(shares, gamma, unguarded_gamma)


def mix(prediction: Prediction, tokens: Tensor, shares: Tensor, gamma: Tensor) -> Tensor:
    """Return log p [n, V] over the whole vocabulary, one token at a time (equation L6)."""
    out = prediction.logits.clone()
    for t in range(len(out)):
        if gamma[t] > 0:
            memory = torch.zeros_like(out[t])
            for token, share in zip(tokens[t].tolist(), shares[t], strict=True):
                memory[token] += share
            out[t] = ((1 - gamma[t]) * torch.softmax(prediction.logits[t], -1) + gamma[t] * memory).log()
    return out


def assign_cells(cells: Tensor, num_empty_rows: Tensor) -> Tensor:
    """Return the cell of each token, token by token (equation L7); arguments as in `ops.assign_cells`."""
    chosen: list[int] = []
    for near, num_empty in zip(cells.tolist(), num_empty_rows.tolist(), strict=True):
        empty = [cell for cell, rows in zip(near, num_empty, strict=True) if chosen.count(cell) < rows]
        chosen.append(empty[0] if empty else near[0])
    return torch.tensor(chosen, dtype=torch.long)


def write_lexical(old: LexicalRows, at: Tensor, keys: Tensor, ngram_hashes: Tensor, targets: Tensor) -> LexicalRows:
    """Return the cells [U, P] after each token's write (equation L7); arguments as in `ops.write_lexical`."""
    new = LexicalRows(*(part.clone() for part in old))
    for t in range(len(at)):
        ages = new.ages[at[t]].tolist()
        row = ages.index(min(ages))
        new.ages[at[t], row] = max(ages) + 1
        new.tokens[at[t], row] = int(targets[t])
        new.ngram_hashes[at[t], row] = ngram_hashes[t]
        new.keys[at[t], row] = keys[t]
    return new
