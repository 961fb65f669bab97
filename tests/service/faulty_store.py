"""A proxy in front of the store that breaks the connection around a commit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal
from urllib.parse import unquote

from service.store.redis.store import RedisStore

Fault = Literal["request", "reply", "late"]


class FaultyStoreProxy:
    """A TCP proxy in front of the store that breaks the connection once, around the next commit.

    Attributes:
        fault: how the connection breaks: "request" loses the commit before the server sees the commit; "reply" loses
            the reply after the server has executed the commit; "late" breaks the connection at once, and delivers the
            commit when `deliver_delayed` is called.
        triggered: whether the fault has happened.
        down_after_fault: whether the proxy refuses to forward anything after the fault, until `repair`.
    """

    def __init__(self, upstream: str, commit_sha: str) -> None:
        self._upstream, self._commit_sha = upstream, commit_sha.encode()
        self.fault: Fault | None = None
        self.triggered = False
        self.down_after_fault = False
        self._down = False
        self._delayed: list[tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_unix_connection(self._upstream)
        fault: Fault | None = None

        async def forward_requests() -> None:
            nonlocal fault
            while data := await reader.read(1 << 16):
                if self._down:
                    return
                if self.fault and self._commit_sha in data:
                    fault, self.fault = self.fault, None
                    self.triggered, self._down = True, self.down_after_fault
                if fault == "late":
                    self._delayed.append((upstream_reader, upstream_writer, data))
                if fault in ("late", "request"):
                    return
                upstream_writer.write(data)

        async def forward_replies() -> None:
            while (data := await upstream_reader.read(1 << 16)) and fault != "reply":
                writer.write(data)

        tasks = [asyncio.create_task(forward_requests()), asyncio.create_task(forward_replies())]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        writer.close()
        if fault != "late":
            upstream_writer.close()

    def repair(self) -> None:
        """Forward again after a fault with `down_after_fault`."""
        self._down = False

    async def deliver_delayed(self) -> None:
        """Deliver the delayed commit to the server, and wait for the server's answer."""
        for upstream_reader, upstream_writer, data in self._delayed:
            upstream_writer.write(data)
            assert await upstream_reader.read(1 << 16)
            upstream_writer.close()


@asynccontextmanager
async def faulty_store_proxy(url: str) -> AsyncIterator[tuple[FaultyStoreProxy, RedisStore]]:
    """Yield a proxy in front of the server at `url`, and a store that reaches the server through the proxy."""
    direct = RedisStore.from_url(url)
    proxy = FaultyStoreProxy(unquote(url.removeprefix("unix://")), direct._scripts.commit.sha)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    store = RedisStore.from_url(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    yield proxy, store
    server.close()
    await store.close()
    await direct.close()
