"""Scenarios: worlds that a policy adapts to. Importing the package registers them with `gymnasium`:

    gymnasium.make("imprint/CardSorting-v0", dims=8)

An environment is one task; its options are those of the world's class, and `steps` is the length of the task.

A new scenario touches two files:

1. `research/scenarios/my_world.py` defines the world, a subclass of `core.Tasks` (`core.TeacherTasks` with a teacher to
   imitate, `core.LabellingTasks` with answers instead of rewards), and a constant

       SCENARIO = Scenario(
           MyWorld,
           env_steps=100,
           recipes={"my-world": Recipe(MyWorld, PolicyTrainConfig(rounds=200), steps=100)},
           evaluation=ActingEvaluation({"random": RandomActor}),
       )

   Baselines and figures that other scenarios share are in `baselines` and `measures`; others belong into the file.
2. `research/scenarios/registry.py` imports that constant and lists it in `SCENARIOS`.

The environment `imprint/MyWorld-v0`, `imprint train --policy my-world` and `imprint scenario my-world` follow from the
description, and the tests of all scenarios cover it.
"""

from research.scenarios.bernoulli_bandit import BernoulliBandit
from research.scenarios.card_sorting import CardSorting
from research.scenarios.choices import Choices
from research.scenarios.core import TaskEnv, Tasks
from research.scenarios.function_stream import FunctionStream
from research.scenarios.graph_walk import GraphWalk
from research.scenarios.label_stream import LabelStream
from research.scenarios.linear_bandit import LinearBandit
from research.scenarios.maze import Maze
from research.scenarios.registry import register_environments

__all__ = [
    "BernoulliBandit",
    "CardSorting",
    "Choices",
    "FunctionStream",
    "GraphWalk",
    "LabelStream",
    "LinearBandit",
    "Maze",
    "TaskEnv",
    "Tasks",
]

register_environments()
