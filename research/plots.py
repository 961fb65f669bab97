"""The figures of `imprint eval`, `imprint train` and `imprint scenario`. Needs matplotlib, which a server lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

MAIN = ("memory", "cleared", "cache", "cache-bytes", "ngrams", "dense", "dynamic-head", "full-history", "adapter")
Results = Mapping[str, Any]


class PlotsMissingError(Exception):
    """An error that says that matplotlib is not installed."""


def draw(results: Results, out: Path) -> list[Path]:
    """Write each figure of `imprint eval` that has data, and return the paths. Raises PlotsMissingError."""
    pyplot = load_pyplot()
    drawings = {"requests": _requests, "kinds": _kinds, "novelty": _novelty, "return": _return, "long": _long}
    drawn = []
    for name, drawing in drawings.items():
        figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
        if drawing(results, axes):
            axes.axhline(1.0, color="grey", linewidth=0.8)
            axes.set_ylabel("perplexity ÷ frozen base's")
            drawn.append(out / f"{name}.png")
            figure.savefig(drawn[-1], dpi=150)
        pyplot.close(figure)
    return drawn


def draw_losses(losses: Sequence[float], path: Path) -> None:
    """Draw the loss of a policy by round. Raises PlotsMissingError."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses)
    axes.set_xlabel("round")
    axes.set_ylabel("loss, nats")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_curves(curves: Mapping[str, Any], window: int, path: Path, quantity: str = "missed reward") -> None:
    """Draw the curve of each arm by step, as a moving mean of `window` steps. Raises PlotsMissingError."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(10, 5), layout="constrained")
    for name, curve in curves.items():
        smooth = np.convolve(curve, np.ones(window) / window, mode="valid")
        axes.plot(np.arange(len(smooth)) + window, smooth, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel(f"{quantity}, mean")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_training(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw perplexity ÷ the frozen base's by step: in training (smoothed), and on held-out streams by kind.

    Raises PlotsMissingError.
    """
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    steps = [record for record in records if "loss" in record]
    window = max(1, len(steps) // 50)
    gains = np.array([record["loss"] - record["frozen"] for record in steps])
    smooth = np.exp(np.convolve(gains, np.ones(window) / window, mode="valid"))
    axes.plot([record["step"] for record in steps[window - 1 :]], smooth, color="0.7", label="training")
    validations = [record["valid"] for record in records if "valid" in record]
    validated_steps = [record["step"] for record in validations]
    for number, kind in enumerate(sorted(validations[0]["kinds"])):
        style = ("-", "--", ":")[number // 10 % 3]  # matplotlib cycles through ten colours
        axes.plot(validated_steps, [record["kinds"][kind] for record in validations], style, linewidth=0.8, label=kind)
    ratios = [record["ratio"] for record in validations]
    axes.plot(validated_steps, ratios, color="black", marker="o", label="held out, mean of kinds")
    axes.axhline(1.0, color="black", linestyle=":", linewidth=0.8)
    axes.set(xlabel="step", ylabel="perplexity ÷ frozen base's")
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def load_pyplot() -> Any:
    """Return `matplotlib.pyplot` with the backend that needs no screen. Raises PlotsMissingError."""
    try:
        import matplotlib
    except ImportError:
        raise PlotsMissingError("matplotlib is missing: pip install 'imprint[plots]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _requests(results: Results, axes: Any) -> bool:
    """Draw the ratio of the main arms by request, with the 95% band of the memory."""
    for name in MAIN:
        if (arm := results["arms"].get(name)) is not None:
            curve = _none_to_nan(arm["by_request"])
            numbers = range(1, len(curve["ratio"]) + 1)
            axes.plot(numbers, curve["ratio"], label=arm["title"], linewidth=2.5 if name == "memory" else 1.2)
            if name == "memory":
                axes.fill_between(numbers, curve["low"], curve["high"], alpha=0.2)
    axes.set_xlabel("request")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8)
    return True


def _kinds(results: Results, axes: Any) -> bool:
    kinds = results["about"]["kinds"]
    names = [name for name in ("memory", "cache", "cache-bytes", "dynamic-head") if name in results["arms"]]
    for number, name in enumerate(names):
        arm = results["arms"][name]
        heights = [arm["ratio"]["kinds"][kind] for kind in kinds]
        _bars(axes, number, len(names), heights, arm["title"])
    axes.set_xticks(range(len(kinds)), kinds, rotation=30, ha="right")
    axes.legend(fontsize=8, loc="lower right")
    return True


def _novelty(results: Results, axes: Any) -> bool:
    classes = results["arms"]["static"]["novelty"]
    names = [name for name in ("memory", "cache", "ngrams", "dynamic-head") if name in results["arms"]]
    for number, name in enumerate(names):
        arm = results["arms"][name]
        heights = [estimate["value"] if estimate else float("nan") for estimate in arm["novelty"].values()]
        _bars(axes, number, len(names), heights, arm["title"])
    labels = [f"{name}\n{found['share']:.0%} of targets" if found else name for name, found in classes.items()]
    axes.set_xticks(range(len(labels)), labels)
    axes.legend(fontsize=8, loc="lower right")
    return True


def _return(results: Results, axes: Any) -> bool:
    """Draw the second half with the memory of the first half, with and without other kinds in between."""
    arms = results["arms"]
    if "returned" not in arms:
        return False
    for name in ("memory", "own-past", "returned", "other-kind"):
        if name in arms:
            ratios = _none_to_nan(arms[name]["by_request"])["ratio"]
            axes.plot(range(1, len(ratios) + 1), ratios, label=arms[name]["title"])
    axes.set_xlabel("request")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8)
    return True


def _long(results: Results, axes: Any) -> bool:
    if (run := results["probes"].get("long")) is None:
        return False
    ratios = [float("nan") if ratio is None else ratio for ratio in run["bins"]["ratio"]]
    axes.plot([position / 1000 for position in run["bins"]["position"]], ratios, label="ratio")
    axes.set_xlabel("thousand tokens learned")
    right_axes = axes.twinx()
    positions = [position / 1000 for position in run["position"]]
    for label, values, colour in (("rows held", run["rows"], "tab:green"), ("state norm", run["norm"], "tab:orange")):
        shares = [value / max(values) for value in values]
        right_axes.plot(positions, shares, "--", color=colour, linewidth=1, label=f"{label} ÷ largest")
    right_axes.set_ylim(0, 1.05)
    axes.legend(fontsize=8, loc="upper left")
    right_axes.legend(fontsize=8, loc="upper right")
    return True


def _bars(axes: Any, number: int, count: int, heights: list[float], label: str) -> None:
    width = 0.8 / count
    axes.bar([x + (number - (count - 1) / 2) * width for x in range(len(heights))], heights, width, label=label)


def _none_to_nan(curve: Mapping[str, list[float | None]]) -> dict[str, list[float]]:
    """Replace None by NaN, which matplotlib leaves out."""
    return {name: [float("nan") if value is None else value for value in values] for name, values in curve.items()}
