"""Bandits: which arm pays must be found by pulling, once and for all, as it drifts, or for each context."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from research.scenarios.core import FloatArray, IntArray, Tasks, TeacherTasks

DISCOUNTS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998)
DEPTH = 500  # pulls of one arm that an index is worked out for


class BernoulliBandit(TeacherTasks):
    """Arms that pay 1 with a chance of their own, uniform in 0…1, or else 0.

    horizon: steps of the task; the context says which share of them is over. restless: the chance of each arm, at each
    step, to be given another chance.
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
        self.chances = rng.random((batch, arms))
        self.counts = np.zeros((batch, arms, 2))  # zeros and ones seen
        self.done = 0

    def observe(self) -> FloatArray:
        return np.full((self.batch, 1), min(1.0, self.done / self.horizon), np.float32)

    def step(self, actions: IntArray) -> FloatArray:
        here = np.arange(self.batch)
        reward = self.rng.random(self.batch) < self.chances[here, actions]
        self.counts[here, actions, reward.astype(int)] += 1
        self.done += 1
        if self.restless:
            self.counts *= 1 - self.restless
            new = self.rng.random(self.chances.shape) < self.restless
            self.chances = np.where(new, self.rng.random(self.chances.shape), self.chances)
        return reward.astype(np.float32)

    def means(self) -> FloatArray:
        return self.chances.astype(np.float32)

    def teacher_scores(self) -> FloatArray:
        """Each arm's Gittins index, at the discount whose horizon is what is left of the steps, or until it changes."""
        left = max(2.0, self.horizon - self.done) if not self.restless else 1 / self.restless
        return gittins(self.counts[..., 1], self.counts[..., 0], 1 - 1 / left).astype(np.float32)

    def expected_rewards(self) -> FloatArray:
        """Each arm's posterior mean."""
        means: FloatArray = ((self.counts[..., 1] + 1) / (self.counts.sum(-1) + 2)).astype(np.float32)
        return means


class LinearBandit(Tasks):
    """Contexts of `dims` normal numbers; an arm pays 1 with chance σ(sharp · x·θ_arm), θ of unit length and the task's.

    restless: the chance of all arms, at each step, to be given other weights.
    """

    def __init__(
        self,
        batch: int,
        rng: np.random.Generator,
        *,
        arms: int = 5,
        dims: int = 4,
        sharp: float = 3.0,
        restless: float = 0.0,
    ) -> None:
        super().__init__(batch, rng)
        self.actions, self.context, self.sharp, self.restless = arms, dims, sharp, restless
        self.weights = self._draw(batch)
        self.current = rng.normal(size=(batch, dims))

    def observe(self) -> FloatArray:
        return self.current.astype(np.float32)

    def step(self, actions: IntArray) -> FloatArray:
        chance = self.means()[np.arange(self.batch), actions]
        reward = self.rng.random(self.batch) < chance
        self.current = self.rng.normal(size=self.current.shape)
        if self.restless:
            new = self.rng.random(self.batch) < self.restless
            self.weights[new] = self._draw(int(new.sum()))
        return reward.astype(np.float32)

    def means(self) -> FloatArray:
        return _sigmoid(self.sharp * np.einsum("bad,bd->ba", self.weights, self.current)).astype(np.float32)

    def _draw(self, batch: int) -> NDArray[np.float64]:
        weights = self.rng.normal(size=(batch, self.actions, self.context))
        units: NDArray[np.float64] = weights / np.linalg.norm(weights, axis=-1, keepdims=True)
        return units


class Choices(Tasks):
    """Personalisation: a user is shown one of a catalogue's items and takes it (1) or not (0).

    Items have `dims` traits that everybody can see, the same in all tasks; a user has a taste in them and a liking of
    each item that no trait explains, both unknown. The taste changes at each step with a chance of `moves`.
    """

    def __init__(
        self,
        batch: int,
        rng: np.random.Generator,
        *,
        items: int = 20,
        dims: int = 6,
        sharp: float = 1.5,
        own: float = 0.7,
        moves: float = 0.0,
    ) -> None:
        super().__init__(batch, rng)
        self.actions, self.features, self.sharp, self.own, self.moves = items, dims, sharp, own, moves
        self.item_features = np.random.default_rng(1).normal(size=(items, dims)) / np.sqrt(dims)
        self.user_weights = rng.normal(size=(batch, dims))
        self.user_item_bias = rng.normal(size=(batch, items))

    def observe(self) -> FloatArray:
        return np.tile(self.item_features.flatten(), (self.batch, 1)).astype(np.float32)

    def step(self, actions: IntArray) -> FloatArray:
        chance = self.means()[np.arange(self.batch), actions]
        reward = self.rng.random(self.batch) < chance
        if self.moves:
            new = self.rng.random(self.batch) < self.moves
            self.user_weights[new] = self.rng.normal(size=(int(new.sum()), self.features))
            self.user_item_bias[new] = self.rng.normal(size=(int(new.sum()), self.actions))
        return reward.astype(np.float32)

    def means(self) -> FloatArray:
        logits = self.sharp * self.user_weights @ self.item_features.T + self.own * self.user_item_bias
        return _sigmoid(logits - 1.5).astype(np.float32)


def gittins(ones: NDArray[np.float64], zeros: NDArray[np.float64], discount: float) -> NDArray[np.float64]:
    """The Gittins index of arms with a uniform prior that have paid and not paid so often; between the discounts of the
    table by their horizons' logarithms, between counts by the nearest."""
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
    """Indices [DEPTH + 1, DEPTH + 1] by pulls and how many of them paid, to 1 / `steps`.

    Calibration (Gittins 1989): the index is the sure payment for which stopping is as good as going on.
    """
    sure = (np.arange(steps) + 0.5) / steps
    stop_value = sure / (1 - discount)
    index = np.zeros((DEPTH + 1, DEPTH + 1), np.float32)
    depth = min(DEPTH, int(20 / (1 - discount))) if discount < 0.99 else DEPTH
    mean = (np.arange(depth + 1) + 1) / (depth + 2)
    value = np.maximum(stop_value, mean[:, None] / (1 - discount))  # at the end, the mean is all there is to know
    for pulls in range(depth, -1, -1):
        mean = ((np.arange(pulls + 1) + 1) / (pulls + 2))[:, None]
        if pulls < depth:
            continue_value = mean * (1 + discount * value[1 : pulls + 2]) + (1 - mean) * discount * value[: pulls + 1]
            index[pulls, : pulls + 1] = (continue_value > stop_value).sum(1) / steps
            value = np.maximum(stop_value, continue_value)
    for pulls in range(depth, DEPTH + 1):
        index[pulls, : pulls + 1] = (np.arange(pulls + 1) + 1) / (pulls + 2)
    return index


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-x))
