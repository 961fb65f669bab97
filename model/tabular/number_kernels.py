"""Readers of numbers: each gives an expected target, computed from the stored examples alone.

Shapes: n examples, oldest first; K columns, standardised (`columns`); t [n]: targets, standardised. `first`: the oldest
example that a reader looks at.
"""

from __future__ import annotations

import math

import numpy as np

from model.numba_support import Array, cached_njit
from model.tabular.columns import hashed
from model.tabular.readers import NEAREST, vote_weights

LINEAR_COLUMNS = 32


@cached_njit
def correlations(z: Array, t: Array, first: int, out: Array) -> None:
    """Fill the squared correlation of each column with the target, corrected for chance, at least 0."""
    n, K = len(t) - first, z.shape[1]
    cross, squares, sums = np.zeros(K, np.float32), np.zeros(K, np.float32), np.zeros(K, np.float32)
    total, square = np.float32(0), np.float32(0)
    for i in range(first, len(t)):
        total += t[i]
        square += t[i] * t[i]
        for k in range(K):
            cross[k] += z[i, k] * t[i]
            sums[k] += z[i, k]
            squares[k] += z[i, k] * z[i, k]
    for k in range(K):
        covariance = cross[k] - sums[k] * total / n
        variances = (squares[k] - sums[k] * sums[k] / n) * (square - total * total / n) + np.float32(1e-6)
        share = covariance * covariance / variances
        out[k] = max(share - (1 - share) / max(n - 2, 1), np.float32(0))


@cached_njit
def ridge(z: Array, t: Array, first: int, chosen: Array, penalty: float, coefficients: Array) -> None:
    """Fill the coefficients [D + 1] of ridge regression on the chosen columns [D], the intercept last."""
    D, n = len(chosen), len(t) - first
    gram, row = np.zeros((D + 1, D + 1), np.float32), np.empty(D + 1, np.float32)
    right = np.zeros(D + 1, np.float32)
    for i in range(first, len(t)):
        for d in range(D):
            row[d] = z[i, chosen[d]]
        row[D] = 1
        for d in range(D + 1):
            value = row[d]
            right[d] += value * t[i]
            for e in range(d + 1):
                gram[d, e] += value * row[e]
    for d in range(D):
        gram[d, d] += np.float32(penalty) + np.float32(1e-4) * n
    gram[D, D] += np.float32(0.1)
    for d in range(D + 1):
        for e in range(d + 1):
            value = gram[d, e]
            for f in range(e):
                value -= gram[d, f] * gram[e, f]
            gram[d, e] = math.sqrt(max(value, np.float32(1e-6))) if d == e else value / gram[e, e]
    for d in range(D + 1):
        value = right[d]
        for e in range(d):
            value -= gram[d, e] * coefficients[e]
        coefficients[d] = value / gram[d, d]
    for j in range(D + 1):
        d = D - j
        value = coefficients[d]
        for e in range(d + 1, D + 1):
            value -= gram[e, d] * coefficients[e]
        coefficients[d] = value / gram[d, d]


@cached_njit
def apply_linear(z: Array, chosen: Array, coefficients: Array, out: Array) -> None:
    """Fill the predictions [n] of coefficients [D + 1] for z [n, K]."""
    D = len(chosen)
    for i in range(len(z)):
        value = coefficients[D]
        for d in range(D):
            value += coefficients[d] * z[i, chosen[d]]
        out[i] = value


@cached_njit
def near_mean(t: Array, indices: Array, distances: Array, size: int, sharpness: int, mean: float) -> float:
    """Return the mean target of the nearest examples, weighted by distance; `mean` counts as a fifth of a vote."""
    votes = np.empty(NEAREST, np.float32)
    vote_weights(distances, size, sharpness, votes)
    total, weight = np.float32(0.2) * mean, np.float32(0.2)
    for j in range(size):
        total += votes[j] * t[indices[j]]
        weight += votes[j]
    return float(total / weight)


