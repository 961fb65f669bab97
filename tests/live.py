"""What the tests of live servers share: a client that expects success, and the raw bytes that a server stores."""

from __future__ import annotations

import json
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

from service.store.base import PAGE_ROWS, RowBatch
from tests.tiny import TEXT

Json = dict[str, Any]
T = TypeVar("T")

EOS = "2"  # of the tiny base, as a key of `logit_bias`
NO_EOS = {EOS: -100}
VOLATILE_FIELDS = {
    b"id",
    b"nonce",
    b"created",
    b"updated",
    b"undo_from",
    b"undo_bytes",
}  # of a stored session: they differ between equal ones
WAIT_TIMEOUT_S = 300.0


class Client:
    """A user of one server. Calls that return JSON assert success."""

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
        """`path` is what comes after /v1/."""
        given = headers if if_match is None else {**headers, "If-Match": if_match}
        return self.http.post(f"/v1/{path}", json=body, headers=given)

    def completion(self, prompt: Any = TEXT[:60], **fields: Any) -> Json:
        """The body of a greedy completion of 8 tokens."""
        return {"model": self.model, "prompt": prompt, "max_tokens": 8, "temperature": 0} | fields

    def complete(self, prompt: Any = TEXT[:60], **fields: Any) -> Json:
        return assert_success(self.post("completions", self.completion(prompt, **fields)))

    def chat(self, messages: Sequence[Mapping[str, str]], **fields: Any) -> Json:
        body = {"model": self.model, "messages": messages, "max_completion_tokens": 8, "temperature": 0} | fields
        return assert_success(self.post("chat/completions", body))

    @contextmanager
    def stream(self, path: str = "completions", **body: Any) -> Iterator[Iterator[Json]]:
        """The chunks of a stream as they come; leaving early disconnects."""
        body = {"model": self.model, "stream": True, "temperature": 0} | body
        with httpx.stream("POST", f"{self.url}/v1/{path}", json=body, timeout=120, headers=self.headers) as response:
            assert response.status_code == 200, response.read()
            yield chunks(response)

    def observe(self, session: str, text: str, if_match: str | None = None) -> Json:
        return assert_success(self.post(f"sessions/{session}/observe", {"text": text}, if_match))

    def score(self, session: str, text: str, learn: bool = False) -> Json:
        return assert_success(self.post(f"sessions/{session}/score", {"text": text, "learn": learn}))

    def session(self, session: str) -> Json:
        return assert_success(self.http.get(f"/v1/sessions/{session}"))

    def version(self, session: str) -> int:
        """0 if there is no such session."""
        response = self.http.get(f"/v1/sessions/{session}")
        return 0 if response.status_code == 404 else int(assert_success(response)["version"])

    def readiness(self) -> str:
        """What /readyz says; "gone" if nobody answers."""
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
        """Nothing is in hand and nothing is reserved."""
        return self.metric("requests_in_flight") == 0 == self.metric("kv_tokens_reserved")

    @contextmanager
    def sent(self, path: str, body: Json) -> Iterator[None]:
        """A request whose client goes when the block ends, without having read an answer."""
        named = body if path.startswith("sessions/") else {"model": self.model} | body
        address, content = urlsplit(self.url), json.dumps(named).encode()
        head = f"POST /v1/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection((address.hostname, address.port or 80)) as connection:
            connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            yield

    @contextmanager
    def request_in_flight(self, path: str, body: Json) -> Iterator[None]:
        """The same, where nobody else is sending: the block begins when the server has the request in hand."""
        before = self.metric("requests_in_flight")
        with self.sent(path, body):
            wait_until(lambda: self.metric("requests_in_flight") > before)
            yield


def assert_success(response: httpx.Response) -> Json:
    assert response.is_success, response.text
    body: Json = response.json()
    return body


def assert_error(response: httpx.Response, status: int, code: str) -> Json:
    """The error of a response, which is of that status and code, in OpenAI's shape."""
    assert response.status_code == status, response.text
    error: Json = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert ("retry-after" in response.headers) == (status in (429, 503))
    return error


def chunks(response: httpx.Response) -> Iterator[Json]:
    """The JSON of each server-sent event; the stream must end with [DONE]."""
    rest = b""
    for part in response.iter_raw():
        *events, rest = (rest + part).split(b"\n\n")
        for event in events:
            data = event.removeprefix(b"data: ").decode()  # strict: no character is cut in two
            if data == "[DONE]":
                return
            chunk: Json = json.loads(data)
            assert "error" not in chunk, chunk
            yield chunk
    raise AssertionError("the stream broke off")


