"""The report of the streams: tables as Markdown and JSON, and a plot, from the files of the runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from research.corpus import console
from research.machine import hardware
from research.plots import PlotsMissingError
from research.streams.baselines import RIVER_LABELS, RIVER_NUMBERS
from research.streams.datasets import STREAMS
from research.streams.prequential import Steps, load, result_file

EARLY = slice(20, 70)  # steps after 20 labels
BINS = 15  # of confidences, for the calibration error
LEARNER = "imprint"
Array = NDArray[Any]
Runs = dict[str, dict[str, list[Steps]]]  # stream → learner → steps of each seed


def report(out: Path, seeds: int) -> None:
    """Write report.json, report.md and curves.png to the folder of the runs."""
    found: dict[str, Any] = {"hardware": hardware(), "seeds": seeds}
    lines: list[str] = []
    for kind in ("labels", "drift", "numbers"):
        names = [stream.name for stream in STREAMS if stream.kind == kind]
        found[kind] = _section(kind, _runs(out, names, seeds), kind == "numbers", lines)
    arm_streams = [stream.name for stream in STREAMS] + ["bernoulli"]
    found["arms"] = _arms(_runs(out / "arms", arm_streams, seeds), lines)
    (out / "report.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "report.md").write_text("\n".join(lines) + "\n")
    try:
        _draw(out, _runs(out, [stream.name for stream in STREAMS if stream.kind != "numbers"], seeds))
    except PlotsMissingError as error:
        console.print(f"no plot: {error}")
    console.print("\n".join(lines))


def _runs(out: Path, names: Iterable[str], seeds: int) -> Runs:
    runs: Runs = {}
    for name in names:
        folder = result_file(out, name, 0, LEARNER).parent
        for file in sorted(folder.glob("*.npz")) if folder.is_dir() else ():
            seed, learner = file.stem.split(".", 1)
            if int(seed) < seeds and not learner.endswith(".partial"):
                runs.setdefault(name, {}).setdefault(learner.replace("-", " "), []).append(load(file))
    return {name: by_learner for name, by_learner in runs.items() if LEARNER in by_learner}


def mean_and_interval(values: Iterable[float]) -> tuple[float, float]:
    """Return a mean, and half of its 95% interval by Student's t (NaN for a single value)."""
    array = np.array(list(values), np.float64)
    if len(array) < 2:
        return float(array.mean()), math.nan
    return float(array.mean()), float(student.ppf(0.975, len(array) - 1) * array.std(ddof=1) / math.sqrt(len(array)))


def calibration_error(confidence: Array, hit: Array) -> float:
    """Return the expected calibration error of confidences in bins of equal width."""
    index = np.minimum((confidence * BINS).astype(int), BINS - 1)
    shares = [(index == b) for b in range(BINS)]
    return float(sum(b.mean() * abs(confidence[b].mean() - hit[b].mean()) for b in shares if b.any()))


