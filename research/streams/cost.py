"""`python -m research.streams.cost`: milliseconds of CPU for one prediction and one learned example of a full session,
with the draft, and the bytes that a session and a commit have."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import cast

import numpy as np
import torch

from model.memory import Draft, MemoryConfig, Pool
from model.memory.backend import choose_backend
from model.tabular.config import MAX_EXAMPLES, default_config
from model.tabular.label_learner import Labels
from model.tabular.loading import new_learner
from model.tabular.number_learner import Regression
from model.tabular.reward_learner import Bandit
from research.corpus import console
from research.machine import hardware

REPEATS = 40


def main() -> None:
    """Print a table."""
    torch.set_num_threads(1)
    console.print(hardware())
    for columns, outputs in ((10, 2), (64, 10)):
        _measure_learners(columns, outputs)


def _measure_learners(columns: int, outputs: int) -> None:
    """Measure each learner on examples of so many columns, and labels or arms."""
    rng = np.random.default_rng(0)
    y = np.concatenate([np.arange(outputs), rng.integers(0, outputs, MAX_EXAMPLES)])
    x = (rng.normal(size=(len(y), columns)) + (y[:, None] % columns == np.arange(columns))).astype(np.float32)
    every = np.arange(outputs)
    labels = cast(Labels, new_learner(default_config("labels", "labels")))
    numbers = cast(Regression, new_learner(default_config("regression", "regression")))
    arms = cast(Bandit, new_learner(default_config("bandit", "bandit")))
    _measure(
        f"labels: {columns} columns, {outputs} labels",
        labels.config.memory,
        lambda i, draft: labels.learn(x[i], int(y[i]), draft),
        lambda pool, session: labels.predict(x[5], pool, session),
    )
    _measure(
        f"regression: {columns} columns",
        numbers.config.memory,
        lambda i, draft: numbers.learn(x[i], float(x[i, 0]), draft),
        lambda pool, session: numbers.predict(x[5], pool, session),
    )
    _measure(
        f"bandit: {columns} columns, {outputs} arms",
        arms.config.memory,
        lambda i, draft: arms.learn(x[i], int(y[i]), None, float(i % 2), 0.5, draft),
        lambda pool, session: arms.decide(x[5], every, None, pool, session),
    )


def _measure(
    name: str, memory: MemoryConfig, learn: Callable[[int, Draft], object], predict: Callable[[Pool, int], object]
) -> None:
    pool = Pool(memory, rows=20 * MAX_EXAMPLES, sessions=4, backend=choose_backend(torch.device("cpu")))
    session = pool.open()
    draft = pool.draft(session)
    for i in range(MAX_EXAMPLES):
        learn(i, draft)
    draft.commit()
    stored = sum(rows.data.numel() for rows in pool.dump(session).values())
    touched = 0

    def commit() -> None:
        nonlocal touched
        turn = pool.draft(session)
        learn(3, turn)
        touched = sum(rows.data.numel() for rows in turn.touched().values())
        turn.rollback()

    costs = [_milliseconds(lambda: predict(pool, session)), _milliseconds(commit)]
    console.print(f"{name}: predict {costs[0]:.2f} ms, learn {costs[1]:.2f} ms, {stored:,} bytes, {touched:,} a commit")


def _milliseconds(run: Callable[[], object]) -> float:
    """Return the median CPU time of a run."""
    times = []
    for _ in range(REPEATS):
        begun = time.process_time()
        run()
        times.append(time.process_time() - begun)
    return 1000 * float(np.median(times))


if __name__ == "__main__":
    main()
