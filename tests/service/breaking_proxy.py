"""A proxy between a client and the server that breaks the connection within an answer."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit


class BreakingProxy:
    """A TCP proxy for HTTP requests that cuts answers off.

    Attributes:
        url: where the proxy listens.
        num_breaks: number of answers to cut off from now on. The server has completed such an answer.
        bytes_forwarded: number of bytes that the client gets of such an answer.
        request_headers: headers of each request, names in lower case.
    """

    def __init__(self, url: str) -> None:
        split = urlsplit(url)
        self._upstream = (split.hostname or "", split.port or 80)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.num_breaks = 0
        self.bytes_forwarded = 0
        self.request_headers: list[dict[str, str]] = []

    @contextmanager
    def open(self) -> Iterator[None]:
        thread = threading.Thread(target=self._serve, daemon=True)
        thread.start()
        yield
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._forward, args=(connection,), daemon=True).start()

    def _forward(self, client_socket: socket.socket) -> None:
        """Forward one request and its answer."""
        with client_socket, socket.create_connection(self._upstream) as server_socket:
            head, _, body = client_socket.recv(1 << 16).partition(b"\r\n\r\n")
            if not head:
                return
            first, *lines = head.decode().split("\r\n")
            fields = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
            while len(body) < int(fields.get("content-length", 0)):
                body += client_socket.recv(1 << 16)
            self.request_headers.append(dict(fields))
            fields["connection"] = "close"
            server_socket.sendall("\r\n".join([first, *map(": ".join, fields.items()), "", ""]).encode() + body)
            answer = b"".join(iter(lambda: server_socket.recv(1 << 16), b""))
            if self.num_breaks:
                self.num_breaks -= 1
                answer = answer[: self.bytes_forwarded]
            client_socket.sendall(answer)
