"""The figures of `imprint bench`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from research.estimates import mean
from research.plots import load_pyplot

Results = Mapping[str, Any]
COLOURS = {"off": "tab:grey", "predict": "tab:cyan", "both": "tab:blue", "llama.cpp": "tab:orange",
           "transformers": "tab:green", "vllm": "tab:red"}  # fmt: skip
SPEED = (
    ("single", "s_per_token", "one stream"),
    ("streams-16", "tokens_per_s", "16 streams"),
    ("streams-64", "tokens_per_s", "64 streams"),
    ("prefill", "tokens_per_s", "prefill"),
)


def draw(results: Results, out: Path) -> list[Path]:
    """Write each figure that has data, and return the paths. Raises PlotsMissingError."""
    plot, drawn = load_pyplot(), []
    for name, drawing in (("speed", _speed), ("state", _state), ("latency", _latency)):
        figure = plot.figure(figsize=(10, 4.2), layout="constrained")
        if drawing(results, figure):
            drawn.append(out / f"{name}.png")
            figure.savefig(drawn[-1], dpi=130)
        plot.close(figure)
    return drawn


def _speed(results: Results, figure: Any) -> bool:
    """Draw tokens per second by arm, with a dot for each round."""
    available = [entry for entry in SPEED if entry[0] in results["scenarios"]]
    for position, (name, what, title) in enumerate(available):
        axes = figure.add_subplot(1, len(available), position + 1)
        arms = {arm: found[what] for arm, found in results["scenarios"][name]["arms"].items() if found}
        rates = {arm: [1 / v if what.startswith("s_") else v for v in values] for arm, values in arms.items()}
        for x, (arm, values) in enumerate(rates.items()):
            axes.bar(x, mean(values).value, color=COLOURS[arm])
            axes.plot([x] * len(values), values, ".", color="black", markersize=3)
        axes.set_xticks(range(len(rates)), list(rates), rotation=40, ha="right")
        axes.set_title(title, fontsize=10)
    if available:
        figure.supylabel("tokens per second", fontsize=10)
    return bool(available)


def _state(results: Results, figure: Any) -> bool:
    """Draw the cost of a request by tokens learned before, and of loads and commits by size."""
    scenarios = results["scenarios"]
    available = [name for name in ("history", "states") if name in scenarios]
    for position, name in enumerate(available):
        axes = figure.add_subplot(1, len(available), position + 1)
        arms = scenarios[name]["arms"]
        if name == "history":
            tokens = [int(arm.replace(",", "")) for arm in arms]
            _line(axes, tokens, [found["request_s"] for found in arms.values()], "request")
            axes.set(xlabel="tokens learned before", ylabel="ms", title="a request of 64 + 16 tokens", ylim=(0, None))
            axes.set_xscale("log")
            _label_with_numbers(axes.xaxis)
        else:
            sizes = [float(arm.removesuffix(" MB")) for arm in arms]
            for what in ("load", "place", "commit", "save"):
                _line(axes, sizes, [found[f"{what}_s"] for found in arms.values()], what)
            axes.set(xlabel="MB of rows", ylabel="ms", title="embedded store", yscale="log", xscale="log")
            axes.set_xticks(sizes, [f"{size:g}" for size in sizes], minor=False)
            axes.set_xticks([], minor=True)
            _label_with_numbers(axes.yaxis)
            axes.legend(fontsize=8)
    return bool(available)


def _latency(results: Results, figure: Any) -> bool:
    """Draw the cumulative distribution of latencies."""
    kinds = (("rate", "first_s", "to the first token, fixed rate"), ("rate", "gap_s", "between tokens, fixed rate"),
             ("interruption", "busy", "between tokens, long prompt coming in"))  # fmt: skip
    available = [entry for entry in kinds if entry[0] in results["scenarios"]]
    for position, (name, what, title) in enumerate(available):
        axes = figure.add_subplot(1, len(available), position + 1)
        for arm, curves in results["scenarios"][name]["curves"].items():
            values = [1000 * value for value in curves[what]]
            axes.plot(values, [i / (len(values) - 1) for i in range(len(values))], color=COLOURS[arm], label=arm)
        axes.set(xscale="log", xlabel="ms", ylim=(0, 1))
        _label_with_numbers(axes.xaxis)
        axes.set_title(title, fontsize=10)
        axes.axhline(0.99, color="0.8", linewidth=0.8)
        axes.legend(fontsize=8)
    if available:
        figure.supylabel("share that came within", fontsize=10)
    return bool(available)


def _line(axes: Any, x: Sequence[float], rounds: Sequence[Sequence[float]], label: str) -> None:
    """Draw the geometric mean over rounds, in ms, with a dot for each round."""
    (line,) = axes.plot(x, [1000 * mean(values).value for values in rounds], marker="o", label=label)
    for position, values in zip(x, rounds, strict=True):
        times = [1000 * value for value in values]
        axes.plot([position] * len(values), times, ".", color=line.get_color(), markersize=3)


def _label_with_numbers(axis: Any) -> None:
    """Label a logarithmic axis with plain numbers instead of powers."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
