"""Texts as streams of requests, the model that the settings name, and the progress bar: shared by all commands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from model.adaptive_lm import AdaptiveLM
from model.base.checkpoint import CheckpointError, fingerprint, load_backbone
from model.base.config import ConfigError
from model.memory import MemoryConfigError
from model.text.tokenizer import Tokenizer
from research.evaluation.prequential import Stream, cut
from service.base_cache import BaseError, resolve_base
from service.errors import CommandError
from service.model_loading import choose_memory
from service.settings import Settings

RECORD_SEPARATOR = "\x1e\n"  # separates the documents of a stream in one file
SUFFIXES = (".txt", ".md", ".rst")
CHARS_PER_TOKEN = 8  # an upper bound, to cut long files before they are tokenised

console = Console()


def base_folder(settings: Settings) -> Path:
    """Return the Hugging Face folder of the settings' base. Raises CommandError."""
    try:
        return resolve_base(settings.model, settings.cache_dir, progress=console.print)
    except BaseError as error:
        raise CommandError(str(error)) from error


def load_model(settings: Settings) -> tuple[AdaptiveLM, Tokenizer]:
    """Load the base, its tokenizer and the memory that the settings name. Raises CommandError."""
    folder = base_folder(settings)
    try:
        backbone, tokenizer = load_backbone(folder), Tokenizer.load(folder)
        lm = AdaptiveLM(backbone, choose_memory(settings, backbone.config.hidden_size, fingerprint(folder)))
    except (CheckpointError, ConfigError, MemoryConfigError) as error:
        raise CommandError(str(error)) from error
    return lm, tokenizer


def read_streams(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    requests: int,
    window: int,
    per_kind: int,
    at_least: int | None = None,
) -> list[Stream]:
    """Return the first `per_kind` streams of each kind that are long enough, sorted by kind.

    A stream has `requests` requests of `window` tokens. With `at_least`, a text of so many requests is long enough.
    Raises CommandError if no text is long enough.
    """
    min_requests = requests if at_least is None else at_least
    chosen: list[Stream] = []
    for file, kind in text_files(paths):
        if sum(stream.kind == kind for stream in chosen) == per_kind:
            continue
        text = read_text(file)[: requests * window * CHARS_PER_TOKEN]
        parts = cut(tokenizer.encode(text), window, requests)
        if len(parts) >= min_requests:
            chosen.append(Stream(f"{kind}/{file.stem}", kind, parts))
    if not chosen:
        raise CommandError(f"no text is long enough: a stream needs {min_requests} requests of {window} tokens")
    return sorted(chosen, key=lambda stream: stream.kind)


def mixed_requests(paths: Sequence[Path], tokenizer: Tokenizer, window: int, tokens: int) -> list[list[int]]:
    """Return requests of all kinds, interleaved by kind, of `tokens` tokens in total or of all tokens that exist."""
    by_kind: dict[str, list[Path]] = {}
    for file, kind in text_files(paths):
        by_kind.setdefault(kind, []).append(file)

    def requests(files: Sequence[Path]) -> Iterator[list[int]]:
        for file in files:
            yield from cut(tokenizer.encode(read_text(file)), window, tokens)

    sources, order = [requests(files) for files in by_kind.values()], list[list[int]]()
    while sources and len(order) * window < tokens:
        for source in list(sources):
            if (request := next(source, None)) is None:
                sources.remove(source)
            else:
                order.append(request)
    return order


def read_text(file: Path) -> str:
    """Return the documents of a file as one text. Raises CommandError."""
    try:
        return file.read_text("utf-8").replace(RECORD_SEPARATOR, "\n\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"cannot read {file}: {error}") from error


def text_files(paths: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Yield text files with their kinds. A kind is the name of the folder below a given path, or of the file's folder.

    Where a given folder has subfolders with texts, each subfolder is a kind, and files beside the subfolders (a
    manifest, for example) are left out.
    """
    for path in paths:
        if path.is_file():
            yield path, path.absolute().parent.name
            continue
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        nested = any(file.parent != path for file in files)
        for file in files:
            if not nested:
                yield file, path.absolute().name
            elif file.parent != path:
                yield file, file.relative_to(path).parts[0]


def progress_bar() -> Progress:
    """Return a progress bar with counts and the remaining time, on the commands' console."""
    return Progress(
        TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )
