"""Kernels for CPUs, compiled by Numba, with the arguments of those in `kernels`; each has a twin in torch's operators.

Import it through `device.row_kernels_for`. What a function compiles to is kept: beside this file, or in
the user's cache. Each row is computed alone, in one order, so neither its neighbours nor the number of threads show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.memory.config import RUNS, SHUT, TRUST
from model.memory.ops import (
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

LEAST = np.float32(-87.0)  # below it, exp is as good as 0 in fp32
ROWS_A_THREAD = 8  # fewer are done before another thread has woken up

Array = NDArray[Any]
T = TypeVar("T")


def compiled(function: Callable[..., T]) -> Callable[..., T]:
    """The function as machine code, from its first call on. Sums may be taken in vectors, of one order for a length."""
    options: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz", "nnan"}}
    try:
        machine: Callable[..., T] = numba.njit(**options, cache=True)(function)
    except RuntimeError:  # there is no place to keep it
        machine = numba.njit(**options)(function)
    return machine


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
    _by_rows(_find, n, *asked, tokens, shares, evidence, same, room)
    return Candidates(tokens, shares, evidence.flatten(1), same), room


def believe(
    found: Candidates, entropy: Tensor, keys: Tensor, gate: Gate, own: Tensor, session: Tensor, trust: Tensor
) -> Belief:
    """Without the dozen operators of its twin, `ops.believe`."""
    n, _, K = found.shares.shape
    belief = Belief(*(entropy.new_empty(size) for size in ((n, K), (n,), (n,))))
    _by_rows(_believe, n, *found[1:], entropy, keys, *gate, own, session, trust, *belief)
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
    _by_rows(partial(_mixture, k), len(logits), *site, session, hidden.float(), trails, trust, logits)
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


def arrays(*tensors: Tensor) -> list[Array]:
    """In the one layout for which kernels are compiled, each other one being compiled for again; nothing that lies so
    is copied."""
    return [(each.detach() if each.requires_grad else each).contiguous().numpy() for each in tensors]


def _by_rows(kernel: Callable[..., None], n: int, *tensors: Tensor) -> None:
    """kernel(first, last, …) for all of n rows, on as many threads as torch's operators would take."""
    given, threads = arrays(*tensors), max(1, min(torch.get_num_threads(), n // ROWS_A_THREAD))
    bounds = [n * i // threads for i in range(threads + 1)]
    others = [_threads().submit(kernel, *part, *given) for part in pairwise(bounds[1:])]
    kernel(0, bounds[1], *given)
    for other in others:
        other.result()


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="rows")


@compiled
def _exp(x: Any) -> Any:
    """exp(x) for x ≤ 88 in fp32, also as a vector: 2ⁿ·exp(r), |r| ≤ ½ log 2, by the polynomial of Cephes' expf."""
    x = max(x, LEAST)
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return (p * r * r + r + np.float32(1.0)) * power


@compiled
def _log(x: Any) -> Any:
    """log(x) for x ≥ 1 in fp32, also as a vector: n·log 2 + log(1 + r), √½ ≤ 1 + r < √2, by that of Cephes' logf."""
    bits = np.float32(x).view(np.int32) - np.int32(0x3F3504F3)  # less √½
    n = np.float32(bits >> np.int32(23))
    r = np.int32((bits & np.int32(0x7FFFFF)) + np.int32(0x3F3504F3)).view(np.float32) - np.float32(1.0)
    p = np.float32(7.0376836292e-2)
    p = p * r - np.float32(1.1514610310e-1)
    p = p * r + np.float32(1.1676998740e-1)
    p = p * r - np.float32(1.2420140846e-1)
    p = p * r + np.float32(1.4249322787e-1)
    p = p * r - np.float32(1.6668057665e-1)
    p = p * r + np.float32(2.0000714765e-1)
    p = p * r - np.float32(2.4999993993e-1)
    p = p * r + np.float32(3.3333331174e-1)
    return n * np.float32(0.69314718) + (p * r * r * r - np.float32(0.5) * r * r + r)


@compiled
def _top(row: Array) -> Any:
    """The largest of a row, within fp32. Whole numbers are compared in vectors, where LLVM compares floats one by one;
    with the bits of the negative ones turned round, floats are ordered as they are."""
    bits = row.view(np.int32) if row.itemsize == 4 else row.astype(np.float32).view(np.int32)
    top = np.int32(-(2**31))
    for i in range(len(bits)):
        top = max(top, np.int32(bits[i] ^ ((bits[i] >> np.int32(31)) & np.int32(0x7FFFFFFF))))
    return np.int32(top ^ ((top >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)


@compiled
def _predict(logits: Array, log_z: Array, entropy: Array) -> None:
    for t in range(len(logits)):
        row = logits[t]
        top, total, weighted = _top(row), np.float32(0.0), np.float32(0.0)
        for i in range(len(row)):
            below = row[i] - top
            p = _exp(below)
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
                    shares[i] = _exp(shares[i] - top)
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
def _mix(logits: Array, log_z: Array, tokens: Array, shares: Array, gamma: Array) -> None:
    K = tokens.shape[1]
    share, distinct = np.zeros(logits.shape[1], shares.dtype), np.empty(K, np.int64)
    base, added, more = np.empty((3, K), logits.dtype)
    for t in range(len(logits)):
        count, without = 0, math.log1p(-gamma[t]) - log_z[t]
        for i in range(K):
            token = tokens[t, i]
            if gamma[t] * shares[t, i] > 0:
                if share[token] == 0:
                    distinct[count] = token
                    count += 1
                share[token] += shares[t, i]
        for i in range(count):
            token = distinct[i]
            base[i], added[i] = logits[t, token] + without, gamma[t] * share[token]
            share[token] = 0
        for i in range(count):
            least = max(base[i], LEAST)
            more[i] = _log(np.float32(1.0) + added[i] * _exp(-least)) + (least - base[i])
        for i in range(count):
            logits[t, distinct[i]] += more[i]


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
    n, K, H, R = last - first, k * ages.shape[1], len(bonus), bonus.shape[1]
    session, trust, logits = session[first:last], trust[first:last], logits[first:last]
    log_z, entropy, gamma, unguarded = np.empty((4, n), logits.dtype)
    context, query = np.empty((n, R), np.int16), np.empty((n, keys.shape[2]), hidden.dtype)
    cells, room = np.empty((2, n, k), np.int64)
    found, shares, mixed = np.empty((n, K), np.int64), np.zeros((n, H, K), logits.dtype), np.empty((n, K), logits.dtype)
    evidence, repeats = np.zeros((n, H, 4 + R), logits.dtype), np.empty(n, np.int64)
    _predict(logits, log_z, entropy)
    _trail_fingerprints(trails[first:last], context)
    _keys(hidden[first:last], key_weight, key_bias, query)
    _nearest(query, centres, cells)
    rows = (tables, ages, tokens, prints, keys)
    scales = (sharpness, prior, bonus)
    _find(0, n, *rows, session, cells, query, context, logits, log_z, *scales, found, shares, evidence, repeats, room)
    judged = (shares, evidence.reshape(n, -1), repeats, entropy, query)
    _believe(0, n, *judged, weight, bias, out_weight, out_bias, own, session, trust, mixed, gamma, unguarded)
    _mix(logits, log_z, found, mixed, gamma)


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
