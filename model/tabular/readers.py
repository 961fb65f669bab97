"""Readers of labels: each gives a distribution over the labels, computed from the stored examples alone.

Shapes: n examples, oldest first; K columns, standardised (`columns`); L labels. `first`: the oldest example that a
reader looks at. Every reader fills `out` [L] with probabilities that sum to 1.
"""

from __future__ import annotations

import math

import numpy as np

from model.numba_support import Array, cached_njit
from model.tabular.columns import hashed

NEAREST = 32  # examples that vote
PRIOR_VOTES = np.float32(0.3)
REPEATS = 16  # stored examples that linear readers learn again for each new one, at most
DECAY, LEAST_ERROR = np.float32(1e-5), np.float32(3e-3)


@cached_njit
def normalise_logs(out: Array) -> None:
    """Turn log-probabilities up to a constant into probabilities, in place."""
    top = out.max()
    total = np.float32(0)
    for j in range(len(out)):
        out[j] = math.exp(out[j] - top)
        total += out[j]
    for j in range(len(out)):
        out[j] /= total


@cached_njit
def tally(y: Array, first: int, half_life: float, out: Array) -> None:
    """Fill the shares of the labels, each example counting half as much as one `half_life` examples later."""
    out[:] = np.float32(0.5)
    keep, weight = 0.5 ** (1.0 / half_life), 1.0
    for i in range(len(y) - 1, first - 1, -1):
        out[y[i]] += weight
        weight *= keep
    out /= out.sum()


@cached_njit
def transitions(y: Array, prior: Array, out: Array) -> None:
    """Fill the shares of the labels that followed the newest label before."""
    out[:] = prior * np.float32(2)
    last = y[len(y) - 1]
    for i in range(len(y) - 1):
        if y[i] == last:
            out[y[i + 1]] += 1
    out /= out.sum()


@cached_njit
def class_moments(z: Array, y: Array, first: int, sums: Array, squares: Array, counts: Array) -> None:
    """Fill sums [L, K], squares [L, K] and counts [L] of the examples of each label."""
    sums[:], squares[:], counts[:] = 0, 0, 0
    for i in range(first, len(y)):
        label = y[i]
        counts[label] += 1
        for k in range(z.shape[1]):
            sums[label, k] += z[i, k]
            squares[label, k] += z[i, k] * z[i, k]


@cached_njit
def relevances(sums: Array, squares: Array, counts: Array, out: Array) -> None:
    """Fill the share of each column's variance that the labels explain, corrected for chance (ω²), at least 0."""
    L, K = sums.shape
    n = counts.sum()
    seen = 0
    for label in range(L):
        seen += counts[label] > 0
    for k in range(K):
        total, square, between = np.float32(0), np.float32(0), np.float32(0)
        for label in range(L):
            if counts[label] > 0:
                total += sums[label, k]
                square += squares[label, k]
                between += sums[label, k] * sums[label, k] / counts[label]
        mean_square = total * total / max(n, np.float32(1))
        between -= mean_square
        whole = square - mean_square
        within = max(whole - between, np.float32(0)) / max(n - seen, np.float32(1))
        out[k] = max(between - (seen - 1) * within, np.float32(0)) / (whole + within + np.float32(1e-6))


@cached_njit
def gaussian_bayes(sums: Array, squares: Array, counts: Array, prior: Array, query: Array, out: Array) -> None:
    """Fill the naive Bayes posterior with normal columns; variances shrink towards the columns' own."""
    L, K = sums.shape
    n = max(counts.sum(), np.float32(1))
    for label in range(L):
        out[label] = math.log(prior[label])
    for k in range(K):
        total, square = np.float32(0), np.float32(0)
        for label in range(L):
            total += sums[label, k]
            square += squares[label, k]
        whole = max(square / n - (total / n) ** 2, np.float32(1e-3))
        for label in range(L):
            count = counts[label]
            mean = sums[label, k] / (count + np.float32(0.5))
            spread = max(squares[label, k] - 2 * mean * sums[label, k] + count * mean * mean, np.float32(0))
            variance = (spread + 2 * whole) / (count + 2) + np.float32(1e-3)
            distance = min((query[k] - mean) ** 2 / variance, np.float32(25))
            out[label] -= np.float32(0.5) * (math.log(variance) + distance)
    normalise_logs(out)


