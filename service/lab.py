"""The commands that work on the model itself, without a server: `imprint eval` and `imprint fit`."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from model.checkpoint import CheckpointError, load_backbone
from model.config import ConfigError
from model.evaluation.prequential import Stream, StreamReport, arms, cut, evaluate, ratio
from model.lm import AdaptiveLM
from model.memory import MemoryConfigError, save_memory
from model.tokenizer import Tokenizer
from model.training.initial import Passage, default_config, fitted_memory, read_passage
from service.app import choose_memory
from service.base import BaseError, resolve_base
from service.client import CommandError
from service.settings import Settings

RECORD_SEPARATOR = "\x1e\n"  # divides the documents of a stream in one file
SUFFIXES = (".txt", ".md", ".rst")
CHARS_PER_TOKEN = 8  # more than any text needs; only cuts long files before they are tokenised

console = Console()


def evaluate_files(
    settings: Settings, paths: Sequence[Path], *, requests: int, window: int, streams: int, out: Path | None
) -> None:
    """Prints the table of `imprint eval`, and writes every number to `out`."""
    lm, tokenizer = _load(settings)
    found = _streams(paths, tokenizer, requests, window, streams)
    with _progress() as bar:
        task = bar.add_task("", total=arms(found))

        def advance(name: str, n: int) -> None:
            bar.update(task, advance=n, description=name[:32])

        reports = evaluate(lm, found, tokenizer.start_token_id, progress=advance)
    console.print(_table(reports))
    if out is not None:
        out.write_text(json.dumps([asdict(report) for report in reports], indent=1))


def fit_files(
    settings: Settings, paths: Sequence[Path], *, out: Path, requests: int, window: int, streams: int, seed: int
) -> None:
    """Writes the checkpoint of `imprint fit` to `out`."""
    lm, tokenizer = _load(settings)
    found = _streams(paths, tokenizer, requests, window, streams, seed=seed)
    passages: list[list[Passage]] = []
    with _progress() as bar:
        task = bar.add_task("reading with the base", total=sum(len(stream.requests) for stream in found))
        for stream in found:
            passages.append([])
            for request in stream.requests:
                passages[-1].append(read_passage(lm.backbone, request, tokenizer.start_token_id))
                bar.advance(task)
        replay = bar.add_task("fitting the read gate", total=len(passages))
        memory = fitted_memory(
            default_config(lm.backbone.config.hidden_size),
            passages,
            seed=seed,
            progress=lambda done: bar.update(replay, completed=done),
        )
    save_memory(memory, out)
    console.print(f"{out}: {memory.fingerprint()}")


def _load(settings: Settings) -> tuple[AdaptiveLM, Tokenizer]:
    try:
        folder = resolve_base(settings.model, settings.cache_dir, progress=console.print)
        backbone, tokenizer = load_backbone(folder), Tokenizer.load(folder)
        lm = AdaptiveLM(backbone, choose_memory(settings, backbone))
    except (BaseError, CheckpointError, ConfigError, MemoryConfigError) as error:
        raise CommandError(str(error)) from error
    return lm, tokenizer


def _streams(
    paths: Sequence[Path], tokenizer: Tokenizer, requests: int, window: int, per_kind: int, seed: int | None = None
) -> list[Stream]:
    """The first streams of each kind that are long enough; with a seed, a random part of random ones."""
    chosen: list[Stream] = []
    files = list(_files(paths))
    if seed is not None:
        random.Random(seed).shuffle(files)
    for file, kind in files:
        if sum(stream.kind == kind for stream in chosen) == per_kind:
            continue
        try:
            text = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CommandError(f"cannot read {file}: {error}") from error
        text = text.replace(RECORD_SEPARATOR, "\n\n")
        size = requests * window * CHARS_PER_TOKEN
        start = 0 if seed is None else random.Random(f"{seed}/{file.name}").randrange(max(1, len(text) - size))
        parts = cut(tokenizer.encode(text[start : start + size]), window, requests)
        if len(parts) == requests:
            chosen.append(Stream(f"{kind}/{file.stem}", kind, parts))
    if not chosen:
        raise CommandError(f"no text is long enough: a stream needs {requests} requests of {window} tokens")
    return sorted(chosen, key=lambda stream: stream.kind)


def _files(paths: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Text files and their kinds: the name of the folder under the one given, or of the file's own folder."""
    for path in paths:
        if path.is_file():
            yield path, path.absolute().parent.name
            continue
        for file in sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()):
            below = file.relative_to(path).parts
            yield file, below[0] if len(below) > 1 else path.absolute().name


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )


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
