"""The errors that the client raises: the server's own, parsed from its answers, and those without a server's answer."""

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from service import errors
from service.errors import ImprintError


class ClientError(ImprintError):
    """An error that no server's answer caused; `status` is 0."""

    status = 0
    type = "client_error"


class NoServer(ClientError):
    """No server answers at the address."""


class TimedOut(ClientError):
    """The answer took longer than the client's `timeout`."""


class ConnectionBroken(ClientError):
    """The connection broke before the answer was complete.

    The server may or may not have learned from the request. A request that is sent again with the error's
    `idempotency_key` is learned once.
    """


class UnexpectedAnswer(ClientError):
    """The answer is not that of an Imprint server, or that of an incompatible version."""


class FileError(ClientError):
    """A file cannot be read as UTF-8 text. The message names the file and the position of the bad byte."""


def _all_subclasses(root: type[ImprintError]) -> Iterator[type[ImprintError]]:
    """Yield the server's error classes, each before its subclasses."""
    for error_class in root.__subclasses__():
        if error_class.__module__ == errors.__name__:
            yield error_class
            yield from _all_subclasses(error_class)


ERROR_CLASSES = list(_all_subclasses(ImprintError))


def error_from_response(status: int, headers: Mapping[str, str], content: bytes, url: str) -> ImprintError:
    """Return the error of a response whose status is not 2xx.

    The body has OpenAI's error shape if it comes from the server, and any shape if it comes from a proxy in between.
    """
    try:
        error = error_from_body(json.loads(content), status)
    except (ValueError, KeyError, TypeError, AttributeError):
        error = _error_class(status, None)(f"{url} answered with status {status}")
    error.status = status
    error.retry_after = _parse_retry_after(headers.get("retry-after", ""))
    error.request_id = headers.get("x-request-id")
    return error


def error_from_body(body: Any, status: int | None = None) -> ImprintError:
    """Return the error of a body `{"error": {"message", "type", "param", "code"}}`.

    Args:
        body: the decoded JSON.
        status: the response's HTTP status; None for an error within a stream, which has none.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: the body has another shape.
    """
    detail = body["error"]
    error = _error_class(status, detail.get("code"))(
        str(detail["message"]), param=detail.get("param"), code=detail.get("code")
    )
    error.type = str(detail.get("type"))
    return error


def _error_class(status: int | None, code: str | None) -> type[ImprintError]:
    """Return the class with this status and code, else the most general class with this status, else the base class."""
    same_status = [error_class for error_class in ERROR_CLASSES if status is None or error_class.status == status]
    same_code = [error_class for error_class in same_status if code is not None and error_class.code == code]
    fallbacks = same_status if status is not None else []
    return next(iter(same_code + fallbacks), ImprintError)


def _parse_retry_after(retry_after: str) -> float | None:
    """Return the seconds in a `Retry-After` header (a number or an HTTP date), or None if it has neither form."""
    try:
        return max(float(retry_after), 0.0)
    except ValueError:
        pass
    try:
        return max((parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError):
        return None
