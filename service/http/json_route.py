"""The route classes of /v1: readiness and strict JSON, checked before the handler of a route runs."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Callable, Coroutine, Iterator
from email.message import Message as MimeHeader
from functools import lru_cache
from typing import Any

import numpy as np
import pydantic_core
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute

from service.concurrency import LARGE, run_off_loop
from service.errors import BadRequest, NotReady, UnsupportedMediaType
from service.http.dependencies import get_sessions

MAX_VALUES = 2**18  # more than any honest request has: 128 prompts of 2,048 token ids
CHUNK_BYTES = 2**18  # fits the caches

JSON_TYPE = (b"content-type", b"application/json")

Headers = list[tuple[bytes, bytes]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


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
    does not count. numpy takes a fifth of the time of `bytes.count`, and does not hold the interpreter's lock.
    """
    if len(body) <= MAX_VALUES:
        return len(body)
    quick = sum(int(np.count_nonzero(_marks(chunk))) for chunk in _chunks(body))
    if quick <= MAX_VALUES:
        return quick
    counted, in_string, backslashes = 0, False, 0
    for chunk in _chunks(body):
        quotes, backslashes = _string_quotes(chunk, backslashes)
        marks = np.flatnonzero(_marks(chunk))
        quotes_before = np.searchsorted(quotes, marks) + in_string
        counted += int(np.count_nonzero(quotes_before % 2 == 0))
        in_string = bool((len(quotes) + in_string) % 2)
        if counted > MAX_VALUES:
            break
    return counted


def _chunks(body: bytes) -> Iterator[Bytes]:
    for start in range(0, len(body), CHUNK_BYTES):
        yield np.frombuffer(body, np.uint8, min(CHUNK_BYTES, len(body) - start), start)


def _marks(chunk: Bytes) -> Any:
    """Return which bytes may stand before a value."""
    return (chunk == ord(",")) | (chunk == ord("[")) | (chunk == ord("{"))


def _string_quotes(chunk: Bytes, backslashes: int) -> tuple[Any, int]:
    """Return the positions of the quotes that begin or end a string, and the backslashes at the end of the chunk.

    backslashes: number of backslashes right before the chunk. A quote after an odd number of backslashes is escaped.
    """
    positions = np.arange(len(chunk), dtype=np.int32)
    latest_other = np.maximum.accumulate(np.where(chunk == ord("\\"), -1 - backslashes, positions))
    quotes = np.flatnonzero(chunk == ord('"'))
    before = np.where(quotes > 0, latest_other[quotes - 1], -1 - backslashes)
    escaped = (quotes - 1 - before) % 2 == 1
    return quotes[~escaped], int(len(chunk) - 1 - latest_other[-1])


class ParsedRequest(Request):
    """A request whose JSON body has been parsed."""

    parsed: Any = None

    async def json(self) -> Any:
        return self.parsed


class JsonRoute(APIRoute):
    """A route under /v1: answers only while the server is ready, and parses a JSON body strictly."""

    parses_json = True

    def requires_json_type(self, request: Request) -> bool:
        """Return whether the body must be declared as JSON, which pages of other sites cannot do without asking."""
        return True

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return a handler that checks a request before FastAPI's handler gets the request.

        Raises:
            NotReady: the server is loading or draining.
            UnsupportedMediaType: the body is not declared as JSON in UTF-8.
            BadRequest: the body is not JSON.
        """
        handle = super().get_route_handler()

        async def check_and_handle(request: Request) -> Response:
            state = (await get_sessions(request)).state
            if state != "ready":
                raise NotReady(f"The server is {state}; try again later.", code=state)
            if self.parses_json and not self.requires_json_type(request):
                request.scope["headers"] = _with_json_type(request.scope["headers"])
            request = ParsedRequest(request.scope, request.receive)
            body = await request.body()
            if body and self.parses_json:
                _require_json(request.headers.get("content-type", ""))
                request.parsed = await run_off_loop(len(body), self._read_json, body)
            route = f"{request.method} {request.url.path}\n"
            request.state.digest = await run_off_loop(len(body), _digest, route, body)
            return await handle(request)

        return check_and_handle

    def _read_json(self, body: bytes) -> Any:
        """Return the value of a JSON body; of a large body, the validated model, which FastAPI takes as it is.

        FastAPI validates on the event loop. Raises RequestValidationError for a large body that is not valid.
        """
        value = parse_json(body)
        if len(body) < LARGE or self.body_field is None:
            return value
        valid, errors = self.body_field.validate(value, loc=("body",))
        if errors:
            raise RequestValidationError(errors)
        return valid


class UndeclaredJsonRoute(JsonRoute):
    """A route whose body is JSON, whatever a program calls it; pages in browsers, which name their origin, must say."""

    def requires_json_type(self, request: Request) -> bool:
        return "origin" in request.headers or "sec-fetch-site" in request.headers


class FileRoute(JsonRoute):
    """A route under /v1 whose body is a file."""

    parses_json = False


def _with_json_type(headers: Headers) -> Headers:
    return [*((name, value) for name, value in headers if name != b"content-type"), JSON_TYPE]


@lru_cache(maxsize=16)
def _require_json(content_type: str) -> None:
    header = MimeHeader()
    header["content-type"] = content_type
    charset = str(header.get_param("charset", "utf-8")).lower()
    if header.get_content_type() != "application/json" or charset not in ("utf-8", "utf8"):
        raise UnsupportedMediaType(
            f"The body must be application/json in UTF-8, got Content-Type {content_type[:80]!r}.",
            param="Content-Type",
        )


def _digest(route: str, body: bytes) -> str:
    """Return the digest under which the store knows an equal request."""
    sha256 = hashlib.sha256(route.encode())
    sha256.update(body)
    return sha256.hexdigest()
