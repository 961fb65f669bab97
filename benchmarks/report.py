"""What is told of a run: the rows to reach, the tables, the page. Plain functions of the results."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.profiling import told
from benchmarks.stage import Sizes
from benchmarks.targets import TARGETS, Results
from research.corpus import console
from research.estimates import mean, ratio
from service.errors import CommandError

BEGIN, END = "<!-- imprint bench: begin -->", "<!-- imprint bench: end -->"
TARGETS_HEADING = "What is to be reached"
QUANTILES = 101
FULL_NUM_SESSIONS = Sizes().sessions

Block = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # a heading, the columns, the rows


def finalize_results(results: dict[str, Any]) -> dict[str, Any]:
    """The results with the rows to reach, and with percentiles in place of samples."""
    for one in results["scenarios"].values():
        if "samples" in one:
            samples = one.pop("samples")
            one["curves"] = {arm: {what: _quantiles(v) for what, v in kept.items()} for arm, kept in samples.items()}
    return results | {"reach": [row.told(results) for row in TARGETS]}


# --- tables ----------------------------------------------------------------------------------------------------------

# What the tables show of each scenario: each column's name, key and scale, and the arm that ratios are taken to.
TABLE_COLUMNS = {
    "single": ([("tokens/s", "s_per_token", -1.0), ("first token, ms", "first_s", 1000.0)], "off"),
    "prefill": ([("tokens/s", "tokens_per_s", 1.0)], "off"),
    "streams": (
        [("tokens/s", "tokens_per_s", 1.0), ("and prompts, tokens/s", "with_prompts_per_s", 1.0),
         ("first token p50, s", "first_p50_s", 1.0)],
        "off",
    ),
    "batch": ([("step, ms", "s_per_step", 1000.0)], "off"),
    "sessions": ([("requests/s", "requests_per_s", 1.0)], "5"),
    "history": ([("request, ms", "request_s", 1000.0)], None),
    "states": ([(what, f"{what}_s", 1000.0) for what in ("save", "load", "place", "commit")], None),
    "rate": ([], None),
    "interruption": ([("long prompt's first token, s", "first_s", 1.0)], "off"),
    "acts": ([("act p50, ms", "p50_s", 1000.0), ("act p99, ms", "p99_s", 1000.0)], None),
}  # fmt: skip


def blocks(results: Results) -> list[Block]:
    """Every table."""
    made = [_targets_table(results)]
    for name, one in results["scenarios"].items():
        if TABLE_COLUMNS[name.partition("-")[0]][0]:
            made.append(_scenario(name, one))
        if "percentiles" in one:
            made.append(_percentiles(one))
    return made + ([_profile(results)] if results["profile"] else [])


def _targets_table(results: Results) -> Block:
    rows = []
    for row in results["reach"]:
        sign = "≥" if row["up"] else "≤"
        measured, reached = row["measured"], row["reached"]
        told = "not measured" if measured is None else _number(measured["value"])
        limit = reached.removeprefix("not measured: ") if measured is None else row["limit"]
        note = f" ({row['note']})" if row.get("note") else ""
        rows.append(
            [row["what"], f"{sign} {row['least']:g}", f"{sign} {row['aim']:g}", told + note, _interval(measured),
             "–" if measured is None else reached, limit]
        )  # fmt: skip
    columns = ["what", "at least", "aim", "measured", "95%", "reached", "what limits it next, or why not measured"]
    return TARGETS_HEADING, columns, rows


def _scenario(name: str, one: Mapping[str, Any]) -> Block:
    shown, base = TABLE_COLUMNS[name.partition("-")[0]]
    rows = []
    for arm, measured in one["arms"].items():
        if not measured:
            continue
        cells = [_number(mean([_rescaled(value, scale) for value in measured[key]]).value) for _, key, scale in shown]
        if base is not None and shown:
            cells.append(_against(one["arms"], arm, base, shown[0][1]))
        rounds = len(next(iter(measured.values())))
        rows.append([arm, *cells, str(rounds)])
    columns = ["", *(label for label, _, _ in shown), *([f"speed ÷ {base} (95%)"] if base and shown else []), "rounds"]
    if name == "states":
        columns = ["", *(f"{label}, ms" for label, _, _ in shown), "rounds"]
    return one["title"], columns, rows


def _against(arms: Mapping[str, Any], arm: str, base: str, key: str) -> str:
    if arm == base or base not in arms:
        return "1"
    mine, theirs = arms[arm][key], arms[base][key]
    rounds = min(len(mine), len(theirs))
    over, under = (mine, theirs) if key.endswith("per_s") else (theirs, mine)
    found = asdict(ratio(over[:rounds], under[:rounds]))
    return f"{_number(found['value'])} ({_interval(found)})"


def _percentiles(one: Mapping[str, Any]) -> Block:
    kinds = {"first_s": "first token", "gap_s": "between tokens", "quiet": "before", "busy": "while it comes in"}
    names = list(next(iter(one["percentiles"].values())))
    columns = ["ms", *(f"{kinds[name]} {p}" for name in names for p in ("p50", "p95", "p99"))]
    rows = [
        [arm, *(f"{1000 * found[name][p]:,.0f}" for name in names for p in ("p50", "p95", "p99"))]
        for arm, found in one["percentiles"].items()
    ]
    return f"{one['title']}: latency", columns, rows


def _profile(results: Results) -> Block:
    rows = [[name, f"{1000 * one['seconds']:.1f}", told(one["shares"], 5)] for name, one in results["profile"].items()]
    return "One step of the model alone, without a server", ["step", "ms", "where its time goes"], rows


def print_report(results: Results) -> None:
    for heading, columns, rows in blocks(results):
        shown = len(columns) - (heading == TARGETS_HEADING)  # what limits is for wider pages
        table = Table(title=heading, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
        for number, name in enumerate(columns[:shown]):
            table.add_column(name, justify="left" if number == 0 else "right")
        for cells in rows:
            table.add_row(*cells[:shown])
        console.print(table)


def markdown(results: Results, plots: Sequence[str]) -> str:
    """plots: paths of the images, as the page sees them."""
    about = results["about"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    small = (
        " A quick run: fewer sessions and tokens than the rows name."
        if about["sizes"]["sessions"] < FULL_NUM_SESSIONS
        else ""
    )
    absent = "".join(f" {name}: not measured ({why})." for name, why in results["missing"].items())
    text = (
        f"{about['date']}; {about['machine']}; threads of each: {about['threads']}; base {about['model']}; {versions}."
        f"{absent}{small}"
        f" Other work took {about['busy']:.0%} of the machine when the run began.\n\n"
        "Arms take turns, round by round; values are geometric means over rounds, intervals Student's over the rounds'"
        ' logarithms. "off": no session, the frozen base; "predict": a session\'s memory is read; "both": it also'
        " learns the prompt, and commits. A question mark stands where the interval leaves open whether the goal is"
        " reached.\n"
    )
    for heading, columns, rows in blocks(results):
        lines = [columns, ["---"] * len(columns), *rows]
        text += f"\n**{heading}**\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text + "".join(f"\n![{Path(plot).stem}]({plot})\n" for plot in plots)


# --- files -----------------------------------------------------------------------------------------------------------


def write(results: Results, out: Path, page: Path | None) -> None:
    """table.md and plots into `out`; into the page between its marks, with the plots and the numbers beside it."""
    plots = _draw(results, out)
    (out / "table.md").write_text(markdown(results, [plot.name for plot in plots]))
    print_report(results)
    if page is not None:
        images = page.parent / "img"
        images.mkdir(exist_ok=True)
        copies = [Path(shutil.copy(plot, images / f"{page.stem}-{plot.name}")) for plot in plots]
        head, _, tail = check_page(page)
        body = markdown(results, [f"img/{copy.name}" for copy in copies])
        page.write_text(f"{head}{BEGIN}\n\n{body}\n{END}{tail}")
        page.with_suffix(".json").write_text(json.dumps(results, indent=1))
        console.print(f"page: {page}")
    console.print(f"results: {out}")


def check_page(page: Path) -> tuple[str, str, str]:
    """A page before, between and behind its marks. Raises CommandError for one that has none."""
    try:
        text = page.read_text("utf-8")
    except OSError as error:
        raise CommandError(f"cannot read {page}: {error.strerror}") from error
    head, found, rest = text.partition(BEGIN)
    between, ended, tail = rest.partition(END)
    if not found or not ended:
        raise CommandError(f"{page} must have the lines {BEGIN} and {END}, between which the results go")
    return head, between, tail


def _draw(results: Results, out: Path) -> list[Path]:
    from benchmarks.plots import draw
    from research.plots import PlotsMissingError

    try:
        return draw(results, out)
    except PlotsMissingError as error:
        console.print(f"no plots: {error}")
        return []


def _rescaled(value: float, scale: float) -> float:
    return 1 / value if scale < 0 else scale * value


def _number(value: float) -> str:
    """Three significant digits, whole numbers above a hundred."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{2 - math.floor(math.log10(value))}f}" if value >= 0.01 else f"{value:.3g}"


def _interval(estimate: Any) -> str:
    if estimate is None or estimate["low"] is None:
        return "–"
    return f"{_number(estimate['low'])}–{_number(estimate['high'])}"


def _quantiles(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered[round(i * (len(ordered) - 1) / (QUANTILES - 1))] for i in range(QUANTILES)] if ordered else []
