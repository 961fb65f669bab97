"""A client that is slow, greedy, silent or half gone holds nothing that others need, and is told why it was ended.

The clients are raw sockets. The server has short time limits; a busy machine makes everything later, never earlier.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from starlette.types import Message, Receive, Scope, Send

from service.errors import Overloaded
from service.http.limits import ConnectionLimits
from service.http.middleware import SMALL_BODY_BYTES, BodyMiddleware
from service.http.protocol import Connection
from service.tenants import new_key
from tests.conftest import Server
from tests.live import NO_EOS, Client, find_valkey, wait_until

TIMEOUT_S = 120.0
LIMITS: dict[str, object] = {
    "head_timeout_s": 1,
    "body_timeout_s": 3,
    "send_timeout_s": 2,
    "max_head_bytes": 8192,
    "max_headers": 20,
    "max_connections": 40,
}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def strict(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with short time limits."""
    running = Server(str(tiny_base), tmp_path_factory.mktemp("strict") / "data", **LIMITS).start()
    yield running
    assert running.stop() == 0, running.log.read_text()


def connect(server: Server) -> socket.socket:
    address = urlsplit(server.url)
    return socket.create_connection((address.hostname or "", address.port or 0), timeout=TIMEOUT_S)


def read_all(connection: socket.socket) -> bytes:
    """Everything until the server closes the connection, or resets it."""
    answer = b""
    while True:
        try:
            part = connection.recv(65536)
        except ConnectionResetError:
            return answer
        if not part:
            return answer
        answer += part


def send_quietly(connection: socket.socket, data: bytes) -> None:
    """Send what the server may refuse half-way."""
    with suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(data)


