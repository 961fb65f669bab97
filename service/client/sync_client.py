"""The client that waits for its answers."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Concatenate, Generic, ParamSpec, Self, TypeVar

import httpx

from service.client import operations
from service.client.operations import Ask
from service.client.text_files import PIECE_CHARS, File, Reading
from service.client.transport import (
    RETRIES,
    TIMEOUT,
    Attempts,
    Chunk,
    Chunks,
    Place,
    documented_as,
    log_wait,
    named,
    needs_model,
)
from service.errors import ImprintError
from service.http.replies import LogEntry, Model, Session

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")


def _answered(ask: Callable[P, Ask[T]]) -> Callable[Concatenate["Client", P], T]:
    def call(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._answer(ask(*args, **kwargs))

    documented_as(ask, call)
    return call


def _streamed(ask: Callable[P, Ask[Chunk]]) -> Callable[Concatenate["Client", P], "Stream[Chunk]"]:
    def call(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> "Stream[Chunk]":
        return Stream(self, ask(*args, **kwargs))

    documented_as(ask, call, "Stream")
    return call


class Client:
    """Talks to one server. Close it, or use it as a context manager; threads may share it.

    Every call that learns has an `Idempotency-Key`, so what is sent again is learned once. Sent again, up to `retries`
    times, is what the server refused for now (429, 502, 503, 504; after its `Retry-After`, unless `x-should-retry` says
    that it would not help) and what a broken connection left open. All errors are `imprint.ImprintError`s.

    url: default `IMPRINT_URL`, else http://127.0.0.1:8000. api_key: default `IMPRINT_API_KEY`, else none. on_wait is
    told of each request that will be sent again, and of the seconds until then; the default logs it.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        retries: int = RETRIES,
        timeout: float | httpx.Timeout = TIMEOUT,
        on_wait: Callable[[ImprintError, float], None] = log_wait,
    ) -> None:
        self._place = Place(url, api_key)
        self._retries = retries
        self._on_wait = on_wait
        self._http = httpx.Client(timeout=timeout)
        self._model: Model | None = None

    @property
    def url(self) -> str:
        """Where the server is."""
        return self._place.url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    create = _answered(operations.create)
    get = _answered(operations.get)
    delete = _answered(operations.delete)
    observe = _answered(operations.observe)
    score = _answered(operations.score)
    complete = _answered(operations.complete)
    chat = _answered(operations.chat)
    stream = _streamed(operations.stream)
    stream_chat = _streamed(operations.stream_chat)
    act = _answered(operations.act)
    feedback = _answered(operations.feedback)
    keep = _answered(operations.keep)
    predict = _answered(operations.predict)
    diff = _answered(operations.diff)
    rollback = _answered(operations.rollback)
    unlearn = _answered(operations.unlearn)
    fork = _answered(operations.fork)
    export = _answered(operations.export)
    import_ = _answered(operations.import_)

    def model(self) -> Model:
        """The served model; asked for once."""
        if self._model is None:
            self._model = self._answer(operations.model())
        return self._model

    def sessions(self, *, after: str | None = None, page_size: int = 100) -> Iterator[Session]:
        """All sessions in the order of their ids, those after `after`; fetched page by page."""
        more = True
        while more:
            page = self._answer(operations.page_of_sessions(after, page_size))
            yield from page.data
            more, after = page.has_more, page.next

    def log(self, session: str, *, before: int | None = None, page_size: int = 100) -> Iterator[LogEntry]:
        """What the session learned when, newest first, versions before `before`; fetched page by page."""
        more = True
        while more:
            page = self._answer(operations.page_of_log(session, before, page_size))
            yield from page.data
            more, before = page.has_more, page.next

    def observe_files(
        self,
        session: str,
        files: Iterable[File],
        *,
        progress: Callable[[Reading], None] = lambda reading: None,
        piece_chars: int = PIECE_CHARS,
        idempotency_key: str | None = None,
    ) -> Reading:
        """Learns UTF-8 files (paths, or open binary files) in order, in pieces of at most `piece_chars` characters.

        Each piece is one version; `progress` is told after each. What was learned stays if a later piece fails, or if
        `progress` raises. Called again with the same files and `idempotency_key`, it learns only the rest.

        Raises:
            FileError: one cannot be read; nothing was learned.
        """
        reading = Reading(session, files, piece_chars, idempotency_key)
        for ask in reading.asks():
            reading.learned(self._answer(ask))
            progress(reading)
        return reading

    def _answer(self, ask: Ask[T]) -> T:
        ask = self._whole(ask)
        attempts = Attempts(self._place, ask, self._retries)
        return attempts.result(ask, self._exchange(attempts, httpx.Response.read))

    def _whole(self, ask: Ask[T]) -> Ask[T]:
        return named(ask, self.model().id) if needs_model(ask) else ask

    def _exchange(self, attempts: Attempts, receive: Callable[[httpx.Response], R]) -> R:
        """What `receive` makes of the answer, as soon as there is one."""
        while True:
            try:
                response = self._http.send(attempts.request, stream=True)
                if attempts.accepts(response):
                    return receive(response)
                response.read()
            except httpx.HTTPError as fault:
                error, wait = attempts.failed(fault)
            else:
                error, wait = attempts.refused(response)
            self._on_wait(error, wait)
            time.sleep(wait)


class Stream(Chunks[Chunk], Generic[Chunk]):
    """An answer as it comes: an iterator of chunks, each with its `text`.

    The request is sent when the first chunk is asked for. Leaving early (`close`, or the end of a `with`) ends the
    turn: it has never been, unless `on_disconnect` is "commit". A connection that breaks in the midst raises
    ConnectionBroken; the same call with its `idempotency_key` is answered again, and learned once.
    """

    def __init__(self, client: Client, ask: Ask[Chunk]) -> None:
        super().__init__(ask)
        self._client = client
        self._attempts: Attempts | None = None
        self._response: httpx.Response | None = None
        self._parts: Iterator[bytes] = iter(())

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        try:
            while (chunk := self._next()) is None:
                if self._ended:
                    raise StopIteration
                self._advance()
            return chunk
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the stream."""
        self._ended = True
        if self._response is not None:
            self._response.close()

    def _advance(self) -> None:
        if self._attempts is None:
            self._ask = self._client._whole(self._ask)
            self._attempts = Attempts(self._client._place, self._ask, self._client._retries)
            data = self._client._exchange(self._attempts, self._begin)
        else:
            try:
                data = next(self._parts, b"")
            except httpx.HTTPError:
                data = b""
        self._take(data, self._attempts)

    def _begin(self, response: httpx.Response) -> bytes:
        """The first bytes: until they are there the request can be sent again."""
        self._response = response
        self._parts = response.iter_bytes()
        return next(self._parts, b"")
