"""Kernels for CPUs, compiled by Numba, with the arguments of those in `kernels`; each has a twin in torch's operators.

Import it through `device.row_kernels_for`. What a function compiles to is kept: beside this file, or in
the user's cache. Each row is computed alone, in one order, so neither its neighbours nor the number of threads show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from model.memory.config import RUNS, SHUT, TRUST
from model.memory.lexical.torch_backend import (
    LIKENESS_STEP,
    MIXER,
    MOST,
    QUERY_STEPS,
    Belief,
    Candidates,
    Gate,
    Prediction,
    Scales,
)
from model.numba_support import LEAST, Array, arrays, by_rows, compiled, exp, largest, log


def find(
    tables: Tensor,
    fields: Sequence[Tensor],
    session: Tensor,
    cells: Tensor,
    query: Tensor,
    context: Tensor,
    base: Prediction,
    scales: Scales,
) -> tuple[Candidates, Tensor]:
    """One pass over the rows for each context. Twin: `SitePool.read`, `ops.compare` and `ops.weigh_rows`; likeness and
    repeated runs are the same to the last bit."""
    n, K, (H, R) = len(cells), cells.shape[1] * fields[0].shape[1], scales.bonus.shape
    tokens, same = torch.empty(n, K, dtype=torch.long), torch.empty(n, dtype=torch.long)
    room = torch.empty(cells.shape, dtype=torch.long)
    shares, evidence = (torch.zeros(n, H, wide, dtype=base.logits.dtype) for wide in (K, 4 + R))
    asked = (tables, *fields, session, cells, query, context, base.logits, base.log_z, *scales)
    by_rows(_find, n, *arrays(*asked, tokens, shares, evidence, same, room))
    return Candidates(tokens, shares, evidence.flatten(1), same), room


def believe(
    found: Candidates, entropy: Tensor, keys: Tensor, gate: Gate, own: Tensor, session: Tensor, trust: Tensor
) -> Belief:
    """Without the dozen operators of its twin, `ops.believe`."""
    n, _, K = found.shares.shape
    belief = Belief(*(entropy.new_empty(size) for size in ((n, K), (n,), (n,))))
    by_rows(_believe, n, *arrays(*found[1:], entropy, keys, *gate, own, session, trust, *belief))
    return belief


def mixture(
    tables: Tensor,
    fields: Sequence[Tensor],
    own: Tensor,
    address: tuple[Tensor, Tensor, Tensor],
    k: int,
    scales: Scales,
    gate: Gate,
    session: Tensor,
    hidden: Tensor,
    trails: Tensor,
    trust: Tensor,
    logits: Tensor,
) -> Tensor:
    """All of a read in one call, in place of the logits; the operators of its twin, what `LexicalSite.mixture` does
    elsewhere, are small, many and cold. address: weight and bias of the keys, and the cells' centres."""
    site, logits = (tables, *fields, own, *address, *scales, *gate), logits.contiguous()
    asked = (session, hidden.float(), trails, trust)
    by_rows(partial(_mixture, k), len(logits), *arrays(*site, *asked, logits))
    return logits


def write(
    fields: Sequence[Tensor], old: Tensor, new: Tensor, at: Tensor, keys: Tensor, prints: Tensor, targets: Tensor
) -> None:
    """Token by token, in place. Twin: `ops.write_lexical` between `Draft.get` and `Draft.put`."""
    _write(*arrays(*fields, old, new, at, keys, prints, targets))


def fill(fields: Sequence[Tensor], places: Tensor, cell: Tensor, row: Tensor, data: Tensor) -> None:
    """Straight into the fields, in one thread. Twin: `ops.fill`."""
    first = 0
    for field in fields:
        part = field.view(torch.uint8)
        _fill(first, *arrays(part, places, cell, row, data))
        first += part.shape[2]


@compiled
def _predict(logits: Array, log_z: Array, entropy: Array) -> None:
    for t in range(len(logits)):
        row = logits[t]
        top, total, weighted = largest(row), np.float32(0.0), np.float32(0.0)
        for i in range(len(row)):
            below = row[i] - top
            p = exp(below)
            total += p
            weighted += p * below
        log_z[t], entropy[t] = top + math.log(total), math.log(total) - weighted / total


