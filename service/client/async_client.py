"""The asynchronous client: the methods of `sync_client.Client`, awaited."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
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


def _request_method(operation: Callable[P, Operation[T]]) -> Callable[Concatenate["AsyncClient", P], Awaitable[T]]:
    """Return the method that sends the operation and returns its result."""

    async def call(self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._request(operation(*args, **kwargs))

    copy_signature(operation, call)
    return call


def _stream_method(
    operation: Callable[P, Operation[Chunk]],
) -> Callable[Concatenate["AsyncClient", P], "AsyncStream[Chunk]"]:
    """Return the method that sends the operation and returns its stream."""

    def call(self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> "AsyncStream[Chunk]":
        return AsyncStream(self, operation(*args, **kwargs))

    copy_signature(operation, call, "AsyncStream")
    return call


class AsyncClient(BaseClient):
    """An asynchronous client with the methods and arguments of `imprint.Client`.

    Methods are awaited; streams and lists are iterated with `async for`.
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
        self._http = httpx.AsyncClient(timeout=timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

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

    async def model(self) -> Model:
        """Return the served model; the server is asked only once."""
        if self._model is None:
            self._model = await self._request(operations.model())
        return self._model

    async def sessions(self, *, after: str | None = None, page_size: int = 100) -> AsyncIterator[Session]:
        """Yield the sessions after the id `after`, in the order of their ids; fetched page by page."""
        more = True
        while more:
            page = await self._request(operations.sessions_page(after, page_size))
            for session in page.data:
                yield session
            more, after = page.has_more, page.next

    async def log(
        self, session: str, *, before: int | None = None, page_size: int = 100, text: bool = True
    ) -> AsyncIterator[LogEntry]:
        """Yield what the session learned and when: versions before `before`, newest first; fetched page by page.

        text: whether the entries have the learned texts, as far as they are kept.
        """
        more = True
        while more:
            page = await self._request(operations.log_page(session, before, page_size, text))
            for entry in page.data:
                yield entry
            more, before = page.has_more, page.next

    async def observe_files(
        self,
        session: str,
        files: Iterable[File],
        *,
        progress: Callable[[ObserveProgress], None] = lambda _: None,
        piece_chars: int = PIECE_CHARS,
        idempotency_key: str | None = None,
    ) -> ObserveProgress:
        """Learn UTF-8 files as `Client.observe_files` does; a thread reads the files."""
        observe_progress = ObserveProgress(session, files, piece_chars, idempotency_key)
        pending = observe_progress.iter_operations()
        while (operation := await asyncio.to_thread(next, pending, None)) is not None:
            observe_progress.record_answer(await self._request(operation))
            progress(observe_progress)
        return observe_progress

    async def learn_table(
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
        """Learn a CSV or Parquet file as `Client.learn_table` does; a thread reads the file."""
        table = await asyncio.to_thread(read_table, file, target)
        done = TableProgress(session, table, target, task=task, ignore=ignore, batch=batch, key=idempotency_key)
        progress(done)
        pending = done.iter_operations()
        while (operation := await asyncio.to_thread(next, pending, None)) is not None:
            done.record_answer(await self._request(operation))
            progress(done)
        return done

    async def _request(self, operation: Operation[T]) -> T:
        operation = await self._with_model_id(operation)
        retry_state = RetryState(self._endpoint, operation, self._retries)
        return retry_state.parse_response(await self._send_with_retries(retry_state, httpx.Response.aread))

    async def _with_model_id(self, operation: Operation[T]) -> Operation[T]:
        return with_model(operation, (await self.model()).id) if needs_model(operation) else operation

    async def _send_with_retries(
        self, retry_state: RetryState[T], receive: Callable[[httpx.Response], Awaitable[R]]
    ) -> R:
        """Send the request until a response is accepted; return what `receive` makes of that response.

        A transport error within `receive` counts as a failed attempt.
        """
        while True:
            try:
                response = await self._http.send(retry_state.request, stream=True)
                if retry_state.is_accepted(response):
                    return await receive(response)
                await response.aread()
            except httpx.HTTPError as exc:
                error, wait = retry_state.on_transport_error(exc)
            else:
                error, wait = retry_state.on_error_response(response)
            self._on_wait(error, wait)
            await asyncio.sleep(wait)


class AsyncStream(BaseStream[Chunk], Generic[Chunk]):
    """An asynchronous iterator of the chunks of an answer; otherwise as `imprint.Stream`."""

    def __init__(self, client: AsyncClient, operation: Operation[Chunk]) -> None:
        super().__init__(operation)
        self._client = client
        self._byte_chunks: AsyncIterator[bytes]

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        try:
            while (chunk := self._next()) is None:
                if self._ended:
                    raise StopAsyncIteration
                await self._advance()
            return chunk
        except BaseException:
            await self.close()
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End the stream and close its connection."""
        self._ended = True
        if self._response is not None:
            await self._response.aclose()

    async def _advance(self) -> None:
        if self._retry_state is None:
            self._operation = await self._client._with_model_id(self._operation)
            self._retry_state = RetryState(self._client._endpoint, self._operation, self._client._retries)
            data = await self._client._send_with_retries(self._retry_state, self._read_first_bytes)
        else:
            try:
                data = await anext(self._byte_chunks, b"")
            except httpx.HTTPError:
                data = b""
        self._feed(data, self._retry_state)

    async def _read_first_bytes(self, response: httpx.Response) -> bytes:
        """Return the first bytes of the stream; a failure before them is retried."""
        self._response = response
        self._byte_chunks = response.aiter_bytes()
        return await anext(self._byte_chunks, b"")