def _section(kind: str, runs: Runs, numbers: bool, lines: list[str]) -> dict[str, Any]:
    """Add a table of a kind of streams; return its summary."""
    key = "error" if numbers else "hit"
    learners = _learners(runs)
    river = {name.replace("-", " ") for name in (RIVER_NUMBERS if numbers else RIVER_LABELS)}
    lines += [f"\n**{kind}**\n", f"| stream | {' | '.join(learners)} |", "| --- |" + " --- |" * len(learners)]
    ratios, early, ranks, forest, errors, covered = [], [], [], [], [], []
    for stream, by_learner in runs.items():
        values = {name: mean_and_interval(float(s[key].mean()) for s in each) for name, each in by_learner.items()}
        best = (min if numbers else max)(values, key=lambda name: values[name][0])
        cells = [_cell(values.get(name), name == best) for name in learners]
        lines.append(f"| {stream} | {' | '.join(cells)} |")
        own = values[LEARNER][0]
        others = {name: value for name, (value, _) in values.items() if name != LEARNER}
        if not others:
            continue
        rivers = [value for name, value in others.items() if name in river]
        ratios.append(own / (min(rivers) if numbers else max(rivers)))
        ranks.append(1 + sum((value < own) if numbers else (value > own) for value in others.values()))
        if "adaptive random forest" in others:
            forest.append(own / others["adaptive random forest"])
        if numbers:
            covered.append(np.mean([s["covered"].mean() for s in by_learner[LEARNER]]))
        else:
            first = {n: np.mean([s["hit"][EARLY].mean() for s in each]) for n, each in by_learner.items()}
            early.append(first[LEARNER] / max(value for name, value in first.items() if name != LEARNER))
            errors.append(np.mean([calibration_error(s["confidence"], s["hit"]) for s in by_learner[LEARNER]]))
    summary = {
        "mean rank": _mean(ranks),
        "÷ best of River": _mean(ratios),
        "÷ adaptive random forest": _mean(forest),
        "after 20 labels ÷ best baseline": _mean(early),
        "calibration error": _mean(errors),
        "share of targets in the 90% interval": _mean(covered),
    }
    summary = {name: value for name, value in summary.items() if not math.isnan(value)}
    lines += ["", "; ".join(f"{name}: {value:.3f}" for name, value in summary.items())]
    return summary


def _arms(runs: Runs, lines: list[str]) -> dict[str, Any]:
    """Add the tables of bandits; return their summary."""
    bernoulli = runs.pop("bernoulli", {})
    learners = _learners(runs)
    lines += ["\n**labels as arms, reward a step**\n", f"| stream | {' | '.join(learners)} |"]
    lines.append("| --- |" + " --- |" * len(learners))
    ratios = []
    for stream, by_learner in runs.items():
        values = {n: mean_and_interval(float(s["reward"].mean()) for s in each) for n, each in by_learner.items()}
        best = max(values, key=lambda name: values[name][0])
        lines.append(f"| {stream} | {' | '.join(_cell(values.get(n), n == best) for n in learners)} |")
        others = [value for name, (value, _) in values.items() if name != LEARNER]
        ratios.append(values[LEARNER][0] / max(others) if others else math.nan)
    regrets = {n: mean_and_interval(np.concatenate([s["regret"] for s in each])) for n, each in bernoulli.items()}
    summary = {"reward ÷ best baseline": _mean(ratios)} | {f"regret of {n}": value for n, (value, _) in regrets.items()}
    lines += ["", "; ".join(f"{name}: {value:.3f}" for name, value in summary.items())]
    return summary


def _learners(runs: Runs) -> list[str]:
    names = {name for by_learner in runs.values() for name in by_learner}
    return sorted(names, key=lambda name: (name != LEARNER, name))


def _cell(value: tuple[float, float] | None, is_best: bool) -> str:
    if value is None:
        return ""
    text = f"{value[0]:.4g}" + ("" if math.isnan(value[1]) else f" ± {value[1]:.2g}")
    return f"**{text}**" if is_best else text


def _mean(values: Iterable[Any]) -> float:
    array = np.array(list(values), np.float64)
    return float(array.mean()) if len(array) else math.nan


def _draw(out: Path, runs: Runs) -> None:
    """Draw accuracy over the last 100 steps of the first seed, for each stream of labels."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotsMissingError(str(error)) from None
    figure = Figure(figsize=(18, 3 * math.ceil(len(runs) / 4)), layout="constrained")
    smooth: Callable[[Array], Array] = lambda hit: np.convolve(hit, np.ones(100) / 100, "valid")  # noqa: E731
    for number, (stream, by_learner) in enumerate(runs.items()):
        axes = figure.add_subplot(math.ceil(len(runs) / 4), 4, number + 1)
        for learner, each in by_learner.items():
            axes.plot(smooth(each[0]["hit"]), label=learner, lw=2 if learner == LEARNER else 0.8)
        axes.set_title(stream)
    if runs:
        figure.axes[0].legend(fontsize=6)
        figure.savefig(out / "curves.png", dpi=60)
