"""The HTTP layer: a client that disconnects ends its turn, and every error has OpenAI's shape."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, cast

import httpx
import pytest
from fastapi import FastAPI

from service.errors import Overloaded, StoreUnavailable
from service.http.install import install
from service.metrics import Metrics
from service.settings import Settings
from service.tenants import ApiKeys
from service.turns.completion import Delta, TurnEnd
from service.turns.completion_job import CompletionJob
from service.turns.idempotency import RequestContext
from service.turns.sessions import Sessions

BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "m", "prompt": "a"},
    "/v1/chat/completions": {"model": "m", "messages": [{"role": "user", "content": "a"}]},
    "/v1/sessions/s/observe": {"text": "a"},
    "/v1/sessions/s/score": {"text": "a"},
}
GENERATING = ("/v1/completions", "/v1/chat/completions")


class FakeSessions:
    """A stand-in for `Sessions` with which a test chooses the moment of a failure or pause."""

    state = "ready"
    store_status = "ok"
    model_id = "m"
    fingerprints = {"base": "b", "memory": "m"}  # noqa: RUF012
    context = 100
    vocab_size = 100
    num_parameters = 1000

    def __init__(self) -> None:
        self.early: Exception | None = None  # raised before the first event
        self.late: Exception | None = None  # raised after the first event
        self.pause_early = False
        self.pause_late = False
        self.paused = asyncio.Event()
        self.running = 0

    async def generate(
        self, ctx: RequestContext, completion_job: CompletionJob
    ) -> AsyncGenerator[Delta | TurnEnd, None]:
        await self._work(self.early, self.pause_early)
        return self._events()

    async def _events(self) -> AsyncGenerator[Delta | TurnEnd, None]:
        self.running += 1
        try:
            yield Delta(0, "hello", [])
            await self._work(self.late, self.pause_late)
            yield TurnEnd(["stop"], 1, 1, None)
        finally:
            await asyncio.sleep(0)  # a rollback yields to the event loop as well
            self.running -= 1

    async def observe(self, *args: Any, **options: Any) -> None:
        await self._work(self.early, self.pause_early)

    score = observe

    async def _work(self, error: Exception | None, pause: bool) -> None:
        self.running += 1
        try:
            if error is not None:
                raise error
            if pause:
                self.paused.set()
                await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            self.running -= 1


@pytest.fixture
def sessions() -> FakeSessions:
    return FakeSessions()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def app(sessions: FakeSessions, metrics: Metrics) -> FastAPI:
    app = FastAPI()
    install(app, sessions=cast(Sessions, sessions), metrics=metrics, settings=Settings(), keys=ApiKeys(Settings()))
    return app


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        yield client


async def leave_while_paused(app: FastAPI, sessions: FakeSessions, path: str, body: dict[str, Any]) -> bytes:
    """Send a request, disconnect as soon as its turn pauses, and return the bytes received until then."""
    answered = b""
    requests = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])

    async def receive() -> dict[str, Any]:
        for message in requests:
            return message
        await sessions.paused.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal answered
        answered += message.get("body", b"")

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
    await app(scope, cast(Any, receive), send)
    return answered


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_disconnect_before_the_first_event_ends_the_turn(
    app: FastAPI, sessions: FakeSessions, metrics: Metrics, path: str, stream: bool
) -> None:
    sessions.pause_early = True
    body = BODIES[path] | ({"stream": stream} if path in GENERATING else {})
    assert await leave_while_paused(app, sessions, path, body) == b""
    assert sessions.running == 0
    assert metrics.registry.get_sample_value("imprint_requests_in_flight") == 0
    labels = {"route": path.replace("/s/", "/{id}/"), "code": "499"}
    assert metrics.registry.get_sample_value("imprint_requests_total", labels) == 1


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_disconnect_after_the_first_event_ends_the_turn(
    app: FastAPI, sessions: FakeSessions, metrics: Metrics, path: str, stream: bool
) -> None:
    sessions.pause_late = True
    answered = await leave_while_paused(app, sessions, path, BODIES[path] | {"stream": stream})
    assert (b"hello" in answered) == stream
    assert sessions.running == 0
    labels = {"route": path, "code": "499"}
    assert metrics.registry.get_sample_value("imprint_requests_total", labels) == 1


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_before_the_first_event_has_its_own_status(
    client: httpx.AsyncClient, sessions: FakeSessions, path: str, stream: bool
) -> None:
    sessions.early = Overloaded("The queue of 1 is full.", retry_after=1.2)
    response = await client.post(path, json=BODIES[path] | {"stream": stream})
    assert response.status_code == 429
    assert response.headers["retry-after"] == "2"
    assert response.json()["error"]["code"] == "queue_full"


@pytest.mark.parametrize("path", GENERATING)
async def test_an_error_in_the_middle_of_a_stream_is_its_last_event(
    client: httpx.AsyncClient, sessions: FakeSessions, metrics: Metrics, path: str
) -> None:
    sessions.late = StoreUnavailable("The store is away.")
    response = await client.post(path, json=BODIES[path] | {"stream": True})
    *_, text, error, done, end = response.text.split("\n\n")
    assert "hello" in text
    assert json.loads(error.removeprefix("data: ")) == sessions.late.body()
    assert (done, end) == ("data: [DONE]", "")
    assert sessions.running == 0
    assert metrics.registry.get_sample_value("imprint_errors_total", {"code": "store_unavailable"}) == 1


@pytest.mark.parametrize("moment", ["early", "late"])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_unexpected_error_is_logged_under_the_request_id_and_answered_without_details(
    client: httpx.AsyncClient,
    sessions: FakeSessions,
    caplog: pytest.LogCaptureFixture,
    moment: str,
    stream: bool,
) -> None:
    setattr(sessions, moment, RuntimeError("a secret of another session"))
    with caplog.at_level(logging.ERROR):
        response = await client.post(
            "/v1/completions",
            json=BODIES["/v1/completions"] | {"stream": stream},
            headers={"X-Request-Id": "request-7"},
        )
    content = response.text
    if stream and moment == "late":
        assert content.endswith("data: [DONE]\n\n")
        content = content.split("\n\n")[-3].removeprefix("data: ")
    else:
        assert response.status_code == 500
    error = json.loads(content)["error"]
    assert (error["type"], error["code"], error["param"]) == ("server_error", "internal_error", None)
    assert "request-7" in error["message"]
    assert "secret" not in response.text
    assert "request-7" in caplog.text and "secret" in caplog.text


@pytest.mark.parametrize("state", ["loading", "draining"])
async def test_a_server_that_is_not_ready_says_so(
    client: httpx.AsyncClient, sessions: FakeSessions, metrics: Metrics, state: str
) -> None:
    assert (await client.get("/readyz")).status_code == 200
    sessions.state = state
    probe = await client.get("/readyz")
    assert (probe.status_code, probe.json()) == (503, {"status": state, "store": "ok"})
    assert int(probe.headers["retry-after"]) >= 1
    assert (await client.get("/livez")).status_code == 200
    assert metrics.registry.get_sample_value("imprint_ready_state") == 0
    for path, body in BODIES.items():
        response = await client.post(path, json=body)
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) == 5  # with the five retries of a client: longer than a start
        assert response.json()["error"]["code"] == state


@pytest.mark.parametrize("request_id", ["a", "7f-A_b.c:d/e", "x" * 128])
async def test_a_safe_request_id_is_echoed(client: httpx.AsyncClient, request_id: str) -> None:
    for path in ("/livez", "/nothing", "/v1/models"):
        response = await client.get(path, headers={"X-Request-Id": request_id})
        assert response.headers["x-request-id"] == request_id


@pytest.mark.parametrize("request_id", ["", "a b", "<script>", "a" * 129, "\xff", "a;b"])
async def test_an_unsafe_request_id_is_replaced(client: httpx.AsyncClient, request_id: str) -> None:
    generated = {
        (await client.get("/livez", headers={b"X-Request-Id": request_id.encode("latin-1")})).headers["x-request-id"]
        for _ in range(2)
    }
    assert len(generated) == 2 and request_id not in generated
