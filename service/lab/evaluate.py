"""`imprint eval`: what the memory is worth on texts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from model.evaluation.prequential import StreamReport, arms, evaluate, ratio
from service.lab.corpus import console, load_model, progress_bar, read_streams
from service.settings import Settings


def evaluate_files(
    settings: Settings, paths: Sequence[Path], *, requests: int, window: int, streams: int, out: Path | None
) -> None:
    """Prints the table of `imprint eval`, and writes every number to `out`."""
    lm, tokenizer = load_model(settings)
    found = read_streams(paths, tokenizer, requests, window, streams)
    with progress_bar() as bar:
        task = bar.add_task("", total=arms(found))

        def advance(name: str, n: int) -> None:
            bar.update(task, advance=n, description=name[:32])

        reports = evaluate(lm, found, tokenizer.start_token_id, progress=advance)
    console.print(_table(reports))
    if out is not None:
        out.write_text(json.dumps([asdict(report) for report in reports], indent=1))


def _table(reports: Sequence[StreamReport]) -> Table:
    table = Table(caption="Perplexity, and its ratio to the frozen base on the same tokens (below 1 is better).")
    table.add_column("stream")
    for name in ("frozen", "online", "ratio", "2nd half: own past", "same kind's past", "other kind's past"):
        table.add_column(name, justify="right")
    columns: list[list[float]] = [[], [], [], []]
    for report in reports:
        half = len(report.frozen.tokens) - len(report.own.tokens)
        pasts = [
            None if arm is None else ratio(arm, report.frozen, half)
            for arm in (report.own, report.same_kind, report.other_kind)
        ]
        ratios = [ratio(report.online, report.frozen), *pasts]
        for column, value in zip(columns, ratios, strict=True):
            if value is not None:
                column.append(value)
        perplexities = [f"{math.exp(arm.mean()):.2f}" for arm in (report.frozen, report.online)]
        table.add_row(report.name, *perplexities, *(_three(value) for value in ratios))
    table.add_section()
    means = [math.exp(sum(map(math.log, column)) / len(column)) if column else None for column in columns]
    table.add_row("geometric mean", "", "", *(_three(mean) for mean in means))
    return table


def _three(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