def assert_refused(answer: bytes, status: int) -> str:
    """The message of a refusal that is an error in OpenAI's shape."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer[:300]
    assert b"connection: close" in head.lower()
    error: dict[str, str] = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error["message"]


def ended(client: Client) -> float:
    lines = client.http.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("imprint_connections_ended_total{"))


def completion(**fields: Any) -> bytes:
    body = {"model": "tiny", "prompt": "The fox", "max_tokens": 4, "temperature": 0} | fields
    return json.dumps(body).encode()


@pytest.mark.parametrize(
    "head",
    [
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 2_000_000,
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 300_000,
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 30 + b"\r\n",
        b"GET /" + b"x" * 2_000_000,
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 20_000 + b"\r\n\r\n",
    ],
    ids=["one header", "many headers", "some headers too many", "a long path", "a header"],
)
def test_a_head_over_the_limits_is_a_431(strict: Server, head: bytes) -> None:
    with connect(strict) as connection, Client(strict.url) as client:
        before = ended(client)
        send_quietly(connection, head)
        answer = read_all(connection)
        if answer:  # a reset may have overtaken the answer to a client that went on sending
            message = assert_refused(answer, 431)
            assert "8192" in message or "20" in message
        assert ended(client) > before


def test_a_head_within_the_limits_is_served(strict: Server) -> None:
    headers = b"".join(b"X-%d: %s\r\n" % (i, b"x" * 380) for i in range(18))
    with connect(strict) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n" + headers + b"Connection: close\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")


def test_trailers_and_chunk_extensions_without_limit_are_refused(strict: Server) -> None:
    chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    for flood in (b"2\r\n{}\r\n0\r\nX: " + b"x" * 500_000, b"2;" + b"x" * 500_000):
        with connect(strict) as connection:
            send_quietly(connection, chunked + flood)
            answer = read_all(connection)
            assert not answer or assert_refused(answer, 400)


@pytest.mark.parametrize("part", ["head", "body"])
def test_half_a_request_is_ended_in_time(strict: Server, part: str) -> None:
    with connect(strict) as connection:
        connection.sendall(HEAD + (b"Content-Length: 100\r\n\r\n{" if part == "body" else b""))
        assert part in assert_refused(read_all(connection), 408)


def test_a_dripping_head_is_ended_in_time(strict: Server) -> None:
    with connect(strict) as connection:
        over = threading.Event()

        def drip() -> None:
            connection.sendall(HEAD)
            while not over.wait(0.1):
                send_quietly(connection, b"X: y\r\n" if connection.fileno() >= 0 else b"")

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            assert_refused(read_all(connection), 408)
        finally:
            over.set()
            dripping.join()


def test_a_silent_connection_is_closed(strict: Server) -> None:
    with connect(strict) as connection:
        assert read_all(connection) == b""


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_connection_between_two_requests_is_idle(strict: Server, method: str) -> None:
    """A client that waits longer than a head may take finds its connection as it left it."""
    body = completion() if method == "POST" else b""
    path = b"/v1/completions" if method == "POST" else b"/livez"
    fields = b"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    request = method.encode() + b" " + path + b" HTTP/1.1\r\n" + fields + body
    with connect(strict) as connection:
        for _ in range(2):
            connection.sendall(request)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
            with suppress(TimeoutError):  # the rest of the answer, and then nothing
                connection.settimeout(2.5)
                while part := connection.recv(65536):
                    assert not part.startswith(b"HTTP/1.1 "), part
                raise AssertionError("the server has closed the connection")


def test_slow_clients_take_no_places_of_fast_ones(strict: Server) -> None:
    """Three times as many half requests as the server has room for, renewed for ever, and one user."""
    over = threading.Event()

    def hold() -> None:
        with ExitStack() as stack:
            while not over.is_set():
                for _ in range(120):
                    connection = stack.enter_context(connect(strict))
                    send_quietly(connection, HEAD + b"Content-Length: 100\r\n\r\n{")
                over.wait(0.2)
                stack.close()

    holding = threading.Thread(target=hold)
    holding.start()
    try:
        time.sleep(0.5)
        for number in range(10):
            with Client(strict.url) as client:
                client.complete("The fox", session=f"fast-{number}")
    finally:
        over.set()
        holding.join()


def test_a_reader_that_never_reads_gives_its_session_back(strict: Server) -> None:
    body = completion(
        session="frozen", stream=True, max_tokens=400, logprobs=5, n=1, temperature=1, logit_bias=NO_EOS, learn="prompt"
    )
    with Client(strict.url) as client, connect(strict) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        wait_until(lambda: client.metric("requests_in_flight") > 0 or client.version("frozen") > 0)
        wait_until(lambda: client.metric("requests_in_flight") == 0)
        client.observe("frozen", "The dog sleeps.")  # the session is free


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_an_answer_is_whole_in_either_version(strict: Server, stream: bool, version: bytes) -> None:
    body = completion(stream=stream)
    head = HEAD.replace(b"1.1", version) + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    with connect(strict) as connection:
        connection.sendall(head + body)
        answer = read_all(connection)
    head, _, content = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert (b"chunked" in head.lower()) == (stream and version == b"1.1")
    if not stream:
        assert json.loads(content)["choices"]
    elif version == b"1.0":
        assert content.startswith(b"data: {") and content.endswith(b"data: [DONE]\n\n")
    else:
        assert content.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_a_half_closed_client_gets_its_whole_answer(strict: Server, stream: bool, version: bytes) -> None:
    body = completion(stream=stream, max_tokens=40, logit_bias=NO_EOS)
    with connect(strict) as connection:
        connection.sendall(HEAD.replace(b"1.1", version) + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        connection.shutdown(socket.SHUT_WR)
        answer = read_all(connection)
    assert version == b"1.1" or b" 100 " not in answer
    while answer.startswith(b"HTTP/1.1 100 "):
        answer = answer.partition(b"\r\n\r\n")[2]
    assert answer.startswith(b"HTTP/1.1 200 ")
    end_of_stream = b"data: [DONE]\n\n" + (b"\r\n0\r\n\r\n" if version == b"1.1" else b"")
    assert answer.endswith(end_of_stream if stream else b"}")


def test_a_half_closed_client_of_http_1_0_gets_what_it_reads(strict: Server) -> None:
    with connect(strict) as connection:
        connection.sendall(b"GET /readyz HTTP/1.0\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        assert json.loads(read_all(connection).partition(b"\r\n\r\n")[2]) == {"status": "ready", "store": "ok"}


@pytest.mark.parametrize(("version", "stream"), [(b"1.1", False), (b"1.1", True), (b"1.0", True)])
def test_a_client_that_goes_is_still_noticed(strict: Server, version: bytes, stream: bool) -> None:
    """The end of a client looks like a half-closed one, and yet its turn is rolled back."""
    session = f"gone-{version.decode()}-{stream}"
    body = completion(session=session, max_tokens=400, logit_bias=NO_EOS, stream=stream)
    with Client(strict.url) as client:
        with connect(strict) as connection:
            connection.sendall(HEAD.replace(b"1.1", version) + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            wait_until(lambda: client.metric("requests_in_flight") > 0)
        wait_until(client.idle)
        assert client.version(session) == 0


def test_a_connection_more_than_can_be_answered_is_a_503(make_server: Callable[..., Server]) -> None:
    """Two streams of a server of two connections wait for a store that stands still; then the store goes on."""
    server = make_server(max_connections=2).start()
    store = find_valkey(server.data_dir)
    assert store is not None
    with ExitStack() as stack:
        answered = [stack.enter_context(connect(server)) for _ in range(2)]
        for number, connection in enumerate(answered):
            body = completion(session=f"busy-{number}", stream=True, max_tokens=400, logit_bias=NO_EOS)
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        for connection in answered:
            assert connection.recv(17) == b"HTTP/1.1 200 OK\r\n"
        store.suspend()  # a stream ends with its commit
        try:
            with connect(server) as refused:
                answer = read_all(refused)
            assert "2 connections" in assert_refused(answer, 503) and b"\r\nretry-after: 1\r\n" in answer
        finally:
            store.resume()
        for connection in answered:
            connection.shutdown(socket.SHUT_WR)
            assert read_all(connection).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    with Client(server.url) as client:
        assert ended(client) == 1
        assert client.version("busy-0") == client.version("busy-1") == 1


def test_pipelined_requests_are_answered_in_order(strict: Server) -> None:
    body = completion()
    one = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    two = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connect(strict) as connection:
        connection.sendall(one + two + one + two)
        connection.shutdown(socket.SHUT_WR)
        answer = read_all(connection)
    assert answer.count(b"HTTP/1.1 200 OK\r\n") == 4
    assert answer.endswith(b'{"status":"ok"}')


@pytest.mark.parametrize("host", [b"evil.example", b"localhost.evil.example", b"10.0.0.1", b"imprint:8000", b""])
def test_without_keys_only_loopback_names_are_served(strict: Server, host: bytes) -> None:
    for path, status in ((b"/v1/models", b"421"), (b"/", b"421"), (b"/livez", b"200")):
        answer = ask(strict, path, host)
        assert answer.startswith(b"HTTP/1.1 " + status), answer[:200]
    assert b"host_not_allowed" in ask(strict, b"/v1/models", host)


@pytest.mark.parametrize("host", [b"localhost", b"LOCALHOST:8000", b"127.0.0.1:80", b"[::1]:80", b"app.localhost"])
def test_loopback_names_are_served(strict: Server, host: bytes) -> None:
    answer = ask(strict, b"/v1/models", host)
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"x-content-type-options: nosniff" in answer


def test_a_server_with_names_is_served_under_these_only(make_server: Callable[..., Server]) -> None:
    server = make_server(hosts="imprint.example, other.example")
    server.start(wait=False)
    wait_until(lambda: ask(server, b"/livez", b"a").startswith(b"HTTP/1.1 200"))
    assert ask(server, b"/v1/models", b"imprint.example:80")[9:12] != b"421"
    assert ask(server, b"/v1/models", b"localhost")[9:12] == b"421"


def ask(server: Server, path: bytes, host: bytes) -> bytes:
    try:
        with connect(server) as connection:
            connection.sendall(b"GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n" % (path, host))
            return read_all(connection)
    except ConnectionRefusedError:
        return b""


def test_a_slow_body_takes_no_place_of_its_tenant(make_server: Callable[..., Server]) -> None:
    key, line = new_key("acme")
    server = make_server(api_keys=line, tenant_requests=1).start()
    head = HEAD + f"Authorization: Bearer {key}\r\nContent-Length: 100\r\n\r\n{{".encode()
    with ExitStack() as stack, Client(server.url, key=key) as client:
        for _ in range(5):
            stack.enter_context(connect(server)).sendall(head)
        time.sleep(0.5)
        client.complete("The fox")


def test_large_bodies_are_bounded_together_and_small_ones_always_fit() -> None:
    async def take(size: int, middleware: BodyMiddleware) -> int:
        messages = [{"type": "http.request", "body": b"x" * size, "more_body": False}]

        async def receive() -> Message:
            return messages.pop()

        async def send(message: Message) -> None:
            raise AssertionError

        await middleware({"type": "http", "headers": []}, receive, send)
        return middleware._held

    async def run() -> None:
        inner: list[bytes] = []

        async def application(scope: Scope, receive: Receive, send: Send) -> None:
            inner.append((await receive())["body"])
            if len(inner) == 1:  # while the first body is held
                with pytest.raises(Overloaded):
                    await take(SMALL_BODY_BYTES, middleware)
                await take(SMALL_BODY_BYTES - 1, middleware)

        middleware = BodyMiddleware(application, limit=10**6, total=200_000)
        assert await take(180_000, middleware) == 0
        assert list(map(len, inner)) == [180_000, SMALL_BODY_BYTES - 1]
        assert await take(180_000, middleware) == 0

    asyncio.run(run())


def test_each_server_has_limits_of_its_own() -> None:
    first = Connection.with_limits(ConnectionLimits(max_headers=8), Connection.report)
    second = Connection.with_limits(ConnectionLimits(max_headers=9), Connection.report)
    assert (first.limits.max_headers, second.limits.max_headers) == (8, 9)
