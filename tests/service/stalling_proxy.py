"""A proxy between a server and its store that a test can stall, cut, half-close or make lose bytes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

ProxyState = Literal["whole", "stalled", "cut", "losing all", "losing replies"]
LOSING: tuple[ProxyState, ...] = ("losing all", "losing replies")


class StallingProxy:
    """A TCP proxy on a thread of its own.

    A whole proxy forwards. A stalled proxy buffers what arrives, and forwards the buffer when it is whole again. A cut
    proxy closes every connection. A losing proxy drops what arrives, or only the store's replies; when it is whole
    again, it closes every connection, because bytes of these are missing.

    Attributes:
        port: where the proxy listens; 0 until it is open.
        state: the present state.
        buffered: the bytes that the server has sent to the store since the proxy was stalled.
    """

    def __init__(self, port: int) -> None:
        self.port = 0
        self.state: ProxyState = "whole"
        self.buffered = b""
        self._upstream = port
        self._loop = asyncio.new_event_loop()
        self._state_changed = asyncio.Event()
        self._connections: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()  # to the server, the store

    def stall(self) -> None:
        self._set_state("stalled")

    def cut(self) -> None:
        self._set_state("cut")

    def lose(self, *, replies_only: bool) -> None:
        self._set_state("losing replies" if replies_only else "losing all")

    def restore(self) -> None:
        self._set_state("whole")

    def half_close(self, end: Literal["server", "store"]) -> None:
        """Tell the server, or the store, that the other one sends nothing more on any open connection."""

        async def shut() -> None:
            for to_server, to_store in self._connections:
                with suppress(OSError, RuntimeError):
                    (to_server if end == "server" else to_store).write_eof()

        asyncio.run_coroutine_threadsafe(shut(), self._loop).result()

    def _set_state(self, state: ProxyState) -> None:
        async def change() -> None:
            was_losing = self.state in LOSING
            self.state, self.buffered = state, b""
            if state == "cut" or was_losing:
                for writer in [writer for ends in self._connections for writer in ends]:
                    writer.close()
            self._state_changed.set()
            self._state_changed = asyncio.Event()

        asyncio.run_coroutine_threadsafe(change(), self._loop).result()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.state == "cut":
            writer.close()
            return
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        ends = (writer, upstream_writer)
        self._connections.add(ends)
        tasks = [
            asyncio.create_task(self._forward(reader, upstream_writer, to_store=True)),
            asyncio.create_task(self._forward(upstream_reader, writer, to_store=False)),
        ]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.close()
        self._connections.discard(ends)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, to_store: bool) -> None:
        with suppress(OSError, RuntimeError):
            while data := await reader.read(1 << 16):
                if self.state == "stalled" and to_store:
                    self.buffered += data
                while self.state == "stalled":
                    await self._state_changed.wait()
                if self.state == "losing all" or (self.state == "losing replies" and not to_store):
                    continue
                writer.write(data)

    def _run(self, started: threading.Event) -> None:
        async def serve() -> None:
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            started.set()
            with suppress(asyncio.CancelledError):
                await server.serve_forever()

        self._loop.run_until_complete(serve())

    @contextmanager
    def open(self) -> Iterator[StallingProxy]:
        """Run the proxy during the block; close all connections in the end."""
        started = threading.Event()
        thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        thread.start()
        started.wait()
        yield self
        self._set_state("cut")
        self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(self._loop)])
        thread.join()
