"""The tables of `imprint eval`, for the console and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.filesize import decimal
from rich.table import Table

from research.corpus import console

MAIN = ("memory", "own-past", "same-kind", "other-kind", "cache", "cache-bytes", "ngrams", "dense", "dynamic-head")
Results = Mapping[str, Any]
TableData = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # heading, columns, rows


def tables(results: Results) -> list[TableData]:
    """Return every table."""
    probes = results["probes"]
    facts = [_facts(probes["facts"])] if "facts" in probes else []
    return [_arms(results), _kinds(results), _novelty(results), *facts, _others(results)]


def print_report(results: Results) -> None:
    """Print every table."""
    print_tables(tables(results))


def print_tables(given: Sequence[TableData]) -> None:
    """Print tables on the commands' console."""
    for heading, columns, rows in given:
        table = Table(title=heading, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
        for cells in rows:
            table.add_row(*cells)
        console.print(table)


def write_markdown(results: Results, path: Path) -> None:
    """Write every table to a Markdown file, with the settings of the run above the tables."""
    about = results["about"]
    titles = "\n".join(f"- `{name}`: {arm['title']}{_tuned(arm)}" for name, arm in results["arms"].items())
    tuning = "tuned on all kinds, none held out"
    if about["tuned_on"] != about["kinds"]:
        tuning = f"tuned on {', '.join(about['tuned_on'])}"
    text = (
        f"{about['tokens']:,} tokens, {len(about['kinds'])} kinds, requests of {about['window']} tokens; {tuning}. "
        f"{about['date']}; {about['machine']}; base {about['model']}; memory {about['memory'][:23]}…\n\n"
        "Half: arms that only speak of the second half are compared there. Cost: seconds of this run over those of the"
        " frozen base's scores, rough on a busy machine; the memory's is what a server does, its"
        " variants' count the head twice.\n\n"
        f"{titles}\n"
    )
    path.write_text(text + markdown(tables(results)))


def markdown(given: Sequence[TableData]) -> str:
    """Return tables as Markdown, each below its heading."""
    text = ""
    for heading, columns, rows in given:
        lines = [columns, ["---"] * len(columns), *rows]
        text += f"\n**{heading}**\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text


def _arms(results: Results) -> TableData:
    about, rows = results["about"], []
    held_out = about["kinds"] != about["tuned_on"]
    for name, arm in results["arms"].items():
        ratio, half = arm["ratio"] or {}, arm["ratio_half"]
        rows.append(
            [
                name,
                _point(ratio.get("all")),
                _interval(ratio.get("all") or half["all"]),
                _point((ratio or half)["tuned"] if held_out else None),
                _point((ratio or half)["held_out"] if held_out else None),
                _point(half["all"]),
                _point(arm["memory_over"]["all"]),
                decimal(arm["state_bytes"]).replace(" bytes", " B"),
                f"{arm['cost']:.2f}×",
            ]
        )
    heading = (
        "Perplexity ÷ the frozen base's on the same tokens, geometric mean over kinds: all, those tuned on, those held"
        " out; on the 2nd half; memory's perplexity ÷ the arm's; state in bytes; time ÷ the frozen base's"
    )
    columns = ["arm", "all", "95%", "tuned", "held", "half", "mem ÷", "state", "cost"]
    return heading, columns, rows


def _kinds(results: Results) -> TableData:
    arms = {name: results["arms"][name] for name in MAIN if name in results["arms"]}
    rows = []
    for kind in results["about"]["kinds"]:
        ratios = [(arm["ratio"] or arm["ratio_half"])["kinds"].get(kind) for arm in arms.values()]
        rows.append([kind, *(_number(ratio) for ratio in ratios)])
    return "The same by kind (all arms: results.json)", ["kind", *arms], rows


def _novelty(results: Results) -> TableData:
    static = results["arms"]["static"]["novelty"]
    shares = ", ".join(f"{name} {estimate['share']:.0%}" for name, estimate in static.items() if estimate)
    rows = []
    for name, arm in results["arms"].items():
        per_1k = arm["gain_per_1k"]
        rows.append(
            [
                name,
                _number(arm["perplexity"]),
                _number(arm["perplexity_per_byte"]),
                "–" if per_1k is None else f"{per_1k:+.4f}",
                *(_point(estimate) for estimate in arm["novelty"].values()),
            ]
        )
    heading = (
        "Perplexity by token and by byte; nats a token gained per 1,000 tokens observed; the ratio by where the target"
        f" stood before ({shares})"
    )
    return heading, ["arm", "token", "byte", "per 1K", *static], rows


def _facts(facts: Results) -> TableData:
    rows = [["frozen base", "–", f"{facts['frozen']['verbatim']:.0%}", f"{facts['frozen']['paraphrased']:.0%}"]]
    for times in ("once", "three times"):
        for distance, share in facts[times].items():
            rows.append(
                [f"taught {times}", f"{int(distance):,}", f"{share['verbatim']:.0%}", f"{share['paraphrased']:.0%}"]
            )
    columns = ["", "other tokens since", "verbatim cue", "paraphrased cue"]
    return f"{facts['facts']} invented facts: answered exactly", columns, rows


def _others(results: Results) -> TableData:
    arms, probes = results["arms"], results["probes"]
    rows = []
    if (returned := arms.get("returned")) and returned["kept_share"] is not None:
        rows.append(["A→B→A: share of A's gain still there", f"{returned['kept_share']:.1%}"])
    if harm := arms.get("other-kind", {}).get("ratio_half", {}).get("all"):
        rows.append(["harm: another kind's memory, perplexity", f"{harm['value'] - 1:+.2%}"])
    if (same := arms.get("same-kind")) and same["own_past_over"]:
        rows.append(["own past ÷ another's past of the same kind", _point(same["own_past_over"]["all"])])
    if "keystrokes" in probes:
        saved = probes["keystrokes"]
        rows.append(["keystrokes saved, memory", _percent(saved["memory"])])
        rows.append(["keystrokes saved, frozen base", _percent(saved["frozen"])])
    if "cost" in probes:
        cost = probes["cost"]
        rows.append(["observe ÷ plain prefill", f"{cost['observe_over_prefill']:.2f}×"])
        rows.append(["observe ÷ frozen score", f"{cost['observe_over_score_frozen']:.2f}×"])
        rows.append(["decode ÷ frozen decode", f"{cost['decode_over_frozen']:.2f}×"])
    for name, ratio in probes.get("poison", {}).items():
        rows.append([f"normal text after poison ({name}): mean, worst", f"{ratio['mean']:.3f}, {ratio['worst']:.3f}"])
    if "long" in probes:
        run = probes["long"]
        rows.append([f"long session, {run['tokens']:,} tokens: ratio", _number(run["ratio"])])
        rows.append(["  tokens 100K–200K", _number(run["ratio_second_span"])])
        rows.append(["  last 100K", _number(run["ratio_last_span"])])
        rows.append(["  rows, bytes at the end", f"{run['rows'][-1]:,}, {decimal(run['state_bytes'])}"])
    return "Other measures", ["", ""], rows


def _tuned(arm: Results) -> str:
    given = ", ".join(f"{name} {value:.4g}" for name, value in arm["tuned"].items())
    return f" ({given})" if given else ""


def _point(estimate: Any) -> str:
    return f"{estimate['value']:.3f}" if estimate else "–"


def _interval(estimate: Any) -> str:
    return f"{estimate['low']:.3f}–{estimate['high']:.3f}" if estimate else "–"


def _percent(estimate: Any) -> str:
    return f"{estimate['value']:.1%} ({estimate['low']:.1%}–{estimate['high']:.1%})" if estimate else "–"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