@compiled
def _find(
    first: int,
    last: int,
    tables: Array,
    ages: Array,
    tokens: Array,
    prints: Array,
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
    out_evidence: Array,
    out_repeats: Array,
    out_room: Array,
) -> None:
    k, P, R, D = cells.shape[1], keys.shape[1], prints.shape[2], keys.shape[2]
    K, step, steps = k * P, np.float32(LIKENESS_STEP), np.empty(D, np.int16)
    cosines, repeats, log_probs = np.empty(K, np.float32), np.empty(K, np.int64), np.empty(K, logits.dtype)
    earned = np.zeros((len(bonus), R + 1), bonus.dtype)
    for r in range(R):
        earned[:, r + 1] = earned[:, r] + bonus[:, r]
    for t in range(first, last):
        for d in range(D):
            steps[d] = np.int16(np.rint(query[t, d] * np.float32(QUERY_STEPS)))
        for j in range(k):
            place, empty = tables[session[t], cells[t, j]], 0
            for p in range(P):
                at, token = j * P + p, tokens[place, p]
                out_tokens[t, at] = token
                repeats[at] = -1  # no row
                if ages[place, p] == 0:
                    empty += 1
                    continue
                same = 0
                for r in range(R):
                    same += prints[place, p, r] == context[t, r] and context[t, r] != 0
                repeats[at] = same
                log_probs[at] = logits[t, token] - log_z[t]
                total = np.int32(0)
                for d in range(D):
                    total += np.int32(np.int32(steps[d]) * np.int32(keys[place, p, d]))
                cosines[at] = np.float32(total) * step
            out_room[t, j] = empty
        for h in range(len(bonus)):
            shares, evidence, best = out_shares[t, h], out_evidence[t, h], -1
            for i in range(K):
                if repeats[i] >= 0:
                    score = sharpness[h] * cosines[i] + prior[h] * log_probs[i] + earned[h, repeats[i]]
                    shares[i] = score
                    if best < 0 or score > shares[best]:
                        best = i
            if h == 0:
                out_repeats[t] = 0 if best < 0 else repeats[best]
            if best < 0:
                evidence[3] = math.log(np.float32(1e-4)) / np.float32(3.0)
                continue
            top, total_share = shares[best], np.float32(0.0)
            for i in range(K):
                if repeats[i] >= 0:
                    shares[i] = exp(shares[i] - top)
                    total_share += shares[i]
            agreement = np.float32(0.0)
            for i in range(K):
                shares[i] /= total_share
                if out_tokens[t, i] == out_tokens[t, best]:
                    agreement += shares[i]
            evidence[0] = (top + math.log(total_share)) / np.float32(10.0)
            evidence[1] = cosines[best]
            evidence[2] = agreement
            evidence[3] = math.log(agreement + np.float32(1e-4)) / np.float32(3.0)
            for run in range(R):
                evidence[4 + run] = repeats[best] > run


@compiled
def _believe(
    first: int,
    last: int,
    shares: Array,
    evidence: Array,
    repeats: Array,
    entropy: Array,
    keys: Array,
    weight: Array,
    bias: Array,
    out_weight: Array,
    out_bias: Array,
    own: Array,
    session: Array,
    trust: Array,
    mixed: Array,
    gamma: Array,
    unguarded: Array,
) -> None:
    H, K, E, D = shares.shape[1], shares.shape[2], evidence.shape[1], keys.shape[1]
    for t in range(first, last):
        inner, out = bias.copy(), out_bias.copy()
        for e in range(E):
            inner += evidence[t, e] * weight[e]
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
        same, mine = repeats[t], own[session[t]]
        logit = out[0] + mine[TRUST, same] + trust[t, same]
        unguarded[t] = min(1 / (1 + math.exp(-logit)), MOST) if known else 0.0
        gamma[t] = unguarded[t] if mine[SHUT, same] == 0 else 0.0


@compiled
def _mix(logits: Array, log_z: float, tokens: Array, shares: Array, gamma: float, by_token: Array) -> None:
    """by_token [V]: zeros, before and after."""
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
        least = max(base[i], LEAST)
        more[i] = log(np.float32(1.0) + added[i] * exp(-least)) + (least - base[i])
    for i in range(count):
        logits[distinct[i]] += more[i]


