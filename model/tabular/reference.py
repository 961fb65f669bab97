"""The readers in plain NumPy: what the compiled ones compute, written to be read. Tests compare the two.

Shapes and letters are those of `readers`, `number_kernels` and `columns`.
"""

from __future__ import annotations

import numpy as np

from model.numba_support import Array
from model.tabular.columns import HEAVY, INDICATORS, LINEAR, MISSING, SAMPLES, hashed
from model.tabular.readers import NEAREST, PRIOR_VOTES


def softmax(logs: Array) -> Array:
    """Return probabilities of log-probabilities up to a constant."""
    exps = np.exp(logs - logs.max())
    probs: Array = exps / exps.sum()
    return probs


def standardise(x: Array, queries: Array) -> tuple[Array, Array, Array]:
    """Return `columns.standardise` without its order of the columns: the columns stay in the order of x."""
    rows, n = np.concatenate([x, queries]).astype(np.float64), len(x)
    columns, numbers = [], []
    for c in range(x.shape[1]):
        missing = rows[:, c] == MISSING
        present = rows[:n, c][~missing[:n]]
        if len(present) >= 2 and present.std() > max(1e-6 * abs(present.mean()), 1e-30):
            centre, scale = present.mean(), present.std()
            looked = x[:: max(1, n // SAMPLES), c][:SAMPLES]
            looked = np.sort(looked[looked != MISSING]).astype(np.float64)
            if len(looked) >= 8:
                spread = (looked[3 * len(looked) // 4] - looked[len(looked) // 4]) / 1.35
                if spread > 0 and scale > HEAVY * spread:
                    centre, scale = looked[len(looked) // 2], HEAVY * spread
            z = (rows[:, c] - centre) / scale
            inside = np.clip(z, -LINEAR, LINEAR)
            columns.append(np.where(missing, 0.0, inside + 0.2 * np.clip(z - inside, -10, 10)))
            numbers.append(c)
        share = missing[:n].mean()
        if 0 < share < 1:
            columns.append((missing - share) / np.sqrt(share * (1 - share)))
            numbers.append(INDICATORS + c)
    z = np.stack(columns, axis=1) if columns else np.zeros((len(rows), 0))
    return z[:n], z[n:], np.array(numbers, np.int64)


def nearest(z: Array, query: Array, weights: Array, first: int) -> tuple[Array, Array]:
    """Return the indices and distances of the nearest examples."""
    distances = (weights * (z - query) ** 2).sum(1)
    order = np.lexsort((-np.arange(len(z)), distances))
    order = order[order >= first][:NEAREST]
    return order, distances[order]


def votes(distances: Array, sharpness: int) -> Array:
    """Return the votes of the nearest examples."""
    width = 1e-6 + distances[:sharpness].mean()
    weights: Array = np.exp(-np.maximum(distances / width - 1, 0))
    return weights


def neighbours(y: Array, indices: Array, distances: Array, sharpness: int, prior: Array) -> Array:
    """Return the shares of the labels among the nearest examples."""
    counts = prior * PRIOR_VOTES + np.bincount(y[indices], votes(distances, sharpness), len(prior))
    shares: Array = counts / counts.sum()
    return shares


def relevances(z: Array, y: Array) -> Array:
    """Return ω² of each column."""
    n, labels = len(y), np.unique(y)
    between = sum((y == label).sum() * z[y == label].mean(0) ** 2 for label in labels) - n * z.mean(0) ** 2
    whole = ((z - z.mean(0)) ** 2).sum(0)
    within = np.maximum(whole - between, 0) / max(n - len(labels), 1)
    share: Array = np.maximum(between - (len(labels) - 1) * within, 0) / (whole + within + 1e-6)
    return share


def gaussian_bayes(z: Array, y: Array, prior: Array, query: Array) -> Array:
    """Return the naive Bayes posterior with normal columns."""
    whole, logs = np.maximum(z.var(0), 1e-3), np.log(prior)
    for label in range(len(prior)):
        own = z[y == label]
        mean = own.sum(0) / (len(own) + 0.5)
        variance = (((own - mean) ** 2).sum(0) + 2 * whole) / (len(own) + 2) + 1e-3
        logs[label] -= 0.5 * (np.log(variance) + np.minimum((query - mean) ** 2 / variance, 25)).sum()
    return softmax(logs)


def kernel_bayes(z: Array, y: Array, prior: Array, query: Array) -> Array:
    """Return the naive Bayes posterior whose columns are counted near the query's value."""
    n, logs = len(y), np.log(prior)
    near = np.maximum(0, 1 - np.abs(z - query) / (0.9 * n**-0.25))
    share = (near.sum(0) + 0.1) / (n + 0.2)
    for label in range(len(prior)):
        own = near[y == label]
        logs[label] += np.log((own.sum(0) + 2 * share) / ((len(own) + 2) * share)).sum()
    return softmax(logs)


def discriminant(z: Array, y: Array, prior: Array, query: Array) -> tuple[Array, Array]:
    """Return the linear discriminant's posterior on all columns, and the covariance within labels."""
    D, L = z.shape[1], len(prior)
    means = np.stack([z[y == label].sum(0) / ((y == label).sum() + 0.5) for label in range(L)])
    left = z - means[y]
    shrink = D + 2
    covariance = (left.T @ left + shrink * np.eye(D)) / (len(y) + shrink) + 1e-3 * np.eye(D)
    difference = query - means
    square = (difference * np.linalg.solve(covariance, difference.T).T).sum(1)
    return softmax(np.log(prior) - 0.5 * square), covariance


def forest(z: Array, y: Array, query: Array, prior: Array, trees: int, trials: int, sample: int) -> Array:
    """Return the mean leaf of randomised trees."""
    L, leaves = len(prior), np.zeros(len(prior))
    for tree in range(trees):
        rows, probs = np.arange(len(y)), prior.astype(np.float64)
        for depth in range(14):
            counts = np.bincount(y[rows], minlength=L)
            probs = (counts + probs) / (len(rows) + 1)
            if counts.max() == len(rows) or len(rows) < 3:
                break
            cut = _best_cut(z, rows, tree, depth, trials, sample, np.eye(L)[y])
            if cut is None:
                break
            column, threshold = cut
            side = (z[rows, column] < threshold) == (query[column] < threshold)
            if not side.any():
                break
            rows = rows[side]
        leaves += probs
    return leaves / trees


def forest_mean(z: Array, t: Array, query: Array, mean: float, trees: int, trials: int, sample: int) -> float:
    """Return the mean leaf of randomised trees for numbers."""
    total = 0.0
    for tree in range(trees):
        rows, value = np.arange(len(t)), mean
        for depth in range(14):
            value = (t[rows].sum() + value) / (len(rows) + 1)
            if len(rows) < 4:
                break
            cut = _best_cut(z, rows, tree, depth, trials, sample, t[:, None])
            if cut is None:
                break
            column, threshold = cut
            side = (z[rows, column] < threshold) == (query[column] < threshold)
            if not side.any():
                break
            rows = rows[side]
        total += float(value)
    return total / trees


def _best_cut(
    z: Array, rows: Array, tree: int, depth: int, trials: int, sample: int, outcomes: Array
) -> tuple[int, float] | None:
    """Return the column and threshold, of random ones, that leave the least variance of the outcomes [n, L]."""
    size, looked = len(rows), min(len(rows), sample)
    stride, begin = size // looked, 0
    if stride > 1:
        begin = int(hashed(tree, depth)) % (size - stride * looked + stride)
    seen = rows[begin : begin + stride * looked : stride]
    best, cut = -1.0, None
    for trial in range(trials):
        key = int(hashed(tree * 64 + depth, trial + 7))
        k = key % z.shape[1]
        one, other = z[rows[(key >> 16) % size], k], z[rows[(key >> 40) % size], k]
        threshold = np.float32(0.5) * (one + other)
        left = z[seen, k] < threshold
        if one == other or not left.any() or left.all():
            continue
        score = sum((outcomes[seen[side]].sum(0) ** 2).sum() / side.sum() for side in (left, ~left))
        if score > best * (1 + 1e-9):
            best, cut = score, (k, threshold)
    return cut


def ridge(z: Array, t: Array, penalty: float) -> Array:
    """Return the coefficients [K + 1] of ridge regression, the intercept last."""
    n, K = z.shape
    design = np.concatenate([z, np.ones((n, 1))], axis=1)
    penalties = np.diag([penalty + 1e-4 * n] * K + [0.1])
    coefficients: Array = np.linalg.solve(design.T @ design + penalties, design.T @ t)
    return coefficients
