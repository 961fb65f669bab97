"""`python -m research.streams`: every learner on every stream; a stopped run resumes from the files in its folder."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from research.corpus import console
from research.streams.array_learners import ImprintLabels, ImprintNumbers
from research.streams.bandits import (
    ARM_BASELINES,
    BERNOULLI_BASELINES,
    ArmBaseline,
    run_bernoulli,
    run_labels_as_arms,
)
from research.streams.baselines import LABEL_BASELINES, NUMBER_BASELINES, LabelBaseline, NumberBaseline
from research.streams.datasets import STREAMS, Pair, Stream
from research.streams.prequential import Steps, result_file, run_labels, run_numbers, save
from research.streams.report import report

ARM_STREAMS = ("iris", "wine", "cancer", "digits", "segments", "phishing", "led", "agrawal, sudden")
BERNOULLI = "bernoulli"  # the stream without columns
ARM_STEPS, BERNOULLI_TASKS = 1500, 50


def main() -> None:
    """Run what is missing, then write the report."""
    parser = argparse.ArgumentParser(prog="python -m research.streams", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("imprint-streams"), help="folder of the results")
    parser.add_argument("--seeds", type=int, default=5, help="orders of each stream")
    parser.add_argument("--learners", default="", help="only these learners, separated by commas; default: all")
    parser.add_argument("--kinds", default="labels,drift,numbers,arms", help="only these kinds of streams")
    parser.add_argument("--streams", default="", help="only these streams, separated by semicolons; default: all")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")  # River's warn of what their defaults will be
    only, kinds = arguments.learners.split(",") if arguments.learners else [], arguments.kinds.split(",")
    names = arguments.streams.split(";") if arguments.streams else [stream.name for stream in STREAMS] + [BERNOULLI]
    for file, name, run in _runs(arguments.out, arguments.seeds, kinds, names):
        if not file.exists() and (not only or name in only):
            steps = run()
            save(file, steps)
            figure = next(float(np.nanmean(steps[key])) for key in ("hit", "error", "reward", "regret") if key in steps)
            console.print(f"{file.parent.name} {file.stem}: {figure:.4g}")
    report(arguments.out, arguments.seeds)


def _runs(out: Path, seeds: int, kinds: list[str], names: list[str]) -> Iterator[tuple[Path, str, Callable[[], Steps]]]:
    """Yield each run's file, its learner and the run."""
    streams = [stream for stream in STREAMS if stream.name in names]
    for seed in range(seeds):
        for stream in (stream for stream in streams if stream.kind in kinds):
            pairs = stream.examples(seed)
            runs = _number_runs(pairs, seed) if stream.kind == "numbers" else _label_runs(pairs, seed)
            for name, run in runs:
                yield result_file(out, stream.name, seed, name), name, run
        for stream in (stream for stream in streams if "arms" in kinds and stream.name in ARM_STREAMS):
            for name, run in _arm_runs(stream, seed):
                yield result_file(out / "arms", stream.name, seed, name), name, run
        for name, make in BERNOULLI_BASELINES.items() if "arms" in kinds and BERNOULLI in names else ():
            file = result_file(out / "arms", BERNOULLI, seed, name)
            yield file, name, partial(run_bernoulli, make, BERNOULLI_TASKS, seed)


def _label_runs(pairs: list[Pair], seed: int) -> Iterator[tuple[str, Callable[[], Steps]]]:
    labels, columns = _labels(pairs), _num_columns(pairs)
    yield "imprint", lambda: run_labels(ImprintLabels(), pairs)
    for name, make in LABEL_BASELINES.items():
        yield name, partial(_run_labels, make, seed, labels, columns, pairs)


def _number_runs(pairs: list[Pair], seed: int) -> Iterator[tuple[str, Callable[[], Steps]]]:
    columns = _num_columns(pairs)

    def run_imprint() -> Steps:
        learner = ImprintNumbers()
        steps = run_numbers(learner, pairs)
        return steps | {"covered": np.array(learner.covered)}

    yield "imprint", run_imprint
    for name, make in NUMBER_BASELINES.items():
        yield name, partial(_run_numbers, make, seed, columns, pairs)


def _arm_runs(stream: Stream, seed: int) -> Iterator[tuple[str, Callable[[], Steps]]]:
    pairs = stream.examples(seed, ARM_STEPS)
    labels, columns = _labels(pairs), _num_columns(pairs)
    for name, make in ARM_BASELINES.items():
        yield name, partial(_run_arms, make, columns, pairs, labels, seed)


# The learners are made when their run begins, not when it is listed.
def _run_labels(
    make: Callable[[int, list[Hashable], int], LabelBaseline],
    seed: int,
    labels: list[Hashable],
    columns: int,
    pairs: list[Pair],
) -> Steps:
    return run_labels(make(seed, labels, columns), pairs)


def _run_numbers(make: Callable[[int, int], NumberBaseline], seed: int, columns: int, pairs: list[Pair]) -> Steps:
    return run_numbers(make(seed, columns), pairs)


def _run_arms(
    make: Callable[[int, int], ArmBaseline], columns: int, pairs: list[Pair], labels: list[Hashable], seed: int
) -> Steps:
    return run_labels_as_arms(make(len(labels), columns), pairs, labels, seed)


def _labels(pairs: list[Pair]) -> list[Hashable]:
    return sorted({label for _, label in pairs}, key=str)


def _num_columns(pairs: list[Pair]) -> int:
    return len({(name, value if isinstance(value, str) else None) for x, _ in pairs for name, value in x.items()})


if __name__ == "__main__":
    main()
