"""Personalisation: a user is shown one item of a catalogue at a time, and takes it or not."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from research.scenarios.baselines import LinearContextualBandit, RandomActor, VowpalWabbit
from research.scenarios.core import Actor, FloatArray, IntArray, Tasks, sigmoid
from research.scenarios.measures import ActingEvaluation
from research.scenarios.scenario import PolicyTrainConfig, Recipe, Scenario


class Choices(Tasks):
    """Users who take the item that they are shown (1) or not (0).

    Items have `dims` observed traits, the same in all tasks. A user has hidden weights of the traits and a hidden bias
    for each item, scaled by `own`. Both are drawn anew at each step with probability `moves`.
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
        probs = self.means()[np.arange(self.batch), actions]
        reward = self.rng.random(self.batch) < probs
        if self.moves:
            changed = self.rng.random(self.batch) < self.moves
            self.user_weights[changed] = self.rng.normal(size=(int(changed.sum()), self.features))
            self.user_item_bias[changed] = self.rng.normal(size=(int(changed.sum()), self.actions))
        return reward.astype(np.float32)

    def means(self) -> FloatArray:
        logits = self.sharp * self.user_weights @ self.item_features.T + self.own * self.user_item_bias
        return sigmoid(logits - 1.5).astype(np.float32)


class ItemThompsonSampling(Actor):
    """Thompson sampling with counts for each item, without the traits; the prior has the population's mean."""

    def __init__(self) -> None:
        self._counts: NDArray[np.float64] | None = None

    def act(self, tasks: Tasks) -> IntArray:
        if self._counts is None or len(self._counts) != tasks.batch:
            self._counts = np.zeros((tasks.batch, tasks.actions, 2))
        ones, zeros = self._counts[..., 1], self._counts[..., 0]
        best: IntArray = tasks.rng.beta(0.6 + ones, 1.4 + zeros).argmax(1)
        return best

    def learn(self, actions: IntArray, rewards: FloatArray) -> None:
        assert self._counts is not None
        self._counts[np.arange(len(actions)), actions, rewards.astype(int)] += 1


SCENARIO = Scenario(
    Choices,
    env_steps=100,
    recipes={
        "choices": Recipe(
            Choices,
            PolicyTrainConfig(rounds=250, batch=32, steps=80, span=20, lr=5e-3, imitate=False),
            steps=100,
            slots=256,
            k=8,
            width=16,
            decay=0.0,
            identity=True,
            by_features=True,
            by_action=True,
            product=True,
        )
    },
    evaluation=ActingEvaluation(
        {
            "LinUCB on traits": LinearContextualBandit,
            "Thompson sampling, items apart": ItemThompsonSampling,
            "Vowpal Wabbit, SquareCB": VowpalWabbit,
            "random": RandomActor,
        }
    ),
)