def text_of(streamed: Sequence[Json], choice: int = 0) -> str:
    """What a choice's chunks of a streamed completion say together."""
    said = [one for chunk in streamed for one in chunk["choices"] if one["index"] == choice]
    return "".join(one["text"] for one in said)


def wait_until(condition: Callable[[], bool], patience: float = WAIT_TIMEOUT_S) -> None:
    """Waits for something that is sure to happen."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def retry_until_success(call: Callable[[], T]) -> T:
    """The answer, once the server gives one."""
    answers: list[T] = []

    def answered() -> bool:
        with suppress(httpx.TransportError, AssertionError):
            answers.append(call())
        return bool(answers)

    wait_until(answered)
    return answers[0]


@contextmanager
def background_load(url: str, size: int = 8) -> Iterator[None]:
    """So many other users, each with a session of its own or none, who send one request after the other."""
    over = Event()

    def send_requests(number: int) -> int:
        sent = 0
        with Client(url) as client:
            while not over.is_set():
                fields: Json = {"max_tokens": 20 + 10 * number, "temperature": 1, "logit_bias": NO_EOS}
                if number % 4:
                    fields |= {"session": f"crowd-{number}", "learn": ("prompt", "completion", "all")[number % 3]}
                client.complete(TEXT[number : 90 + number], **fields)
                sent += 1
        return sent

    with ThreadPoolExecutor(size) as pool:
        users = [pool.submit(send_requests, number) for number in range(size)]
        try:
            with Client(url) as client:
                wait_until(lambda: client.metric("requests_in_flight") >= size / 2)
            yield
        finally:
            over.set()
        assert all(user.result() for user in users)


def in_background(pool: ThreadPoolExecutor, client: Client, work: Callable[[], Any]) -> Future[Any]:
    """Starts a request and returns when the server has it in hand."""
    before = client.metric("requests_in_flight")
    future = pool.submit(work)
    wait_until(lambda: future.done() or client.metric("requests_in_flight") > before)
    return future


# --- the store, from behind -------------------------------------------------------------------------------------------


def find_valkey(data_dir: Path) -> psutil.Process | None:
    """The Valkey process that runs on a server's data folder."""
    home = data_dir / "valkey"
    with suppress(OSError, ValueError, psutil.NoSuchProcess):
        process = psutil.Process(int((home / "pid").read_text()))
        if process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()) == home.resolve():
            return process
    return None


def stored(store: Path | str, session: str, tenant: str = "default") -> dict[str, dict[bytes, bytes]]:
    """Every byte that is kept of a session, by the last part of its keys' names; of what is no hash, its dump.

    store: the data folder of a running server, or the URL of its Redis.
    """
    prefix = f"imprint:{{{tenant}/{session}}}:"
    with connect_redis(store) as redis:
        keys: list[bytes] = sorted(redis.scan_iter(match=f"{prefix}*"))
        return {key.decode().removeprefix(prefix): _content(redis, key) for key in keys}


def rows_of(pages: dict[bytes, bytes]) -> dict[int, bytes]:
    """A site's rows as they are stored, by slot."""
    if not pages:
        return {}
    page = next(iter(pages.values()))
    rows = RowBatch.of_pages(pages, (len(page) - PAGE_ROWS) // sum(page[:PAGE_ROWS]))
    return dict(zip(rows.slots.tolist(), map(bytes, rows.data), strict=True))


def _content(redis: Redis, key: bytes) -> dict[bytes, bytes]:
    if redis.type(key) == b"hash":
        return cast(dict[bytes, bytes], redis.hgetall(key))
    return {b"": cast(bytes, redis.dump(key))}


def state(store: Path | str, session: str) -> dict[str, dict[bytes, bytes]]:
    """What a session is: its rows, and its meta but for what tells it from an equal one."""
    return {
        key: {name: value for name, value in content.items() if key != "meta" or name not in VOLATILE_FIELDS}
        for key, content in stored(store, session).items()
        if key == "meta" or key.startswith("rows:")
    }


def tenant_usage(store: Path | str, tenant: str) -> dict[str, int]:
    """The bytes of rows that a tenant's account names, by session; `*` is their sum."""
    with connect_redis(store) as redis:
        noted = cast(dict[bytes, bytes], redis.hgetall(f"imprint:{{{tenant}}}:sessions"))
        return {name.decode(): int(num_bytes) for name, num_bytes in noted.items()}


def connect_redis(store: Path | str) -> Redis:
    if isinstance(store, str):
        return Redis.from_url(store)
    valkey = find_valkey(store)
    assert valkey is not None
    connections = valkey.net_connections("unix")
    return Redis(unix_socket_path=next(str(each.laddr) for each in connections if each.laddr))
