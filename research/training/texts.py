"""What `imprint train` reads: files and data sets as texts by kind, and a budget of streams drawn from all kinds alike.

A file is a stream; what it holds beyond one stream's size makes further ones. Texts are read when they are drawn.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
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
CHARS_PER_TOKEN = 4  # about; says where in a long file its next stream begins
MIN_REQUESTS = 2  # of a stream: with one there is nothing to remember


@dataclass(frozen=True)
class Text:
    """One stream's text: part `part` of a file, of `size` characters, or `text` itself."""

    name: str
    file: Path | None = None
    part: int = 0
    size: int = 0
    text: str = ""

    def read(self) -> str:
        """Raises CommandError."""
        if self.file is None:
            return self.text
        return read_text(self.file)[self.part * self.size : (self.part + 1) * self.size]


@dataclass
class TextKind:
    """Texts of one sort: files, each a list of its parts. `num_held_out` of the files are to be validated on."""

    name: str
    files: Iterator[list[Text]]
    num_held_out: int


@dataclass(frozen=True)
class PlannedStream:
    """A stream that was chosen. id: names its features; sha256: of its text; valid: whether it is held out."""

    id: str
    name: str
    kind: str
    valid: bool
    sha256: str
    requests: int
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Budget:
    """What to draw. tokens: to train on, in all; stream_tokens, valid_tokens: of one stream, at most; valid: streams
    held out of a kind; requests: shortest and longest, in tokens; seed: of the choice and of the cuts."""

    tokens: int
    stream_tokens: int
    valid: int
    valid_tokens: int
    requests: tuple[int, int]
    seed: int


def find_kinds(paths: Sequence[str], budget: Budget) -> list[TextKind]:
    """The kinds under local paths and in `hf:` data sets. Raises CommandError for what is not there."""
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
    """Files in random order; where they are too few to hold any out, their parts count as files."""
    if len(files) <= budget.valid:
        files = [[text] for texts in files for text in texts]
    random.Random(f"{budget.seed}/{name}").shuffle(files)
    return TextKind(name, iter(files), min(budget.valid, len(files) - 1))


def _hub_kind(spec: str, size: int, num_held_out: int) -> TextKind:
    """`owner/name[:config][:split][:column]` of the hub, or a folder in a data set's form; documents in their order."""
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
        except Exception as error:  # datasets and the network raise of every kind
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise CommandError(f"data set {source}: {reason[0]}") from error

    return TextKind(name, files(), num_held_out)


def _join_documents(documents: Iterable[str], size: int) -> Iterator[str]:
    """Consecutive documents as texts of about `size` characters; the last one is what is left."""
    together: list[str] = []
    for document in documents:
        together.append(document)
        if sum(map(len, together)) >= size:
            yield "\n\n".join(together)
            together = []
    if together:
        yield "\n\n".join(together)


def draw_streams(
    kinds: Sequence[TextKind], budget: Budget, tokenizer: Tokenizer, base: str, folder: Path
) -> list[PlannedStream]:
    """Chooses the streams and writes their tokens to `folder`, a file a stream: `ids` int32 [n], `lengths` [requests].

    The next stream is always one of the kind with the fewest tokens so far, so that kinds stay in balance as long as
    their texts last. base: identifies what will make features of them. Raises CommandError if there is too little text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    limit = min(budget.stream_tokens, budget.tokens // len(kinds))
    if limit < MIN_REQUESTS * budget.requests[1]:
        need = len(kinds) * MIN_REQUESTS * budget.requests[1]
        raise CommandError(f"tokens must be at least {need:,} for {len(kinds)} kinds of text, got {budget.tokens:,}")
    streams: list[PlannedStream] = []

    def take(kind: TextKind, text: Text, valid: bool) -> int:
        """The tokens taken: 0 if the text is too short."""
        content = text.read()
        ids = np.array(tokenizer.encode(content), dtype=np.int32)
        ids = ids[int(tokenizer.add_bos) :][: min(limit, budget.valid_tokens) if valid else limit]
        lengths = np.array(cut_lengths(len(ids), *budget.requests, f"{budget.seed}/{text.name}"))
        if len(lengths) < MIN_REQUESTS:
            return 0
        ids = ids[: lengths.sum()]
        id = hashlib.sha256(base.encode() + ids.tobytes() + lengths.tobytes()).hexdigest()[:16]
        np.savez(folder / f"{id}.npz", ids=ids, lengths=lengths)
        digest = hashlib.sha256(content.encode()).hexdigest()
        streams.append(PlannedStream(id, text.name, kind.name, valid, digest, len(lengths), len(ids)))
        return len(ids)

    for kind in kinds:
        num_held_out = 0
        while num_held_out < kind.num_held_out and (file := next(kind.files, None)) is not None:
            num_held_out += bool(take(kind, file[0], valid=True))
    taken = dict.fromkeys((kind.name for kind in kinds), 0)
    texts = {kind.name: _round_robin(kind.files) for kind in kinds}
    while texts and sum(taken.values()) < budget.tokens:
        kind = min((kind for kind in kinds if kind.name in texts), key=lambda kind: taken[kind.name])
        text = next(texts[kind.name], None)
        if text is None:
            del texts[kind.name]
        else:
            taken[kind.name] += take(kind, text, valid=False)
    for what, valid in (("train", False), ("validate", True)):
        if not any(stream.valid == valid for stream in streams):
            raise CommandError(
                f"no text is left to {what} on: a stream needs {MIN_REQUESTS} requests of at least"
                f" {budget.requests[0]} tokens, and {budget.valid} files of each kind are held out"
            )
    return streams


def _round_robin(files: Iterator[list[Text]]) -> Iterator[Text]:
    """The first part of every file, then the second of every file, …"""
    later = []
    for first, *rest in files:
        yield first
        later.append(rest)
    for turn in zip_longest(*later):
        yield from (text for text in turn if text is not None)
