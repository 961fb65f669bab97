"""`python -m research.streams.ablation TASK`: a learner without each of its parts, on the first examples of streams.

A reader that is taken away says what the best constant says; other parts are taken away by constants of their own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np

from model.tabular import arm_readers, arms, change, guard, label_readers, labels, number_readers, numbers
from research.corpus import console
from research.machine import hardware
from research.streams.array_learners import ImprintArms, ImprintLabels, ImprintNumbers
from research.streams.bandits import run_labels_as_arms
from research.streams.datasets import find_stream
from research.streams.prequential import run_labels, run_numbers

STEPS = 1500
NOISE = ((2, 0.9), (2, 0.97), (5, 0.9), (10, 0.9), (10, 0.5))  # numbers of labels, and the share of the commonest
NOISE_STEPS, NOISE_COLUMNS, NOISE_SEEDS = 500, 4, 5
ALWAYS = 500.0  # nats ahead: all of the answer
NEVER_CHANGED = {(change, "THRESHOLD_NATS"): np.inf}
Part = Callable[[str], bool] | Mapping[tuple[Any, str], float]  # which readers, or constants and their values
STREAMS = {
    "labels": ("iris", "wine", "phishing", "sine, sudden", "agrawal, sudden"),
    "regression": ("chicks", "diabetes", "airline passengers", "friedman", "friedman, drifting"),
    "bandit": ("iris", "wine", "phishing", "led", "agrawal, sudden"),
}


def named(*words: str) -> Callable[[str], bool]:
    """Return whether a reader's name has one of the words."""
    return lambda name: any(word in name for word in words)


PARTS: dict[str, dict[str, Part]] = {
    "labels": {
        "the guard": {(guard, "MARGIN"): ALWAYS},
        "the Bayesian mixture": {(labels, "FIRST_ADVANTAGE"): ALWAYS},
        "the learned mixer": {(labels, "FIRST_ADVANTAGE"): -ALWAYS},
        "sharpening": {(labels, "SHARPNESS_RATE"): 0.0},
        "change detection": NEVER_CHANGED,
        "the latest window": named("late"),
        "forests": named("forest"),
        "neighbours": named("near"),
        "Bayes and discriminant": named("bayes", "discriminant"),
        "linear readers": named("linear"),
    },
    "regression": {
        "change detection": NEVER_CHANGED,
        "the latest window": named("late"),
        "forests": named("forest"),
        "neighbours": named("near"),
        "ridge regression": named("ridge"),
        "targets before": named("last", "recent", "lags"),
    },
    "bandit": {
        "late rewards": named("late"),
        "forests": named("forest"),
        "neighbours": named("near"),
        "ridge regression": named("ridge"),
        "columns": named("near", "ridge", "forest"),
        "the width of columns": {(arms, "DIMENSIONS"): 0.0},
    },
}


def main() -> None:
    """Print the table of a task, as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m research.streams.ablation", description=__doc__)
    parser.add_argument("task", choices=sorted(PARTS))
    task = parser.parse_args().task
    console.print(hardware())
    columns = ["", *STREAMS[task], "mean", *(["log loss"] if task == "labels" else [])]
    console.print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", soft_wrap=True)
    for name, part in {"all": {}, **PARTS[task]}.items():
        with without(task, part):
            figures, losses = np.array([measure(task, stream, STEPS) for stream in STREAMS[task]]).T
        cells = [f"{figure:.4g}" for figure in (*figures, figures.mean(), losses.mean()) if np.isfinite(figure)]
        console.print(f"| {name if name == 'all' else f'without {name}'} | {' | '.join(cells)} |", soft_wrap=True)
    if task == "labels":
        print_noise()


def print_noise() -> None:
    """Print what the guard saves where columns say nothing: nats behind the shares of the labels, at most."""
    console.print(f"\n| labels, share of the commonest | all | without the guard |\n|{' --- |' * 3}", soft_wrap=True)
    for num_labels, share in NOISE:
        cells = []
        for part in ({}, PARTS["labels"]["the guard"]):
            with without("labels", part):
                cells.append(f"{max(nats_lost(num_labels, share, seed) for seed in range(NOISE_SEEDS)):.1f}")
        console.print(f"| {num_labels}, {share} | {' | '.join(cells)} |", soft_wrap=True)


def nats_lost(num_labels: int, share: float, seed: int) -> float:
    """Return how far `labels` falls behind the shares of the labels on columns of noise, at its worst moment (nats)."""
    rng, learner, lost, worst = np.random.default_rng(seed), ImprintLabels(), 0.0, 0.0
    chances = [share, *[(1 - share) / (num_labels - 1)] * (num_labels - 1)]
    for label in rng.choice(num_labels, NOISE_STEPS, p=chances).tolist():
        columns: dict[str, float | str] = {str(column): float(rng.normal()) for column in range(NOISE_COLUMNS)}
        probs, shares = learner.predict(columns), learner.shares()
        if label in probs:
            lost += float(np.log(shares[label]) - np.log(probs[label]))
            worst = max(worst, lost)
        learner.learn(columns, label)
    return worst


def measure(task: str, stream: str, steps: int) -> tuple[float, float]:
    """Return accuracy, mean absolute error or mean reward on the first examples of a stream (seed 0), and the log loss
    of labels (else NaN)."""
    pairs = find_stream(stream).examples(0, steps)
    if task == "labels":
        found = run_labels(ImprintLabels(), pairs)
        return float(found["hit"].mean()), float(-np.log(found["prob"]).mean())
    if task == "regression":
        return float(run_numbers(ImprintNumbers(), pairs)["error"].mean()), np.nan
    names = sorted({label for _, label in pairs}, key=str)
    return float(run_labels_as_arms(ImprintArms(len(names)), pairs, names, 0)["reward"].mean()), np.nan


@contextmanager
def without(task: str, part: Part) -> Iterator[None]:
    """Take a part away from the learner of a task."""
    with ExitStack() as stack:
        if callable(part):
            stack.enter_context(_silenced(task, part))
        else:
            for (module, constant), value in part.items():
                stack.enter_context(patch.object(module, constant, value))
        yield


def _silenced(task: str, is_gone: Callable[[str], bool]) -> Any:
    """Return a patch under which some readers say what the best constant reader says."""

    def gone(names: tuple[str, ...]) -> list[int]:
        return [number for number, name in enumerate(names) if is_gone(name)]

    if task == "bandit":
        missing = gone(arm_readers.READERS)

        def read_fewer_arms(*inputs: Any) -> None:
            arm_readers.read_arms(*inputs)
            means = inputs[-2]
            means[missing] = means[arm_readers.ARM]

        return patch.object(arms, "read_arms", read_fewer_arms)
    module, names = (labels, label_readers.READERS) if task == "labels" else (numbers, number_readers.READERS)
    read: Callable[..., Any] = module.read

    def read_fewer(*inputs: Any) -> Any:
        readout = read(*inputs)
        readout[0][gone(names)] = readout[0][0]
        return readout

    return patch.object(module, "read", read_fewer)


if __name__ == "__main__":
    main()
