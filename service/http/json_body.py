"""JSON bodies from bytes to values, with a bound on the number of values."""

from __future__ import annotations

import codecs
from typing import Any

import numpy as np
import pydantic_core

from service.errors import BadRequest

MAX_VALUES = 2**18  # more than any honest request has: 128 prompts of 2,048 token ids
CHUNK_BYTES = 2**20


def parse_json(body: bytes) -> Any:
    """Return the one JSON value that `body` holds in UTF-8.

    The bound on values comes before the parser, which holds the interpreter's lock for all of its work.

    A byte order mark is left out.

    Raises:
        BadRequest: the body is not JSON in UTF-8, has NaN or a lone surrogate, is nested too deep or has too many
            values.
    """
    if body.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in body[:2]:
        raise BadRequest("The body is not valid JSON: it must be in UTF-8, not UTF-16.", code="invalid_json")
    body = body.removeprefix(codecs.BOM_UTF8)
    if (values := count_values(body)) > MAX_VALUES:
        raise BadRequest(
            f"The body may have at most {MAX_VALUES} JSON values, got {values} or more.", code="too_many_values"
        )
    try:
        return pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise BadRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from None


def count_values(body: bytes) -> int:
    """Return an upper bound of the number of values in a JSON text; exact enough wherever it exceeds `MAX_VALUES`.

    Each value but the first comes after a comma, or is the first one in an array or object. What stands in strings
    does not count.
    """
    quick = sum(body.count(mark) for mark in (b",", b"[", b"{"))
    if quick <= MAX_VALUES:
        return quick
    counted, in_string, backslashes = 0, False, 0
    for start in range(0, len(body), CHUNK_BYTES):
        chunk = np.frombuffer(body, np.uint8, min(CHUNK_BYTES, len(body) - start), start)
        quotes, backslashes = _string_quotes(chunk, backslashes)
        marks = np.flatnonzero((chunk == ord(",")) | (chunk == ord("[")) | (chunk == ord("{")))
        quotes_before = np.searchsorted(quotes, marks) + in_string
        counted += int(np.count_nonzero(quotes_before % 2 == 0))
        in_string = bool((len(quotes) + in_string) % 2)
        if counted > MAX_VALUES:
            break
    return counted


def _string_quotes(chunk: np.ndarray[Any, np.dtype[np.uint8]], backslashes: int) -> tuple[Any, int]:
    """Return the positions of the quotes that begin or end a string, and the backslashes at the end of the chunk.

    backslashes: number of backslashes right before the chunk. A quote after an odd number of backslashes is escaped.
    """
    positions = np.arange(len(chunk), dtype=np.int32)
    latest_other = np.maximum.accumulate(np.where(chunk == ord("\\"), -1 - backslashes, positions))
    quotes = np.flatnonzero(chunk == ord('"'))
    before = np.where(quotes > 0, latest_other[quotes - 1], -1 - backslashes)
    escaped = (quotes - 1 - before) % 2 == 1
    return quotes[~escaped], int(len(chunk) - 1 - latest_other[-1])
