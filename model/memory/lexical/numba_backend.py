"""The Numba backend of the lexical memory, for CPUs: the equations of `ops.py`, compiled.

Numba keeps the machine code of a function in this file's folder or in the user's cache. Each row is computed alone and
in one order, so its bits depend neither on the other rows of the batch nor on the number of threads (law 4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from model.memory.config import GATE_CLOSED, TRUST
from model.memory.lexical.types import (
    HASH_MULTIPLIER,
    MAX_GAMMA,
    NGRAM_SIZES,
    QUERY_SCALE,
    SIMILARITY_STEP,
    AddressWeights,
    Candidates,
    GatedMixture,
    GateWeights,
    HeadParams,
)
from model.memory.prediction import Prediction
from model.numba_support import MIN_EXP_INPUT, Array, as_arrays, cached_njit, exp, log, parallel_rows, row_max


class NumbaBackend:
    """The memory's kernels as machine code for CPUs. `MemoryBackend` states the contract of each method."""

    name = "numba"

    def load_rows(
        self, fields: Sequence[Tensor], physical_cells: Tensor, cell: Tensor, row: Tensor, data: Tensor
    ) -> None:
        first = 0
        for field in fields:
            part = field.view(torch.uint8)
            # One thread: the other cores have work while a session is loaded.
            _load_rows(first, *as_arrays(part, physical_cells, cell, row, data))
            first += part.shape[2]

    def find_candidates(
        self,
        tables: Tensor,
        fields: Sequence[Tensor],
        session: Tensor,
        cells: Tensor,
        query: Tensor,
        context: Tensor,
        prediction: Prediction,
        head_params: HeadParams,
    ) -> tuple[Candidates, Tensor]:
        n, K, (H, R) = len(cells), cells.shape[1] * fields[0].shape[1], head_params.bonus.shape
        tokens, ngram_matches = torch.empty(n, K, dtype=torch.long), torch.empty(n, dtype=torch.long)
        num_empty_rows = torch.empty(cells.shape, dtype=torch.long)
        shares, gate_features = (torch.zeros(n, H, size, dtype=prediction.logits.dtype) for size in (K, 4 + R))
        inputs = (tables, *fields, session, cells, query, context, prediction.logits, prediction.log_z, *head_params)
        outputs = (tokens, shares, gate_features, ngram_matches, num_empty_rows)
        parallel_rows(_find, n, *as_arrays(*inputs, *outputs))
        return Candidates(tokens, shares, gate_features.flatten(1), ngram_matches), num_empty_rows

    def gate_mixture(
        self,
        found: Candidates,
        entropy: Tensor,
        keys: Tensor,
        gate: GateWeights,
        session_scalars: Tensor,
        session: Tensor,
        trust: Tensor,
    ) -> GatedMixture:
        n, _, K = found.shares.shape
        gated = GatedMixture(*(entropy.new_empty(size) for size in ((n, K), (n,), (n,))))
        inputs = (*found[1:], entropy, keys, *gate, session_scalars, session, trust)
        parallel_rows(_gate_mixture, n, *as_arrays(*inputs, *gated))
        return gated

    def mixture(
        self,
        tables: Tensor,
        fields: Sequence[Tensor],
        session_scalars: Tensor,
        address: AddressWeights,
        k: int,
        head_params: HeadParams,
        gate: GateWeights,
        session: Tensor,
        hidden: Tensor,
        last_tokens: Tensor,
        trust: Tensor,
        logits: Tensor,
    ) -> Tensor:
        # One call replaces some forty torch operators, which are small and find their data cold.
        logits = logits.contiguous()
        site = (tables, *fields, session_scalars, *address, *head_params, *gate)
        requests = (session, hidden.float(), last_tokens, trust)
        parallel_rows(partial(_mixture, k), len(logits), *as_arrays(*site, *requests, logits))
        return logits

    def write(
        self,
        fields: Sequence[Tensor],
        old: Tensor,
        new: Tensor,
        at: Tensor,
        keys: Tensor,
        ngram_hashes: Tensor,
        targets: Tensor,
    ) -> None:
        _write(*as_arrays(*fields, old, new, at, keys, ngram_hashes, targets))