@cached_njit
def kernel_bayes(z: Array, y: Array, first: int, counts: Array, prior: Array, query: Array, out: Array) -> None:
    """Fill the naive Bayes posterior whose columns are counted near the query's value."""
    K, L = len(query), len(out)
    near, every = np.zeros((L, K), np.float32), np.zeros(K, np.float32)
    n = len(y) - first
    width = np.float32(0.9) * np.float32(max(n, 1)) ** np.float32(-0.25)
    scale = 1 / width
    for i in range(first, len(y)):
        row = near[y[i]]
        for k in range(K):
            row[k] += max(np.float32(0), np.float32(1) - abs(z[i, k] - query[k]) * scale)
    for label in range(L):
        for k in range(K):
            every[k] += near[label, k]
    for label in range(L):
        total = math.log(prior[label])
        for k in range(K):
            share = (every[k] + np.float32(0.1)) / (n + np.float32(0.2))
            total += math.log((near[label, k] + 2 * share) / ((counts[label] + 2) * share))
        out[label] = total
    normalise_logs(out)


@cached_njit
def nearest(z: Array, query: Array, weights: Array, first: int, indices: Array, distances: Array) -> int:
    """Fill the NEAREST nearest examples, nearest first and the newest first among equals, and return their number."""
    size, K = 0, len(query)
    for i in range(len(z) - 1, first - 1, -1):
        distance = np.float32(0)
        for k in range(K):
            difference = z[i, k] - query[k]
            distance += weights[k] * difference * difference
        if size < NEAREST:
            size += 1
        elif distance >= distances[size - 1]:
            continue
        j = size - 1
        while j > 0 and distances[j - 1] > distance:
            distances[j], indices[j] = distances[j - 1], indices[j - 1]
            j -= 1
        distances[j], indices[j] = distance, i
    return size


@cached_njit
def vote_weights(distances: Array, size: int, sharpness: int, out: Array) -> None:
    """Fill the votes of the nearest examples: a kernel as wide as the mean distance of the first `sharpness`."""
    width, m = np.float32(1e-6), min(size, sharpness)
    for j in range(m):
        width += distances[j] / m
    for j in range(size):
        out[j] = math.exp(-max(distances[j] / width - 1, np.float32(0)))


@cached_njit
def neighbours(y: Array, indices: Array, distances: Array, size: int, sharpness: int, prior: Array, out: Array) -> None:
    """Fill the shares of the labels among the nearest examples, weighted by distance."""
    votes = np.empty(NEAREST, np.float32)
    vote_weights(distances, size, sharpness, votes)
    out[:] = prior * PRIOR_VOTES
    for j in range(size):
        out[y[indices[j]]] += votes[j]
    out /= out.sum()


@cached_njit
def discriminant(
    z: Array,
    y: Array,
    first: int,
    sums: Array,
    counts: Array,
    chosen: Array,
    prior: Array,
    query: Array,
    factor: Array,
    out: Array,
) -> None:
    """Fill the linear discriminant's posterior on the chosen columns [D], and the Cholesky factor [D, D] of the
    covariance within labels, which shrinks towards the identity."""
    D, L, n = len(chosen), len(out), len(y) - first
    covariance = np.zeros((D, D), np.float32)
    row = np.empty(D, np.float32)
    means = np.empty((L, D), np.float32)
    for label in range(L):
        for d in range(D):
            means[label, d] = sums[label, chosen[d]] / (counts[label] + np.float32(0.5))
    for i in range(first, len(y)):
        for d in range(D):
            row[d] = z[i, chosen[d]] - means[y[i], d]
        for d in range(D):
            value = row[d]
            for e in range(d + 1):
                covariance[d, e] += value * row[e]
    shrink = np.float32(D + 2)
    for d in range(D):
        for e in range(d + 1):
            covariance[d, e] /= n + shrink
        covariance[d, d] += shrink / (n + shrink) + np.float32(1e-3)
    for d in range(D):
        for e in range(d + 1):
            value = covariance[d, e]
            for f in range(e):
                value -= factor[d, f] * factor[e, f]
            factor[d, e] = math.sqrt(max(value, np.float32(1e-6))) if d == e else value / factor[e, e]
    for label in range(L):
        square = np.float32(0)
        for d in range(D):
            value = query[chosen[d]] - means[label, d]
            for f in range(d):
                value -= factor[d, f] * row[f]
            row[d] = value / factor[d, d]
            square += row[d] * row[d]
        out[label] = math.log(prior[label]) - np.float32(0.5) * square
    normalise_logs(out)


@cached_njit
def whiten(z: Array, query: Array, chosen: Array, factor: Array) -> tuple[Array, Array]:
    """Return the chosen columns of the examples [n, D] and of the query [D] in units in which the covariance within
    labels is the identity."""
    n, D = len(z), len(chosen)
    inverse = np.zeros((D, D), np.float32)
    for d in range(D):
        inverse[d, d] = 1 / factor[d, d]
        for e in range(d):
            value = np.float32(0)
            for f in range(e, d):
                value -= factor[d, f] * inverse[f, e]
            inverse[d, e] = value / factor[d, d]
    turned = np.ascontiguousarray(inverse.T)
    whitened, whitened_query = np.zeros((n, D), np.float32), np.zeros(D, np.float32)
    for i in range(n):
        for e in range(D):
            value = z[i, chosen[e]]
            for d in range(D):
                whitened[i, d] += turned[e, d] * value
    for e in range(D):
        for d in range(e, D):
            whitened_query[d] += turned[e, d] * query[chosen[e]]
    return whitened, whitened_query


