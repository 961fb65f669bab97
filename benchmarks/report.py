"""The report of a run: targets, tables and the generated page, as functions of the results."""

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

from benchmarks.plots import draw
from benchmarks.profiling import format_shares
from benchmarks.targets import TARGETS, Results
from benchmarks.testbed import Sizes
from research.corpus import console
from research.estimates import mean, ratio
from research.plots import PlotsMissingError
from service.errors import CommandError

BEGIN, END = "<!-- imprint bench: begin -->", "<!-- imprint bench: end -->"
TARGETS_HEADING = "What is to be reached"
QUANTILES = 101
FULL_NUM_SESSIONS = Sizes().sessions

TableData = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # heading, columns, rows


def finalize_results(results: dict[str, Any]) -> dict[str, Any]:
    """Return the results with the evaluated targets, and with percentiles in place of samples."""
    for scenario in results["scenarios"].values():
        if "samples" in scenario:
            samples = scenario.pop("samples")
            scenario["curves"] = {
                arm: {name: _quantiles(values) for name, values in by_name.items()} for arm, by_name in samples.items()
            }
    return results | {"reach": [target.evaluate(results) for target in TARGETS]}


# --- tables ----------------------------------------------------------------------------------------------------------

# The columns of the tables by scenario (heading, key, scale; a negative scale inverts), and the arm that ratios are
# relative to.
TABLE_COLUMNS = {
    "single": ([("tokens/s", "s_per_token", -1.0), ("first token, ms", "first_s", 1000.0)], "off"),
    "prefill": ([("tokens/s", "tokens_per_s", 1.0)], "off"),
    "streams": (
        [("tokens/s", "tokens_per_s", 1.0), ("and prompts, tokens/s", "with_prompts_per_s", 1.0),
         ("first token p50, s", "first_p50_s", 1.0)],
        "off",
    ),
    "batch": ([("step, ms", "s_per_step", 1000.0)], "off"),
    "masked": ([("step, ms", "s_per_step", 1000.0)], "plain"),
    "sessions": ([("requests/s", "requests_per_s", 1.0)], "5"),
    "history": ([("request, ms", "request_s", 1000.0)], None),
    "states": ([(phase, f"{phase}_s", 1000.0) for phase in ("save", "load", "place", "commit")], None),
    "rate": ([], None),
    "interruption": ([("long prompt's first token, s", "first_s", 1.0)], "off"),
    "acts": ([("act p50, ms", "p50_s", 1000.0), ("act p99, ms", "p99_s", 1000.0)], None),
}  # fmt: skip


def tables(results: Results) -> list[TableData]:
    """Return every table."""
    found = [_targets_table(results)]
    for name, scenario in results["scenarios"].items():
        if TABLE_COLUMNS[name.partition("-")[0]][0]:
            found.append(_scenario(name, scenario))
        if "percentiles" in scenario:
            found.append(_percentiles(scenario))
    return found + ([_profile(results)] if results["profile"] else [])


def _targets_table(results: Results) -> TableData:
    rows = []
    for row in results["reach"]:
        sign = "≥" if row["up"] else "≤"
        measured, reached = row["measured"], row["reached"]
        shown = "not measured" if measured is None else _number(measured["value"])
        limit = reached.removeprefix("not measured: ") if measured is None else row["limit"]
        note = f" ({row['note']})" if row.get("note") else ""
        rows.append(
            [row["what"], f"{sign} {row['least']:g}", f"{sign} {row['aim']:g}", shown + note, _interval(measured),
             "–" if measured is None else reached, limit]
        )  # fmt: skip
    columns = ["what", "at least", "aim", "measured", "95%", "reached", "what limits it next, or why not measured"]
    return TARGETS_HEADING, columns, rows


def _scenario(name: str, scenario: Mapping[str, Any]) -> TableData:
    table_columns, base = TABLE_COLUMNS[name.partition("-")[0]]
    rows = []
    for arm, measured in scenario["arms"].items():
        if not measured:
            continue
        cells = [
            _number(mean([_rescaled(value, scale) for value in measured[key]]).value) for _, key, scale in table_columns
        ]
        if base is not None and table_columns:
            cells.append(_relative_speed(scenario["arms"], arm, base, table_columns[0][1]))
        rounds = len(next(iter(measured.values())))
        rows.append([arm, *cells, str(rounds)])
    relative = [f"speed ÷ {base} (95%)"] if base and table_columns else []
    columns = ["", *(label for label, _, _ in table_columns), *relative, "rounds"]
    if name == "states":
        columns = ["", *(f"{label}, ms" for label, _, _ in table_columns), "rounds"]
    return scenario["title"], columns, rows


