"""The same client for asyncio."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
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


def _answered(ask: Callable[P, Ask[T]]) -> Callable[Concatenate["AsyncClient", P], Awaitable[T]]:
    async def call(self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._answer(ask(*args, **kwargs))

    documented_as(ask, call)
    return call


def _streamed(ask: Callable[P, Ask[Chunk]]) -> Callable[Concatenate["AsyncClient", P], "AsyncStream[Chunk]"]:
    def call(self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> "AsyncStream[Chunk]":
        return AsyncStream(self, ask(*args, **kwargs))

    documented_as(ask, call, "AsyncStream")
    return call


class AsyncClient:
    """`imprint.Client` with the same calls, awaited; streams and lists are iterated with `async for`."""

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
        self._http = httpx.AsyncClient(timeout=timeout)
        self._model: Model | None = None

    @property
    def url(self) -> str:
        """Where the server is."""
        return self._place.url

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

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

    async def model(self) -> Model:
        """The served model; asked for once."""
        if self._model is None:
            self._model = await self._answer(operations.model())
        return self._model

    async def sessions(self, *, after: str | None = None, page_size: int = 100) -> AsyncIterator[Session]:
        """All sessions in the order of their ids, those after `after`; fetched page by page."""
        more = True
        while more:
            page = await self._answer(operations.page_of_sessions(after, page_size))
            for session in page.data:
                yield session
            more, after = page.has_more, page.next

    async def log(self, session: str, *, before: int | None = None, page_size: int = 100) -> AsyncIterator[LogEntry]:
        """What the session learned when, newest first, versions before `before`; fetched page by page."""
        more = True
        while more:
            page = await self._answer(operations.page_of_log(session, before, page_size))
            for entry in page.data:
                yield entry
            more, before = page.has_more, page.next

    async def observe_files(
        self,
        session: str,
        files: Iterable[File],
        *,
        progress: Callable[[Reading], None] = lambda reading: None,
        piece_chars: int = PIECE_CHARS,
        idempotency_key: str | None = None,
    ) -> Reading:
        """See `Client.observe_files`. Files are read on a thread."""
        reading = Reading(session, files, piece_chars, idempotency_key)
        pending = reading.asks()
        while (ask := await asyncio.to_thread(next, pending, None)) is not None:
            reading.learned(await self._answer(ask))
            progress(reading)
        return reading

    async def _answer(self, ask: Ask[T]) -> T:
        ask = await self._whole(ask)
        attempts = Attempts(self._place, ask, self._retries)
        return attempts.result(ask, await self._exchange(attempts, httpx.Response.aread))

    async def _whole(self, ask: Ask[T]) -> Ask[T]:
        return named(ask, (await self.model()).id) if needs_model(ask) else ask

    async def _exchange(self, attempts: Attempts, receive: Callable[[httpx.Response], Awaitable[R]]) -> R:
        """What `receive` makes of the answer, as soon as there is one."""
        while True:
            try:
                response = await self._http.send(attempts.request, stream=True)
                if attempts.accepts(response):
                    return await receive(response)
                await response.aread()
            except httpx.HTTPError as fault:
                error, wait = attempts.failed(fault)
            else:
                error, wait = attempts.refused(response)
            self._on_wait(error, wait)
            await asyncio.sleep(wait)


class AsyncStream(Chunks[Chunk], Generic[Chunk]):
    """`imprint.Stream` for `async for` and `async with`."""

    def __init__(self, client: AsyncClient, ask: Ask[Chunk]) -> None:
        super().__init__(ask)
        self._client = client
        self._attempts: Attempts | None = None
        self._response: httpx.Response | None = None
        self._parts: AsyncIterator[bytes]

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
        """Ends the stream."""
        self._ended = True
        if self._response is not None:
            await self._response.aclose()

    async def _advance(self) -> None:
        if self._attempts is None:
            self._ask = await self._client._whole(self._ask)
            self._attempts = Attempts(self._client._place, self._ask, self._client._retries)
            data = await self._client._exchange(self._attempts, self._begin)
        else:
            try:
                data = await anext(self._parts, b"")
            except httpx.HTTPError:
                data = b""
        self._take(data, self._attempts)

    async def _begin(self, response: httpx.Response) -> bytes:
        """The first bytes: until they are there the request can be sent again."""
        self._response = response
        self._parts = response.aiter_bytes()
        return await anext(self._parts, b"")
