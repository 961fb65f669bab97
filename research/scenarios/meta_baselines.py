"""Rivals that learn to learn: trained on the policy's lessons with several learning rates, of which the best counts."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.policies.network import Policy, new_policy
from research.corpus import console
from research.scenarios.core import Tasks
from research.scenarios.recipes import Recipe
from research.training.agents import Agent, ContextAgent, DenseAgent, RecurrentAgent
from research.training.policy_loop import PolicyTrainer, train_agent

RATES = (6e-4, 2e-3, 6e-3)
RIVALS = {
    "gru": "RL², GRU",
    "lstm": "RL², LSTM",
    "transformer": "transformer, task in context",
    "dense": "dense delta memory",
}
Judge = Callable[[Agent], float]  # how badly an agent does on tasks that no table shows


@dataclass(frozen=True)
class Effort:
    """rates: learning rates that a rival is trained with; trainings: seeds from which the policy, and a rival at its
    best rate, are trained; seconds of one core for each training of a rival."""

    rates: Sequence[float] = RATES
    trainings: int = 1
    seconds: float | None = None


@dataclass(frozen=True)
class Trained:
    """agents: one a training seed, at the best rate; tried: how badly each rate did."""

    agents: list[Agent]
    rate: float
    tried: Mapping[float, float]
    rounds: int
    late: float  # by what share the loss fell from the third quarter of the first training to the last
    seconds: float

    def note(self) -> str:
        """What a table says of it."""
        size = sum(parameter.numel() for parameter in self.agents[0].network.parameters())
        tried = ", ".join(f"{rate:g}: {figure:.2f}" for rate, figure in self.tried.items())
        at = f"lr {self.rate:g}" + (f" (other tasks: {tried})" if len(self.tried) > 1 else "")
        fell = f"loss −{self.late:.1%} in the last quarter"
        return f"{size:,} parameters, {self.rounds} rounds in {self.seconds:.0f} s, {fell}, {at}"


def train_rival(name: str, recipe: Recipe, size: int, judge: Judge, effort: Effort, seconds: float) -> Trained:
    """A rival of RIVALS of about `size` parameters, trained for so many seconds of one core with each rate, and with
    the best one from as many seeds as asked for."""

    def train(rate: float, seed: int) -> tuple[Agent, list[float]]:
        agent = _rival(name, recipe.make(1, np.random.default_rng(0)), size, seed)
        lessons = recipe.but(lr=rate, seed=seed).lessons
        losses = train_agent(
            agent,
            lambda batch, rng: recipe.make(batch, rng, training=True),
            lessons,
            greedy=recipe.greedy,
            seconds=seconds,
        )
        return agent, losses

    found, tried = {}, {}
    for rate in effort.rates:
        found[rate] = train(rate, 0)
        tried[rate] = judge(found[rate][0])
        console.print(f"{name}, lr {rate:g}: {tried[rate]:.3f} after {len(found[rate][1])} rounds")
    best = min(effort.rates, key=lambda rate: tried[rate])
    first, losses = found[best]
    others = [train(best, seed)[0] for seed in range(1, effort.trainings)]
    quarter = max(1, len(losses) // 4)
    late = 1 - float(np.mean(losses[-quarter:]) / np.mean(losses[-2 * quarter : -quarter] or losses))
    return Trained([first, *others], best, tried, len(losses), late, seconds)


def train_again(name: str, recipe: Recipe, seed: int) -> Policy:
    """The policy as it ships, but from another seed."""
    recipe = recipe.but(seed=seed)
    policy = new_policy(recipe.config(name), seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = PolicyTrainer(
            policy, lambda batch, rng: recipe.make(batch, rng, training=True), recipe.lessons, Path(folder)
        )
        trainer.run(lambda done, loss: None)
    console.print(f"{name}, seed {seed}: trained for {trainer.seconds:.0f} s of one core")
    return policy


def _rival(name: str, tasks: Tasks, size: int, seed: int) -> Agent:
    """An agent of about as many parameters."""

    def width(cost: float) -> int:
        """Units whose squares cost so many parameters each, beside the layers in and out; a multiple of 4."""
        edge = tasks.context + (tasks.actions + 1) * tasks.features + 3 * tasks.actions + 2
        return min(128, 4 * int((math.sqrt(edge**2 + 4 * cost * size) - edge) / (2 * cost) / 4))

    if name == "transformer":
        return ContextAgent(tasks, width(16.5), seed=seed)
    if name == "dense":
        return DenseAgent(tasks, width(5), seed=seed)
    return RecurrentAgent(tasks, width(8 if name == "lstm" else 6), cell=name, seed=seed)
