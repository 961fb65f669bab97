"""Worlds to adapt to. Importing this package registers them with `gymnasium`, one task an environment:

    gymnasium.make("imprint/CardSorting-v0", dims=8)

Options are those of the classes; `steps` is how long a task lasts.
"""

from functools import partial

import gymnasium

from research.scenarios.bandits import BernoulliBandit, Choices, LinearBandit
from research.scenarios.card_sorting import CardSorting
from research.scenarios.core import TaskEnv, Tasks
from research.scenarios.streams import FunctionStream, LabelStream

__all__ = [
    "BernoulliBandit",
    "CardSorting",
    "Choices",
    "FunctionStream",
    "LabelStream",
    "LinearBandit",
    "TaskEnv",
    "Tasks",
]

for tasks, steps in (
    (CardSorting, 300),
    (BernoulliBandit, 500),
    (LinearBandit, 500),
    (Choices, 100),
    (LabelStream, 200),
    (FunctionStream, 400),
):
    gymnasium.register(f"imprint/{tasks.__name__}-v0", partial(TaskEnv, tasks, steps=steps))
