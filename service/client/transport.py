"""The part of both clients that does no input or output: the server's address, retries, and the parsing of streams."""

import functools
import inspect
import json
import logging
import os
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Generic, TypeVar, get_args, get_type_hints
from urllib.parse import urlsplit

import httpx

from service.client.errors import (
    ClientError,
    ConnectionBroken,
    NoServer,
    TimedOut,
    UnexpectedAnswer,
    error_from_body,
    error_from_response,
)
from service.client.operations import IDEMPOTENCY_HEADER, Operation
from service.errors import ImprintError
from service.http.replies import ChatChunk, CompletionChunk, Model
from service.types import Adaptation

T = TypeVar("T")
Chunk = TypeVar("Chunk", bound=CompletionChunk | ChatChunk)
OnWait = Callable[[ImprintError, float], None]

DEFAULT_URL = "http://127.0.0.1:8000"
# On a CPU, the server may learn from a long text for many minutes before it answers.
TIMEOUT = httpx.Timeout(60, connect=5, read=3600)
RETRIES = 5
RETRYABLE_STATUSES = (429, 502, 503, 504)  # temporary failures, unless the answer says otherwise
MAX_WAIT_S = 60.0  # an answer with a longer `Retry-After` raises its error at once
INITIAL_BACKOFF_S, MAX_BACKOFF_S = 0.5, 8.0

log = logging.getLogger("imprint")


def log_wait(error: ImprintError, seconds: float) -> None:
    """Log that a request will be sent again after `seconds`."""
    log.info("%s; trying again in %.1f s", error, seconds)


class Endpoint:
    """The server's address, and the headers of every request.

    Args:
        url: the address; None = IMPRINT_URL, else DEFAULT_URL.
        api_key: the API key; None = IMPRINT_API_KEY, else no key.

    Raises:
        ClientError: the address is no http:// or https:// URL, or the key is not ASCII.
    """

    def __init__(self, url: str | None, api_key: str | None) -> None:
        self.url = (url or os.environ.get("IMPRINT_URL") or DEFAULT_URL).rstrip("/")
        key = (os.environ.get("IMPRINT_API_KEY", "") if api_key is None else api_key).strip()
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.has_answered = False
        try:
            address = urlsplit(self.url)
            valid = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
        except ValueError:
            valid = False
        if not valid:
            raise ClientError(f"the server's address must be http://… or https://…, got {self.url!r}")
        if not key.isascii():
            raise ClientError("the API key holds characters that no key has")


class RetryState(Generic[T]):
    """One operation through all its attempts: the request, and the decision whether and when to send it again."""

    def __init__(self, endpoint: Endpoint, operation: Operation[T], retries: int) -> None:
        self._endpoint = endpoint
        self._operation = operation
        self._retries = retries
        self._num_retries = 0
        self._may_have_been_applied = False
        try:
            self.request = httpx.Request(
                operation.method, endpoint.url + operation.path, headers=self._headers(), content=self._body()
            )
        except UnicodeEncodeError as error:
            raise ClientError(f"the text is not valid Unicode: {error.reason}") from None

    def _headers(self) -> dict[str, str]:
        json_type = {"Content-Type": "application/json"} if isinstance(self._operation.body, dict) else {}
        return self._endpoint.headers | self._operation.session_header | json_type | dict(self._operation.headers)

    def _body(self) -> bytes | None:
        body = self._operation.body
        return json.dumps(body, ensure_ascii=False).encode() if isinstance(body, dict) else body

    def is_accepted(self, response: httpx.Response) -> bool:
        """Return whether the response ends the operation with success.

        A 404 to a repeated DELETE is a success: an earlier attempt may have erased the session.
        """
        self._endpoint.has_answered = True
        erased = response.status_code == 404 and self._operation.method == "DELETE" and self._may_have_been_applied
        return response.is_success or erased

    def on_error_response(self, response: httpx.Response) -> tuple[ImprintError, float]:
        """Return the response's error and the seconds to wait before the next attempt.

        Raises:
            ImprintError: the error itself, if another attempt would not help or all attempts are used up.
        """
        error = error_from_response(response.status_code, response.headers, response.content, self._endpoint.url)
        should_retry = response.headers.get("x-should-retry")
        retryable = should_retry == "true" or (should_retry != "false" and response.status_code in RETRYABLE_STATUSES)
        self._may_have_been_applied |= response.status_code != 429
        return self._backoff_or_raise(error, retryable, error.retry_after)

    def on_transport_error(self, exc: httpx.HTTPError) -> tuple[ImprintError, float]:
        """Return the client's error for a failed exchange and the seconds to wait before the next attempt.

        Raises:
            ClientError: the error itself, if another attempt would not help or all attempts are used up. A refused
                connection is retried only if the server has answered before.
        """
        url = self._endpoint.url
        match exc:
            case httpx.ConnectError() | httpx.ConnectTimeout():
                error: ClientError = NoServer(f"no Imprint server answers at {url}: start one with `imprint serve`")
                return self._backoff_or_raise(error, self._endpoint.has_answered, None)
            case httpx.TimeoutException():
                return self._backoff_or_raise(TimedOut(f"{url} did not answer in time"), False, None)
            case httpx.TransportError():
                self._may_have_been_applied = True
                return self._backoff_or_raise(ConnectionBroken(f"the connection to {url} broke: {exc}"), True, None)
            case _:
                error = UnexpectedAnswer(f"{url} answered what cannot be read: {exc}")
                return self._backoff_or_raise(error, False, None)

    def _backoff_or_raise(
        self, error: ImprintError, retryable: bool, retry_after_s: float | None
    ) -> tuple[ImprintError, float]:
        if not retryable or self._num_retries == self._retries or (retry_after_s or 0) > MAX_WAIT_S:
            raise self.with_idempotency_key(error) from None
        backoff = min(INITIAL_BACKOFF_S * 2**self._num_retries, MAX_BACKOFF_S)
        self._num_retries += 1
        # Random, so that clients that failed together do not return together; never before `Retry-After`.
        wait = backoff * random.uniform(0.5, 1) if retry_after_s is None else retry_after_s * random.uniform(1, 1.25)
        return error, wait

    def with_idempotency_key(self, error: ImprintError) -> ImprintError:
        """Set the operation's key on the error, so that the caller can repeat the call, and return the error."""
        error.idempotency_key = self._operation.headers.get(IDEMPOTENCY_HEADER)
        return error

    def parse_response(self, content: bytes) -> T:
        """Return the result in the answer's body or in one chunk of it. Raises UnexpectedAnswer."""
        try:
            return self._operation.parse(content)
        except ValueError:
            error = UnexpectedAnswer(f"{self._endpoint.url} answered, but not as an Imprint server does")
            raise self.with_idempotency_key(error) from None


