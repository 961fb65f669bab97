"""The client that waits for its answers."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Concatenate, Generic, ParamSpec, Self, TypeVar

import httpx

from service.client import operations
from service.client.operations import Operation
from service.client.text_files import PIECE_CHARS, File, ObserveProgress
from service.client.transport import (
    RETRIES,
    TIMEOUT,
    BaseStream,
    Chunk,
    Endpoint,
    RetryState,
    copy_signature,
    log_wait,
    needs_model,
    with_model,
)
from service.errors import ImprintError
from service.http.replies import LogEntry, Model, Session

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")


def _request_method(operation: Callable[P, Operation[T]]) -> Callable[Concatenate["Client", P], T]:
    def call(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._request(operation(*args, **kwargs))

    copy_signature(operation, call)
    return call


def _stream_method(operation: Callable[P, Operation[Chunk]]) -> Callable[Concatenate["Client", P], "Stream[Chunk]"]:
    def call(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> "Stream[Chunk]":
        return Stream(self, operation(*args, **kwargs))

    copy_signature(operation, call, "Stream")
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
        self._endpoint = Endpoint(url, api_key)
        self._retries = retries
        self._on_wait = on_wait
        self._http = httpx.Client(timeout=timeout)
        self._model: Model | None = None

    @property
    def url(self) -> str:
        """Where the server is."""
        return self._endpoint.url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    create = _request_method(operations.create)
    get = _request_method(operations.get)
    delete = _request_method(operations.delete)
    observe = _request_method(operations.observe)
    score = _request_method(operations.score)
    complete = _request_method(operations.complete)
    chat = _request_method(operations.chat)
    stream = _stream_method(operations.stream)
    stream_chat = _stream_method(operations.stream_chat)
    act = _request_method(operations.act)
    feedback = _request_method(operations.feedback)
    keep = _request_method(operations.keep)
    predict = _request_method(operations.predict)
    diff = _request_method(operations.diff)
    rollback = _request_method(operations.rollback)
    unlearn = _request_method(operations.unlearn)
    fork = _request_method(operations.fork)
    export = _request_method(operations.export)
    import_ = _request_method(operations.import_)

    def model(self) -> Model:
        """The served model; asked for once."""
        if self._model is None:
            self._model = self._request(operations.model())
        return self._model

    def sessions(self, *, after: str | None = None, page_size: int = 100) -> Iterator[Session]:
        """All sessions in the order of their ids, those after `after`; fetched page by page."""
        more = True
        while more:
            page = self._request(operations.sessions_page(after, page_size))
            yield from page.data
            more, after = page.has_more, page.next

    def log(self, session: str, *, before: int | None = None, page_size: int = 100) -> Iterator[LogEntry]:
        """What the session learned when, newest first, versions before `before`; fetched page by page."""
        more = True
        while more:
            page = self._request(operations.log_page(session, before, page_size))
            yield from page.data
            more, before = page.has_more, page.next

    def observe_files(
        self,
        session: str,
        files: Iterable[File],
        *,
        progress: Callable[[ObserveProgress], None] = lambda observe_progress: None,
        piece_chars: int = PIECE_CHARS,
        idempotency_key: str | None = None,
    ) -> ObserveProgress:
        """Learns UTF-8 files (paths, or open binary files) in order, in pieces of at most `piece_chars` characters.

        Each piece is one version; `progress` is told after each. What was learned stays if a later piece fails, or if
        `progress` raises. Called again with the same files and `idempotency_key`, it learns only the rest.

        Raises:
            FileError: one cannot be read; nothing was learned.
        """
        observe_progress = ObserveProgress(session, files, piece_chars, idempotency_key)
        for operation in observe_progress.iter_operations():
            observe_progress.record_answer(self._request(operation))
            progress(observe_progress)
        return observe_progress

    def _request(self, operation: Operation[T]) -> T:
        operation = self._with_model_id(operation)
        retry_state = RetryState(self._endpoint, operation, self._retries)
        return retry_state.result(operation, self._send_with_retries(retry_state, httpx.Response.read))

    def _with_model_id(self, operation: Operation[T]) -> Operation[T]:
        return with_model(operation, self.model().id) if needs_model(operation) else operation

    def _send_with_retries(self, retry_state: RetryState, receive: Callable[[httpx.Response], R]) -> R:
        """What `receive` makes of the answer, as soon as there is one."""
        while True:
            try:
                response = self._http.send(retry_state.request, stream=True)
                if retry_state.is_accepted(response):
                    return receive(response)
                response.read()
            except httpx.HTTPError as exc:
                error, wait = retry_state.on_transport_error(exc)
            else:
                error, wait = retry_state.on_error_response(response)
            self._on_wait(error, wait)
            time.sleep(wait)


class Stream(BaseStream[Chunk], Generic[Chunk]):
    """An answer as it comes: an iterator of chunks, each with its `text`.

    The request is sent when the first chunk is asked for. Leaving early (`close`, or the end of a `with`) ends the
    turn: it has never been, unless `on_disconnect` is "commit". A connection that breaks in the midst raises
    ConnectionBroken; the same call with its `idempotency_key` is answered again, and learned once.
    """

    def __init__(self, client: Client, operation: Operation[Chunk]) -> None:
        super().__init__(operation)
        self._client = client
        self._retry_state: RetryState | None = None
        self._response: httpx.Response | None = None
        self._byte_chunks: Iterator[bytes] = iter(())

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
        if self._retry_state is None:
            self._ask = self._client._with_model_id(self._ask)
            self._retry_state = RetryState(self._client._endpoint, self._ask, self._client._retries)
            data = self._client._send_with_retries(self._retry_state, self._read_first_bytes)
        else:
            try:
                data = next(self._byte_chunks, b"")
            except httpx.HTTPError:
                data = b""
        self._feed(data, self._retry_state)

    def _read_first_bytes(self, response: httpx.Response) -> bytes:
        """The first bytes: until they are there the request can be sent again."""
        self._response = response
        self._byte_chunks = response.iter_bytes()
        return next(self._byte_chunks, b"")
