"""Streams and pools for the tests of tabular learners; the mixers are untrained, so no checkpoint is needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.memory import Pool
from model.memory.backend import choose_backend
from model.tabular.config import MAX_EXAMPLES, Task, default_config
from model.tabular.label_learner import Labels
from model.tabular.loading import NUM_READERS, Learners, new_learner
from model.tabular.mixer import Mixer
from model.tabular.number_learner import Regression

Array = NDArray[Any]


def learner_of(task: Task) -> Learners:
    """Return an untrained learner."""
    return new_learner(default_config(task, task), Mixer(NUM_READERS[task]))


def new_pool(learner: Learners, sessions: int = 6) -> Pool:
    """Return a pool with room for a few sessions."""
    backend = choose_backend(torch.device("cpu"))
    return Pool(learner.config.memory, rows=12 * MAX_EXAMPLES, sessions=sessions, backend=backend)


def stream(n: int, columns: int = 5, labels: int = 3, seed: int = 0) -> tuple[Array, Array]:
    """Return examples [n, C], some values missing, and their labels [n] in order of appearance."""
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(labels), rng.integers(0, labels, n - labels)])
    x = (rng.normal(size=(n, columns)) + y[:, None] * np.linspace(0, 2, columns)).astype(np.float32)
    x[rng.random(x.shape) < 0.05] = np.nan
    return x, y


def teach(learner: Labels | Regression, pool: Pool, session: int, x: Array, y: Array) -> list[float]:
    """Let a session learn examples, one commit each; return the losses."""
    losses = []
    for features, value in zip(x, y.tolist(), strict=True):
        draft = pool.draft(session)
        losses.append(learner.learn(features, value, draft).loss)
        draft.commit()
    return losses
