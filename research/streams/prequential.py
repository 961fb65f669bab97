"""One pass over a stream: predict, compare, then learn; what each step gave, kept in a file for each run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.streams.baselines import LabelBaseline, NumberBaseline
from research.streams.datasets import Pair

Steps = dict[str, NDArray[Any]]
SHORTEST_PROB = 1e-6


def run_labels(baseline: LabelBaseline, pairs: list[Pair]) -> Steps:
    """Return for each step whether the likeliest label was right (hit), its probability (confidence), and that of the
    right label (prob)."""
    steps = np.zeros((len(pairs), 3), np.float32)
    begun = time.perf_counter()
    for i, (x, label) in enumerate(pairs):
        probs = baseline.predict(x)
        if probs:
            best = max(probs, key=lambda each: probs[each])
            steps[i] = best == label, probs[best], probs.get(label, 0.0)
        baseline.learn(x, label)
    return {
        "hit": steps[:, 0],
        "confidence": steps[:, 1],
        "prob": np.maximum(steps[:, 2], SHORTEST_PROB),
        "seconds": np.array(time.perf_counter() - begun),
    }


def run_numbers(baseline: NumberBaseline, pairs: list[Pair]) -> Steps:
    """Return for each step the absolute error."""
    errors = np.zeros(len(pairs), np.float64)
    begun = time.perf_counter()
    for i, (x, target) in enumerate(pairs):
        errors[i] = abs(baseline.predict(x) - target)
        baseline.learn(x, float(target))
    return {"error": errors, "seconds": np.array(time.perf_counter() - begun)}


def result_file(out: Path, stream: str, seed: int, learner: str) -> Path:
    """Return the file of one run."""
    return out / stream.replace(", ", "-").replace(" ", "-") / f"{seed}.{learner.replace(' ', '-')}.npz"


def save(file: Path, steps: Steps) -> None:
    """Write the steps of a run, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial.npz")
    np.savez_compressed(partial, **steps)  # type: ignore[arg-type]
    partial.rename(file)


def load(file: Path) -> Steps:
    """Return the steps of a run."""
    with np.load(file) as data:
        return dict(data)
