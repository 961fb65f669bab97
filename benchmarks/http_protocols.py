"""Measure what the HTTP protocol classes cost: `python -m benchmarks.http_protocols` prints a table.

Each class serves the same small application in a process of its own. CPU time of that process is the main measure: it
does not depend on what else the machine runs.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection as Pipe
from typing import Any

import psutil
import uvicorn
from starlette.types import Receive, Scope, Send

from service.http.limits import ConnectionLimits, ConnectionReport
from service.http.protocol import Connection

REQUESTS, CONNECTIONS, EVENTS, UPLOAD_BYTES, DISCONNECTS = 3000, 32, 2000, 16 * 2**20, 20
GET = b"GET /plain HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\nUser-Agent: bench\r\nAuthorization: Bearer x\r\n\r\n"
KINDS: dict[str, Callable[[], Any]] = {
    "uvicorn's h11": lambda: "h11",
    "uvicorn's httptools": lambda: "httptools",
    "ours, on httptools": lambda: Connection.with_limits(ConnectionLimits(), ConnectionReport()),
}


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with a word, with a stream of events, or with the time at which the client was gone."""
    path, more = scope["path"], True
    while more:
        more = (await receive()).get("more_body", False)
    headers = [(b"content-type", b"application/json")]
    if path == "/wait":
        while (await receive())["type"] != "http.disconnect":
            pass
        application.gone.append(time.time())  # type: ignore[attr-defined]
        return
    if path != "/stream":
        body = str(application.gone).encode() if path == "/gone" else b'{"status":"ok"}'  # type: ignore[attr-defined]
        headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        return
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for _ in range(EVENTS):
        await send({"type": "http.response.body", "body": b"data: " + b"x" * 200 + b"\n\n", "more_body": True})
        await asyncio.sleep(0)
    await send({"type": "http.response.body", "body": b""})


application.gone = []  # type: ignore[attr-defined]


def serve(kind: str, pipe: Pipe) -> None:
    """Serve in this process with a protocol class of `KINDS`."""
    listener = socket.create_server(("127.0.0.1", 0))
    pipe.send(listener.getsockname()[1])
    config = uvicorn.Config(
        application, http=KINDS[kind](), ws="none", lifespan="off", log_config=None, access_log=False
    )
    uvicorn.Server(config).run([listener])


class Bench:
    """The measurements of one protocol class."""

    def __init__(self, port: int, process: psutil.Process) -> None:
        self.port = port
        self.process = process

    def cpu_s(self) -> float:
        """Return the CPU time that the server has used, in seconds."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def connect(self) -> socket.socket:
        """Return a new connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def latency(self) -> tuple[float, float, float]:
        """Return the median and the 99th percentile of one request's latency, and its CPU time, in microseconds."""
        with self.connect() as connection:
            times, before = [], self.cpu_s()
            for _ in range(REQUESTS):
                began = time.perf_counter()
                connection.sendall(GET)
                answer = b""
                while not answer.endswith(b"}"):
                    answer += connection.recv(65536)
                times.append(time.perf_counter() - began)
            cpu = (self.cpu_s() - before) / REQUESTS
        cuts = statistics.quantiles(times, n=100)
        return cuts[49] * 1e6, cuts[98] * 1e6, cpu * 1e6

    def throughput(self) -> float:
        """Return the requests per second of CPU time over many connections, with requests sent in advance."""
        connections = [self.connect() for _ in range(CONNECTIONS)]
        before, rounds = self.cpu_s(), REQUESTS // CONNECTIONS
        for _ in range(rounds):
            for connection in connections:
                connection.sendall(GET)
            for connection in connections:
                answer = b""
                while not answer.endswith(b"}"):
                    answer += connection.recv(65536)
        used = self.cpu_s() - before
        for connection in connections:
            connection.close()
        return rounds * CONNECTIONS / used

    def stream(self) -> float:
        """Return the CPU time of one event of a stream, in microseconds."""
        before = self.cpu_s()
        for _ in range(5):
            with self.connect() as connection:
                connection.sendall(GET.replace(b"/plain", b"/stream"))
                answer = b""
                while not answer.endswith(b"0\r\n\r\n"):
                    answer = answer[-16:] + connection.recv(2**20)
        return (self.cpu_s() - before) / (5 * EVENTS) * 1e6

    def upload(self) -> float:
        """Return the CPU time of a body of 16 MiB, in milliseconds."""
        head = f"POST /plain HTTP/1.1\r\nHost: localhost\r\nContent-Length: {UPLOAD_BYTES}\r\n\r\n".encode()
        before = self.cpu_s()
        for _ in range(5):
            with self.connect() as connection:
                connection.sendall(head + b"x" * UPLOAD_BYTES)
                while not connection.recv(65536).endswith(b"}"):
                    pass
        return (self.cpu_s() - before) / 5 * 1e3

    def disconnects(self) -> float:
        """Return the median time until the application knows that a client is gone, in milliseconds."""
        left = []
        for _ in range(DISCONNECTS):
            with self.connect() as connection:
                connection.sendall(GET.replace(b"/plain", b"/wait"))
                time.sleep(0.02)
            left.append(time.time())
            time.sleep(0.1)
        with self.connect() as connection:
            connection.sendall(GET.replace(b"/plain", b"/gone"))
            answer = connection.recv(65536)
            while not answer.endswith(b"]"):
                answer += connection.recv(65536)
        noticed = [float(word) for word in answer.rpartition(b"[")[2][:-1].split(b",") if word]
        return statistics.median(n - since for n, since in zip(noticed, left, strict=False)) * 1e3


def main() -> None:
    """Print the table."""
    spawn = multiprocessing.get_context("spawn")
    print(
        "| protocol | latency p50 / p99 (µs) | CPU a request (µs) | requests per CPU second | CPU an event (µs) |",
        end="",
    )
    print(" CPU a 16 MiB body (ms) | client gone (ms) |\n| --- | --- | --- | --- | --- | --- | --- |")
    for kind in KINDS:
        here, there = spawn.Pipe()
        server = spawn.Process(target=serve, args=(kind, there), daemon=True)
        server.start()
        bench = Bench(here.recv(), psutil.Process(server.pid))
        time.sleep(1)
        bench.latency()
        median, slow, cpu = bench.latency()
        row = f"| {kind} | {median:.0f} / {slow:.0f} | {cpu:.0f} | {bench.throughput():.0f} | {bench.stream():.1f} |"
        print(f"{row} {bench.upload():.0f} | {bench.disconnects():.0f} |", flush=True)
        server.terminate()
        server.join()


if __name__ == "__main__":
    main()
