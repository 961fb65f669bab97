"""The configuration of a tabular learner: its task, its limits and the memory that a session has.

The configuration is part of the checkpoint, so the fields keep their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from model.memory import MemoryConfig, MemoryConfigError, SiteConfig

Task = Literal["labels", "regression", "bandit"]
MAX_COLUMNS, MAX_LABELS, MAX_ARMS = 256, 100, 256
ROW = 32  # numbers in a row of every site
SESSION, EXAMPLES, WEIGHTS = "session", "examples", "weights"  # names of sites; see `memory`
SESSION_ROWS = 8
WEIGHT_SEGMENTS = -(-(1 + 2 * MAX_COLUMNS) // ROW)  # rows of the weights of one label or arm
MAX_EXAMPLES = 1024
EXAMPLE_ROWS = 9 * MAX_EXAMPLES  # rows of all examples of a session: 1.2 MB
TABLES = 2  # linear readers of labels
HORIZONS = (0.85, 0.97, 0.995)  # discounts of the readers' losses of late


class TabularError(ValueError):
    """A learner that cannot be built or read, or an input out of its limits; the message names field, limit, value."""


@dataclass(frozen=True)
class TabularConfig:
    """The shape of a tabular learner.

    name: the model name that clients send.
    task: "labels" (predict a label), "regression" (predict a number) or "bandit" (choose an arm, learn its reward).
    memory: the sites of the session's memory; all of them are journals.
    columns, labels, arms: the largest number of columns, labels and arms. For a bandit, the columns of the context and
        of the arms' features count together.
    """

    name: str
    task: Task
    memory: MemoryConfig
    columns: int = MAX_COLUMNS
    labels: int = MAX_LABELS
    arms: int = MAX_ARMS

    def __post_init__(self) -> None:
        if self.task not in ("labels", "regression", "bandit"):
            raise TabularError(f"task must be 'labels', 'regression' or 'bandit', got {self.task!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON-serialisable values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TabularConfig:
        """Build a configuration from `to_dict`'s keys. Raises TabularError on an unknown or a missing key."""
        try:
            return cls(**{**data, "memory": MemoryConfig.from_dict(data["memory"])})
        except (TypeError, KeyError, MemoryConfigError) as error:
            raise TabularError(f"not a tabular learner's configuration: {error}") from error


def default_config(name: str, task: Task) -> TabularConfig:
    """Return the configuration of a learner of a task, with the memory that every session of it has."""
    sites = [
        SiteConfig(SESSION, "journal", slots=SESSION_ROWS, k=1, width=ROW),
        SiteConfig(EXAMPLES, "journal", slots=EXAMPLE_ROWS, k=1, width=ROW),
    ]
    if task == "labels":
        slots = TABLES * MAX_LABELS * WEIGHT_SEGMENTS
        sites.append(SiteConfig(WEIGHTS, "journal", slots=slots, k=1, width=ROW))
    return TabularConfig(name, task, MemoryConfig(hidden_size=ROW, sites=tuple(sites)))
