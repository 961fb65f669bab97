"""Kernels for CPUs, compiled by Numba, with the arguments of those in `kernels`; each has a twin in torch's operators.

Import it through `device.row_kernels_for`. What a function compiles to is kept: beside this file, or in
the user's cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.memory.ops import LIKENESS_STEP, Candidates, Compared, earned_by, query_steps

Array = NDArray[Any]
T = TypeVar("T")


def compiled(function: Callable[..., T]) -> Callable[..., T]:
    """The function as machine code, from its first call on."""
    try:
        machine: Callable[..., T] = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # there is no place to keep it
        machine = numba.njit(nogil=True)(function)
    return machine


def compare(
    tables: Tensor, fields: Sequence[Tensor], session: Tensor, cells: Tensor, query: Tensor, context: Tensor
) -> Compared:
    """One pass over the rows; equal to its twin, `SitePool.read` and `ops.compare`, to the last bit."""
    n, K = len(cells), cells.shape[1] * fields[0].shape[1]
    found = Compared(
        torch.empty(n, K, dtype=torch.long),
        torch.empty(n, K),
        torch.empty(n, K, dtype=torch.long),
        torch.empty(n, K, dtype=torch.bool),
    )
    inputs = (tables, *fields, session, cells, query_steps(query).short(), context)
    _compare(*_arrays(*inputs, *found), np.float32(LIKENESS_STEP))
    return found


def weigh(
    tokens: Tensor,
    cosines: Tensor,
    repeats: Tensor,
    log_probs: Tensor,
    missing: Tensor,
    sharpness: Tensor,
    prior: Tensor,
    bonus: Tensor,
) -> Candidates:
    """Without the passes over all candidates that its twin, `ops.weigh`, takes for each step."""
    (n, K), (H, R) = cosines.shape, bonus.shape
    shares, evidence = (torch.zeros(n, H, wide, dtype=log_probs.dtype) for wide in (K, 4 + R))
    same = torch.empty(n, dtype=torch.long)
    scales = (sharpness, prior, earned_by(bonus))
    _weigh(*_arrays(tokens, cosines, repeats, log_probs, missing, *scales, shares, evidence, same))
    return Candidates(tokens, shares, evidence.flatten(1), same)


def write(
    fields: Sequence[Tensor], old: Tensor, new: Tensor, at: Tensor, keys: Tensor, prints: Tensor, targets: Tensor
) -> None:
    """Token by token, in place. Twin: `ops.write_lexical` between `Draft.get` and `Draft.put`."""
    _write(*_arrays(*fields, old, new, at, keys, prints, targets))


def _arrays(*tensors: Tensor) -> list[Array]:
    return [tensor.detach().numpy() for tensor in tensors]


@compiled
def _compare(
    tables: Array,
    ages: Array,
    tokens: Array,
    prints: Array,
    keys: Array,
    session: Array,
    cells: Array,
    query: Array,
    context: Array,
    out_tokens: Array,
    out_cosines: Array,
    out_repeats: Array,
    out_missing: Array,
    step: Any,
) -> None:
    n, k = cells.shape
    P, R, D = keys.shape[1], prints.shape[2], keys.shape[2]
    for t in range(n):
        for j in range(k):
            place = tables[session[t], cells[t, j]]
            for p in range(P):
                at = j * P + p
                out_missing[t, at] = ages[place, p] == 0
                out_tokens[t, at] = tokens[place, p]
                repeats = 0
                for r in range(R):
                    repeats += prints[place, p, r] == context[t, r] and context[t, r] != 0
                out_repeats[t, at] = repeats
                total = np.int32(0)
                for d in range(D):
                    total += np.int32(np.int32(query[t, d]) * np.int32(keys[place, p, d]))
                out_cosines[t, at] = np.float32(total) * step


@compiled
def _weigh(
    tokens: Array,
    cosines: Array,
    repeats: Array,
    log_probs: Array,
    missing: Array,
    sharpness: Array,
    prior: Array,
    bonus: Array,
    out_shares: Array,
    out_evidence: Array,
    out_repeats: Array,
) -> None:
    n, K = cosines.shape
    H, runs = bonus.shape
    for t in range(n):
        for h in range(H):
            shares, evidence, best = out_shares[t, h], out_evidence[t, h], -1
            for i in range(K):
                if not missing[t, i]:
                    score = sharpness[h] * cosines[t, i] + prior[h] * log_probs[t, i] + bonus[h, repeats[t, i]]
                    shares[i] = score
                    if best < 0 or score > shares[best]:
                        best = i
            if h == 0:
                out_repeats[t] = 0 if best < 0 else repeats[t, best]
            if best < 0:
                evidence[3] = math.log(np.float32(1e-4)) / np.float32(3.0)
                continue
            top, total = shares[best], np.float32(0.0)
            for i in range(K):
                if not missing[t, i]:
                    shares[i] = math.exp(shares[i] - top)
                    total += shares[i]
            agreement = np.float32(0.0)
            for i in range(K):
                shares[i] /= total
                if tokens[t, i] == tokens[t, best]:
                    agreement += shares[i]
            evidence[0] = (top + math.log(total)) / np.float32(10.0)
            evidence[1] = cosines[t, best]
            evidence[2] = agreement
            evidence[3] = math.log(agreement + np.float32(1e-4)) / np.float32(3.0)
            for run in range(runs - 1):
                evidence[4 + run] = repeats[t, best] > run


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
