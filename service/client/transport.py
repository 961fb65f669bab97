"""What the two clients share: where the server is, when a request is sent again, how a stream is read. No input or
output happens here."""

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
from service.http.replies import ChatChunk, CompletionChunk
from service.types import Adaptation

T = TypeVar("T")
Chunk = TypeVar("Chunk", bound=CompletionChunk | ChatChunk)

DEFAULT_URL = "http://127.0.0.1:8000"
# A long text may be learned for many minutes on a CPU before the answer comes.
TIMEOUT = httpx.Timeout(60, connect=5, read=3600)
RETRIES = 5
RETRYABLE_STATUSES = (429, 502, 503, 504)  # statuses that pass, unless the answer says otherwise
MAX_WAIT_S = 60.0  # who is told to wait longer is told so by the error
INITIAL_BACKOFF_S, MAX_BACKOFF_S = 0.5, 8.0

log = logging.getLogger("imprint")


def log_wait(error: ImprintError, seconds: float) -> None:
    """Tells of a request that will be sent again."""
    log.info("%s; trying again in %.1f s", error, seconds)


class Endpoint:
    """Where the server is, and how to send requests there."""

    def __init__(self, url: str | None, api_key: str | None) -> None:
        self.url = (url or os.environ.get("IMPRINT_URL") or DEFAULT_URL).rstrip("/")
        key = (os.environ.get("IMPRINT_API_KEY", "") if api_key is None else api_key).strip()
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.has_answered = False  # whether somebody has answered
        try:
            address = urlsplit(self.url)
            valid = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
        except ValueError:
            valid = False
        if not valid:
            raise ClientError(f"the server's address must be http://… or https://…, got {self.url!r}")
        if not key.isascii():
            raise ClientError("the API key holds characters that no key has")


class RetryState:
    """One request, however often it is sent: what to send, and whether and when to send it again."""

    def __init__(self, endpoint: Endpoint, operation: Operation[Any], retries: int) -> None:
        self._endpoint = endpoint
        self._ask = operation
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
        json_type = {"Content-Type": "application/json"} if isinstance(self._ask.body, dict) else {}
        return self._endpoint.headers | json_type | dict(self._ask.headers)

    def _body(self) -> bytes | None:
        body = self._ask.body
        return json.dumps(body, ensure_ascii=False).encode() if isinstance(body, dict) else body

    def is_accepted(self, response: httpx.Response) -> bool:
        """Whether this is the answer. What an earlier attempt may have erased is erased."""
        self._endpoint.has_answered = True
        erased = response.status_code == 404 and self._ask.method == "DELETE" and self._may_have_been_applied
        return response.is_success or erased

    def on_error_response(self, response: httpx.Response) -> tuple[ImprintError, float]:
        """The error, and the seconds after which to try again. Raises the error if that is no use."""
        error = error_from_response(response.status_code, response.headers, response.content, self._endpoint.url)
        should_retry = response.headers.get("x-should-retry")
        retryable = should_retry == "true" or (should_retry != "false" and response.status_code in RETRYABLE_STATUSES)
        self._may_have_been_applied |= response.status_code != 429
        return self._backoff_or_raise(error, retryable, error.retry_after)

    def on_transport_error(self, exc: httpx.HTTPError) -> tuple[ImprintError, float]:
        """The same for an exchange that broke. A server that has never answered is not waited for."""
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
                return self._backoff_or_raise(
                    UnexpectedAnswer(f"{url} answered what cannot be read: {exc}"), False, None
                )

    def _backoff_or_raise(
        self, error: ImprintError, retryable: bool, after_s: float | None
    ) -> tuple[ImprintError, float]:
        if not retryable or self._num_retries == self._retries or (after_s or 0) > MAX_WAIT_S:
            raise self.with_idempotency_key(error) from None
        backoff = min(INITIAL_BACKOFF_S * 2**self._num_retries, MAX_BACKOFF_S)
        self._num_retries += 1
        # Never before the time that was told, and not all clients at the same one.
        wait = backoff * random.uniform(0.5, 1) if after_s is None else after_s * random.uniform(1, 1.25)
        return error, wait

    def with_idempotency_key(self, error: ImprintError) -> ImprintError:
        """The error with what it takes to send the request again."""
        error.idempotency_key = self._ask.headers.get(IDEMPOTENCY_HEADER)
        return error

    def result(self, operation: Operation[T], content: bytes) -> T:
        """What the answer's body, or a chunk of it, says."""
        try:
            return operation.read(content)
        except ValueError:
            exc = UnexpectedAnswer(f"{self._endpoint.url} answered, but not as an Imprint server does")
            raise self.with_idempotency_key(exc) from None


def with_model(operation: Operation[T], model: str) -> Operation[T]:
    """The completion that is asked for, of that model."""
    assert isinstance(operation.body, dict)
    return replace(operation, body=operation.body | {"model": model})


def needs_model(operation: Operation[Any]) -> bool:
    return isinstance(operation.body, dict) and "model" in operation.body and operation.body["model"] is None


class BaseStream(Generic[Chunk]):
    """The chunks of a stream, from its bytes. text: what the first choice has said so far; adaptation: what was
    learned, told with the end."""

    def __init__(self, operation: Operation[Chunk]) -> None:
        self.text = ""
        self.adaptation: Adaptation | None = None
        self.idempotency_key = operation.headers.get(IDEMPOTENCY_HEADER)
        self._ask = operation
        self._decoder = SSEDecoder()
        self._ready: deque[Chunk] = deque()
        self._pending_error: ImprintError | None = None  # comes after what is ready
        self._ended = False

    def _next(self) -> Chunk | None:
        """The next chunk that has arrived."""
        if not self._ready:
            if self._pending_error is not None:
                raise self._pending_error
            return None
        chunk = self._ready.popleft()
        self.text += chunk.text
        self.adaptation = chunk.adaptation or self.adaptation
        return chunk

    def _feed(self, data: bytes, retry_state: RetryState) -> None:
        """Reads the next bytes; none are the end."""
        try:
            for event in self._decoder.feed(data):
                if event == "[DONE]":
                    self._ended = True
                    return
                if event.startswith('{"error"'):
                    raise retry_state.with_idempotency_key(error_from_body(json.loads(event)))
                self._ready.append(retry_state.result(self._ask, event.encode()))
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
    """The `data` fields of a server-sent event stream.

    Lines end at newlines only: httpx's own line iterator would cut at U+2028 inside the JSON, too.
    """

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> Iterator[str]:
        """Those that end in `data`."""
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip().decode()


def copy_signature(operation: Callable[..., Operation[Any]], call: Callable[..., Any], returns: str = "") -> None:
    """Gives a client's method the name, the text and the signature of the call that it sends."""
    functools.update_wrapper(call, operation)
    self_parameter = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    original = inspect.signature(operation)
    result = returns or get_args(get_type_hints(operation)["return"])[0]
    signature = original.replace(parameters=[self_parameter, *original.parameters.values()], return_annotation=result)
    call.__signature__ = signature  # type: ignore[attr-defined]
