"""The learners by task: made new, or read from a file."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

from model.tabular import arm_readers, label_readers, number_readers
from model.tabular.checkpoint import read_tabular
from model.tabular.config import TabularConfig, Task
from model.tabular.label_learner import Labels
from model.tabular.mixer import Mixer
from model.tabular.number_learner import Regression
from model.tabular.reward_learner import Bandit

Learners = Labels | Regression | Bandit
NUM_READERS: dict[Task, int] = {"labels": label_readers.E, "regression": number_readers.E, "bandit": arm_readers.E}


def new_learner(config: TabularConfig, mixer: Mixer | None = None) -> Learners:
    """Return the learner of a configuration, with a mixer, or with the one that is shipped for the task."""
    mixer = mixer or shipped_mixer(config.task)
    if config.task == "labels":
        return Labels(config, mixer)
    return Regression(config, mixer) if config.task == "regression" else Bandit(config, mixer)


def shipped_mixer(task: Task) -> Mixer:
    """Return the mixer that is shipped for a task; one before training for a bandit, which uses none."""
    if task == "bandit":
        return Mixer(NUM_READERS[task])
    with as_file(files("model") / "checkpoints" / "tabular" / f"{task}.safetensors") as path:
        return read_tabular(path)[1]


def load_learner(path: Path) -> Learners:
    """Read a learner from a file of `save_tabular`. Raises TabularError."""
    return new_learner(*read_tabular(path))