@cached_njit
def linear(weights: Array, query: Array, out: Array) -> None:
    """Fill softmax(W query + b); weights [L, K + 1], the bias first."""
    K = len(query)
    for label in range(len(out)):
        total = weights[label, 0]
        for k in range(K):
            total += weights[label, k + 1] * query[k]
        out[label] = total
    normalise_logs(out)


@cached_njit
def linear_step(weights: Array, z: Array, label: int, rate: float, probs: Array) -> None:
    """Change the weights by one normalised step towards a label."""
    linear(weights, z, probs)
    K, square = len(z), np.float32(1)
    for k in range(K):
        square += z[k] * z[k]
    step = np.float32(rate) / square
    for other in range(len(probs)):
        error = (other == label) - probs[other]
        if abs(error) < LEAST_ERROR:  # a write touches few rows
            continue
        for k in range(K):
            weights[other, k + 1] += step * error * z[k] - DECAY * weights[other, k + 1]
        weights[other, 0] += step * error


@cached_njit
def linear_steps(weights: Array, z: Array, y: Array, query: Array, label: int, spans: Array, ordinal: int) -> None:
    """Learn a label, and then again some stored examples, with each table of weights [TABLES, L, K + 1].

    spans [TABLES]: number of the latest examples that a table learns again from.
    """
    n, L = len(y), weights.shape[1]
    probs = np.empty(L, np.float32)
    for table in range(len(weights)):
        linear_step(weights[table], query, label, 1.0, probs)
        if n > 0:
            for repeat in range(min(REPEATS, max(2, 320 // L))):
                i = n - 1 - np.int64(hashed(ordinal, repeat + REPEATS * table) % np.uint64(spans[table]))
                linear_step(weights[table], z[i], y[i], 0.5, probs)


@cached_njit
def forest(
    z: Array, y: Array, first: int, query: Array, prior: Array, trees: int, trials: int, sample: int, out: Array
) -> None:
    """Fill the mean leaf of randomised trees, of which only the path of the query is grown.

    Each split is the best of random columns and thresholds (extremely randomised trees: Geurts et al. 2006), judged on
    at most `sample` examples of the node. On the path, each node's shares count as the prior of the next node's.
    """
    L, K, n = len(out), len(query), len(y)
    rows, probs = np.empty(n - first, np.int64), np.empty(L, np.float32)
    looked_rows, looked_y = np.empty(sample, np.int64), np.empty(sample, np.int64)
    left, whole, counts = np.empty(L, np.float32), np.empty(L, np.float32), np.empty(L, np.float32)
    out[:] = 0
    for tree in range(trees):
        size = n - first
        for i in range(size):
            rows[i] = first + i
        probs[:] = prior
        for depth in range(14):
            counts[:] = 0
            for i in range(size):
                counts[y[rows[i]]] += 1
            for label in range(L):
                probs[label] = (counts[label] + probs[label]) / (size + 1)
            if counts.max() == size or size < 3:
                break
            looked = min(size, sample)
            begin, stride = 0, size // looked
            if stride > 1:
                begin = int(np.int64(hashed(tree, depth) % np.uint64(size - stride * looked + stride)))
            whole[:] = 0
            for j in range(looked):
                looked_rows[j] = rows[begin + j * stride]
                looked_y[j] = y[looked_rows[j]]
                whole[looked_y[j]] += 1
            best, column, threshold = np.float32(-1), -1, np.float32(0)
            for trial in range(trials):
                key = hashed(tree * 64 + depth, trial + 7)
                k = int(np.int64(key % np.uint64(K)))
                one = z[rows[np.int64((key >> np.uint64(16)) % np.uint64(size))], k]
                other = z[rows[np.int64((key >> np.uint64(40)) % np.uint64(size))], k]
                if one == other:
                    continue
                cut = np.float32(0.5) * (one + other)
                left[:] = 0
                below = np.float32(0)
                for j in range(looked):
                    is_left = np.float32(z[looked_rows[j], k] < cut)  # no branch: it would be mispredicted
                    left[looked_y[j]] += is_left
                    below += is_left
                if below == 0 or below == looked:
                    continue
                score_left, score_right = np.float32(0), np.float32(0)
                for label in range(L):
                    score_left += left[label] * left[label]
                    right = whole[label] - left[label]
                    score_right += right * right
                score = score_left / below + score_right / (looked - below)
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
        out += probs
    out /= trees
