"""The Bernoulli bandit: find the arm that pays most often by pulling arms; the arms may drift.

The file holds the world, its Gittins index (the teacher), Thompson sampling, and the scenario's description.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from research.scenarios.baselines import RandomActor, TeacherActor, VowpalWabbit
from research.scenarios.core import Actor, FloatArray, IntArray, Tasks, TeacherTasks
from research.scenarios.measures import ActingEvaluation
from research.scenarios.scenario import PolicyTrainConfig, Recipe, Scenario

DISCOUNTS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998)
DEPTH = 500  # largest number of pulls in a table of indices


class BernoulliBandit(TeacherTasks):
    """Arms that pay 1 with a probability, uniform in 0…1, or else 0.

    horizon: steps of the task; the context is the share of the horizon that is over. restless: probability of each arm,
    at each step, to be given a new payout probability.
    """

    context = 1

    def __init__(
        self,
        batch: int,
        rng: np.random.Generator,
        *,
        arms: int = 10,
        horizon: int = 500,
        restless: float = 0.0,
    ) -> None:
        super().__init__(batch, rng)
        self.actions, self.horizon, self.restless = arms, horizon, restless
        self.probs = rng.random((batch, arms))
        self.counts = np.zeros((batch, arms, 2))  # observed zeros and ones
        self.done = 0

    def observe(self) -> FloatArray:
        return np.full((self.batch, 1), min(1.0, self.done / self.horizon), np.float32)

    def step(self, actions: IntArray) -> FloatArray:
        task = np.arange(self.batch)
        reward = self.rng.random(self.batch) < self.probs[task, actions]
        self.counts[task, actions, reward.astype(int)] += 1
        self.done += 1
        if self.restless:
            self.counts *= 1 - self.restless
            changed = self.rng.random(self.probs.shape) < self.restless
            self.probs = np.where(changed, self.rng.random(self.probs.shape), self.probs)
        return reward.astype(np.float32)

    def means(self) -> FloatArray:
        return self.probs.astype(np.float32)

    def teacher_scores(self) -> FloatArray:
        """Return each arm's Gittins index [B, A].

        The discount is 1 − 1 / horizon, where the horizon is the number of steps left, or the mean time between two
        changes of a restless arm.
        """
        left = max(2.0, self.horizon - self.done) if not self.restless else 1 / self.restless
        return gittins(self.counts[..., 1], self.counts[..., 0], 1 - 1 / left).astype(np.float32)

    def expected_rewards(self) -> FloatArray:
        """Return each arm's posterior mean [B, A] under a uniform prior."""
        means: FloatArray = ((self.counts[..., 1] + 1) / (self.counts.sum(-1) + 2)).astype(np.float32)
        return means


class ThompsonSampling(Actor):
    """Thompson sampling with the world's own counts: the best arm under a draw from each arm's Beta posterior."""

    def act(self, tasks: Tasks) -> IntArray:
        assert isinstance(tasks, BernoulliBandit)
        best: IntArray = tasks.rng.beta(1 + tasks.counts[..., 1], 1 + tasks.counts[..., 0]).argmax(1)
        return best


def gittins(ones: NDArray[np.float64], zeros: NDArray[np.float64], discount: float) -> NDArray[np.float64]:
    """Return the Gittins index of arms with a uniform prior and these counts, any shape.

    Indices are interpolated between the discounts of the tables, linearly in the logarithm of the horizon
    1 / (1 − discount), and taken at the nearest integer counts.
    """
    pulls = np.minimum(np.rint(ones + zeros), DEPTH).astype(int)
    wins = np.clip(np.rint(ones * pulls / np.maximum(ones + zeros, 1e-9)), 0, pulls).astype(int)
    horizon_positions = np.log(1 / (1 - np.array(DISCOUNTS)))
    position = np.interp(np.log(1 / (1 - discount)), horizon_positions, np.arange(len(DISCOUNTS)))
    low = min(int(position), len(DISCOUNTS) - 2)
    share = position - low
    below, above = (gittins_table(DISCOUNTS[i])[pulls, wins] for i in (low, low + 1))
    index: NDArray[np.float64] = (1 - share) * below + share * above
    return index


@lru_cache(maxsize=len(DISCOUNTS))
def gittins_table(discount: float, steps: int = 400) -> NDArray[np.float32]:
    """Return the indices [DEPTH + 1, DEPTH + 1] by number of pulls and number of wins, with a resolution of 1 / steps.

    The method is calibration (Gittins 1989): the index of an arm is the sure payment
    for which stopping is worth as much as pulling on. Backward induction over the number of pulls.
    """
    sure = (np.arange(steps) + 0.5) / steps
    stop_value = sure / (1 - discount)
    index = np.zeros((DEPTH + 1, DEPTH + 1), np.float32)
    depth = min(DEPTH, int(20 / (1 - discount))) if discount < 0.99 else DEPTH
    mean = (np.arange(depth + 1) + 1) / (depth + 2)
    value = np.maximum(stop_value, mean[:, None] / (1 - discount))  # at the last pull the mean is taken for the truth
    for pulls in range(depth, -1, -1):
        mean = ((np.arange(pulls + 1) + 1) / (pulls + 2))[:, None]
        if pulls < depth:
            continue_value = mean * (1 + discount * value[1 : pulls + 2]) + (1 - mean) * discount * value[: pulls + 1]
            index[pulls, : pulls + 1] = (continue_value > stop_value).sum(1) / steps
            value = np.maximum(stop_value, continue_value)
    for pulls in range(depth, DEPTH + 1):
        index[pulls, : pulls + 1] = (np.arange(pulls + 1) + 1) / (pulls + 2)
    return index


BANDIT = Recipe(
    BernoulliBandit,
    PolicyTrainConfig(rounds=40, batch=64, steps=500, span=25, lr=5e-3, keen=100.0, led=0.5),
    steps=500,
    width=16,
    decay=0.0,
    identity=True,
    by_action=True,
)
SCENARIO = Scenario(
    BernoulliBandit,
    env_steps=500,
    recipes={"bandit": BANDIT, "bandit-5": replace(BANDIT, options={"arms": 5})},
    evaluation=ActingEvaluation(
        {
            "Gittins index": TeacherActor,
            "Thompson sampling": ThompsonSampling,
            "Vowpal Wabbit, SquareCB": VowpalWabbit,
            "random": RandomActor,
        }
    ),
)