def _relative_speed(arms: Mapping[str, Any], arm: str, base: str, key: str) -> str:
    """Return the speed of an arm ÷ the speed of the base arm, with the interval."""
    if arm == base or base not in arms:
        return "1"
    values, base_values = arms[arm][key], arms[base][key]
    rounds = min(len(values), len(base_values))
    numerators, denominators = (values, base_values) if key.endswith("per_s") else (base_values, values)
    found = asdict(ratio(numerators[:rounds], denominators[:rounds]))
    return f"{_number(found['value'])} ({_interval(found)})"


def _percentiles(scenario: Mapping[str, Any]) -> TableData:
    kinds = {"first_s": "first token", "gap_s": "between tokens", "quiet": "before", "busy": "while it comes in"}
    names = list(next(iter(scenario["percentiles"].values())))
    columns = ["ms", *(f"{kinds[name]} {p}" for name in names for p in ("p50", "p95", "p99"))]
    rows = [
        [arm, *(f"{1000 * found[name][p]:,.0f}" for name in names for p in ("p50", "p95", "p99"))]
        for arm, found in scenario["percentiles"].items()
    ]
    return f"{scenario['title']}: latency", columns, rows


def _profile(results: Results) -> TableData:
    rows = [
        [name, f"{1000 * step['seconds']:.1f}", format_shares(step["shares"], 5)]
        for name, step in results["profile"].items()
    ]
    return "One step of the model alone, without a server", ["step", "ms", "where its time goes"], rows


def print_report(results: Results) -> None:
    """Print every table."""
    for heading, columns, rows in tables(results):
        shown = len(columns) - (heading == TARGETS_HEADING)  # a console is too narrow for the limits
        table = Table(title=heading, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
        for number, name in enumerate(columns[:shown]):
            table.add_column(name, justify="left" if number == 0 else "right")
        for cells in rows:
            table.add_row(*cells[:shown])
        console.print(table)


def markdown(results: Results, plots: Sequence[str]) -> str:
    """Return the tables and figures as Markdown.

    plots: paths of the images relative to the page
    """
    about = results["about"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    quick = (
        " A quick run: fewer sessions and tokens than the rows name."
        if about["sizes"]["sessions"] < FULL_NUM_SESSIONS
        else ""
    )
    absent = "".join(f" {name}: not measured ({why})." for name, why in results["missing"].items())
    text = (
        f"{about['date']}; {about['machine']}; threads of each: {about['threads']}; base {about['model']}; {versions}."
        f"{absent}{quick}"
        f" Other work took {about['busy']:.0%} of the machine when the run began.\n\n"
        "Arms take turns, round by round; values are geometric means over rounds, intervals Student's over the rounds'"
        ' logarithms. "off": no session, the frozen base; "predict": a session\'s memory is read; "both": it also'
        " learns the prompt, and commits. A question mark stands where the interval leaves open whether the goal is"
        " reached.\n"
    )
    for heading, columns, rows in tables(results):
        lines = [columns, ["---"] * len(columns), *rows]
        text += f"\n**{heading}**\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text + "".join(f"\n![{Path(plot).stem}]({plot})\n" for plot in plots)


# --- files -----------------------------------------------------------------------------------------------------------


def write(results: Results, out: Path, page: Path | None) -> None:
    """Write table.md and figures to `out`. Write the same between the marks of the page, and JSON beside the page."""
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
    """Return the text of a page before, between and after its marks. Raises CommandError for a page without marks."""
    try:
        text = page.read_text("utf-8")
    except OSError as error:
        raise CommandError(f"cannot read {page}: {error.strerror}") from error
    head, begin, rest = text.partition(BEGIN)
    between, end, tail = rest.partition(END)
    if not begin or not end:
        raise CommandError(f"{page} must have the lines {BEGIN} and {END}, between which the results go")
    return head, between, tail


def _draw(results: Results, out: Path) -> list[Path]:
    try:
        return draw(results, out)
    except PlotsMissingError as error:
        console.print(f"no plots: {error}")
        return []


def _rescaled(value: float, scale: float) -> float:
    return 1 / value if scale < 0 else scale * value


def _number(value: float) -> str:
    """Return a number with three significant digits, or without decimals from 100 on."""
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
