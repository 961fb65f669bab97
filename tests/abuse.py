"""Abusive clients: each does again and again what a server may not be stopped or held by.

`python -m tests.abuse URL` reads lines from its input: `go` starts the clients, `rest` makes them end what they hold
and wait. At the end of the input the program prints, as JSON, how often each attack ended in which way.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import resource
import socket
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

MB = 2**20
ANSWER_TIMEOUT_S = 90.0
HELD_AT_ONCE = 25  # connections that one attack leaves unfinished
MAX_HELD = 500  # of one client; five clients together have more than the server takes
NICENESS = 19  # in earnest these clients would take no time of the server's machine

Address = tuple[str, int]


def request(path: str, body: bytes = b"", *headers: str, method: str = "POST") -> bytes:
    """Return the bytes of a request after which the server closes the connection."""
    fields = ["Host: localhost", "Connection: close", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *fields, *headers, "", ""]).encode() + body


def chat(messages: list[dict[str, str]]) -> bytes:
    """Return the body of a chat with the served tiny base."""
    return json.dumps({"model": "tiny", "max_tokens": 8, "messages": messages}).encode()


def refused_requests() -> dict[str, bytes]:
    """Return requests that the server has to refuse, by name."""
    chats, completions = "/v1/chat/completions", "/v1/completions"
    empty = {"role": "user", "content": ""}
    manifest = json.dumps({"__metadata__": {"imprint": "[" * 200_000}}).encode()
    bomb = gzip.compress(bytes(200 * MB), 1)
    return {
        "chat of one 5 MB message": request(chats, chat([empty | {"content": "x" * 5 * MB}])),
        "chat of one 15 MB message": request(chats, chat([empty | {"content": "The fox. " * (15 * MB // 9)}])),
        "20,000 empty messages": request(chats, chat([empty] * 20_000)),
        "200,000 empty messages": request(chats, chat([empty] * 200_000)),
        "prompt of 15 MB": request(completions, json.dumps({"model": "tiny", "prompt": "fox " * 4_000_000}).encode()),
        "body over the limit": request(completions, b" " * 17 * MB),
        "deep JSON": request(completions, b'{"prompt": ' + b"[" * 5 * MB),
        "deep manifest": request(
            "/v1/sessions/abuse/import", len(manifest).to_bytes(8, "little") + manifest, method="PUT"
        ),
        "gzip bomb": request(completions, bomb, "Content-Encoding: gzip"),
        "one endless header": b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 5 * MB,
        "endless headers": b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 300_000,
        "endless path": b"GET /" + b"x" * 2 * MB,
        "another host": request("/v1/models", method="GET").replace(b"localhost", b"evil.example"),
        "garbage": bytes(random.Random(0).randbytes(4096)),
        "TLS": bytes.fromhex("160301020001000201") + bytes(512),
    }


class AbusiveClient:
    """One abusive client.

    Args:
        address: host and port of the server.
        rng: what it draws attacks from.
        refused: requests that the server has to refuse.
        counts: number of attacks by name and outcome.
        pause_s: mean time between two attacks.
    """

    def __init__(
        self,
        address: Address,
        rng: random.Random,
        refused: dict[str, bytes],
        counts: Counter[str],
        *,
        pause_s: float,
    ) -> None:
        self._address = address
        self._rng = rng
        self._refused = refused
        self._counts = counts
        self._pause_s = pause_s
        self._held: deque[socket.socket] = deque()
        self._others: dict[str, Callable[[], str]] = {
            "half-sent bodies": lambda: self._hold(request("/v1/completions", bytes(1000))[:-990]),
            "half-sent heads": lambda: self._hold(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"),
            "half-sent request lines": lambda: self._hold(b"POST /v1/comp"),
            "silent connections": lambda: self._hold(b""),
            "dripping": self._drip,
            "reader that never reads": self._never_read,
            "half-closed client": lambda: self._exchange(self._completion(), half_close=True),
            "half-closed client of HTTP/1.0": lambda: self._exchange(b"GET /readyz HTTP/1.0\r\n\r\n", half_close=True),
            "client that hangs up": lambda: self._exchange(self._completion(), answer=False),
        }

    def run(self, active: threading.Event, over: threading.Event) -> None:
        """Attack while `active` is set, until `over` is."""
        while not over.is_set():
            if not active.is_set():
                self._let_go(0)
                active.wait(0.1)
                continue
            name = self._rng.choice([*self._refused, *self._others])
            try:
                outcome = self._others[name]() if name in self._others else self._exchange(self._refused[name])
            except TimeoutError:
                outcome = "no answer"
            except OSError as error:
                outcome = type(error).__name__
            self._counts[f"{name}: {outcome}"] += 1
            over.wait(self._rng.expovariate(1 / self._pause_s))
        self._let_go(0)

    def _exchange(self, data: bytes, *, half_close: bool = False, answer: bool = True) -> str:
        """Send a request; return the status of the answer, or "closed" without one."""
        with socket.create_connection(self._address, timeout=ANSWER_TIMEOUT_S) as connection:
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(data)
                if half_close:
                    connection.shutdown(socket.SHUT_WR)
            return read_status(connection) if answer else "closed"

    def _completion(self, **fields: Any) -> bytes:
        return request("/v1/completions", json.dumps({"model": "tiny", "prompt": "The fox", **fields}).encode())

    def _hold(self, data: bytes) -> str:
        """Leave requests unfinished."""
        for _ in range(HELD_AT_ONCE):
            connection = socket.create_connection(self._address, timeout=ANSWER_TIMEOUT_S)
            self._held.append(connection)
            with suppress(OSError):
                connection.sendall(data)
        self._let_go(MAX_HELD)
        return "held"

    def _drip(self) -> str:
        """Send one byte more on connections that wait for the rest of a request."""
        for connection in self._rng.sample(list(self._held), min(HELD_AT_ONCE, len(self._held))):
            with suppress(OSError):
                connection.sendall(b"x")
        return "sent"

    def _never_read(self) -> str:
        """Ask for a long stream and read nothing of it."""
        connection = socket.socket()
        self._held.append(connection)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(ANSWER_TIMEOUT_S)
        connection.connect(self._address)
        fields = {"stream": True, "max_tokens": 400, "logprobs": 5, "logit_bias": {"2": -100}}
        connection.sendall(self._completion(**fields))
        return "held"

    def _let_go(self, keep: int) -> None:
        while len(self._held) > keep:
            self._held.popleft().close()


def read_status(connection: socket.socket) -> str:
    """Read until the server closes the connection; return the status of the last answer, or "closed" without one."""
    content = b""
    with suppress(ConnectionResetError):
        while part := connection.recv(65536):
            content = (content + part)[-MB:]
    statuses = [part[:3].decode() for part in content.split(b"HTTP/1.1 ")[1:]]
    return next((status for status in reversed(statuses) if status != "100"), "closed")


def main() -> None:
    """Run the clients as the input says, and print the counts at its end."""
    parser = argparse.ArgumentParser(prog="python -m tests.abuse", description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--pause", type=float, default=1, help="mean seconds between a client's attacks (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.nice(NICENESS)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    parts, refused = urlsplit(options.url), refused_requests()
    address = (parts.hostname or "", parts.port or 80)
    active, over, counts = threading.Event(), threading.Event(), Counter[str]()
    clients = [
        AbusiveClient(address, random.Random(f"{options.seed}/{n}"), refused, counts, pause_s=options.pause)
        for n in range(options.clients)
    ]
    threads = [threading.Thread(target=client.run, args=(active, over), daemon=True) for client in clients]
    for thread in threads:
        thread.start()
    print("ready", flush=True)
    for line in sys.stdin:
        (active.set if line.strip() == "go" else active.clear)()
    over.set()
    active.set()
    for thread in threads:
        thread.join(ANSWER_TIMEOUT_S)
    print(json.dumps(counts, sort_keys=True))


if __name__ == "__main__":
    main()