@cached_njit
def near_line(
    z: Array, t: Array, query: Array, weights: Array, indices: Array, distances: Array, size: int, mean: float
) -> float:
    """Return the target at the query by a linear model of the nearest examples, shrunk towards their mean.

    The model is one step of steepest descent from the mean, with the best step length.
    """
    votes, K = np.empty(NEAREST, np.float32), len(query)
    vote_weights(distances, size, 12, votes)
    total, weight = np.float32(0.2) * mean, np.float32(0.2)
    for j in range(size):
        total += votes[j] * t[indices[j]]
        weight += votes[j]
    centre = total / weight
    gradient = np.zeros(K, np.float32)
    for j in range(size):
        error = votes[j] * (t[indices[j]] - centre)
        for k in range(K):
            gradient[k] += weights[k] * error * (z[indices[j], k] - query[k])
    top, bottom, at_query = np.float32(0), np.float32(1e-3), np.float32(0)
    shift = np.float32(0)
    for j in range(size):
        slope = np.float32(0)
        for k in range(K):
            slope += gradient[k] * (z[indices[j], k] - query[k])
        shift += votes[j] * slope / weight
    for j in range(size):
        slope = -shift
        for k in range(K):
            slope += gradient[k] * (z[indices[j], k] - query[k])
        top += votes[j] * slope * (t[indices[j]] - centre)
        bottom += votes[j] * slope * slope
    at_query = -shift
    return float(centre + np.float32(0.8) * top / bottom * at_query)


@cached_njit
def forest_mean(
    z: Array, t: Array, first: int, query: Array, mean: float, trees: int, trials: int, sample: int
) -> float:
    """Return the mean leaf of randomised trees, of which only the path of the query is grown; see `readers.forest`.

    A split minimises the variance of the target on both sides.
    """
    K, n = len(query), len(t)
    rows, looked_rows, looked_t = (
        np.empty(n - first, np.int64),
        np.empty(sample, np.int64),
        np.empty(sample, np.float32),
    )
    result = np.float32(0)
    for tree in range(trees):
        size = n - first
        for i in range(size):
            rows[i] = first + i
        value = np.float32(mean)
        for depth in range(14):
            total = np.float32(0)
            for i in range(size):
                total += t[rows[i]]
            value = (total + value) / (size + 1)
            if size < 4:
                break
            looked = min(size, sample)
            begin, stride = 0, size // looked
            if stride > 1:
                begin = int(np.int64(hashed(tree, depth) % np.uint64(size - stride * looked + stride)))
            whole = np.float32(0)
            for j in range(looked):
                looked_rows[j] = rows[begin + j * stride]
                looked_t[j] = t[looked_rows[j]]
                whole += looked_t[j]
            best, column, threshold = np.float32(-1), -1, np.float32(0)
            for trial in range(trials):
                key = hashed(tree * 64 + depth, trial + 7)
                k = int(np.int64(key % np.uint64(K)))
                one = z[rows[np.int64((key >> np.uint64(16)) % np.uint64(size))], k]
                other = z[rows[np.int64((key >> np.uint64(40)) % np.uint64(size))], k]
                if one == other:
                    continue
                cut = np.float32(0.5) * (one + other)
                left, below = np.float32(0), np.float32(0)
                for j in range(looked):
                    is_left = np.float32(z[looked_rows[j], k] < cut)
                    left += is_left * looked_t[j]
                    below += is_left
                if below == 0 or below == looked:
                    continue
                score = left * left / below + (whole - left) * (whole - left) / (looked - below)
                if score > best:
                    best, column, threshold = score, k, cut
            if column < 0:
                break
            kept, side = 0, query[column] < threshold
            for i in range(size):
                row = rows[i]
                rows[kept] = row
                kept += (z[row, column] < threshold) == side
            if kept == 0:
                break
            size = kept
        result += value
    return float(result / trees)
