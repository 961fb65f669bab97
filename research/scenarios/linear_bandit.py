"""The linear bandit: the best arm depends on the context, through weights that must be learned."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from research.scenarios.baselines import LinearContextualBandit, RandomActor, VowpalWabbit
from research.scenarios.core import FloatArray, IntArray, Tasks, sigmoid
from research.scenarios.measures import ActingEvaluation
from research.scenarios.scenario import PolicyTrainConfig, Recipe, Scenario


class LinearBandit(Tasks):
    """Contexts x of `dims` normal values; an arm pays 1 with probability σ(sharp · x·θ_arm), or else 0.

    θ_arm is a random unit vector of the task. restless: probability of all arms, at each step, to get new vectors.
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
        probs = self.means()[np.arange(self.batch), actions]
        reward = self.rng.random(self.batch) < probs
        self.current = self.rng.normal(size=self.current.shape)
        if self.restless:
            changed = self.rng.random(self.batch) < self.restless
            self.weights[changed] = self._draw(int(changed.sum()))
        return reward.astype(np.float32)

    def means(self) -> FloatArray:
        logits = self.sharp * np.einsum("bad,bd->ba", self.weights, self.current)
        return sigmoid(logits).astype(np.float32)

    def _draw(self, batch: int) -> NDArray[np.float64]:
        weights = self.rng.normal(size=(batch, self.actions, self.context))
        units: NDArray[np.float64] = weights / np.linalg.norm(weights, axis=-1, keepdims=True)
        return units


SCENARIO = Scenario(
    LinearBandit,
    env_steps=500,
    recipes={
        "bandit-linear": Recipe(
            LinearBandit,
            PolicyTrainConfig(rounds=200, batch=64, steps=100, span=25, lr=5e-3, imitate=False),
            steps=500,
            slots=256,
            decay=0.0,
            identity=True,
            by_action=True,
            product=True,
        )
    },
    evaluation=ActingEvaluation(
        {
            "LinUCB": LinearContextualBandit,
            "linear Thompson sampling": partial(LinearContextualBandit, drawn=True),
            "Vowpal Wabbit, SquareCB": VowpalWabbit,
            "random": RandomActor,
        }
    ),
)