@compiled
def _trail_fingerprints(trails: Array, out: Array) -> None:
    mixer = np.int64(MIXER)
    for t in range(len(trails)):
        for r in range(len(RUNS)):
            total, power, first = np.int64(0), np.int64(1), trails.shape[1] - RUNS[r]
            for at in range(trails.shape[1] - 1, first - 1, -1):
                power *= mixer
                total += (trails[t, at] + 1) * power
            high = np.int16(((total ^ (total >> 29)) * mixer) >> 48)
            out[t, r] = 0 if trails[t, first] < 0 else 1 if high == 0 else high


@compiled
def _keys(hidden: Array, weight: Array, bias: Array, out: Array) -> None:
    for t in range(len(hidden)):
        key, square = out[t], np.float32(0.0)
        key[:] = bias
        for i in range(len(weight)):
            for d in range(len(key)):
                key[d] += hidden[t, i] * weight[i, d]
        for d in range(len(key)):
            square += key[d] * key[d]
        key /= max(np.sqrt(square), np.float32(1e-12))


@compiled
def _nearest(keys: Array, centres: Array, out: Array) -> None:
    """The k cells [n, k] whose centres are the nearest to each key, the nearest first."""
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


@compiled
def _mixture(
    k: int,
    first: int,
    last: int,
    tables: Array,
    ages: Array,
    tokens: Array,
    prints: Array,
    keys: Array,
    own: Array,
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
    trails: Array,
    trust: Array,
    logits: Array,
) -> None:
    K, H, R, one = k * ages.shape[1], len(bonus), bonus.shape[1], (1, k * ages.shape[1])
    log_z, entropy, gamma, unguarded = np.empty((4, 1), logits.dtype)
    context, query = np.empty((1, R), np.int16), np.empty((1, keys.shape[2]), hidden.dtype)
    cells, room = np.empty((2, 1, k), np.int64)
    found, shares, mixed = np.empty(one, np.int64), np.empty((1, H, K), logits.dtype), np.empty(one, logits.dtype)
    evidence, repeats = np.empty((1, H, 4 + R), logits.dtype), np.empty(1, np.int64)
    rows, scales, judged = (tables, ages, tokens, prints, keys), (sharpness, prior, bonus), evidence.reshape(1, -1)
    by_token = np.zeros(logits.shape[1], logits.dtype)
    for t in range(first, last):  # one after the other: a row of logits is still near when it is needed again
        mine, asked, shares[:], evidence[:] = slice(t, t + 1), session[t : t + 1], 0.0, 0.0
        _predict(logits[mine], log_z, entropy)
        _trail_fingerprints(trails[mine], context)
        _keys(hidden[mine], key_weight, key_bias, query)
        _nearest(query, centres, cells)
        wanted = (asked, cells, query, context, logits[mine], log_z)
        _find(0, 1, *rows, *wanted, *scales, found, shares, evidence, repeats, room)
        gate = (weight, bias, out_weight, out_bias, own, asked, trust[mine])
        _believe(0, 1, shares, judged, repeats, entropy, query, *gate, mixed, gamma, unguarded)
        _mix(logits[t], log_z[0], found[0], mixed[0], gamma[0], by_token)


@compiled
def _write(
    ages: Array,
    tokens: Array,
    prints: Array,
    keys: Array,
    old: Array,
    new: Array,
    at: Array,
    new_keys: Array,
    new_prints: Array,
    targets: Array,
) -> None:
    for u in range(len(old)):
        if old[u] != new[u]:
            ages[new[u]] = ages[old[u]]
            tokens[new[u]] = tokens[old[u]]
            prints[new[u]] = prints[old[u]]
            keys[new[u]] = keys[old[u]]
    for t in range(len(at)):
        place = new[at[t]]
        oldest = np.argmin(ages[place])
        ages[place, oldest] = ages[place].max() + 1
        tokens[place, oldest] = targets[t]
        prints[place, oldest] = new_prints[t]
        keys[place, oldest] = new_keys[t]


@compiled
def _fill(first: int, field: Array, places: Array, cell: Array, row: Array, data: Array) -> None:
    for place in places:
        field[place] = 0
    for n in range(len(data)):
        there = field[places[cell[n]], row[n]]
        for at in range(len(there)):
            there[at] = data[n, first + at]