def needs_model(operation: Operation[Any]) -> bool:
    """Return whether the operation is a completion that names no model."""
    return isinstance(operation.body, dict) and "model" in operation.body and operation.body["model"] is None


def with_model(operation: Operation[T], model: str) -> Operation[T]:
    """Return a copy of the completion that names the model."""
    assert isinstance(operation.body, dict)
    return replace(operation, body=operation.body | {"model": model})


class BaseClient:
    """The state of a client, without its connections."""

    def __init__(self, url: str | None, api_key: str | None, retries: int, on_wait: OnWait) -> None:
        self._endpoint = Endpoint(url, api_key)
        self._retries = retries
        self._on_wait = on_wait
        self._model: Model | None = None

    @property
    def url(self) -> str:
        """The server's address."""
        return self._endpoint.url


class BaseStream(Generic[Chunk]):
    """The state of a stream, without its connection: turns bytes into chunks.

    Attributes:
        text: the text of the first choice so far.
        adaptation: what the session learned; None until the last chunk, and without a session.
        idempotency_key: the key under which the same call can be repeated.
    """

    def __init__(self, operation: Operation[Chunk]) -> None:
        self.text = ""
        self.adaptation: Adaptation | None = None
        self.idempotency_key = operation.headers.get(IDEMPOTENCY_HEADER)
        self._operation = operation
        self._retry_state: RetryState[Chunk] | None = None
        self._response: httpx.Response | None = None
        self._decoder = SSEDecoder()
        self._ready: deque[Chunk] = deque()
        self._pending_error: ImprintError | None = None  # raised after the chunks that are ready
        self._ended = False

    def _next(self) -> Chunk | None:
        """Return the next chunk that has arrived, or None. Raises the stream's error after the last chunk."""
        if not self._ready:
            if self._pending_error is not None:
                raise self._pending_error
            return None
        chunk = self._ready.popleft()
        self.text += chunk.text
        self.adaptation = chunk.adaptation or self.adaptation
        return chunk

    def _feed(self, data: bytes, retry_state: RetryState[Chunk]) -> None:
        """Parse the next bytes of the stream. Empty bytes mean that the connection was closed."""
        try:
            for event in self._decoder.feed(data):
                if event == "[DONE]":
                    self._ended = True
                    return
                if event.startswith('{"error"'):
                    raise retry_state.with_idempotency_key(error_from_body(json.loads(event)))
                self._ready.append(retry_state.parse_response(event.encode()))
            if not data:
                raise retry_state.with_idempotency_key(
                    ConnectionBroken("the stream was closed before the answer was complete")
                )
        except ImprintError as error:
            self._pending_error = error
        except (ValueError, KeyError, TypeError, AttributeError):
            self._pending_error = retry_state.with_idempotency_key(
                UnexpectedAnswer("the stream holds what is neither a chunk nor an error")
            )


class SSEDecoder:
    """An incremental parser of server-sent events that yields their `data` fields.

    Lines end at newlines only: httpx's own line iterator would also cut at U+2028, which may stand inside the JSON.
    """

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> Iterator[str]:
        """Yield the `data` fields that are complete with these bytes."""
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip().decode()


def copy_signature(operation: Callable[..., Operation[Any]], method: Callable[..., Any], returns: str = "") -> None:
    """Give a client's method the name, docstring and signature of the operation that it sends.

    Args:
        operation: function of `service.client.operations`.
        method: the client's method, changed in place.
        returns: the method's return type; default: the result type of the operation.
    """
    functools.update_wrapper(method, operation)
    self_parameter = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    original = inspect.signature(operation)
    result = returns or get_args(get_type_hints(operation)["return"])[0]
    signature = original.replace(parameters=[self_parameter, *original.parameters.values()], return_annotation=result)
    method.__signature__ = signature  # type: ignore[attr-defined]
