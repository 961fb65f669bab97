"""HTTP/1 on one connection: uvicorn's httptools protocol with bounds on size, time and number.

A request that breaks a bound never reaches the application. docs/decisions/http-server.md says why this class extends
uvicorn's and does not use uvicorn's h11 protocol.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import socket
from typing import Any, Literal

from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.http.limits import ConnectionLimits, ConnectionReport, Reason

SWEEP_EVERY_S = 0.5
LINGER_S = 2.0  # for which a refused client may go on sending
MIN_SENT_BYTES = 16_384  # that a client must read in each `send_timeout_s`
FRAMING = 16  # bytes of chunk sizes and trailers allowed for each byte of a body
PROBES_S = (0.0, 0.05, 0.5)  # after the end of a client's sending side, at which the server looks whether it is gone
PROBE_EVERY_S = 5.0
TCP_CLOSED = 7  # the first byte of Linux' TCP_INFO
Phase = Literal["head", "body", "answer", "idle"]

quiet_log = logging.getLogger("service.http.protocol.requests")  # uvicorn's line for each request that is no HTTP
quiet_log.setLevel(logging.ERROR)


class Connection(HttpToolsProtocol):
    """One connection. `Connection.limits` and `Connection.report` are of the server; `with_limits` sets them.

    Attributes:
        phase: what the connection waits for: the head of a request, its body, the answer, or the next request.
        deadline: the loop's time at which the phase has lasted too long.
        since: the loop's time at which the phase began.
    """

    limits = ConnectionLimits()
    report = ConnectionReport()
    phase: Phase = "head"
    deadline = math.inf
    since = 0.0
    _sweeper: asyncio.TimerHandle | None = None

    @classmethod
    def with_limits(cls, limits: ConnectionLimits, report: ConnectionReport) -> type[Connection]:
        """Return the class of one server's connections."""
        return type("LimitedConnection", (cls,), {"limits": limits, "report": report})

    # --- the transport ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._reads_head = True
        self._head_begun = False
        self._head_bytes = self._framing_bytes = self._send_mark = 0
        self._send_deadline = math.inf
        self._refused = False
        self._next_probe: asyncio.TimerHandle | None = None
        super().connection_made(transport)
        self.logger = quiet_log
        self._enter("head", self.limits.head_timeout_s)
        self.report.opened(len(self.connections))
        cls = type(self)
        if cls._sweeper is None:
            cls._sweeper = self.loop.call_later(SWEEP_EVERY_S, cls._sweep, self.loop, self.connections)
        if len(self.connections) > self.limits.max_connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._next_probe is not None:
            self._next_probe.cancel()
        self.deadline = self._send_deadline = math.inf
        super().connection_lost(exc)
        self.report.opened(len(self.connections))

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        step = self.limits.max_head_bytes
        for start in range(0, len(data), step):
            if not self._feed(data[start : start + step]):
                return

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection of a client that only ended its sending side open until the last answer.

        The end of a client looks the same. What tells the two apart is that a client that is gone refuses what the
        server sends: `100 Continue`, which HTTP/1.1 clients skip, or the first bytes of the answer.
        """
        if self.phase != "answer" or self._refused:
            return False
        self.cycle.keep_alive = False
        self._probe(0)
        return True

    def pause_writing(self) -> None:
        super().pause_writing()
        self._send_mark = self.transport.get_write_buffer_size()
        self._send_deadline = self.loop.time() + self.limits.send_timeout_s

    def resume_writing(self) -> None:
        super().resume_writing()
        self._send_deadline = math.inf

    # --- the parser ------------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_begun = True
        if self.phase == "idle":
            self._enter("head", self.limits.head_timeout_s)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._reads_head:
            return  # a trailer: nothing here reads trailers
        if len(self.headers) >= self.limits.max_headers:
            self._refuse(431, "headers", f"A request may have {self.limits.max_headers} headers, got more.")
        else:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._refused:
            return
        super().on_headers_complete()
        self._reads_head, self._head_begun, self._head_bytes, self._framing_bytes = False, False, 0, 0
        if self.phase != "answer":
            self._enter("body", self.limits.body_timeout_s)

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            self._framing_bytes -= (FRAMING + 1) * len(body)
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._refused:
            return
        self._reads_head, self._message_ended = True, True
        if self.phase == "body" and self.cycle.response_complete:
            self._enter("idle", self.limits.idle_timeout_s)
        elif self.phase == "body":
            self._enter("answer", math.inf)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        pipelined = bool(self.pipeline)
        super().on_response_complete()
        if self.phase != "answer":
            return  # the rest of the body is still to come
        if pipelined and not self.pipeline and self.cycle.more_body:
            self._enter("body", self.limits.body_timeout_s)
        elif not pipelined and self._head_begun:
            self._enter("head", self.limits.head_timeout_s)
        elif not pipelined:
            self._enter("idle", self.limits.idle_timeout_s)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        super()._start_asgi_task(cycle, _until_close(cycle, app) if cycle.scope["http_version"] == "1.0" else app)

    def _feed(self, part: bytes) -> bool:
        """Feed a part of what came in; return whether the connection goes on."""
        limit, read_head = self.limits.max_head_bytes, self._reads_head
        self._message_ended = False
        if not read_head:
            self._framing_bytes += len(part)
        super().data_received(part)
        if self._refused or self.transport.is_closing():
            return False
        self._framing_bytes = max(0, self._framing_bytes)
        if read_head and self._reads_head and not self._message_ended:
            self._head_bytes += len(part)
            if self._head_bytes > limit:
                self._refuse(431, "head", f"The request line and the headers may have {limit} bytes, got more.")
        elif self._framing_bytes > limit:
            self._refuse(400, "framing", "The chunks of the body have more framing than content.")
        return not self._refused

    # --- the bounds ------------------------------------------------------------------------------------------------

    def _enter(self, phase: Phase, timeout_s: float) -> None:
        self.phase, self.since = phase, self.loop.time()
        self.deadline = self.since + timeout_s

    def _make_room(self) -> None:
        """End the connection that has waited longest for its client; refuse this one if none waits."""
        waiting = [each for each in self.connections if isinstance(each, Connection) and each.phase != "answer"]
        oldest = min(waiting, key=lambda each: each.since)
        if oldest is self:
            limit = self.limits.max_connections
            self._refuse(503, "connections", f"The server has {limit} connections and takes no more.", retry_after=1)
        else:
            self.report.ended("room for others", oldest.client)
            oldest.since = math.inf  # a connection that is lost leaves the set later
            oldest.transport.abort()

    @classmethod
    def _sweep(cls, loop: asyncio.AbstractEventLoop, connections: set[Any]) -> None:
        """End the connections whose deadline is over, again and again while there are connections."""
        now = loop.time()
        for connection in [each for each in connections if isinstance(each, cls)]:
            connection._expire(now)
        cls._sweeper = loop.call_later(SWEEP_EVERY_S, cls._sweep, loop, connections) if connections else None

    def _expire(self, now: float) -> None:
        if now >= self._send_deadline:
            unsent = self.transport.get_write_buffer_size()
            if unsent > self._send_mark - MIN_SENT_BYTES:
                self.report.ended("a client that does not read", self.client)
                self.transport.abort()
                return
            self._send_mark, self._send_deadline = unsent, now + self.limits.send_timeout_s
        if now < self.deadline:
            return
        answered = self.cycle is None or self.cycle.response_complete
        if self._refused or self.phase == "idle" or (answered and not self._head_begun):
            self.transport.abort()
        else:
            limits = self.limits
            reason: Reason = "head timeout" if self.phase == "head" else "body timeout"
            timeout_s = limits.head_timeout_s if self.phase == "head" else limits.body_timeout_s
            self._refuse(408, reason, f"The {self.phase} of a request must come within {timeout_s} s.")

    def _refuse(self, status: int, reason: Reason, message: str, retry_after: int | None = None) -> None:
        """Answer with an error in OpenAI's shape, unless an answer has begun, and close the connection.

        To close a connection on which bytes arrive would destroy the answer: the server first takes them for a while.
        """
        if self._refused:
            return
        self._refused = True
        self.report.ended(reason, self.client)
        busy = self.cycle is not None and not self.cycle.response_complete
        if not (busy and self.cycle.response_started):
            self.transport.write(_error(status, message, retry_after))
        if busy:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._enter("idle", LINGER_S)
        if status == 503 or not self.transport.can_write_eof():
            self.transport.close()
        else:
            self.transport.write_eof()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "invalid HTTP", "The request is not valid HTTP/1.1.")

    def _probe(self, number: int) -> None:
        """Send what a client that is there skips, and look whether the connection still is."""
        cycle = self.cycle
        if self.transport.is_closing() or cycle.response_complete:
            return
        if _is_closed(self.transport):
            self.transport.abort()
            return
        may_continue = cycle.scope["http_version"] != "1.0" and not cycle.response_started and not self.pipeline
        if may_continue and (number == 0 or number >= len(PROBES_S)):
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        wait_s = PROBES_S[number + 1] - PROBES_S[number] if number + 1 < len(PROBES_S) else PROBE_EVERY_S
        self._next_probe = self.loop.call_later(wait_s, self._probe, number + 1)


def _is_closed(transport: asyncio.Transport) -> bool:
    """Return whether the kernel knows that the peer refuses what is sent; always false where it cannot be asked."""
    sock, option = transport.get_extra_info("socket"), getattr(socket, "TCP_INFO", None)
    if sock is None or option is None:
        return False
    try:
        with socket.socket(fileno=os.dup(sock.fileno())) as own:  # uvloop's sockets have no options to read
            return own.getsockopt(socket.IPPROTO_TCP, option, 1)[0] == TCP_CLOSED
    except OSError:
        return False


def _until_close(cycle: RequestResponseCycle, app: Any) -> Any:
    """Return the application for an HTTP/1.0 request: an answer of unknown length ends with the connection.

    uvicorn would send the answer in chunks, which HTTP/1.0 does not know.
    """

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        until_close = False

        async def send_plain(message: Message) -> None:
            nonlocal until_close
            if message["type"] == "http.response.start":
                until_close = all(name.lower() != b"content-length" for name, _ in message.get("headers", ()))
                if until_close:
                    cycle.chunked_encoding, cycle.keep_alive = False, False
            elif until_close:
                # The cycle counts down what a body of known length has left.
                more = message.get("more_body", False)
                cycle.expected_content_length = len(message.get("body", b"")) + more
            await send(message)

        await app(scope, receive, send_plain)

    return run


def _error(status: int, message: str, retry_after: int | None) -> bytes:
    kind, code = ("server_error", "unavailable") if status >= 500 else ("invalid_request_error", f"http_{status}")
    error = {"message": message, "type": kind, "param": None, "code": code}
    body = json.dumps({"error": error}).encode()
    headers = [b"content-type: application/json", b"x-content-type-options: nosniff", b"connection: close"]
    headers += [b"content-length: %d" % len(body)] + ([] if retry_after is None else [b"retry-after: %d" % retry_after])
    return STATUS_LINE[status] + b"\r\n".join([*headers, b"", body])
