"""Helpers for tests of running servers: a client that expects success, and access to the raw bytes in the store."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Any, Self, TypeVar, cast
from urllib.parse import urlsplit

import httpx
import psutil
from redis import Redis

from service.store.redis.codec import PAGE_ROWS, unpack_pages
from tests.tiny import TEXT

Json = dict[str, Any]
T = TypeVar("T")

EOS = "2"  # end-of-text token of the tiny base, as a key of `logit_bias`
HASH = re.compile(r"sha256:|\b[0-9a-f]{16,}")  # no message to a client shows one
QUOTED = re.compile(r"'[^']*'")  # a name that the client gave; tests give random ones
NO_EOS = {EOS: -100}  # a `logit_bias` that forbids the end of text
# Fields of a stored session that differ between sessions that have learned the same.
VOLATILE_FIELDS = {b"once_until", b"id", b"nonce", b"created", b"updated", b"undo_from", b"undo_bytes", b"logged"}
WAIT_TIMEOUT_S = 300.0


class Client:
    """A client of one server. Methods that return JSON assert success."""

    def __init__(self, url: str, model: str = "tiny", key: str | None = None) -> None:
        self.url = url
        self.model = model
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=url, timeout=120, headers=self.headers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.http.close()

    def post(self, path: str, body: Json, if_match: str | None = None, **headers: str) -> httpx.Response:
        """Send a POST request to /v1/`path`."""
        all_headers = headers if if_match is None else {**headers, "If-Match": if_match}
        return self.http.post(f"/v1/{path}", json=body, headers=all_headers)

    def completion(self, prompt: Any = TEXT[:60], **fields: Any) -> Json:
        """Return the body of a greedy completion of 8 tokens."""
        return {"model": self.model, "prompt": prompt, "max_tokens": 8, "temperature": 0} | fields

    def complete(self, prompt: Any = TEXT[:60], **fields: Any) -> Json:
        return assert_success(self.post("completions", self.completion(prompt, **fields)))

    def chat(self, messages: Sequence[Mapping[str, str]], **fields: Any) -> Json:
        body = {"model": self.model, "messages": messages, "max_completion_tokens": 8, "temperature": 0} | fields
        return assert_success(self.post("chat/completions", body))

    @contextmanager
    def stream(self, path: str = "completions", **body: Any) -> Iterator[Iterator[Json]]:
        """Send a streamed request and yield an iterator of its chunks; leaving the block disconnects."""
        body = {"model": self.model, "stream": True, "temperature": 0} | body
        with httpx.stream("POST", f"{self.url}/v1/{path}", json=body, timeout=120, headers=self.headers) as response:
            assert response.status_code == 200, response.read()
            yield chunks(response)

    def observe(self, session: str, text: str, if_match: str | None = None, **fields: Any) -> Json:
        return assert_success(self.post(f"sessions/{session}/observe", {"text": text} | fields, if_match))

    def score(self, session: str, text: str, learn: bool = False, **fields: Any) -> Json:
        return assert_success(self.post(f"sessions/{session}/score", {"text": text, "learn": learn, **fields}))

    def session(self, session: str) -> Json:
        return assert_success(self.http.get(f"/v1/sessions/{session}"))

    def version(self, session: str) -> int:
        """Return the session's version, or 0 if there is no such session."""
        response = self.http.get(f"/v1/sessions/{session}")
        return 0 if response.status_code == 404 else int(assert_success(response)["version"])

    def readiness(self) -> str:
        """Return the status of /readyz, or "gone" if no server answers."""
        with suppress(httpx.TransportError):
            response = httpx.get(f"{self.url}/readyz")
            status: str = response.json()["status"]
            assert response.status_code == (200 if status == "ready" else 503)
            assert ("retry-after" in response.headers) == (status != "ready")
            return status
        return "gone"

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith(f"imprint_{name} ")))

    def idle(self) -> bool:
        """Return whether no request is in flight and no key/value cache is reserved."""
        return self.metric("requests_in_flight") == 0 == self.metric("kv_tokens_reserved")

    @contextmanager
    def abandoned_request(self, path: str, body: Json) -> Iterator[None]:
        """Send a request, and disconnect without reading the answer when the block ends."""
        full_body = body if path.startswith("sessions/") else {"model": self.model} | body
        address, content = urlsplit(self.url), json.dumps(full_body).encode()
        head = f"POST /v1/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection((address.hostname, address.port or 80)) as connection:
            connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            yield

    @contextmanager
    def request_in_flight(self, path: str, body: Json) -> Iterator[None]:
        """Send a request that is abandoned when the block ends; the block begins once the server works on the request.

        No other client may send at the same time.
        """
        before = self.metric("requests_in_flight")
        with self.abandoned_request(path, body):
            wait_until(lambda: self.metric("requests_in_flight") > before)
            yield


def assert_success(response: httpx.Response) -> Json:
    assert response.is_success, response.text
    body: Json = response.json()
    return body


def assert_error(response: httpx.Response, status: int, code: str | None) -> Json:
    """Check that the response is an error of this status and code in OpenAI's shape, and return the error."""
    assert response.status_code == status, response.text
    error: Json = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code
    own_words = QUOTED.sub("", error["message"].replace(response.headers["x-request-id"], ""))
    assert not HASH.search(own_words), error["message"]
    assert ("retry-after" in response.headers) == (status in (429, 503))
    return error


