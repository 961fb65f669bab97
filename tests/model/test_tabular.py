"""The tabular learners: what they promise for any stream."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.memory import Pool
from model.memory.backend import choose_backend
from model.tabular.config import EXAMPLE_ROWS, TabularError, default_config
from model.tabular.label_learner import Labels
from model.tabular.label_readers import E
from model.tabular.mixer import Mixer


def new_pool(learner: Labels, sessions: int = 4) -> Pool:
    backend = choose_backend(torch.device("cpu"))
    return Pool(learner.config.memory, rows=2 * EXAMPLE_ROWS, sessions=sessions, backend=backend)


def teach(learner: Labels, pool: Pool, session: int, xs: np.ndarray, ys: np.ndarray) -> list[float]:
    losses = []
    for x, y in zip(xs, ys, strict=True):
        draft = pool.draft(session)
        losses.append(learner.learn(x.astype(np.float32), int(y), draft).loss)
        draft.commit()
    return losses


def test_labels_are_learned_from_a_few_examples() -> None:
    learner = Labels(default_config("labels", "labels"), Mixer(E))
    pool = new_pool(learner)
    session = pool.open()
    rng = np.random.default_rng(0)
    ys = np.concatenate([[0, 1], rng.integers(0, 2, 60)])
    xs = rng.normal(size=(62, 40)) + ys[:, None]
    teach(learner, pool, session, xs, ys)
    prediction = learner.predict(np.full(40, 1.0, np.float32), pool, session)
    assert prediction.probs.argmax() == 1
    assert prediction.probs.sum() + prediction.unknown == pytest.approx(1, abs=1e-5)
    assert ys[prediction.votes[0].ordinal - 1] == 1


def test_an_empty_session_knows_no_label_and_a_label_skips_no_index() -> None:
    learner = Labels(default_config("labels", "labels"), Mixer(E))
    pool = new_pool(learner)
    x = np.ones(3, np.float32)
    assert learner.predict(x, pool, 0).unknown == 1.0
    with pytest.raises(TabularError, match=r"label must be in 0\.\.0, got 1"):
        learner.learn(x, 1, pool.draft(0))