@cached_njit
def _predict(logits: Array, log_z: Array, entropy: Array) -> None:
    """Compute log_z and entropy [n] of logits [n, V], as `prediction.base_prediction` does."""
    for t in range(len(logits)):
        row = logits[t]
        top, total, weighted = row_max(row), np.float32(0.0), np.float32(0.0)
        for i in range(len(row)):
            below = row[i] - top
            p = exp(below)
            total += p
            weighted += p * below
        log_z[t], entropy[t] = top + math.log(total), math.log(total) - weighted / total


@cached_njit
def _find(
    first: int,
    last: int,
    tables: Array,
    ages: Array,
    tokens: Array,
    ngram_hashes: Array,
    keys: Array,
    session: Array,
    cells: Array,
    query: Array,
    context: Array,
    logits: Array,
    log_z: Array,
    sharpness: Array,
    prior: Array,
    bonus: Array,
    out_tokens: Array,
    out_shares: Array,
    out_gate_features: Array,
    out_ngram_matches: Array,
    out_num_empty_rows: Array,
) -> None:
    """Compute equations L3 and L4 for the contexts first … last, in one pass over the rows of each."""
    k, P, R, D = cells.shape[1], keys.shape[1], ngram_hashes.shape[2], keys.shape[2]
    K, step, scaled_query = k * P, np.float32(SIMILARITY_STEP), np.empty(D, np.int16)
    cosines, ngram_matches, log_probs = np.empty(K, np.float32), np.empty(K, np.int64), np.empty(K, logits.dtype)
    cumulative_bonus = np.zeros((len(bonus), R + 1), bonus.dtype)
    for r in range(R):
        cumulative_bonus[:, r + 1] = cumulative_bonus[:, r] + bonus[:, r]
    for t in range(first, last):
        for d in range(D):
            scaled_query[d] = np.int16(np.rint(query[t, d] * np.float32(QUERY_SCALE)))
        for j in range(k):
            physical_cell, empty = tables[session[t], cells[t, j]], 0
            for p in range(P):
                at, token = j * P + p, tokens[physical_cell, p]
                out_tokens[t, at] = token
                ngram_matches[at] = -1  # no row
                if ages[physical_cell, p] == 0:
                    empty += 1
                    continue
                matches = 0
                for r in range(R):
                    matches += ngram_hashes[physical_cell, p, r] == context[t, r] and context[t, r] != 0
                ngram_matches[at] = matches
                log_probs[at] = logits[t, token] - log_z[t]
                total = np.int32(0)
                for d in range(D):
                    total += np.int32(np.int32(scaled_query[d]) * np.int32(keys[physical_cell, p, d]))
                cosines[at] = np.float32(total) * step
            out_num_empty_rows[t, j] = empty
        for h in range(len(bonus)):
            shares, gate_features, best = out_shares[t, h], out_gate_features[t, h], -1
            for i in range(K):
                if ngram_matches[i] >= 0:
                    score = sharpness[h] * cosines[i] + prior[h] * log_probs[i] + cumulative_bonus[h, ngram_matches[i]]
                    shares[i] = score
                    if best < 0 or score > shares[best]:
                        best = i
            if h == 0:
                out_ngram_matches[t] = 0 if best < 0 else ngram_matches[best]
            if best < 0:
                gate_features[3] = math.log(np.float32(1e-4)) / np.float32(3.0)
                continue
            top, total_share = shares[best], np.float32(0.0)
            for i in range(K):
                if ngram_matches[i] >= 0:
                    shares[i] = exp(shares[i] - top)
                    total_share += shares[i]
            agreement = np.float32(0.0)
            for i in range(K):
                shares[i] /= total_share
                if out_tokens[t, i] == out_tokens[t, best]:
                    agreement += shares[i]
            gate_features[0] = (top + math.log(total_share)) / np.float32(10.0)
            gate_features[1] = cosines[best]
            gate_features[2] = agreement
            gate_features[3] = math.log(agreement + np.float32(1e-4)) / np.float32(3.0)
            for j in range(R):
                gate_features[4 + j] = ngram_matches[best] > j


