"""A line to the store that breaks at the worst moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal
from urllib.parse import unquote

from service.store import RedisStore

Fault = Literal["request", "reply", "late"]


class FaultyStoreProxy:
    """A TCP proxy in front of the store that breaks the connection once, around the next commit.

    fault: "request" loses the commit before the server sees it, "reply" after the server has executed it;
    "late" breaks the connection at once, and the server sees the commit when `deliver_delayed` is called.
    """

    def __init__(self, upstream: str, commit_sha: str) -> None:
        self._upstream, self._commit_sha = upstream, commit_sha.encode()
        self.fault: Fault | None = None
        self.triggered = False
        self.down_after_fault = False
        self._down = False
        self._delayed: list[tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_unix_connection(self._upstream)
        fault: Fault | None = None

        async def requests() -> None:
            nonlocal fault
            while data := await reader.read(1 << 16):
                if self._down:
                    return
                if self.fault and self._commit_sha in data:
                    fault, self.fault = self.fault, None
                    self.triggered, self._down = True, self.down_after_fault
                if fault == "late":
                    self._delayed.append((far_reader, far_writer, data))
                if fault in ("late", "request"):
                    return
                far_writer.write(data)

        async def replies() -> None:
            while (data := await far_reader.read(1 << 16)) and fault != "reply":
                writer.write(data)

        tasks = [asyncio.create_task(requests()), asyncio.create_task(replies())]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        writer.close()
        if fault != "late":
            far_writer.close()

    def repair(self) -> None:
        self._down = False

    async def deliver_delayed(self) -> None:
        """Lets the server have the commit that was held back, and waits until it has answered it."""
        for far_reader, far_writer, data in self._delayed:
            far_writer.write(data)
            assert await far_reader.read(1 << 16)
            far_writer.close()


@asynccontextmanager
async def faulty_store_proxy(url: str) -> AsyncIterator[tuple[FaultyStoreProxy, RedisStore]]:
    direct = RedisStore.from_url(url)
    line = FaultyStoreProxy(unquote(url.removeprefix("unix://")), direct._commit.sha)
    server = await asyncio.start_server(line.serve, "127.0.0.1", 0)
    store = RedisStore.from_url(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    yield line, store
    server.close()
    await store.close()
    await direct.close()
