"""The texts of `imprint train`: files and data sets by kind, and the draw of streams from all kinds alike.

A file is a stream, and the rest of a long file makes further streams. A text is read when it is drawn.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from model.text.tokenizer import Tokenizer
from research.corpus import read_text, text_files
from research.training.features import cut_lengths
from service.errors import CommandError

HUB = "hf:"
CHARS_PER_TOKEN = 4  # an estimate, for the size of the parts of a long file
MIN_REQUESTS = 2  # of a stream; a single request leaves nothing to remember


@dataclass(frozen=True)
class Text:
    """The text of one stream: part number `part` of a file, with `size` characters, or `text` itself."""

    name: str
    file: Path | None = None
    part: int = 0
    size: int = 0
    text: str = ""

    def read(self) -> str:
        """Return the text. Raises CommandError if the file cannot be read."""
        if self.file is None:
            return self.text
        return read_text(self.file)[self.part * self.size : (self.part + 1) * self.size]


@dataclass
class TextKind:
    """The texts of one kind: files as lists of parts, of which `num_held_out` files are for validation."""

    name: str
    files: Iterator[list[Text]]
    num_held_out: int


@dataclass(frozen=True)
class PlannedStream:
    """A chosen stream.

    id: name of the features
    valid: whether the stream is held out for validation
    sha256: hash of the text
    """

    id: str
    name: str
    kind: str
    valid: bool
    sha256: str
    requests: int
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Budget:
    """The amount of text to draw.

    tokens: tokens to train on, in total
    stream_tokens, valid_tokens: tokens of a training stream and of a held-out stream, at most
    valid: held-out files of each kind
    requests: length of the shortest and of the longest request, in tokens
    seed: seed of the choice and of the lengths of requests
    """

    tokens: int
    stream_tokens: int
    valid: int
    valid_tokens: int
    requests: tuple[int, int]
    seed: int


def find_kinds(paths: Sequence[str], budget: Budget) -> list[TextKind]:
    """Return the kinds under local paths and in `hf:` data sets. Raises CommandError for a missing path or no text."""
    size = budget.stream_tokens * CHARS_PER_TOKEN
    local = [Path(path) for path in paths if not path.startswith(HUB)]
    for path in local:
        if not path.exists():
            raise CommandError(f"no such file or folder: {path}")
    by_kind: dict[str, list[list[Text]]] = {}
    for file, kind in text_files(local):
        parts = range(-(-file.stat().st_size // size))
        texts = [Text(f"{kind}/{file.stem}" + (f"+{part}" if part else ""), file, part, size) for part in parts]
        by_kind.setdefault(kind, []).append(texts)
    kinds = [_local_kind(name, files, budget) for name, files in sorted(by_kind.items())]
    kinds += [_hub_kind(path.removeprefix(HUB), size, budget.valid) for path in paths if path.startswith(HUB)]
    if not kinds:
        raise CommandError(f"no texts in {', '.join(paths)}")
    return kinds


def _local_kind(name: str, files: list[list[Text]], budget: Budget) -> TextKind:
    """Return a kind with its files in random order. If the files are too few to hold any out, parts count as files."""
    if len(files) <= budget.valid:
        files = [[text] for texts in files for text in texts]
    random.Random(f"{budget.seed}/{name}").shuffle(files)
    return TextKind(name, iter(files), min(budget.valid, len(files) - 1))


def _hub_kind(spec: str, size: int, num_held_out: int) -> TextKind:
    """Return the kind of `owner/name[:config][:split][:column]`, a data set of the hub or a local folder."""
    source, config, split, column = [*spec.split(":"), "", "", ""][:4]
    split, column = split or "train", column or "text"
    name = Path(source).name if Path(source).exists() else source
    try:
        datasets: Any = import_module("datasets")
    except ImportError:
        raise CommandError(f"data set {source} needs a package: pip install 'imprint[train]'") from None

    def files() -> Iterator[list[Text]]:
        try:
            rows = datasets.load_dataset(source, config or None, split=split, streaming=True)
            for number, text in enumerate(_join_documents((row[column] for row in rows), size)):
                yield [Text(f"{name}/{number}", text=text)]
        except KeyError as error:
            raise CommandError(f"data set {source}: split {split} has no column {error}: name one last") from error
        except Exception as error:  # datasets and the network raise many types
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise CommandError(f"data set {source}: {reason[0]}") from error

    return TextKind(name, files(), num_held_out)


def _join_documents(documents: Iterable[str], size: int) -> Iterator[str]:
    """Yield consecutive documents joined to texts of about `size` characters."""
    pending: list[str] = []
    for document in documents:
        pending.append(document)
        if sum(map(len, pending)) >= size:
            yield "\n\n".join(pending)
            pending = []
    if pending:
        yield "\n\n".join(pending)


@dataclass
class _StreamWriter:
    """Writes the tokens of chosen texts, and lists the streams.

    limit: tokens of a stream, at most
    base: identifies the base and the precision of the features
    """

    tokenizer: Tokenizer
    budget: Budget
    base: str
    folder: Path
    limit: int
    streams: list[PlannedStream] = field(default_factory=list)

    def add(self, kind: TextKind, text: Text, *, valid: bool) -> int:
        """Write a stream, and return its number of tokens: 0 if the text is too short."""
        content = text.read()
        ids = np.array(self.tokenizer.encode(content), dtype=np.int32)[int(self.tokenizer.add_bos) :]
        ids = ids[: min(self.limit, self.budget.valid_tokens) if valid else self.limit]
        lengths = np.array(cut_lengths(len(ids), *self.budget.requests, f"{self.budget.seed}/{text.name}"))
        if len(lengths) < MIN_REQUESTS:
            return 0
        ids = ids[: lengths.sum()]
        id = hashlib.sha256(self.base.encode() + ids.tobytes() + lengths.tobytes()).hexdigest()[:16]
        np.savez(self.folder / f"{id}.npz", ids=ids, lengths=lengths)
        digest = hashlib.sha256(content.encode()).hexdigest()
        self.streams.append(PlannedStream(id, text.name, kind.name, valid, digest, len(lengths), len(ids)))
        return len(ids)


def draw_streams(
    kinds: Sequence[TextKind], budget: Budget, tokenizer: Tokenizer, base: str, folder: Path
) -> list[PlannedStream]:
    """Choose the streams and write the tokens of each to a file in `folder`: `ids` int32 [n], `lengths` [requests].

    The next stream is always of the kind with the fewest tokens so far, so the kinds stay balanced while their texts
    last. `base` identifies the base and the precision of the features. Raises CommandError for too little text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    limit = min(budget.stream_tokens, budget.tokens // len(kinds))
    if limit < MIN_REQUESTS * budget.requests[1]:
        need = len(kinds) * MIN_REQUESTS * budget.requests[1]
        raise CommandError(f"tokens must be at least {need:,} for {len(kinds)} kinds of text, got {budget.tokens:,}")
    writer = _StreamWriter(tokenizer, budget, base, folder, limit)
    for kind in kinds:
        num_held_out = 0
        while num_held_out < kind.num_held_out and (file := next(kind.files, None)) is not None:
            num_held_out += bool(writer.add(kind, file[0], valid=True))
    num_tokens = {kind.name: 0 for kind in kinds}
    texts = {kind.name: _round_robin(kind.files) for kind in kinds}
    while texts and sum(num_tokens.values()) < budget.tokens:
        kind = min((kind for kind in kinds if kind.name in texts), key=lambda kind: num_tokens[kind.name])
        text = next(texts[kind.name], None)
        if text is None:
            del texts[kind.name]
        else:
            num_tokens[kind.name] += writer.add(kind, text, valid=False)
    for purpose, valid in (("train", False), ("validate", True)):
        if not any(stream.valid == valid for stream in writer.streams):
            raise CommandError(
                f"no text is left to {purpose} on: a stream needs {MIN_REQUESTS} requests of at least"
                f" {budget.requests[0]} tokens, and {budget.valid} files of each kind are held out"
            )
    return writer.streams


def _round_robin(files: Iterator[list[Text]]) -> Iterator[Text]:
    """Yield the first part of every file, then the second part of every file, and so on."""
    remaining = []
    for first, *rest in files:
        yield first
        remaining.append(rest)
    for parts in zip_longest(*remaining):
        yield from (text for text in parts if text is not None)
