"""The list of all scenarios, and their recipes by name."""

from __future__ import annotations

from functools import partial

import gymnasium

from research.scenarios.bernoulli_bandit import SCENARIO as BERNOULLI_BANDIT
from research.scenarios.card_sorting import SCENARIO as CARD_SORTING
from research.scenarios.choices import SCENARIO as CHOICES
from research.scenarios.core import TaskEnv
from research.scenarios.function_stream import SCENARIO as FUNCTION_STREAM
from research.scenarios.graph_walk import SCENARIO as GRAPH_WALK
from research.scenarios.label_stream import SCENARIO as LABEL_STREAM
from research.scenarios.linear_bandit import SCENARIO as LINEAR_BANDIT
from research.scenarios.maze import SCENARIO as MAZE
from research.scenarios.scenario import Recipe, Scenario

SCENARIOS: tuple[Scenario, ...] = (
    CARD_SORTING,
    BERNOULLI_BANDIT,
    LINEAR_BANDIT,
    CHOICES,
    MAZE,
    GRAPH_WALK,
    LABEL_STREAM,
    FUNCTION_STREAM,
)
RECIPES: dict[str, Recipe] = {name: recipe for scenario in SCENARIOS for name, recipe in scenario.recipes.items()}


def scenario_of(recipe: str) -> Scenario:
    """Return the scenario that a recipe belongs to. Raises KeyError."""
    return {name: scenario for scenario in SCENARIOS for name in scenario.recipes}[recipe]


def register_environments() -> None:
    """Register every scenario with `gymnasium`."""
    for scenario in SCENARIOS:
        gymnasium.register(scenario.env_id, partial(TaskEnv, scenario.tasks, steps=scenario.env_steps))
