"""The readers of arms: each gives an expected reward of every arm of a decision, from the stored examples alone.

Shapes: n examples, oldest first; A arms of the decision; K columns, standardised, the context's and the arms' own; a
query [K] for each arm. `arm_of` [n]: index in 0…A − 1 of each example's arm, −1 for an arm that is not in the decision.
"""

from __future__ import annotations

import math

import numpy as np

from model.numba_support import Array, cached_njit
from model.tabular.number_kernels import apply_linear, forest_mean, near_mean, ridge
from model.tabular.readers import NEAREST, nearest

READERS = ("mean", "arm", "arm, late", "near", "ridge", "forest", "near, all arms", "ridge, all arms")
E = len(READERS)
MEAN, ARM, ARM_LATE, NEAR, RIDGE, FOREST, NEAR_ALL, RIDGE_ALL = range(E)
ARM_COLUMNS, ALL_COLUMNS = 12, 24  # columns of a ridge regression of one arm, and of all arms
PENALTY, PRIOR_REWARDS, SHARPNESS = 2.0, 1.0, 5
LATE_KEEP = 0.97
TREES, TRIALS, SAMPLE = 12, 8, 48


@cached_njit
def arm_relevances(z: Array, rewards: Array, arm_of: Array, arms: int, out: Array) -> None:
    """Fill the share of the rewards' variance within arms that each column explains, arm by arm, less chance's."""
    n, K = z.shape
    counts, sums = np.zeros(arms, np.float32), np.zeros(arms, np.float32)
    cross, shifts = np.zeros((arms, K), np.float32), np.zeros((arms, K), np.float32)
    square, squares = np.float32(0), np.zeros(K, np.float32)
    for i in range(n):
        a = arm_of[i]
        if a < 0:
            continue
        counts[a] += 1
        sums[a] += rewards[i]
        square += rewards[i] * rewards[i]
        for k in range(K):
            cross[a, k] += z[i, k] * rewards[i]
            shifts[a, k] += z[i, k]
            squares[k] += z[i, k] * z[i, k]
    total, seen = max(counts.sum(), np.float32(1)), np.float32(0)
    for a in range(arms):
        if counts[a] > 0:
            square -= sums[a] * sums[a] / counts[a]
            seen += 1
    out[:] = 0
    for a in range(arms):
        if counts[a] > 1:
            for k in range(K):
                covariance = cross[a, k] - shifts[a, k] * sums[a] / counts[a]
                out[k] += covariance * covariance / (counts[a] * (squares[k] / total + np.float32(1e-6)))
    for k in range(K):
        out[k] = max(out[k] / (square + np.float32(1e-6)) - seen / total, np.float32(0))


@cached_njit
def read_arms(
    z: Array, rewards: Array, arm_of: Array, queries: Array, metric: Array, has_features: bool, out: Array, votes: Array
) -> None:
    """Fill out [E, A] with expected rewards, and votes [A] with the number of near examples of each arm.

    metric [K]: weight of each column in a distance. has_features: whether the arms have columns of their own.
    """
    n, K = z.shape
    A = len(queries)
    mean, late = np.float32(0), np.float32(0)
    weight, keep = np.float32(0), np.float32(LATE_KEEP)
    sizes = np.zeros(A, np.int64)
    for i in range(n):
        mean += rewards[i]
        late = late * keep + rewards[i]
        weight = weight * keep + 1
        if arm_of[i] >= 0:
            sizes[arm_of[i]] += 1
    mean /= max(n, 1)
    late /= max(weight, np.float32(1))
    indices, distances = np.empty(NEAREST, np.int64), np.empty(NEAREST, np.float32)
    ranked = np.argsort(-metric, kind="mergesort")
    shared = ranked[: min(K, ALL_COLUMNS)]
    chosen = ranked[: min(K, ARM_COLUMNS)]
    common = np.zeros(len(shared) + 1, np.float32)
    at_query = np.empty(1, np.float32)
    if n > 0 and K > 0:
        ridge(z, rewards, 0, shared, PENALTY, common)
    coefficients = np.zeros(len(chosen) + 1, np.float32)
    for a in range(A):
        own, own_rewards = np.empty((sizes[a], K), np.float32), np.empty(sizes[a], np.float32)
        size, total, late_total, late_weight = 0, np.float32(0), np.float32(0), np.float32(0)
        for i in range(n):
            late_total, late_weight = late_total * keep, late_weight * keep
            if arm_of[i] == a:
                own_rewards[size] = rewards[i]
                total += rewards[i]
                late_total, late_weight = late_total + rewards[i], late_weight + 1
                for k in range(K):
                    own[size, k] = z[i, k]
                size += 1
        prior = np.float32(PRIOR_REWARDS)
        out[MEAN, a] = mean
        out[ARM, a] = (total + prior * mean) / (size + prior)
        out[ARM_LATE, a] = (late_total + prior * late) / (late_weight + prior)
        for reader in range(NEAR, E):
            out[reader, a] = out[ARM, a]
        votes[a] = size
        if K == 0:
            continue
        query = queries[a]
        if has_features and n > 0:
            found = nearest(z, query, metric, 0, indices, distances)
            out[NEAR_ALL, a] = near_mean(rewards, indices, distances, found, SHARPNESS, mean)
            apply_linear(query.reshape((1, K)), shared, common, at_query)
            out[RIDGE_ALL, a] = at_query[0]
        if size < 2:
            continue
        found = nearest(own, query, metric, 0, indices, distances)
        out[NEAR, a] = near_mean(own_rewards, indices, distances, found, SHARPNESS, out[ARM, a])
        for i in range(size):
            own_rewards[i] -= out[ARM, a]
        ridge(own, own_rewards, 0, chosen, PENALTY, coefficients)
        apply_linear(query.reshape((1, K)), chosen, coefficients, at_query)
        out[RIDGE, a] = out[ARM, a] + at_query[0]
        trees = max(2, min(TREES, 240 // A))
        out[FOREST, a] = out[ARM, a] + forest_mean(own, own_rewards, 0, query, np.float32(0), trees, TRIALS, SAMPLE)


@cached_njit
def chances(means: Array, deviations: Array, out: Array) -> None:
    """Fill the probability that each arm is the best, if their values are normal: Thompson sampling's, by a sum.

    P(a) = ∫ φ_a(v) Π_{b ≠ a} Φ_b(v) dv, over 96 points of the value v.
    """
    A, points = len(means), 96
    low, high = np.float32(1e30), np.float32(-1e30)
    for a in range(A):
        high = max(high, means[a] + 4 * deviations[a])
        low = max(means[a] - 4 * deviations[a], low) if low < 1e29 else means[a] - 4 * deviations[a]
    out[:] = np.float32(1e-12)
    step = (high - low) / points
    logs = np.empty(A, np.float64)
    for p in range(points):
        value, total = low + (p + 0.5) * step, 0.0
        for a in range(A):
            u = (value - means[a]) / deviations[a]
            logs[a] = math.log(max(0.5 * math.erfc(-u * 0.7071067811865476), 1e-300))
            total += logs[a]
        for a in range(A):
            u = (value - means[a]) / deviations[a]
            out[a] += math.exp(total - logs[a] - 0.5 * u * u) / deviations[a] * step
    out /= out.sum()
