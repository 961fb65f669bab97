"""Bandits of the streams: a classification stream whose labels are arms (reward 1 for the right one), and Bernoulli
arms without context; the baselines are Vowpal Wabbit's, LinUCB, linear Thompson sampling, and Beta–Bernoulli ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Protocol

import numpy as np
from vowpalwabbit import Workspace

from research.scenarios.bernoulli_bandit import gittins
from research.streams.array_learners import Encoder, ImprintArms
from research.streams.baselines import vw_features
from research.streams.datasets import Features, Pair
from research.streams.prequential import Steps

Rng = np.random.Generator
BERNOULLI_ARMS, BERNOULLI_STEPS = 10, 300


class ArmBaseline(Protocol):
    """A learner that draws arms and learns the rewards of what it drew."""

    def choose(self, x: Features, rng: Rng) -> int:
        """Draw an arm."""

    def learn(self, arm: int, reward: float) -> None:
        """Learn the reward of the arm that was drawn last."""


class VwArms:
    """Vowpal Wabbit's contextual bandit, with the options of its documentation."""

    def __init__(self, arms: int, options: str) -> None:
        self._arms, self._model = arms, Workspace(f"--cb_explore {arms} --quiet {options}")

    def choose(self, x: Features, rng: Rng) -> int:
        self._text = vw_features(x)
        probs = np.array(self._model.predict(self._text), np.float64)
        self._probs = probs / probs.sum()
        self._drawn = int(rng.choice(self._arms, p=self._probs))
        return self._drawn

    def learn(self, arm: int, reward: float) -> None:
        self._model.learn(f"{arm + 1}:{-reward}:{self._probs[arm]:.6f} {self._text}")


class LinearArms:
    """One ridge regression an arm: the highest upper bound (LinUCB, Li et al. 2010) or the best of a draw (Thompson).

    The columns are standardised online; columns beyond `size` are left out.
    """

    def __init__(self, arms: int, size: int, *, drawn: bool, width: float = 0.5) -> None:
        self._inverse = np.tile(np.eye(size + 1), (arms, 1, 1))
        self._sums, self._size = np.zeros((arms, size + 1)), size
        self._width, self._drawn, self._encode = width, drawn, Encoder()
        self._count, self._mean, self._square = 0, np.zeros(size), np.zeros(size)

    def choose(self, x: Features, rng: Rng) -> int:
        row = np.zeros(self._size)
        encoded = np.nan_to_num(self._encode(x))[: self._size]
        row[: len(encoded)] = encoded
        self._count += 1
        change = row - self._mean
        self._mean = self._mean + change / self._count
        self._square = self._square + change * (row - self._mean)
        deviation = np.sqrt(self._square / self._count)
        self._x = np.append(np.where(deviation > 0, (row - self._mean) / np.where(deviation > 0, deviation, 1), 0), 1.0)
        theta = np.einsum("aij,aj->ai", self._inverse, self._sums)
        if self._drawn:
            noise = rng.normal(size=theta.shape)
            theta = theta + self._width * np.einsum("aij,aj->ai", np.linalg.cholesky(self._inverse), noise)
            return int((theta @ self._x).argmax())
        spread = np.sqrt(np.einsum("aij,i,j->a", self._inverse, self._x, self._x))
        return int((theta @ self._x + self._width * spread).argmax())

    def learn(self, arm: int, reward: float) -> None:
        turned = self._inverse[arm] @ self._x
        self._inverse[arm] -= np.outer(turned, turned) / (1 + self._x @ turned)
        self._sums[arm] += reward * self._x


class BetaArms:
    """Bernoulli arms with Beta posteriors: Thompson sampling, or the Gittins index for the steps that are left."""

    def __init__(self, arms: int, *, drawn: bool) -> None:
        self._counts, self._drawn = np.zeros((arms, 2)), drawn

    def choose(self, x: Features, rng: Rng) -> int:
        zeros, ones = self._counts.T
        if self._drawn:
            return int(rng.beta(ones + 1, zeros + 1).argmax())
        left = max(2.0, BERNOULLI_STEPS - self._counts.sum())
        return int(gittins(ones, zeros, 1 - 1 / left).argmax())

    def learn(self, arm: int, reward: float) -> None:
        self._counts[arm, int(reward)] += 1


ARM_BASELINES: dict[str, Callable[[int, int], ArmBaseline]] = {
    "imprint": lambda arms, columns: ImprintArms(arms),
    "vw": lambda arms, columns: VwArms(arms, ""),
    "vw squarecb": lambda arms, columns: VwArms(arms, "--squarecb"),
    "vw bag": lambda arms, columns: VwArms(arms, "--bag 5"),
    "linucb": lambda arms, columns: LinearArms(arms, columns, drawn=False),
    "linear thompson": lambda arms, columns: LinearArms(arms, columns, drawn=True),
}
BERNOULLI_BASELINES: dict[str, Callable[[], ArmBaseline]] = {
    "imprint": lambda: ImprintArms(BERNOULLI_ARMS),
    "beta thompson": lambda: BetaArms(BERNOULLI_ARMS, drawn=True),
    "gittins": lambda: BetaArms(BERNOULLI_ARMS, drawn=False),
}


def run_labels_as_arms(baseline: ArmBaseline, pairs: list[Pair], labels: list[Hashable], seed: int) -> Steps:
    """Return the reward of each step of a classification stream whose labels are the arms."""
    rng, rewards = np.random.default_rng([seed, 1]), np.zeros(len(pairs), np.float32)
    begun = time.perf_counter()
    for i, (x, label) in enumerate(pairs):
        arm = baseline.choose(x, rng)
        rewards[i] = labels[arm] == label
        baseline.learn(arm, float(rewards[i]))
    return {"reward": rewards, "seconds": np.array(time.perf_counter() - begun)}


def run_bernoulli(make: Callable[[], ArmBaseline], tasks: int, seed: int) -> Steps:
    """Return the regret of each task of independent Bernoulli arms, whose chances are uniform."""
    regrets = np.zeros(tasks)
    for task in range(tasks):
        rng = np.random.default_rng([seed, task])
        chances, baseline = rng.random(BERNOULLI_ARMS), make()
        for _ in range(BERNOULLI_STEPS):
            arm = baseline.choose({}, rng)
            baseline.learn(arm, float(rng.random() < chances[arm]))
            regrets[task] += chances.max() - chances[arm]
    return {"regret": regrets}