def chunks(response: httpx.Response) -> Iterator[Json]:
    """Yield the JSON of each server-sent event; the stream must end with [DONE]."""
    rest = b""
    for part in response.iter_raw():
        *events, rest = (rest + part).split(b"\n\n")
        for event in events:
            data = event.removeprefix(b"data: ").decode()  # a strict decoder: no character may be cut in two
            if data == "[DONE]":
                return
            chunk: Json = json.loads(data)
            assert "error" not in chunk, chunk
            yield chunk
    raise AssertionError("the stream broke off")


def text_of(streamed: Sequence[Json], choice: int = 0) -> str:
    """Return the whole text of one choice of a streamed completion."""
    return "".join(part["text"] for chunk in streamed for part in chunk["choices"] if part["index"] == choice)


def wait_until(condition: Callable[[], bool], timeout_s: float = WAIT_TIMEOUT_S) -> None:
    """Wait until the condition holds; fail after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def retry_until_success(call: Callable[[], T]) -> T:
    """Repeat the call until it raises no transport error and no AssertionError; return its result."""
    answers: list[T] = []

    def succeeded() -> bool:
        with suppress(httpx.TransportError, AssertionError):
            answers.append(call())
        return bool(answers)

    wait_until(succeeded)
    return answers[0]


@contextmanager
def background_load(url: str, size: int = 8) -> Iterator[None]:
    """Keep `size` other users busy during the block, each with a session of its own or without one."""
    finished = Event()

    def send_requests(number: int) -> int:
        num_sent = 0
        with Client(url) as client:
            while not finished.is_set():
                fields: Json = {"max_tokens": 20 + 10 * number, "temperature": 1, "logit_bias": NO_EOS}
                if number % 4:
                    fields |= {"session": f"crowd-{number}", "learn": ("prompt", "completion", "all")[number % 3]}
                client.complete(TEXT[number : 90 + number], **fields)
                num_sent += 1
        return num_sent

    with ThreadPoolExecutor(size) as pool:
        users = [pool.submit(send_requests, number) for number in range(size)]
        try:
            with Client(url) as client:
                wait_until(lambda: client.metric("requests_in_flight") >= size / 2)
            yield
        finally:
            finished.set()
        assert all(user.result() for user in users)


def in_background(
    pool: ThreadPoolExecutor, client: Client, work: Callable[[], Any], gauge: str = "turns_in_flight"
) -> Future[Any]:
    """Start a request on the pool, and return once the request has its place in the queue, by a gauge that counts it.

    A request is in flight earlier, while its body still comes; another one may then overtake it.
    """
    before = client.metric(gauge)
    future = pool.submit(work)
    wait_until(lambda: future.done() or client.metric(gauge) > before)
    return future


# --- the store, read directly -----------------------------------------------------------------------------------------


def find_valkey(data_dir: Path) -> psutil.Process | None:
    """Return the Valkey process that runs on a server's data folder, or None."""
    home = data_dir / "valkey"
    with suppress(OSError, ValueError, psutil.NoSuchProcess):
        process = psutil.Process(int((home / "pid").read_text()))
        if process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()) == home.resolve():
            return process
    return None


def stored(store: Path | str, session: str, tenant: str = "default") -> dict[str, dict[bytes, bytes]]:
    """Return every stored byte of a session, by the last part of its keys' names; a key that is no hash as its dump.

    Args:
        store: the data folder of a running server, or the URL of its Redis.
        session: id of the session.
        tenant: the session's owner.
    """
    prefix = f"imprint:{{{tenant}/{session}}}:"
    with connect_redis(store) as redis:
        keys: list[bytes] = sorted(redis.scan_iter(match=f"{prefix}*", count=10_000))
        return {key.decode().removeprefix(prefix): _content(redis, key) for key in keys}


def rows_of(pages: dict[bytes, bytes]) -> dict[int, bytes]:
    """Return the rows in a site's stored pages, by slot."""
    if not pages:
        return {}
    page = next(iter(pages.values()))
    rows = unpack_pages(pages, (len(page) - PAGE_ROWS) // sum(page[:PAGE_ROWS]))
    return dict(zip(rows.slots.tolist(), map(bytes, rows.data), strict=True))


def _content(redis: Redis, key: bytes) -> dict[bytes, bytes]:
    if redis.type(key) == b"hash":
        return cast(dict[bytes, bytes], redis.hgetall(key))
    return {b"": cast(bytes, redis.dump(key))}


def state(store: Path | str, session: str) -> dict[str, dict[bytes, bytes]]:
    """Return the stored rows and metadata of a session, without the fields that differ between equal sessions."""
    return {
        key: {name: value for name, value in content.items() if key != "meta" or name not in VOLATILE_FIELDS}
        for key, content in stored(store, session).items()
        if key == "meta" or key.startswith("rows:")
    }


def tenant_usage(store: Path | str, tenant: str) -> dict[str, int]:
    """Return the bytes of rows that a tenant's usage record names, by session; `*` is their sum."""
    with connect_redis(store) as redis:
        usage = cast(dict[bytes, bytes], redis.hgetall(f"imprint:{{{tenant}}}:sessions"))
        usage.pop(b"*settled", None)  # no session
        return {name.decode(): int(num_bytes) for name, num_bytes in usage.items()}


def connect_redis(store: Path | str) -> Redis:
    if isinstance(store, str):
        return Redis.from_url(store)
    valkey = find_valkey(store)
    assert valkey is not None
    connections = valkey.net_connections("unix")
    return Redis(unix_socket_path=next(str(connection.laddr) for connection in connections if connection.laddr))
