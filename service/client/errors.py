"""What can go wrong for the client: the server's own errors, and those of the way to it, in one tree."""

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from service import errors
from service.errors import ImprintError


class ClientError(ImprintError):
    """No server's answer stands behind it: `status` is 0."""

    status = 0
    type = "client_error"


class NoServer(ClientError):
    """Nobody answers at the address."""


class TimedOut(ClientError):
    """The answer took longer than the client's `timeout`."""


class ConnectionBroken(ClientError):
    """The connection broke before the answer was complete.

    Whether a learning request landed is unknown; sent again with the error's `idempotency_key`, it is learned once.
    """


class UnexpectedAnswer(ClientError):
    """Who answers there is no Imprint server, or one of another age."""


class FileError(ClientError):
    """A file cannot be read as UTF-8 text. The message names the file, and the byte."""


def _all_subclasses(root: type[ImprintError]) -> Iterator[type[ImprintError]]:
    """The server's errors, general ones before special ones."""
    for error_class in root.__subclasses__():
        if error_class.__module__ == errors.__name__:
            yield error_class
            yield from _all_subclasses(error_class)


ERROR_CLASSES = list(_all_subclasses(ImprintError))


def error_from_response(status: int, headers: Mapping[str, str], content: bytes, url: str) -> ImprintError:
    """What a refused request says, in OpenAI's error shape or, from a proxy in between, any other."""
    try:
        error = error_from_body(json.loads(content), status)
    except (ValueError, KeyError, TypeError, AttributeError):
        error = _error_class(status, None)(f"{url} answered with status {status}")
    error.status = status
    error.retry_after = _parse_retry_after(headers.get("retry-after", ""))
    error.request_id = headers.get("x-request-id")
    return error


def error_from_body(body: Any, status: int | None = None) -> ImprintError:
    """The error that `{"error": {"message", "type", "param", "code"}}` tells of.

    Raises ValueError, KeyError, TypeError or AttributeError if it is none.
    """
    detail = body["error"]
    error = _error_class(status, detail.get("code"))(
        str(detail["message"]), param=detail.get("param"), code=detail.get("code")
    )
    error.type = str(detail.get("type"))
    return error


def _error_class(status: int | None, code: str | None) -> type[ImprintError]:
    possible = [error_class for error_class in ERROR_CLASSES if status is None or error_class.status == status]
    exact = [error_class for error_class in possible if code is not None and error_class.code == code]
    general = possible if status is not None else []
    return next(iter(exact + general), ImprintError)


def _parse_retry_after(retry_after: str) -> float | None:
    """`Retry-After`: seconds, or a date; None if it is neither."""
    try:
        return max(float(retry_after), 0.0)
    except ValueError:
        pass
    try:
        return max((parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError):
        return None
