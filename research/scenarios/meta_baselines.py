"""Meta-learned baselines: agents that are trained on the policy's tasks, with several learning rates.

The agents themselves are in `research.training.agents`.
"""

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
from research.scenarios.scenario import Recipe
from research.training.agents import Agent, ContextAgent, DenseAgent, RecurrentAgent
from research.training.policy_loop import PolicyTrainer, train_agent

RATES = (6e-4, 2e-3, 6e-3)
META_BASELINES = {
    "gru": "RL², GRU",
    "lstm": "RL², LSTM",
    "transformer": "transformer, task in context",
    "dense": "dense delta memory",
}
EvaluateAgent = Callable[[Agent], float]  # an agent's figure on practice tasks; lower is better


@dataclass(frozen=True)
class BaselineTrainConfig:
    """The training of meta-learned baselines.

    rates: learning rates to try. trainings: number of seeds from which the policy, and a baseline at its best rate, are
    trained. seconds: of one core, for each training of a baseline (None: as long as the policy was trained).
    """

    rates: Sequence[float] = RATES
    trainings: int = 1
    seconds: float | None = None


@dataclass(frozen=True)
class TrainedBaseline:
    """A trained baseline.

    agents: one for each training seed, at the best rate. rate: the best learning rate. rate_scores: the practice figure
    of each rate. rounds: of the first training. late_improvement: share by which the loss fell from the third to the
    last quarter of the first training. seconds: of each training.
    """

    agents: list[Agent]
    rate: float
    rate_scores: Mapping[float, float]
    rounds: int
    late_improvement: float
    seconds: float

    def note(self) -> str:
        """Return the remark for the table."""
        size = sum(parameter.numel() for parameter in self.agents[0].network.parameters())
        rate_scores = ", ".join(f"{rate:g}: {figure:.2f}" for rate, figure in self.rate_scores.items())
        at = f"lr {self.rate:g}" + (f" (other tasks: {rate_scores})" if len(self.rate_scores) > 1 else "")
        improvement = f"loss −{self.late_improvement:.1%} in the last quarter"
        return f"{size:,} parameters, {self.rounds} rounds in {self.seconds:.0f} s, {improvement}, {at}"


def train_baseline(
    name: str, recipe: Recipe, size: int, evaluate: EvaluateAgent, baseline_config: BaselineTrainConfig, seconds: float
) -> TrainedBaseline:
    """Train a baseline of META_BASELINES with about `size` parameters.

    Each rate is tried from seed 0, for `seconds` of one core; the rate with the lowest `evaluate` is also trained from
    the other seeds.
    """

    def train(rate: float, seed: int) -> tuple[Agent, list[float]]:
        agent = _build_baseline(name, recipe.make(1, np.random.default_rng(0)), size, seed)
        train_config = recipe.with_train_config(lr=rate, seed=seed).train_config
        losses = train_agent(
            agent,
            lambda batch, rng: recipe.make(batch, rng, training=True),
            train_config,
            greedy=recipe.greedy,
            seconds=seconds,
        )
        return agent, losses

    trained, rate_scores = {}, {}
    for rate in baseline_config.rates:
        trained[rate] = train(rate, 0)
        rate_scores[rate] = evaluate(trained[rate][0])
        console.print(f"{name}, lr {rate:g}: {rate_scores[rate]:.3f} after {len(trained[rate][1])} rounds")
    best = min(baseline_config.rates, key=lambda rate: rate_scores[rate])
    first, losses = trained[best]
    others = [train(best, seed)[0] for seed in range(1, baseline_config.trainings)]
    quarter = max(1, len(losses) // 4)
    late_improvement = 1 - float(np.mean(losses[-quarter:]) / np.mean(losses[-2 * quarter : -quarter] or losses))
    return TrainedBaseline([first, *others], best, rate_scores, len(losses), late_improvement, seconds)


def train_from_seed(name: str, recipe: Recipe, seed: int) -> Policy:
    """Train a policy of the recipe from another seed than the shipped one."""
    recipe = recipe.with_train_config(seed=seed)
    policy = new_policy(recipe.config(name), seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = PolicyTrainer(
            policy, lambda batch, rng: recipe.make(batch, rng, training=True), recipe.train_config, Path(folder)
        )
        trainer.run(lambda done, loss: None)
    console.print(f"{name}, seed {seed}: trained for {trainer.seconds:.0f} s of one core")
    return policy


def _build_baseline(name: str, tasks: Tasks, size: int, seed: int) -> Agent:
    """Build an untrained agent with about `size` parameters."""

    def width(cost: float) -> int:
        """Return the width W, a multiple of 4, that solves cost·W² + edge·W = size; edge: the layers in and out."""
        edge = tasks.context + (tasks.actions + 1) * tasks.features + 3 * tasks.actions + 2
        return min(128, 4 * int((math.sqrt(edge**2 + 4 * cost * size) - edge) / (2 * cost) / 4))

    if name == "transformer":
        return ContextAgent(tasks, width(16.5), seed=seed)
    if name == "dense":
        return DenseAgent(tasks, width(5), seed=seed)
    return RecurrentAgent(tasks, width(8 if name == "lstm" else 6), cell=name, seed=seed)
