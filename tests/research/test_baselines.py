"""Meta-learned baselines are tuned: each learning rate is tried, and several seeds show the variance."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from research.scenarios.meta_baselines import BaselineTrainConfig, train_baseline
from research.scenarios.registry import RECIPES
from research.training.agents import Agent
from service.cli.main import app


def test_the_best_rate_on_practice_tasks_is_trained_from_several_seeds() -> None:
    recipe, evaluated = RECIPES["card-sorting"].with_train_config(batch=4, steps=4, span=2), list[Agent]()

    def evaluate(agent: Agent) -> float:
        evaluated.append(agent)
        return (3.0, 1.0, 2.0)[len(evaluated) - 1]

    baseline_config = BaselineTrainConfig(rates=(1e-4, 1e-3, 1e-2), trainings=2)
    trained = train_baseline("gru", recipe, 2000, evaluate, baseline_config, 0.02)
    assert trained.rate == 1e-3 and trained.rate_scores == {1e-4: 3.0, 1e-3: 1.0, 1e-2: 2.0}
    first, second = (agent.network for agent in trained.agents)
    assert first is evaluated[1].network
    assert not any(torch.equal(*pair) for pair in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("rates", ["fast", "1e-3,0", " "])
def test_invalid_learning_rates_are_refused(rates: str) -> None:
    result = CliRunner().invoke(app, ["scenario", "card-sorting", "--rates", rates])
    assert result.exit_code == 2 and "--rates must be" in result.output
