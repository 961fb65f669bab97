"""The learner of rewards: what it computes for a decision, and for a reward, from the memory of its session.

Readers are weighed by how well they foretold the rewards of late (a Bayesian mixture that forgets). An arm's value is
taken as normal around the mixture's mean; an arm is drawn with the probability that it is the best (Thompson 1933).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from model.numba_support import Array
from model.tabular.arm_readers import ARM, ARM_LATE, MEAN, READERS, arm_relevances, chances, read_arms
from model.tabular.columns import standardise
from model.tabular.config import HORIZONS
from model.tabular.memory import COUNT, StreamMemory

ERROR = 7  # number of the session's row: mean squared error of late
BLIND = [MEAN, ARM, ARM_LATE]  # readers that do not look at the columns
TRUST = 0.5  # of the log-likelihood of the readers' errors
WIDTH = 0.5  # of the standard deviation of an arm's value
DIMENSIONS, LARGEST_DIMENSIONS = 0.4, 12  # rewards that a column costs where columns are read, and most columns
VARIANCE_PRIOR = 3.0  # rewards that the variance of all rewards counts for in an arm's own
SURE = 1e-3  # smallest standard deviation, in those of the rewards


class ArmReading(NamedTuple):
    """The readout of a decision: means [E, A], the mixture's mean and standard deviation [A], the reward's
    own standard deviation, and how many examples of each arm [A] there are."""

    means: Array
    mean: Array
    deviation: Array
    scale: float
    counts: Array


def read_decision(memory: StreamMemory, queries: Array, arms: Array, has_features: bool) -> ArmReading:
    """Return what the readers say of arms [A] with queries [A, C], as wide as the memory's examples."""
    n, A = len(memory.values), len(arms)
    rewards, centre, scale = _scaled_rewards(memory.values)
    place = np.full(max(int(arms.max()), int(memory.extra[:, 0].max(initial=0))) + 1, -1, np.int64)
    place[arms] = np.arange(A)
    arm_of = place[memory.extra[:, 0].astype(np.int64)]
    if n:
        z, scaled, _ = standardise(memory.x, queries, memory.ordinals)
    else:
        z, scaled = np.empty((0, 0), np.float32), np.empty((A, 0), np.float32)
    relevance = np.empty(z.shape[1], np.float32)
    if z.shape[1]:
        arm_relevances(z, rewards, arm_of, A, relevance)
        relevance = relevance + np.float32(0.05) * relevance.mean(dtype=np.float32) + np.float32(1e-4)
    means, votes = np.empty((len(READERS), A), np.float32), np.empty(A, np.float32)
    read_arms(z, rewards, arm_of, scaled, relevance, has_features, means, votes)
    means = np.clip(means, rewards.min(initial=0.0) - 0.5, rewards.max(initial=0.0) + 0.5)
    counts = np.bincount(arm_of[arm_of >= 0], minlength=A)
    error = (float(memory.row[ERROR]) * n + 1.0) / (n + 1)
    shares = _shares(memory.losses, error)
    seeing = 1.0 - float(shares[BLIND].sum())
    costs = 1.0 + DIMENSIONS * seeing * min(z.shape[1], LARGEST_DIMENSIONS)
    deviation = np.maximum(WIDTH * np.sqrt(error * _variances(rewards, arm_of, counts) / (1.0 + counts / costs)), SURE)
    mean = shares @ means
    return ArmReading(
        means, (centre + scale * mean).astype(np.float32), (scale * deviation).astype(np.float32), scale, counts
    )


def _variances(rewards: Array, arm_of: Array, counts: Array) -> Array:
    """Return the variance of each arm's rewards [A], which shrinks towards that of all rewards."""
    is_known, A = arm_of >= 0, len(counts)
    sums = np.bincount(arm_of[is_known], rewards[is_known], A)
    squares = np.bincount(arm_of[is_known], rewards[is_known] ** 2, A)
    within = np.maximum(squares - sums**2 / np.maximum(counts, 1), 0)
    variances: Array = (within + VARIANCE_PRIOR) / (counts + VARIANCE_PRIOR)
    return variances


def _scaled_rewards(rewards: Array) -> tuple[Array, float, float]:
    """Return the rewards standardised, and their centre and scale."""
    if not len(rewards):
        return rewards, 0.0, 1.0
    wide = rewards.astype(np.float64)
    centre = float(wide.mean())
    spread = float(np.sqrt((((wide - centre) ** 2).sum() + float(np.abs(wide).max()) ** 2 / 4) / (len(wide) + 1)))
    spread = spread or 1.0
    return np.clip((wide - centre) / spread, -10, 10).astype(np.float32), centre, spread


def _shares(losses: Array, error: float) -> Array:
    """Return the readers' shares [E] by their discounted squared errors."""
    scores = -TRUST * losses[:, 1:].mean(1, dtype=np.float64) / (2 * error)
    shares = np.exp(scores - scores.max())
    normalised: Array = (shares / shares.sum()).astype(np.float32)
    return normalised


def decide(reading: ArmReading) -> Array:
    """Return the probability with which each arm [A] is to be drawn."""
    probs = np.empty(len(reading.mean), np.float32)
    chances(reading.mean, reading.deviation, probs)
    return probs


def learn_reward(memory: StreamMemory, reading: ArmReading, reward: float) -> None:
    """Change the session's row and losses by the reward of an arm; reading: of that arm alone."""
    row = memory.row
    row[COUNT] += 1
    n = len(memory.values)
    if not n:
        return
    _, centre, scale = _scaled_rewards(memory.values)
    scaled = (reward - centre) / scale
    errors = np.minimum(np.abs(reading.means[:, 0] - np.float32(scaled)), np.float32(4)) ** 2
    memory.losses = memory.losses * np.array(HORIZONS, np.float32) + errors[:, None]
    error = min(abs(float(reading.mean[0]) - reward) / scale, 4.0) ** 2
    row[ERROR] += (error - row[ERROR]) * max(0.01, 1.0 / n)