@cached_njit
def _gate_mixture(
    first: int,
    last: int,
    shares: Array,
    gate_features: Array,
    ngram_matches: Array,
    entropy: Array,
    keys: Array,
    weight: Array,
    bias: Array,
    out_weight: Array,
    out_bias: Array,
    session_scalars: Array,
    session: Array,
    trust: Array,
    mixed: Array,
    gamma: Array,
    unguarded_gamma: Array,
) -> None:
    """Compute equation L5 for the contexts first … last."""
    H, K, E, D = shares.shape[1], shares.shape[2], gate_features.shape[1], keys.shape[1]
    for t in range(first, last):
        inner, out = bias.copy(), out_bias.copy()
        for e in range(E):
            inner += gate_features[t, e] * weight[e]
        inner += entropy[t] / np.float32(4.0) * weight[E]
        for d in range(D):
            inner += keys[t, d] * weight[E + 1 + d]
        for g in range(len(inner)):
            out += np.tanh(inner[g]) * out_weight[g]
        heads = np.exp(out[1:] - out[1:].max())
        heads /= heads.sum()
        mixed[t] = 0.0
        for h in range(H):
            for i in range(K):
                mixed[t, i] += heads[h] * shares[t, h, i]
        known = mixed[t].sum() > 0
        matches, scalars = ngram_matches[t], session_scalars[session[t]]
        logit = out[0] + scalars[TRUST, matches] + trust[t, matches]
        unguarded_gamma[t] = min(1 / (1 + math.exp(-logit)), MAX_GAMMA) if known else 0.0
        gamma[t] = unguarded_gamma[t] if scalars[GATE_CLOSED, matches] == 0 else 0.0


@cached_njit
def _mix(logits: Array, log_z: float, tokens: Array, shares: Array, gamma: float, by_token: Array) -> None:
    """Mix p_mem into the logits [V] of one context, in place (equation L6); by_token [V] is 0 before and after."""
    distinct, count, without = np.empty(len(tokens), np.int64), 0, math.log1p(-gamma) - log_z
    base, added, more = np.empty((3, len(tokens)), logits.dtype)
    for i in range(len(tokens)):
        if gamma * shares[i] > 0:
            if by_token[tokens[i]] == 0:
                distinct[count] = tokens[i]
                count += 1
            by_token[tokens[i]] += shares[i]
    for i in range(count):
        base[i], added[i] = logits[distinct[i]] + without, gamma * by_token[distinct[i]]
        by_token[distinct[i]] = 0
    for i in range(count):
        least = max(base[i], MIN_EXP_INPUT)
        more[i] = log(np.float32(1.0) + added[i] * exp(-least)) + (least - base[i])
    for i in range(count):
        logits[distinct[i]] += more[i]


@cached_njit
def _hash_last_ngrams(last_tokens: Array, out: Array) -> None:
    """Compute the n-gram hashes [n, R] of last tokens [n, 8] (equation L1)."""
    multiplier = np.int64(HASH_MULTIPLIER)
    for t in range(len(last_tokens)):
        for r in range(len(NGRAM_SIZES)):
            total, power, first = np.int64(0), np.int64(1), last_tokens.shape[1] - NGRAM_SIZES[r]
            for at in range(last_tokens.shape[1] - 1, first - 1, -1):
                power *= multiplier
                total += (last_tokens[t, at] + 1) * power
            high = np.int16(((total ^ (total >> 29)) * multiplier) >> 48)
            out[t, r] = 0 if last_tokens[t, first] < 0 else 1 if high == 0 else high


@cached_njit
def _keys(hidden: Array, weight: Array, bias: Array, out: Array) -> None:
    """Compute the keys [n, d_k] of hidden states [n, d] (equation L1)."""
    for t in range(len(hidden)):
        key, square = out[t], np.float32(0.0)
        key[:] = bias
        for i in range(len(weight)):
            for d in range(len(key)):
                key[d] += hidden[t, i] * weight[i, d]
        for d in range(len(key)):
            square += key[d] * key[d]
        key /= max(np.sqrt(square), np.float32(1e-12))


@cached_njit
def _nearest_cells(keys: Array, centres: Array, out: Array) -> None:
    """Find the k cells [n, k] whose centres are nearest to each key, the nearest first (equation L2)."""
    k = out.shape[1]
    best = np.empty(k, keys.dtype)
    for t in range(len(keys)):
        found = 0
        for cell in range(len(centres)):
            score = np.float32(0.0)
            for d in range(keys.shape[1]):
                score += keys[t, d] * centres[cell, d]
            if found == k and score <= best[k - 1]:
                continue
            at = min(found, k - 1)
            while at > 0 and best[at - 1] < score:
                best[at], out[t, at] = best[at - 1], out[t, at - 1]
                at -= 1
            best[at], out[t, at] = score, cell
            found = min(found + 1, k)


