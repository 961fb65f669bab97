"""A blocking adapter of the asynchronous client, so that one test can check both clients."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from typing import Any

from imprint import AsyncClient


class BlockingAsyncClient:
    """An `AsyncClient` on an event loop of its own, whose methods block and whose streams are plain iterators."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = AsyncClient(*args, **options)

    def __enter__(self) -> BlockingAsyncClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self._loop.run_until_complete(self._client.close())
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = getattr(self._client, name)(*args, **kwargs)
            if inspect.isawaitable(result):
                return self._loop.run_until_complete(_result(result))
            return BlockingIterator(self._loop, result)

        return call


class BlockingIterator:
    """A plain iterator over an asynchronous iterator."""

    def __init__(self, loop: asyncio.AbstractEventLoop, stream: Any) -> None:
        self._loop = loop
        self._stream = stream

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            return self._loop.run_until_complete(_result(anext(self._stream)))
        except StopAsyncIteration:
            raise StopIteration from None

    def __enter__(self) -> BlockingIterator:
        return self

    def __exit__(self, *exception: object) -> None:
        self._loop.run_until_complete(self._stream.close())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


async def _result(awaitable: Any) -> Any:
    return await awaitable
