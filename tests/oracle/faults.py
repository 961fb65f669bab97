"""Faults of processes, disks and clients. Each class is one kind of fault."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Literal
from urllib.parse import urlsplit

from tests.clients import ContractViolation, Turn
from tests.conftest import Server
from tests.live import find_valkey
from tests.oracle.deployment import LEASE_S, RECOVERY_S, Fault, Run, wait_ready
from tests.service.small_disk import fill
from tests.tiny import TEXT

READY = {"status": "ready"}
OK = {"status": "ready", "store": "ok"}


class Kill(Fault):
    """Kills (-9) one server, its embedded store, or both, at a random instant; sometimes during a start."""

    def __init__(self, server: Server, victim: Literal["server", "store", "both"]) -> None:
        self.kind = f"kill of {'both' if victim == 'both' else 'the ' + victim}"
        self._server, self._victim = server, victim

    async def inject(self, run: Run) -> None:
        if run.random.random() > 0.15:
            await self.settle(run)
            await run.pause(0, 2)
        else:
            await run.pause(0, 3)
        while not await self._kill(run.random):
            await asyncio.sleep(0.01)

    async def settle(self, run: Run) -> None:
        await wait_ready(self._server.url, READY, partial(restart_if_ended, self._server))

    async def _kill(self, rng: random.Random) -> bool:
        """Kill the victim and restart a killed server at once; return False if there was nothing to kill."""
        restart_if_ended(self._server)
        server, store = self._server.process, find_valkey(self._server.data_dir)
        assert server is not None
        if self._victim != "server" and store is None:
            return False
        killed = [server] if self._victim != "store" else []
        killed += [store] if self._victim != "server" and store is not None else []  # type: ignore[list-item]
        rng.shuffle(killed)
        for process in killed:
            process.kill()
        if self._victim != "store":
            await asyncio.to_thread(server.wait)
            self._server.start(wait=False)
        return True


def restart_if_ended(server: Server) -> None:
    """Restart a server that ended because its store was killed during the start, as a supervisor would."""
    assert server.process is not None
    if server.process.poll() is None:
        return
    output = server.log.read_text()[-2000:]
    if "valkey did not start (status -9)" not in output.splitlines()[-1]:
        raise ContractViolation(f"the server ended by itself: {output}")
    server.start(wait=False)


class FullDisk(Fault):
    """Fills the disk of an embedded store to the last byte; the server must learn again when there is room."""

    kind = "full disk"

    def __init__(self, server: Server) -> None:
        self._server = server

    async def inject(self, run: Run) -> None:
        await wait_ready(self._server.url, OK, partial(restart_if_ended, self._server))
        await run.pause(0, 0.5)
        filler = await asyncio.to_thread(fill, self._server.data_dir.parent)
        try:
            await run.pause(0.2, 1.5)
        finally:
            filler.unlink()
        await wait_ready(self._server.url, OK, partial(restart_if_ended, self._server))


class FrozenReader(Fault):
    """Asks for a long stream and never reads; the session must be free for its next turn."""

    kind = "frozen reader"

    def __init__(self) -> None:
        self._numbers = count()

    async def inject(self, run: Run) -> None:
        await run.pause(0, 1)
        client = run.new_client(f"frozen-{next(self._numbers)}")
        history, path = client.history, f"sessions/{client.history.name}/observe"
        run.histories.append(history)
        stream = Turn(0, "completions", self._body(run, history.name), has_key=False)
        stream.on_disconnect = stream.body["on_disconnect"] = run.random.choice(("rollback", "commit"))
        following = Turn(1, path, {"text": f"1 {TEXT[:60]}"}, has_key=True)
        history.turns += [stream, following]
        with await self._connect(run) as connection:
            content = json.dumps(stream.body).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: {history.name}/0/0\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
            with suppress(OSError):  # a server that is killed now has not begun
                connection.sendall(head.encode() + content)
            await asyncio.sleep(0.2)
            async with asyncio.timeout(RECOVERY_S):
                await client.send_until_acknowledged(following)

    @staticmethod
    async def _connect(run: Run) -> socket.socket:
        """Connect once a server listens, with the smallest buffers: what the kernel takes counts as read."""
        address = urlsplit(run.random.choice(run.deployment.urls))
        for _ in range(int(RECOVERY_S)):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
            try:
                connection.connect((address.hostname, address.port))
                return connection
            except ConnectionRefusedError:
                connection.close()
                await asyncio.sleep(1)
        raise ContractViolation(f"nothing listens at {address.netloc}")

    @staticmethod
    def _body(run: Run, session: str) -> dict[str, object]:
        fields = {"model": run.model, "session": session, "prompt": f"0 {TEXT[:80]}", "max_tokens": 250}
        choices = {"stream": True, "logprobs": 5, "temperature": 1, "seed": run.random.randrange(2**31)}
        return fields | choices | {"adapt": "both", "learn": run.random.choice(("prompt", "all"))}


class Pause(Fault):
    """Stops a replica for longer than a lease lasts, and lets it continue in the middle of its work."""

    kind = "pause of a replica"

    async def inject(self, run: Run) -> None:
        await run.pause(0.2, 1.5)
        process = run.random.choice(run.deployment.servers).process
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        try:
            await run.pause(1.1 * LEASE_S, 3 * LEASE_S)
        finally:
            process.send_signal(signal.SIGCONT)
