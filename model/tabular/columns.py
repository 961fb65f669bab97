"""Columns on one scale and in one order, so that neither the scale nor the order of a stream's columns matters.

The order is that of a checksum of each column's values. All later steps see the columns in this order, so the results
for permuted columns are equal bit for bit. A column that is sometimes missing becomes two: its values, with the mean
where they are missing, and an indicator. A column without variance is left out.
"""

from __future__ import annotations

import numpy as np

from model.numba_support import Array, cached_njit

MISSING = np.finfo(np.float32).min
SAMPLES = 32  # values of a column whose quartiles are looked at
HEAVY = np.float32(3.0)  # a column whose deviation is so many times larger than its quartiles say has heavy tails
LINEAR = np.float32(2.5)  # larger standardised values are squashed by a logarithm
INDICATORS = 256  # number of the indicator of the first column
LEAST = np.float32(1e-6)


@cached_njit
def hashed(a: int, b: int) -> np.uint64:
    """Return a pseudo-random number of two numbers (SplitMix64)."""
    x = np.uint64(a) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(b) * np.uint64(0xD1B54A32D192ED03)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@cached_njit
def _squash(z: np.float32) -> np.float32:
    """Return z with what is beyond ±LINEAR divided by 5, at most by 10; without branches."""
    inside = min(max(z, -LINEAR), LINEAR)
    return inside + np.float32(0.2) * min(max(z - inside, np.float32(-10)), np.float32(10))


@cached_njit
def _moments(x: Array, centres: Array, scales: Array, counts: Array) -> None:
    """Fill the centre, the scale (0: no variance) and the number of present values of each column of x [n, C]."""
    n, C = x.shape
    sums = np.zeros(C, np.float64)
    counts[:] = 0
    for i in range(n):
        for c in range(C):
            is_present = x[i, c] != MISSING
            counts[c] += is_present
            sums[c] += x[i, c] if is_present else np.float32(0)
    sums /= np.maximum(counts, 1)
    squares = np.zeros(C, np.float64)
    for i in range(n):
        for c in range(C):
            difference = x[i, c] - sums[c] if x[i, c] != MISSING else 0.0
            squares[c] += difference * difference
    sample, step = np.empty(SAMPLES, np.float32), max(1, n // SAMPLES)
    for c in range(C):
        centre, deviation, size = sums[c], np.sqrt(squares[c] / max(counts[c], 1)), 0
        for j in range(min(n // step, SAMPLES)):
            if x[j * step, c] != MISSING:
                sample[size] = x[j * step, c]
                size += 1
        if size >= 8 and deviation > 0:
            ordered = np.sort(sample[:size])
            spread = (ordered[(3 * size) // 4] - ordered[size // 4]) / 1.35
            if spread > 0 and deviation > HEAVY * spread:
                centre, deviation = np.float64(ordered[size // 2]), HEAVY * spread
        flat = counts[c] < 2 or deviation <= LEAST * abs(centre) or deviation <= 1e-30
        centres[c], scales[c] = centre, np.float32(0) if flat else deviation


@cached_njit
def standardise(x: Array, queries: Array, ordinals: Array) -> tuple[Array, Array, Array]:
    """Return z [n, K], the queries' z [Q, K] and the number of each of the K columns: c for the values of column c,
    INDICATORS + c for its indicator. x [n, C] and queries [Q, C] have MISSING where a value is missing; ordinals: int64
    [n].
    """
    (n, C), Q = x.shape, len(queries)
    centres, scales, counts = np.empty(C, np.float64), np.empty(C, np.float64), np.empty(C, np.int64)
    _moments(x, centres, scales, counts)
    K = 0
    source, numbers, centre, scale = (
        np.empty(2 * C, np.int64),
        np.empty(2 * C, np.int64),
        np.empty(2 * C),
        np.empty(2 * C),
    )
    for c in range(C):
        if scales[c] > 0:
            source[K], numbers[K], centre[K], scale[K] = c, c, centres[c], 1 / scales[c]
            K += 1
        if 0 < counts[c] < n:
            share = (n - counts[c]) / n
            source[K], numbers[K], centre[K], scale[K] = c, INDICATORS + c, share, 1 / np.sqrt(share * (1 - share))
            K += 1
    wide, sums = np.empty((n + Q, K), np.float32), np.zeros(K, np.float64)
    for i in range(n + Q):
        salt = 1.618
        if i < n:
            salt = np.float64(hashed(ordinals[i], 1) >> np.uint64(40)) / 2**24
        for k in range(K):
            value = x[i, source[k]] if i < n else queries[i - n, source[k]]
            is_missing = value == MISSING
            if numbers[k] >= INDICATORS:
                wide[i, k] = (is_missing - centre[k]) * scale[k]
            else:
                wide[i, k] = np.float32(0) if is_missing else _squash(np.float32((value - centre[k]) * scale[k]))
            sums[k] += salt * wide[i, k]
    order = np.argsort(sums, kind="mergesort")
    z, columns = np.empty((n + Q, K), np.float32), np.empty(K, np.int64)
    for k in range(K):
        columns[k] = numbers[order[k]]
    for i in range(n + Q):
        for k in range(K):
            z[i, k] = wide[i, order[k]]
    return z[:n], z[n:], columns