@cached_njit
def _mixture(
    k: int,
    first: int,
    last: int,
    tables: Array,
    ages: Array,
    tokens: Array,
    ngram_hashes: Array,
    keys: Array,
    session_scalars: Array,
    key_weight: Array,
    key_bias: Array,
    centres: Array,
    sharpness: Array,
    prior: Array,
    bonus: Array,
    weight: Array,
    bias: Array,
    out_weight: Array,
    out_bias: Array,
    session: Array,
    hidden: Array,
    last_tokens: Array,
    trust: Array,
    logits: Array,
) -> None:
    """Compute equations L1–L6 for the rows first … last of the logits, in place."""
    K, H, R, one = k * ages.shape[1], len(bonus), bonus.shape[1], (1, k * ages.shape[1])
    log_z, entropy, gamma, unguarded_gamma = np.empty((4, 1), logits.dtype)
    context, query = np.empty((1, R), np.int16), np.empty((1, keys.shape[2]), hidden.dtype)
    cells, num_empty_rows = np.empty((2, 1, k), np.int64)
    found, shares, mixed = np.empty(one, np.int64), np.empty((1, H, K), logits.dtype), np.empty(one, logits.dtype)
    gate_features, ngram_matches = np.empty((1, H, 4 + R), logits.dtype), np.empty(1, np.int64)
    rows, head_params, flat_features = (
        (tables, ages, tokens, ngram_hashes, keys),
        (sharpness, prior, bonus),
        gate_features.reshape(1, -1),
    )
    by_token = np.zeros(logits.shape[1], logits.dtype)
    for t in range(first, last):  # one after the other: a row of logits is still in the cache when it is mixed
        row, sessions, shares[:], gate_features[:] = slice(t, t + 1), session[t : t + 1], 0.0, 0.0
        _predict(logits[row], log_z, entropy)
        _hash_last_ngrams(last_tokens[row], context)
        _keys(hidden[row], key_weight, key_bias, query)
        _nearest_cells(query, centres, cells)
        contexts = (sessions, cells, query, context, logits[row], log_z)
        _find(0, 1, *rows, *contexts, *head_params, found, shares, gate_features, ngram_matches, num_empty_rows)
        gate = (weight, bias, out_weight, out_bias, session_scalars, sessions, trust[row])
        _gate_mixture(0, 1, shares, flat_features, ngram_matches, entropy, query, *gate, mixed, gamma, unguarded_gamma)
        _mix(logits[t], log_z[0], found[0], mixed[0], gamma[0], by_token)


@cached_njit
def _write(
    ages: Array,
    tokens: Array,
    ngram_hashes: Array,
    keys: Array,
    old: Array,
    new: Array,
    at: Array,
    new_keys: Array,
    new_ngram_hashes: Array,
    targets: Array,
) -> None:
    """Write one block, token by token (equation L7)."""
    for u in range(len(old)):
        if old[u] != new[u]:
            ages[new[u]] = ages[old[u]]
            tokens[new[u]] = tokens[old[u]]
            ngram_hashes[new[u]] = ngram_hashes[old[u]]
            keys[new[u]] = keys[old[u]]
    for t in range(len(at)):
        physical_cell = new[at[t]]
        oldest = np.argmin(ages[physical_cell])
        ages[physical_cell, oldest] = ages[physical_cell].max() + 1
        tokens[physical_cell, oldest] = targets[t]
        ngram_hashes[physical_cell, oldest] = new_ngram_hashes[t]
        keys[physical_cell, oldest] = new_keys[t]


@cached_njit
def _load_rows(first: int, field: Array, physical_cells: Array, cell: Array, row: Array, data: Array) -> None:
    """Put bytes from `first` on of each stored row into a field; empty the rest of the cells."""
    for physical_cell in physical_cells:
        field[physical_cell] = 0
    for n in range(len(data)):
        stored = field[physical_cells[cell[n]], row[n]]
        for at in range(len(stored)):
            stored[at] = data[n, first + at]
