"""Both Python clients, against a real server, over a connection that breaks, and against a server that misbehaves."""

from __future__ import annotations

import inspect
import io
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

import imprint
from service import errors
from service.client import operations, transport
from service.client.errors import error_from_response
from tests.conftest import Server
from tests.live import NO_EOS, in_background, wait_until
from tests.live import Client as Plain
from tests.service.async_as_sync import BlockingAsyncClient
from tests.service.breaking_proxy import BreakingProxy
from tests.service.scripted_server import CHUNK, OBSERVED, Answer, ScriptedServer, error_answer, ok, stream, text_chunk
from tests.tiny import TEXT

CLIENTS: dict[str, Callable[..., Any]] = {"sync": imprint.Client, "async": BlockingAsyncClient}
CHAT = [{"role": "user", "content": TEXT[:80]}]
GREEDY: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "logit_bias": NO_EOS}


@pytest.fixture(params=CLIENTS)
def connect(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Yield a function that makes clients of one kind."""
    clients: list[Any] = []

    def connect(url: str, **options: Any) -> Any:
        clients.append(CLIENTS[request.param](url, **options))
        return clients[-1]

    yield connect
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def client(connect: Callable[..., Any], server: Server) -> Any:
    return connect(server.url)


@pytest.fixture
def session() -> str:
    return uuid4().hex


# Against a real server.


def test_sessions_are_created_with_options_shown_listed_and_erased(client: Any) -> None:
    names = [f"{uuid4().hex[:8]}-{number}" for number in range(3)]
    names.sort()
    for name in names:
        created = client.create(name, learn="all", keep_text=True, ttl_s=3600)
        assert created.options == {"learn": "all", "keep_text": True, "ttl_s": 3600}
        assert (created.id, created.version) == (name, 0)
    assert client.get(names[0]).id == names[0]
    listed = [listing.id for listing in client.sessions(page_size=2)]
    assert listed == sorted(listed) and set(names) <= set(listed)
    assert [listing.id for listing in client.sessions(after=names[0])] == listed[listed.index(names[0]) + 1 :]
    for name in names:
        client.delete(name)
    with pytest.raises(imprint.NotFound) as error:
        client.get(names[0])
    assert (error.value.status, error.value.code) == (404, "session_not_found")
    assert error.value.request_id


def test_texts_and_chats_are_observed_and_scored(client: Any, session: str) -> None:
    observed = client.observe(session, TEXT)
    assert (observed.version, observed.tokens_learned > 0, observed.rows_written > 0) == (1, True, True)
    assert client.observe(session, messages=CHAT, if_match=1).version == 2
    with pytest.raises(imprint.PreconditionFailed):
        client.observe(session, TEXT, if_match=1)
    scored = client.score(session, TEXT)
    assert scored.version == 2 and scored.loss < scored.frozen_loss
    assert client.score(session, TEXT, learn=True).version == 3


def test_files_are_observed_piece_by_piece_and_once(client: Any, session: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("One two.\n\n" * 8)
    steps: list[tuple[str, int, int | None, int | None]] = []

    def observe(files: list[Any], key: str | None = None) -> Any:
        steps.clear()
        return client.observe_files(
            session,
            files,
            piece_chars=50,
            idempotency_key=key,
            progress=lambda progress: steps.append(
                (Path(progress.file).name, progress.characters, progress.total, progress.version)
            ),
        )

    done = observe([tmp_path / "a", str(tmp_path / "a")], "mine")
    assert steps == [("a", 50, 160, 1), ("a", 80, 160, 2), ("a", 130, 160, 3), ("a", 160, 160, 4)]
    assert done.tokens_learned == client.get(session).tokens_learned
    assert done.loss is not None and f"{done.tokens_learned:,} tokens" in str(done)
    again = observe([tmp_path / "a", str(tmp_path / "a")], "mine")
    assert (again.tokens_learned, again.version) == (done.tokens_learned, 4)
    assert client.get(session).version == 4
    observe([io.BytesIO(b"Three.")])
    assert steps == [("the stream", 6, None, 5)]
    (tmp_path / "bad").write_bytes(b"\xff")
    for bad in ("bad", "none"):
        with pytest.raises(imprint.FileError, match=bad):
            observe([tmp_path / "a", tmp_path / bad])
    assert client.get(session).version == 5


def test_a_stream_has_the_text_of_the_whole_answer(client: Any, session: str) -> None:
    whole = client.complete(TEXT[:60], **GREEDY)
    streamed = client.stream(TEXT[:60], **GREEDY)
    assert "".join(chunk.text for chunk in streamed) == streamed.text == whole.text
    assert whole.adaptation is streamed.adaptation is None
    reply = client.chat(CHAT, session=session, **GREEDY)
    assert reply.adaptation.version_to == 1
    with client.stream_chat([*CHAT, *CHAT], session=session, adapt="both", **GREEDY) as streamed:
        chunks = list(streamed)
    assert chunks[-1].adaptation == streamed.adaptation
    assert streamed.adaptation.version_to == client.get(session).version == 2
    assert client.complete(["a", "b"], n=2, logprobs=1, **GREEDY).choices[3].logprobs.tokens


def test_a_stream_that_is_left_changes_nothing(client: Any, server: Server, session: str) -> None:
    with client.stream(TEXT[:60], session=session, max_tokens=400, logit_bias=NO_EOS) as streamed:
        next(streamed)
    with Plain(server.url) as plain:
        wait_until(plain.idle)
        assert plain.version(session) == 0


def test_versions_are_rolled_back_forked_exported_and_unlearned(client: Any, session: str) -> None:
    client.create(session, keep_text=True)
    for text in (TEXT, TEXT[40:], TEXT[80:]):
        client.observe(session, text)
    assert client.rollback(session, 2).version == 4
    assert client.unlearn(session, 1).version == 5
    diff = client.diff(session, 3, 5)
    assert [entry.version for entry in diff.forgotten] == [1, 3] and diff.tokens_learned < 0 == len(diff.learned)
    entries = list(client.log(session, page_size=2))
    assert [(entry.version, entry.kind, entry.of) for entry in entries[:2]] == [(5, "unlearn", 1), (4, "rollback", 2)]
    assert [entry.version for entry in entries] == [5, 4, 3, 2, 1]
    assert next(iter(client.log(session, before=3))).text == TEXT[40:]
    fork = client.fork(session, f"{session}-fork")
    data = client.export(session)
    copy = client.import_(f"{session}-copy", data)
    assert fork.rows == copy.rows == client.get(session).rows > 0
    scores = [client.score(name, TEXT).logprobs for name in (session, fork.id, copy.id)]
    assert scores[0] == scores[1] == scores[2]
    with pytest.raises(imprint.BadRequest) as bad:
        client.import_(session, data[:-1])
    assert bad.value.code == "invalid_export"


def test_policies_act_learn_rewards_and_predict_labels(client: Any, session: str) -> None:
    first = client.act(session, [0.0], model="bandit-10", seed=1)
    assert first.adaptation.version_to == 1 and 0 <= first.action < len(first.probabilities)
    assert client.feedback(session, first.action_id, 1.0).version == 2
    second = client.act(session, [0.0], temperature=0)
    assert client.act(session, [0.0], reward=0.0, action_id=second.action_id).adaptation.version_to == 4
    labels = f"{session}-labels"
    client.create(labels, model="digits")
    digit = [0.0] * 64
    assert client.observe(labels, features=digit, label=3).version == 1
    assert client.predict(labels, digit).label == 3


def test_rewards_of_several_actions_are_one_version_learned_once(client: Any, session: str) -> None:
    choices = [{"actions": ["a", "b"], "context": {"hour": hour}} for hour in range(3)]
    taken = client.act_batch(session, choices, model="bandit").data
    rewards = [{"action_id": each.action_id, "reward": float(each.action == "a"), "regret": 0.5} for each in taken]
    with pytest.raises(imprint.Conflict) as twice:
        client.feedback_batch(session, [*rewards, rewards[0]])
    assert twice.value.param == "examples.3.action_id" and client.get(session).version == 1
    first, again = (client.feedback_batch(session, rewards, idempotency_key="the-rewards") for _ in range(2))
    assert first == again and (first.version, first.tokens_learned) == (2, 3)
    with pytest.raises(imprint.Conflict) as taken_again:
        client.feedback_batch(session, rewards[:1])
    assert taken_again.value.code == "action_closed"
    with pytest.raises(imprint.PreconditionFailed):
        client.feedback_batch(session, rewards[:1], if_match=1)


def test_an_error_names_its_code_and_parameter(client: Any, session: str) -> None:
    with pytest.raises(imprint.BadRequest) as bad:
        client.complete("a", temperature=101)
    assert (bad.value.param, bad.value.status) == ("temperature", 400)
    with pytest.raises(imprint.NotFound) as error:
        client.complete("a", model="gpt-4o")
    assert error.value.code == "model_not_found"
    with pytest.raises(imprint.BadRequest):
        next(client.stream("a", session=session, n=17))
    with pytest.raises(imprint.ClientError):
        client.get("..")
    with pytest.raises(imprint.ClientError):
        client.observe(session, "\ud800")


# Over a connection that breaks.


@pytest.mark.parametrize("bytes_forwarded", [0, 200], ids=["before the answer", "within it"])
def test_what_learns_is_learned_once_over_a_line_that_breaks(
    connect: Callable[..., Any], server: Server, session: str, bytes_forwarded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "INITIAL_BACKOFF_S", 0.01)
    proxy = BreakingProxy(server.url)
    with proxy.open():
        client = connect(proxy.url)
        client.model()
        proxy.bytes_forwarded = bytes_forwarded
        calls: list[Callable[[], Any]] = [
            lambda: client.observe(session, TEXT),
            lambda: client.score(session, TEXT, learn=True),
            lambda: client.complete(TEXT, session=session, **GREEDY),
            lambda: client.rollback(session, 2),
            lambda: client.fork(session, f"{session}-fork"),
            lambda: client.import_(session, client.export(f"{session}-fork")),
            lambda: (
                list(client.stream(TEXT, session=session, **GREEDY))
                if not bytes_forwarded
                else client.observe(session, "a")
            ),
        ]
        for call in calls:
            proxy.request_headers.clear()
            proxy.num_breaks = 2
            call()
        assert len({head["idempotency-key"] for head in proxy.request_headers}) == 1 and len(proxy.request_headers) == 3
        assert client.get(session).version == 6
        proxy.num_breaks = 2
        client.delete(f"{session}-fork")
        with pytest.raises(imprint.NotFound):
            client.delete(f"{session}-fork")


def test_a_broken_stream_can_be_repeated_with_its_key(
    connect: Callable[..., Any], server: Server, session: str
) -> None:
    proxy = BreakingProxy(server.url)
    with proxy.open():
        client = connect(proxy.url)
        client.model()
        proxy.num_breaks, proxy.bytes_forwarded = 1, 700
        broken = client.stream(TEXT, session=session, max_tokens=30, logit_bias=NO_EOS)
        with pytest.raises(imprint.ConnectionBroken) as error:
            list(broken)
        assert error.value.idempotency_key == broken.idempotency_key
        key = error.value.idempotency_key
        again = client.stream(TEXT, session=session, max_tokens=30, logit_bias=NO_EOS, idempotency_key=key)
        list(again)
        assert broken.text and again.text.startswith(broken.text)
        assert again.adaptation.version_to == client.get(session).version == 1


# Against a server that misbehaves.


@pytest.fixture
def scripted_server() -> Iterator[Callable[..., ScriptedServer]]:
    started: list[ScriptedServer] = []

    def start(*answers: Answer, port: int = 0) -> ScriptedServer:
        started.append(ScriptedServer(*answers, port=port))
        return started[-1]

    yield start
    for server in started:
        server.close()


def test_a_temporary_error_is_retried_after_the_time_that_it_names(
    connect: Callable[..., Any], scripted_server: Callable[..., ScriptedServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "INITIAL_BACKOFF_S", 0.01)
    gateway: Answer = (502, {}, b"Bad Gateway")
    retryable = error_answer(500, "engine_error", **{"x-should-retry": "true"})
    server = scripted_server(error_answer(429, "queue_full", **{"Retry-After": "1"}), gateway, retryable, ok(OBSERVED))
    waits: list[tuple[type, float]] = []
    client = connect(server.url, on_wait=lambda error, wait: waits.append((type(error), wait)))
    began = time.monotonic()
    assert client.observe("me", "text").version == 1
    assert time.monotonic() - began >= 1
    assert [error_class for error_class, _ in waits] == [errors.Overloaded, imprint.ImprintError, errors.EngineError]
    assert 1 <= waits[0][1] <= 1.25 and all(0 < wait <= 0.04 for _, wait in waits[1:])
    assert len({headers["Idempotency-Key"] for _, headers, _ in server.requests}) == 1


@pytest.mark.parametrize(
    ("answer", "error_class"),
    [
        (error_answer(429, "insufficient_quota", **{"x-should-retry": "false"}), imprint.QuotaExceeded),
        (error_answer(429, "rate_limit_exceeded", **{"Retry-After": "3600"}), imprint.RateLimited),
        (error_answer(409, "session_erased"), imprint.Conflict),
        (error_answer(401, "invalid_api_key"), imprint.Unauthorized),
        (error_answer(500, "damaged_session"), imprint.EngineError),
        (error_answer(507, "session_too_large"), imprint.TooLarge),
        ((418, {}, b"short and stout"), imprint.ImprintError),
        ((200, {}, b"<html>"), imprint.UnexpectedAnswer),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_permanent_error_is_raised_at_once(
    connect: Callable[..., Any], scripted_server: Callable[..., ScriptedServer], answer: Any, error_class: type
) -> None:
    server = scripted_server(answer)
    with pytest.raises(imprint.ImprintError) as error:
        connect(server.url).observe("me", "text", idempotency_key="mine")
    assert type(error.value) is error_class
    assert error.value.idempotency_key == "mine"
    assert len(server.requests) == 1


def test_a_server_that_has_answered_before_is_waited_for_and_another_is_not(
    connect: Callable[..., Any], scripted_server: Callable[..., ScriptedServer]
) -> None:
    server = scripted_server(ok(OBSERVED))
    port: int = server.server.server_port
    client = connect(server.url, on_wait=lambda error, wait: scripted_server(ok(OBSERVED), port=port))
    client.observe("me", "text")
    server.close()
    assert client.observe("me", "text").version == 1
    waited: list[float] = []
    with pytest.raises(imprint.NoServer, match="imprint serve"):
        connect("http://127.0.0.1:9", on_wait=lambda error, wait: waited.append(wait)).get("me")
    assert not waited


def test_the_number_of_attempts_is_limited(
    connect: Callable[..., Any], scripted_server: Callable[..., ScriptedServer]
) -> None:
    server = scripted_server(*[error_answer(503, "loading", **{"Retry-After": "0"})] * 9)
    with pytest.raises(imprint.NotReady):
        connect(server.url, retries=2).get("me")
    assert len(server.requests) == 3


def test_an_error_within_a_stream_comes_after_the_text_before_it(
    connect: Callable[..., Any], scripted_server: Callable[..., ScriptedServer]
) -> None:
    busy = {"error": {"message": "It moved on.", "type": "server_error", "param": None, "code": "session_busy"}}
    server = scripted_server(
        stream(text_chunk("Hel"), text_chunk("lo"), busy, "[DONE]"), stream(text_chunk("Hel"), CHUNK, "[DONE]")
    )
    client = connect(server.url)
    streamed = client.stream_chat(CHAT, model="tiny")
    with pytest.raises(imprint.SessionBusy, match="It moved on"):
        list(streamed)
    assert streamed.text == "Hello"
    with pytest.raises(imprint.UnexpectedAnswer):
        list(client.stream_chat(CHAT, model="tiny"))


# The package.


def test_retry_after_may_be_a_date() -> None:
    assert imprint.BadRequest is errors.BadRequest
    past = error_from_response(503, {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, b"", "http://here")
    assert past.retry_after == 0.0 and type(past) is errors.Unavailable
    assert error_from_response(503, {"retry-after": "soon"}, b"", "http://here").retry_after is None


def test_url_and_key_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPRINT_URL", "http://there:1/")
    monkeypatch.setenv("IMPRINT_API_KEY", "imp_1")
    endpoint = transport.Endpoint(None, None)
    assert (endpoint.url, endpoint.headers) == ("http://there:1", {"Authorization": "Bearer imp_1"})
    assert transport.Endpoint("http://here", "").headers == {}
    for url in ("localhost:8000", "ftp://here", "http://", "http://here:port"):
        with pytest.raises(imprint.ClientError, match="http://…"):
            imprint.Client(url)
    with pytest.raises(imprint.ClientError):
        imprint.Client(api_key="é")


def test_both_clients_have_the_same_calls_with_text_and_signature() -> None:
    def calls(kind: type) -> dict[str, Any]:
        methods = {name: value for name, value in vars(kind).items() if not name.startswith("_") and callable(value)}
        return {name: [*inspect.signature(method).parameters] for name, method in methods.items()}

    assert calls(imprint.Client) == calls(imprint.AsyncClient)
    assert calls(imprint.Client)["rollback"] == ["self", "session", "version", "idempotency_key", "if_match"]
    for name in calls(imprint.Client):
        assert inspect.getdoc(getattr(imprint.Client, name))
    defined = {
        name
        for name, operation in vars(operations).items()
        if getattr(operation, "__module__", "") == operations.__name__
    }
    defined = {name for name in defined if inspect.isfunction(getattr(operations, name)) and not name.startswith("_")}
    assert defined - calls(imprint.Client).keys() == {"sessions_page", "log_page"}


def test_the_package_exports_all_errors_of_the_server() -> None:
    names = {name for name, kind in vars(errors).items() if inspect.isclass(kind) and "errors" in kind.__module__}
    assert names - {"CommandError"} <= set(imprint.__all__)


def test_the_client_needs_no_torch() -> None:
    heavy = "torch", "numpy", "fastapi", "transformers", "redis", "tokenizers", "typer"
    check = f"import sys, imprint; print([name for name in {heavy!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True).stdout == "[]\n"


def test_threads_may_share_a_client(server: Server, session: str) -> None:
    with imprint.Client(server.url) as client, ThreadPoolExecutor(4) as pool, Plain(server.url) as plain:
        long = in_background(pool, plain, lambda: client.complete(TEXT, max_tokens=60, logit_bias=NO_EOS))
        versions = sorted(pool.map(lambda _: client.observe(session, TEXT[:60]).version, range(6)))
        assert long.result() and versions == [1, 2, 3, 4, 5, 6]
