"""Learning from files: read them as UTF-8, cut them into pieces where paragraphs end, and count what was learned."""

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

# About 12,000 tokens. Each piece is one version, so the versions that a session keeps can undo a whole book.
PIECE_CHARS = 50_000
READ_BYTES = 2**16
SEPARATORS = ("\n\n", "\n", " ")

File = str | os.PathLike[str] | IO[bytes]


class ObserveProgress:
    """The progress of a session through a list of files. Each piece of a file is one version.

    Attributes:
        session: the session's id.
        file: name of the file that is being learned.
        characters: number of characters learned so far, in all files.
        total: number of characters in all files; None if one of them is an open file.
        tokens_learned: number of tokens learned so far.
        rows_written: number of memory rows written so far.
        version: the session's newest version; None before the first piece.
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
        """Return the mean loss so far, in nats per token before the token was learned; None before any token."""
        return self._loss_sum / self._num_scored if self._num_scored else None

    def iter_operations(self) -> Iterator[Operation[Observed]]:
        """Yield one operation per piece. The caller passes each answer to `record_answer` before taking the next one.

        All files given by name are read once before the first piece, so that a bad file fails before anything is
        learned.

        Raises:
            FileError: a file cannot be read as UTF-8 text.
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
        """Add the answer to the operation that was yielded last."""
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
    """Return the name under which messages mention the file."""
    if isinstance(file, str | os.PathLike):
        return os.fspath(file)
    name = getattr(file, "name", "")
    return "standard input" if name == "<stdin>" else str(name) or "the stream"


def pieces(file: File, size: int = PIECE_CHARS) -> Iterator[str]:
    """Yield the text of a UTF-8 file in non-empty pieces of at most `size` characters; joined, they are the whole text.

    Raises:
        FileError: the file cannot be read as UTF-8 text.
    """
    text = ""
    for part in _decode_utf8(file):
        text += part
        while len(text) > size:
            cut = _cut_position(text, size)
            yield text[:cut]
            text = text[cut:]
    if text:
        yield text


def text_pieces(text: str, size: int) -> list[str]:
    """Return a text in pieces as `pieces` cuts a file's."""
    found = []
    while len(text) > size:
        cut = _cut_position(text, size)
        found.append(text[:cut])
        text = text[cut:]
    return [*found, text] if text else found


def _cut_position(text: str, size: int) -> int:
    """Return the end of the next piece: after the last blank line in its second half, else newline, else space."""
    for separator in SEPARATORS:
        if (start := text.rfind(separator, size // 2, size)) >= 0:
            return start + len(separator)
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
        # `error.start` counts from the start of the decoder's input, which may begin with the bytes of a character
        # that the previous read cut in two.
        at = offset - len(error.object) + error.start
        raise FileError(f"{display_name(file)} is not UTF-8 text: {error.reason} at byte {at}") from None
    except OSError as error:
        raise FileError(f"cannot read {display_name(file)}: {error.strerror}") from None
