"""The synchronous client."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from typing import Concatenate, Generic, ParamSpec, Self, TypeVar

import httpx

from service.client import operations
from service.client.operations import Operation
from service.client.tables import BATCH, TableProgress, Task, read_table
from service.client.text_files import PIECE_CHARS, File, ObserveProgress
from service.client.transport import (
    RETRIES,
    TIMEOUT,
    BaseClient,
    BaseStream,
    Chunk,
    OnWait,
    RetryState,
    copy_signature,
    log_wait,
    needs_model,
    with_model,
)
from service.http.replies import LogEntry, Model, Session

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")


def _request_method(operation: Callable[P, Operation[T]]) -> Callable[Concatenate["Client", P], T]:
    """Return the method that sends the operation and returns its result."""

    def call(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._request(operation(*args, **kwargs))

    copy_signature(operation, call)
    return call


def _stream_method(operation: Callable[P, Operation[Chunk]]) -> Callable[Concatenate["Client", P], "Stream[Chunk]"]:
    """Return the method that sends the operation and returns its stream."""

    def call(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> "Stream[Chunk]":
        return Stream(self, operation(*args, **kwargs))

    copy_signature(operation, call, "Stream")
    return call


class Client(BaseClient):
    """A client of one server. Close the client, or use it as a context manager; threads may share it.

    A request is sent again after a broken connection, and after a temporary refusal (429, 502, 503, 504): then after
    the answer's `Retry-After`, unless its `x-should-retry` says that a retry would not help. Every call that learns has
    an `Idempotency-Key`, so a request that is sent again is learned once. All errors are `imprint.ImprintError`s.

    Args:
        url: the server's address; default: IMPRINT_URL, else http://127.0.0.1:8000.
        api_key: the API key; default: IMPRINT_API_KEY, else no key.
        retries: number of times that a request is sent again, at most.
        timeout: seconds to wait, or an httpx.Timeout with a limit for each phase.
        on_wait: called with the error and the seconds to wait before a request is sent again; the default logs both.

    Raises:
        ClientError: the address or the key is not valid.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        retries: int = RETRIES,
        timeout: float | httpx.Timeout = TIMEOUT,
        on_wait: OnWait = log_wait,
    ) -> None:
        super().__init__(url, api_key, retries, on_wait)
        self._http = httpx.Client(timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
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
    act_batch = _request_method(operations.act_batch)
    feedback = _request_method(operations.feedback)
    feedback_batch = _request_method(operations.feedback_batch)
    keep = _request_method(operations.keep)
    predict = _request_method(operations.predict)
    estimate = _request_method(operations.estimate)
    predict_batch = _request_method(operations.predict_batch)
    diff = _request_method(operations.diff)
    rollback = _request_method(operations.rollback)
    unlearn = _request_method(operations.unlearn)
    fork = _request_method(operations.fork)
    export = _request_method(operations.export)
    import_ = _request_method(operations.import_)

    def model(self) -> Model:
        """Return the served model; the server is asked only once."""
        if self._model is None:
            self._model = self._request(operations.model())
        return self._model

    def sessions(self, *, after: str | None = None, page_size: int = 100) -> Iterator[Session]:
        """Yield the sessions after the id `after`, in the order of their ids; fetched page by page."""
        more = True
        while more:
            page = self._request(operations.sessions_page(after, page_size))
            yield from page.data
            more, after = page.has_more, page.next

    def log(
        self, session: str, *, before: int | None = None, page_size: int = 100, text: bool = True
    ) -> Iterator[LogEntry]:
        """Yield what the session learned and when: versions before `before`, newest first; fetched page by page.

        text: whether the entries have the learned texts, as far as they are kept.
        """
        more = True
        while more:
            page = self._request(operations.log_page(session, before, page_size, text))
            yield from page.data
            more, before = page.has_more, page.next

    def observe_files(
        self,
        session: str,
        files: Iterable[File],
        *,
        progress: Callable[[ObserveProgress], None] = lambda _: None,
        piece_chars: int = PIECE_CHARS,
        idempotency_key: str | None = None,
    ) -> ObserveProgress:
        """Learn UTF-8 files in order, in pieces that become one version each.

        If a piece fails or `progress` raises, the session keeps the pieces before it. A second call with the same files
        and `idempotency_key` then learns only the rest.

        Args:
            session: id of the session.
            files: paths, or open binary files.
            progress: called after each piece.
            piece_chars: characters of a piece, at most.
            idempotency_key: the key from which each piece's key is made; by default a new one.

        Raises:
            FileError: a file given by its path cannot be read as UTF-8 text. Nothing was learned.
        """
        observe_progress = ObserveProgress(session, files, piece_chars, idempotency_key)
        for operation in observe_progress.iter_operations():
            observe_progress.record_answer(self._request(operation))
            progress(observe_progress)
        return observe_progress

    def learn_table(
        self,
        session: str,
        file: str | PathLike[str],
        target: str,
        *,
        task: Task | None = None,
        ignore: Sequence[str] = (),
        batch: int = BATCH,
        progress: Callable[[TableProgress], None] = lambda _: None,
        idempotency_key: str | None = None,
    ) -> TableProgress:
        """Learn a CSV or Parquet file row by row; each row is predicted before it is learned.

        A call that ended early learns only the rest when it is made again.

        Args:
            session: id of the session.
            file: the path of the file.
            target: the column to learn.
            task: "labels" or "regression"; by default what the target's values look like.
            ignore: columns to leave out.
            batch: rows of a version, at most 128.
            progress: called before the first batch and after each one.
            idempotency_key: the key from which each batch's key is made; by default a hash of the file and the
                arguments.

        Raises:
            FileError: the file cannot be read, has no such column, or has a target of which only some values are
                numbers, without a `task`.
        """
        table = read_table(file, target)
        done = TableProgress(session, table, target, task=task, ignore=ignore, batch=batch, key=idempotency_key)
        progress(done)
        for operation in done.iter_operations():
            done.record_answer(self._request(operation))
            progress(done)
        return done

    def _request(self, operation: Operation[T]) -> T:
        operation = self._with_model_id(operation)
        retry_state = RetryState(self._endpoint, operation, self._retries)
        return retry_state.parse_response(self._send_with_retries(retry_state, httpx.Response.read))

    def _with_model_id(self, operation: Operation[T]) -> Operation[T]:
        return with_model(operation, self.model().id) if needs_model(operation) else operation

    def _send_with_retries(self, retry_state: RetryState[T], receive: Callable[[httpx.Response], R]) -> R:
        """Send the request until a response is accepted; return what `receive` makes of that response.

        A transport error within `receive` counts as a failed attempt.
        """
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
    """An iterator of the chunks of an answer, each with its `text`.

    The request is sent when the first chunk is taken. A stream that is closed before its end (by `close`, or by leaving
    a `with`) rolls the turn back, unless `on_disconnect` is "commit". A connection that breaks after the first bytes
    raises ConnectionBroken; the same call with the error's `idempotency_key` is answered again, and learned once.
    """

    def __init__(self, client: Client, operation: Operation[Chunk]) -> None:
        super().__init__(operation)
        self._client = client
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
        """End the stream and close its connection."""
        self._ended = True
        if self._response is not None:
            self._response.close()

    def _advance(self) -> None:
        if self._retry_state is None:
            self._operation = self._client._with_model_id(self._operation)
            self._retry_state = RetryState(self._client._endpoint, self._operation, self._client._retries)
            data = self._client._send_with_retries(self._retry_state, self._read_first_bytes)
        else:
            try:
                data = next(self._byte_chunks, b"")
            except httpx.HTTPError:
                data = b""
        self._feed(data, self._retry_state)

    def _read_first_bytes(self, response: httpx.Response) -> bytes:
        """Return the first bytes of the stream; a failure before them is retried."""
        self._response = response
        self._byte_chunks = response.iter_bytes()
        return next(self._byte_chunks, b"")
