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
    from_body,
    refusal,
)
from service.client.operations import KEY, Ask
from service.errors import ImprintError
from service.http.replies import ChatChunk, CompletionChunk
from service.types import Adaptation

T = TypeVar("T")
Chunk = TypeVar("Chunk", bound=CompletionChunk | ChatChunk)

LOCAL = "http://127.0.0.1:8000"
# A long text may be learned for many minutes on a CPU before the answer comes.
TIMEOUT = httpx.Timeout(60, connect=5, read=3600)
RETRIES = 5
AGAIN = (429, 502, 503, 504)  # statuses that pass, unless the answer says otherwise
LONGEST_WAIT_S = 60.0  # who is told to wait longer is told so by the error
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.5, 8.0

log = logging.getLogger("imprint")


def log_wait(error: ImprintError, seconds: float) -> None:
    """Tells of a request that will be sent again."""
    log.info("%s; trying again in %.1f s", error, seconds)


class Place:
    """Where the server is, and how to send requests there."""

    def __init__(self, url: str | None, api_key: str | None) -> None:
        self.url = (url or os.environ.get("IMPRINT_URL") or LOCAL).rstrip("/")
        key = (os.environ.get("IMPRINT_API_KEY", "") if api_key is None else api_key).strip()
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.reached = False  # whether somebody has answered
        try:
            address = urlsplit(self.url)
            valid = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
        except ValueError:
            valid = False
        if not valid:
            raise ClientError(f"the server's address must be http://… or https://…, got {self.url!r}")
        if not key.isascii():
            raise ClientError("the API key holds characters that no key has")


class Attempts:
    """One request, however often it is sent: what to send, and whether and when to send it again."""

    def __init__(self, place: Place, ask: Ask[Any], retries: int) -> None:
        self._place = place
        self._ask = ask
        self._retries = retries
        self._count = 0
        self._may_have_landed = False
        try:
            self.request = httpx.Request(
                ask.method, place.url + ask.path, headers=self._headers(), content=self._body()
            )
        except UnicodeEncodeError as error:
            raise ClientError(f"the text is not valid Unicode: {error.reason}") from None

    def _headers(self) -> dict[str, str]:
        json_type = {"Content-Type": "application/json"} if isinstance(self._ask.body, dict) else {}
        return self._place.headers | json_type | dict(self._ask.headers)

    def _body(self) -> bytes | None:
        body = self._ask.body
        return json.dumps(body, ensure_ascii=False).encode() if isinstance(body, dict) else body

    def accepts(self, response: httpx.Response) -> bool:
        """Whether this is the answer. What an earlier attempt may have erased is erased."""
        self._place.reached = True
        erased = response.status_code == 404 and self._ask.method == "DELETE" and self._may_have_landed
        return response.is_success or erased

    def refused(self, response: httpx.Response) -> tuple[ImprintError, float]:
        """The error, and the seconds after which to try again. Raises the error if that is no use."""
        error = refusal(response.status_code, response.headers, response.content, self._place.url)
        told = response.headers.get("x-should-retry")
        again = told == "true" or (told != "false" and response.status_code in AGAIN)
        self._may_have_landed |= response.status_code != 429
        return self._again(error, again, error.retry_after)

    def failed(self, fault: httpx.HTTPError) -> tuple[ImprintError, float]:
        """The same for an exchange that broke. A server that has never answered is not waited for."""
        url = self._place.url
        match fault:
            case httpx.ConnectError() | httpx.ConnectTimeout():
                error: ClientError = NoServer(f"no Imprint server answers at {url}: start one with `imprint serve`")
                return self._again(error, self._place.reached, None)
            case httpx.TimeoutException():
                return self._again(TimedOut(f"{url} did not answer in time"), False, None)
            case httpx.TransportError():
                self._may_have_landed = True
                return self._again(ConnectionBroken(f"the connection to {url} broke: {fault}"), True, None)
            case _:
                return self._again(UnexpectedAnswer(f"{url} answered what cannot be read: {fault}"), False, None)

    def _again(self, error: ImprintError, again: bool, after_s: float | None) -> tuple[ImprintError, float]:
        if not again or self._count == self._retries or (after_s or 0) > LONGEST_WAIT_S:
            raise self.marked(error) from None
        backoff = min(FIRST_BACKOFF_S * 2**self._count, LONGEST_BACKOFF_S)
        self._count += 1
        # Never before the time that was told, and not all clients at the same one.
        wait = backoff * random.uniform(0.5, 1) if after_s is None else after_s * random.uniform(1, 1.25)
        return error, wait

    def marked(self, error: ImprintError) -> ImprintError:
        """The error with what it takes to send the request again."""
        error.idempotency_key = self._ask.headers.get(KEY)
        return error

    def result(self, ask: Ask[T], content: bytes) -> T:
        """What the answer's body, or a chunk of it, says."""
        try:
            return ask.read(content)
        except ValueError:
            fault = UnexpectedAnswer(f"{self._place.url} answered, but not as an Imprint server does")
            raise self.marked(fault) from None


def named(ask: Ask[T], model: str) -> Ask[T]:
    """The completion that is asked for, of that model."""
    assert isinstance(ask.body, dict)
    return replace(ask, body=ask.body | {"model": model})


def needs_model(ask: Ask[Any]) -> bool:
    return isinstance(ask.body, dict) and "model" in ask.body and ask.body["model"] is None


class Chunks(Generic[Chunk]):
    """The chunks of a stream, from its bytes. text: what the first choice has said so far; adaptation: what was
    learned, told with the end."""

    def __init__(self, ask: Ask[Chunk]) -> None:
        self.text = ""
        self.adaptation: Adaptation | None = None
        self.idempotency_key = ask.headers.get(KEY)
        self._ask = ask
        self._events = Events()
        self._ready: deque[Chunk] = deque()
        self._fault: ImprintError | None = None  # comes after what is ready
        self._ended = False

    def _next(self) -> Chunk | None:
        """The next chunk that has arrived."""
        if not self._ready:
            if self._fault is not None:
                raise self._fault
            return None
        chunk = self._ready.popleft()
        self.text += chunk.text
        self.adaptation = chunk.adaptation or self.adaptation
        return chunk

    def _take(self, data: bytes, attempts: Attempts) -> None:
        """Reads the next bytes; none are the end."""
        try:
            for event in self._events.feed(data):
                if event == "[DONE]":
                    self._ended = True
                    return
                if event.startswith('{"error"'):
                    raise attempts.marked(from_body(json.loads(event)))
                self._ready.append(attempts.result(self._ask, event.encode()))
            if not data:
                raise attempts.marked(ConnectionBroken("the stream was closed before the answer was complete"))
        except ImprintError as error:
            self._fault = error
        except (ValueError, KeyError, TypeError, AttributeError):
            self._fault = attempts.marked(UnexpectedAnswer("the stream holds what is neither a chunk nor an error"))


class Events:
    """The `data` fields of a server-sent event stream.

    Lines end at newlines only: httpx's own line iterator would cut at U+2028 inside the JSON, too.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[str]:
        """Those that end in `data`."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip().decode()


def documented_as(ask: Callable[..., Ask[Any]], call: Callable[..., Any], returns: str = "") -> None:
    """Gives a client's method the name, the text and the signature of the call that it sends."""
    functools.update_wrapper(call, ask)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    given = inspect.signature(ask)
    result = returns or get_args(get_type_hints(ask)["return"])[0]
    signature = given.replace(parameters=[itself, *given.parameters.values()], return_annotation=result)
    call.__signature__ = signature  # type: ignore[attr-defined]
