"""The tables and the plot of `imprint eval --recall`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from research.estimates import half_width, proportion
from research.evaluation.recall.chapter import TypedWord
from research.evaluation.recall.trial import Record
from research.evaluation.report import TableData
from research.plots import load_pyplot

SHARES: Mapping[str, Callable[[Record], bool | None]] = {
    "right": lambda record: record.verdict.right,
    "fluent": lambda record: record.verdict.fluent_error,
    "another's": lambda record: record.verdict.others_value,
    "outdated": lambda record: record.verdict.outdated if record.question.outdated else None,
    "found": lambda record: record.verdict.found,
}


def figures(records: Iterable[Record]) -> dict[str, Any]:
    """Return the shares of records, each with its 95% interval (Wilson) and its n; and the mean F1.

    A share counts the records that it applies to; it is None if there are none.
    """
    chosen, found = list(records), dict[str, Any]()
    for name, value in SHARES.items():
        values = [flag for record in chosen if (flag := value(record)) is not None]
        found[name] = None
        if values:
            low, high = proportion(sum(values), len(values))
            found[name] = {"value": sum(values) / len(values), "low": low, "high": high, "n": len(values)}
    scores = [record.verdict.f1 for record in chosen]
    half = half_width(scores) if len(scores) > 1 else 0.0
    mean = sum(scores) / len(scores)
    found["f1"] = {"value": mean, "low": max(0.0, mean - half), "high": min(1.0, mean + half), "n": len(scores)}
    return found


def grouped(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return the figures by probe, distance, label and arm; the label "all" covers every question of a probe."""
    keys: dict[tuple[str, int, str, str], list[Record]] = {}
    for record in records:
        for label in ("all", record.question.label):
            keys.setdefault((record.probe, record.distance, label, record.arm), []).append(record)
    return [
        {"probe": probe, "distance": distance, "label": label, "arm": arm, **figures(chosen)}
        for (probe, distance, label, arm), chosen in keys.items()
    ]


def tables(groups: Sequence[Mapping[str, Any]]) -> list[TableData]:
    """Return a table for each probe and distance: arms × figures with intervals; then right by label."""
    found: list[TableData] = []
    for probe, distance in dict.fromkeys((group["probe"], group["distance"]) for group in groups):
        here = [group for group in groups if (group["probe"], group["distance"]) == (probe, distance)]
        names = [name for name in (*SHARES, "f1") if any(group[name] for group in here)]
        total = [group for group in here if group["label"] == "all"]
        rows = [[group["arm"], *(_share(group[name]) for name in names)] for group in total]
        n = max(group["f1"]["n"] for group in total)
        heading = f"{probe}, after {distance:,} other tokens, {n} questions: percent and 95% interval"
        found.append((heading, ["arm", *names], rows))
        labels = list(dict.fromkeys(group["label"] for group in here if group["label"] != "all"))
        if len(labels) > 1:
            by_key = {(group["arm"], group["label"]): group for group in here}
            arms = [group["arm"] for group in total]
            split = [[arm, *(_count(by_key.get((arm, label))) for label in labels)] for arm in arms]
            found.append((f"{probe}, after {distance:,} other tokens: right answers", ["arm", *labels], split))
    return found


def evidence_table(found: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> TableData:
    """Return the mean share of evidence among the best texts, by arm, category and number of texts."""
    rows = []
    for arm, categories in found.items():
        for category, by_best in categories.items():
            means = (sum(shares) / max(1, len(shares)) for shares in by_best.values())
            size = len(next(iter(by_best.values())))
            rows.append([arm, f"{category} ({size})", *(f"{mean:.3f}" for mean in means)])
    best = list(next(iter(next(iter(found.values())).values())))
    return "LoCoMo: evidence among the best texts", ["arm", "category (questions)", *best], rows


def suggestion_table(name: str, found: Mapping[str, Mapping[str, Sequence[TypedWord]]]) -> TableData:
    """Return the suggestions of names that are accepted, and the keys saved on names and on all words, by distance."""
    rows = []
    for arm, by_distance in found.items():
        for distance, typed in by_distance.items():
            accepted = [saved > 0 for is_name, _, saved in typed if is_name]
            low, high = proportion(sum(accepted), max(1, len(accepted)))
            share = {"value": sum(accepted) / max(1, len(accepted)), "low": low, "high": high}
            names, everything = (_saved(chosen) for chosen in ([word for word in typed if word[0]], typed))
            rows.append([arm, f"{int(distance):,}", f"{len(accepted)}", _share(share), names, everything])
    heading = f"Names in a held-out chapter of {name}: suggestions accepted, keys saved (percent)"
    return heading, ["arm", "other tokens", "names", "accepted", "keys, names", "keys, all"], rows


def _saved(typed: Sequence[TypedWord]) -> str:
    total = sum(size for _, size, _ in typed)
    return f"{100 * sum(saved for _, _, saved in typed) / total:.0f}" if total else "–"


def draw(groups: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the share of right answers by other tokens, a panel for each probe. Raises PlotsMissingError."""
    pyplot = load_pyplot()
    probes = list(dict.fromkeys(group["probe"] for group in groups))
    figure, panels = pyplot.subplots(
        1, len(probes), figsize=(4.5 * len(probes), 4.5), squeeze=False, sharey=True, layout="constrained"
    )
    for axes, probe in zip(panels[0], probes, strict=True):
        here = [group for group in groups if group["probe"] == probe and group["label"] == "all"]
        for arm in dict.fromkeys(group["arm"] for group in here):
            points = [(max(group["distance"], 100), group["right"]) for group in here if group["arm"] == arm]
            values = [share["value"] for _, share in points]
            errors = [  # not negative, as the end of an interval at 0 or 1 may be by rounding
                [max(0.0, share["value"] - share["low"]) for _, share in points],
                [max(0.0, share["high"] - share["value"]) for _, share in points],
            ]
            axes.errorbar([distance for distance, _ in points], values, yerr=errors, marker="o", capsize=2, label=arm)
        axes.set_xscale("log")
        axes.set_title(probe)
        axes.set_xlabel("other tokens since (0 is drawn at 100)")
    panels[0][0].set_ylabel("right answers")
    panels[0][0].set_ylim(-0.02, 1.02)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize="small")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _share(share: Mapping[str, float] | None) -> str:
    return "–" if share is None else f"{100 * share['value']:.0f} {100 * share['low']:.0f}–{100 * share['high']:.0f}"


def _count(group: Mapping[str, Any] | None) -> str:
    return "–" if group is None else f"{round(group['right']['value'] * group['right']['n'])}/{group['right']['n']}"
