"""What the commands that work on the model itself share: the model of the settings, texts as streams, and progress."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from model.checkpoint import CheckpointError, load_backbone
from model.config import ConfigError
from model.evaluation.prequential import Stream, cut
from model.lm import AdaptiveLM
from model.memory import MemoryConfigError
from model.tokenizer import Tokenizer
from service.app import choose_memory
from service.base import BaseError, resolve_base
from service.client import CommandError
from service.settings import Settings

RECORD_SEPARATOR = "\x1e\n"  # divides the documents of a stream in one file
SUFFIXES = (".txt", ".md", ".rst")
CHARS_PER_TOKEN = 8  # more than any text needs; only cuts long files before they are tokenised

console = Console()


def load_model(settings: Settings) -> tuple[AdaptiveLM, Tokenizer]:
    try:
        folder = resolve_base(settings.model, settings.cache_dir, progress=console.print)
        backbone, tokenizer = load_backbone(folder), Tokenizer.load(folder)
        lm = AdaptiveLM(backbone, choose_memory(settings, backbone))
    except (BaseError, CheckpointError, ConfigError, MemoryConfigError) as error:
        raise CommandError(str(error)) from error
    return lm, tokenizer


def read_streams(
    paths: Sequence[Path], tokenizer: Tokenizer, requests: int, window: int, per_kind: int, seed: int | None = None
) -> list[Stream]:
    """The first streams of each kind that are long enough; with a seed, a random part of random ones."""
    chosen: list[Stream] = []
    files = list(text_files(paths))
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


def text_files(paths: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Text files and their kinds: the name of the folder under the one given, or of the file's own folder."""
    for path in paths:
        if path.is_file():
            yield path, path.absolute().parent.name
            continue
        for file in sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()):
            below = file.relative_to(path).parts
            yield file, below[0] if len(below) > 1 else path.absolute().name


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )
