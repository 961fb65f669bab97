"""Files as the texts of requests: read as UTF-8, cut where paragraphs end, counted as they are learned."""

import codecs
import contextlib
import os
import uuid
from collections.abc import Iterable, Iterator
from typing import IO

from service.client import operations
from service.client.errors import FileError
from service.client.operations import Operation
from service.http.replies import Observed

# About 12,000 tokens: one version each, so a book can be taken back with the versions that a session keeps.
PIECE_CHARS = 50_000
READ_BYTES = 2**16
SEPARATORS = ("\n\n", "\n", " ")

File = str | os.PathLike[str] | IO[bytes]


class ObserveProgress:
    """How far a session has come in learning files, and what it has learned; each piece is one version.

    file: the name of the one in hand. characters: read and learned; total: of all files, None if one is a stream.
    loss: nats per token, each before it was learned; None until something was.
    """

    def __init__(self, session: str, files: Iterable[File], piece_chars: int, key: str | None) -> None:
        self.session = session
        self.file = ""
        self.characters = 0
        self.total: int | None = None
        self.tokens_learned = 0
        self.rows_written = 0
        self.version: int | None = None
        self._files = list(files)
        self._piece_chars = piece_chars
        self._key = key or uuid.uuid4().hex
        self._num_scored = 0
        self._loss_sum = 0.0

    @property
    def loss(self) -> float | None:
        return self._loss_sum / self._num_scored if self._num_scored else None

    def iter_operations(self) -> Iterator[Operation[Observed]]:
        """What is to be sent, piece by piece; each has to be answered with `record_answer`. Raises FileError.

        Every file is read once before the first piece: a bad one should not leave the work half done.
        """
        paths = [file for file in self._files if isinstance(file, str | os.PathLike)]
        sizes = [sum(map(len, pieces(path, self._piece_chars))) for path in paths]
        self.total = sum(sizes) if len(paths) == len(self._files) else None
        number = 0
        for file in self._files:
            self.file = display_name(file)
            for piece in pieces(file, self._piece_chars):
                self._piece = piece
                yield operations.observe(self.session, piece, idempotency_key=f"{self._key}-{number}")
                number += 1

    def record_answer(self, answer: Observed) -> None:
        """Counts the piece that was last asked for."""
        self.characters += len(self._piece)
        self.tokens_learned += answer.tokens_learned
        self.rows_written += answer.rows_written
        self.version = answer.version
        if answer.loss is not None:
            self._num_scored += answer.tokens_learned
            self._loss_sum += answer.loss * answer.tokens_learned

    def __str__(self) -> str:
        loss = "" if self.loss is None else f" · loss {self.loss:.3f}"
        version = "" if self.version is None else f" · version {self.version}"
        return f"learned {self.tokens_learned:,} tokens · {self.rows_written:,} rows{loss}{version}"


def display_name(file: File) -> str:
    """What to call the file in a message."""
    if isinstance(file, str | os.PathLike):
        return os.fspath(file)
    name = getattr(file, "name", "")
    return "standard input" if name == "<stdin>" else str(name) or "the stream"


def pieces(file: File, size: int = PIECE_CHARS) -> Iterator[str]:
    """The text of a UTF-8 file, in pieces of at most `size` characters that joined give the whole. Raises FileError."""
    text = ""
    for part in _decode_utf8(file):
        text += part
        while len(text) > size:
            cut = _cut_position(text, size)
            yield text[:cut]
            text = text[cut:]
    if text:
        yield text


def _cut_position(text: str, size: int) -> int:
    """Where to cut: behind the last blank line of the piece's second half, else newline, else space."""
    for separator in SEPARATORS:
        if (found := text.rfind(separator, size // 2, size)) >= 0:
            return found + len(separator)
    return size


def _decode_utf8(file: File) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    try:
        with open(file, "rb") if isinstance(file, str | os.PathLike) else contextlib.nullcontext(file) as stream:
            while data := stream.read(READ_BYTES):
                offset += len(data)
                yield decoder.decode(data)
            yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        # The decoder counts from what it was given, a character that the last read cut in two included.
        at = offset - len(error.object) + error.start
        raise FileError(f"{display_name(file)} is not UTF-8 text: {error.reason} at byte {at}") from None
    except OSError as error:
        raise FileError(f"cannot read {display_name(file)}: {error.strerror}") from None
