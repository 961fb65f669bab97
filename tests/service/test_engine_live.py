"""The engine of a running server: fairness, batches, clients that disconnect, start and shutdown."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
import psutil
import pytest

from model.base.config import tiny_config
from model.text.tokenizer import Tokenizer
from tests.live import NO_EOS, WAIT_TIMEOUT_S, Client, Json, assert_error, find_valkey, text_of, wait_until
from tests.tiny import TEXT, build_tiny_base

PROMPT = TEXT[:60]
CONTEXT = 8192
HUGE = TEXT * 3000  # takes many seconds to learn


@pytest.fixture(scope="session")
def long_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a tiny base with a long context, so that a request can take long."""
    return str(build_tiny_base(tmp_path_factory.mktemp("base") / "long", tiny_config(max_context=CONTEXT)))


@pytest.fixture
def client(server: Any) -> Iterator[Client]:
    with Client(server.url, server.model) as client:
        yield client
        wait_until(client.idle)


@pytest.fixture
def slow(make_server: Callable[..., Any], long_base: str) -> Iterator[Callable[..., tuple[Any, Client]]]:
    """Yield a function that starts a server of the long base and returns it with a client."""
    with ExitStack() as stack:

        def start(**settings: object) -> tuple[Any, Client]:
            server = make_server(model=long_base, **settings).start()
            return server, stack.enter_context(Client(server.url, server.model))

        yield start


def endless(**fields: Any) -> Json:
    """Return a completion that goes on until the context is full."""
    return {"prompt": PROMPT, "max_tokens": CONTEXT - 100, "logit_bias": NO_EOS, "temperature": 0} | fields


@pytest.fixture
def session() -> str:
    return uuid4().hex


# --- batches and fairness ---------------------------------------------------------------------------------------------


def test_a_long_prompt_does_not_stall_a_running_stream(slow: Callable[..., tuple[Any, Client]]) -> None:
    """The stream gets one token for each block of 64 tokens of the prompt."""
    _, client = slow()
    arrived = 0
    with client.stream(**endless()) as chunks, ThreadPoolExecutor(2) as pool:
        next(chunks)

        def read(prompt: Any) -> int:
            nonlocal arrived
            prompt_read = pool.submit(client.complete, prompt, max_tokens=1)
            before = arrived
            for _ in chunks:
                arrived += 1
                if prompt_read.done():
                    break
            assert prompt_read.result()["usage"]["prompt_tokens"] == len(prompt)
            return arrived - before

        blocks = CONTEXT // 64
        assert read([5] * (CONTEXT - 1)) >= blocks / 2
        observed = pool.submit(client.observe, "alice", TEXT * 100)
        next(chunk for chunk in chunks if observed.done())


def test_more_streams_than_the_batch_holds_all_end_as_they_would_alone(make_server: Callable[..., Any]) -> None:
    server = make_server(max_batch=2).start()
    with Client(server.url, server.model) as client:
        prompts = [TEXT[n : 50 + n] for n in range(8)]
        alone = [client.complete(prompt, max_tokens=60)["choices"][0] for prompt in prompts]

        def streamed(prompt: str) -> tuple[str, str]:
            with client.stream(prompt=prompt, max_tokens=60) as chunks:
                received = list(chunks)
            return text_of(received), received[-1]["choices"][0]["finish_reason"]

        with ThreadPoolExecutor(len(prompts)) as pool:
            together = list(pool.map(streamed, prompts))
        assert together == [(choice["text"], choice["finish_reason"]) for choice in alone]
        four = client.complete(n=4, max_tokens=20, temperature=1, seed=1, logit_bias=NO_EOS)
        assert len({choice["text"] for choice in four["choices"]}) == 4


def test_more_sessions_than_are_kept_hot_may_learn_at_once(make_server: Callable[..., Any]) -> None:
    server = make_server(hot_sessions=1, max_batch=4, max_queue=8).start()
    with Client(server.url, server.model) as client, ThreadPoolExecutor(8) as pool:
        for version in (1, 2, 3):
            answers = list(pool.map(lambda number: client.observe(f"s{number}", PROMPT), range(20)))
            assert [answer["version"] for answer in answers] == [version] * 20
        assert client.metric("session_evictions_total") > 0


def test_choices_are_independent_and_come_interleaved(client: Client) -> None:
    body: Json = {"prompt": PROMPT, "n": 4, "max_tokens": 40, "temperature": 1, "seed": 3, "logit_bias": NO_EOS}
    whole = client.complete(**body)
    texts = [choice["text"] for choice in whole["choices"]]
    assert len(set(texts)) == 4 and whole["usage"]["completion_tokens"] == 160
    with client.stream(**body) as chunks:
        received = list(chunks)
    assert [text_of(received, choice) for choice in range(4)] == texts
    order = [chunk["choices"][0]["index"] for chunk in received]
    assert order != sorted(order)
    assert texts[0] == client.complete(**body | {"n": 1})["choices"][0]["text"]


def test_several_prompts_of_a_session_are_read_in_order(client: Client, session: str) -> None:
    client.observe(session, TEXT)
    client.observe(f"{session}-one", TEXT)
    together = client.complete([PROMPT, TEXT, PROMPT], session=session)
    one_by_one = [client.complete(p, session=f"{session}-one")["choices"][0]["text"] for p in (PROMPT, TEXT, PROMPT)]
    assert [choice["text"] for choice in together["choices"]] == one_by_one


# --- streamed text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn", ["prompt", "all"])
def test_nothing_of_a_stop_string_leaks(client: Client, session: str, learn: str) -> None:
    fields: Json = {"max_tokens": 120, "logit_bias": NO_EOS}
    client.observe(session, TEXT * 3)
    text = client.complete(session=session, adapt="predict", **fields)["choices"][0]["text"]
    for start in range(0, len(text) - 12, max(1, len(text) // 10)):
        stop = text[start : start + 12]
        expected = text[: text.find(stop)]
        body: Json = fields | {"session": session, "adapt": "predict", "stop": ["never generated", stop]}
        with client.stream(prompt=PROMPT, learn=learn, **body) as chunks:
            received = list(chunks)
        assert text_of(received) == expected
        assert received[-1]["choices"][0]["finish_reason"] == "stop"
        assert client.complete(**body)["choices"][0]["text"] == expected


def test_no_chunk_has_half_a_character(client: Client, tiny_base: Path) -> None:
    """Draw the bytes of é and € at random: characters arrive whole, and invalid bytes become U+FFFD."""
    tokenizer = Tokenizer.load(tiny_base)
    halves = {bytes([byte]) for byte in "é€".encode()}
    bias = {str(i): 100 for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) in halves}
    body: Json = {"messages": [{"role": "user", "content": "é"}], "logprobs": True, "max_completion_tokens": 400}
    with client.stream("chat/completions", **body, logit_bias=bias, **{"temperature": 2, "seed": 5}) as chunks:
        choices = [chunk["choices"][0] for chunk in chunks]
    pieces = [choice["delta"].get("content", "") for choice in choices]
    parts = [
        bytes(token["bytes"]) for choice in choices if choice["logprobs"] for token in choice["logprobs"]["content"]
    ]
    assert len(parts) == 400
    assert "".join(pieces) == b"".join(parts).decode(errors="replace")
    assert {"é", "€"} <= set("".join(pieces))


# --- clients that disconnect ------------------------------------------------------------------------------------------


LONG_REQUESTS: list[tuple[str, Json]] = [
    ("completions", endless(learn="all")),
    ("completions", endless(learn="all", stream=True)),
    ("completions", endless(prompt=[5] * 300, n=2, max_tokens=3000)),
    ("chat/completions", {"messages": [{"role": "user", "content": TEXT}], "logit_bias": NO_EOS}),
    ("sessions/alice/observe", {"text": HUGE}),
    ("sessions/alice/score", {"text": HUGE, "learn": True}),
]


def of_alice(path: str, body: Json) -> Json:
    """Add the session "alice" to a body whose path does not name it."""
    return body if "sessions/" in path else body | {"session": "alice"}


def test_a_request_whose_client_disconnects_ends_and_changes_nothing(slow: Callable[..., tuple[Any, Client]]) -> None:
    """A request that went on would be committed, which the versions would show."""
    _, client = slow(max_batch=1)
    for path, body in LONG_REQUESTS:
        with client.request_in_flight(path, of_alice(path, body)):
            wait_until(lambda: client.metric("kv_tokens_reserved") > 0)
        wait_until(client.idle)
        assert client.version("alice") == 0
    with client.stream(**of_alice("", endless(learn="all"))) as chunks:
        for _ in range(100):
            next(chunks)
    wait_until(client.idle)
    assert client.metric("tokens_learned_total") == 0
    assert client.observe("alice", TEXT) == client.observe("bob", TEXT)


def test_a_waiting_request_whose_client_disconnects_changes_nothing(slow: Callable[..., tuple[Any, Client]]) -> None:
    _, client = slow(max_batch=1)
    for path, body in LONG_REQUESTS:
        with client.request_in_flight("sessions/alice/observe", {"text": HUGE}):
            wait_until(lambda: client.metric("kv_tokens_reserved") > 0)
            with client.request_in_flight(path, of_alice(path, body)):  # waits for its session
                pass
            wait_until(lambda: client.metric("requests_in_flight") == 1)
            with client.request_in_flight("completions", endless()):  # waits for the device
                wait_until(lambda: client.metric("queue_depth") == 1)
            wait_until(lambda: client.metric("queue_depth") == 0)
        wait_until(client.idle)
    assert client.observe("alice", TEXT) == client.observe("bob", TEXT)


def test_a_full_queue_refuses_politely_and_recovers(slow: Callable[..., tuple[Any, Client]]) -> None:
    _, client = slow(max_queue=2)
    with ExitStack() as running:
        streams = [running.enter_context(client.stream(**endless())) for _ in range(2)]
        assert all(map(next, streams))
        for path, body in (
            ("completions", client.completion()),
            ("completions", client.completion(stream=True, session="alice")),
            ("sessions/alice/observe", {"text": TEXT}),
            ("sessions/alice/score", {"text": TEXT}),
        ):
            assert assert_error(client.post(path, body), 429, "queue_full")["type"] == "rate_limit_error"
        assert client.readiness() == "ready"
        assert client.version("alice") == 0
    wait_until(client.idle)
    assert client.observe("alice", TEXT)["version"] == 1


def test_a_burst_leaves_nothing_behind(make_server: Callable[..., Any]) -> None:
    """Descriptors, threads and memory reach a plateau after every kind of client."""
    server = make_server().start()
    process = psutil.Process(server.process.pid)
    with Client(server.url, server.model) as client:

        def visit(number: int) -> None:
            fields = client.completion(TEXT[number : 80 + number], max_tokens=60, logit_bias=NO_EOS)
            match number % 5:
                case 0:
                    with Client(server.url) as visitor, visitor.stream(**fields, session="s0", learn="all") as chunks:
                        next(chunks)
                case 1:
                    with Client(server.url) as visitor:
                        visitor.observe("s1", TEXT * 20)
                case 2:
                    with Client(server.url) as visitor, visitor.stream(**fields, session=f"s{number}") as chunks:
                        assert list(chunks)
                case 3:
                    with client.abandoned_request("completions", fields | {"session": "s3"}):
                        pass
                case 4:
                    assert client.post("completions", fields | {"max_tokens": -2}).status_code == 400

        def resources_after_burst() -> tuple[int, int, int]:
            with ThreadPoolExecutor(10) as pool:
                list(pool.map(visit, range(40)))
            wait_until(client.idle)
            return process.num_fds(), process.num_threads(), process.memory_info().rss

        resources_after_burst()
        fds, threads, rss = resources_after_burst()
        _, threads_after, rss_after = resources_after_burst()
        wait_until(lambda: process.num_fds() <= fds + 4)
        assert threads_after <= threads + 4
        assert rss_after <= rss + 32 * 2**20


# --- start and shutdown -----------------------------------------------------------------------------------------------


def test_a_starting_server_reports_that_it_is_loading(make_server: Callable[..., Any]) -> None:
    server = make_server().start(wait=False)
    with Client(server.url, server.model) as client:
        statuses: list[str] = []

        def has_status(status: str) -> bool:
            statuses.append(client.readiness())
            return statuses[-1] == status

        wait_until(lambda: has_status("loading"))
        assert client.http.get("/livez").status_code == 200
        early = client.post("completions", client.completion())
        if early.status_code != 200:
            assert_error(early, 503, "loading")
        wait_until(lambda: has_status("ready"))
        assert set(statuses) <= {"gone", "loading", "ready"}
        assert client.complete()["usage"]["completion_tokens"] > 0


def test_a_server_may_be_stopped_while_it_loads(make_server: Callable[..., Any]) -> None:
    server = make_server().start(wait=False)
    with Client(server.url) as client:
        wait_until(lambda: client.readiness() == "loading")
    assert server.stop() == 0
    assert find_valkey(server.data_dir) is None


def test_a_server_that_is_told_to_stop_ends_what_it_began_and_takes_no_more(
    slow: Callable[..., tuple[Any, Client]],
) -> None:
    server, client = slow()
    fields = endless(session="alice", learn="all", max_tokens=1000)
    with client.stream(**fields) as chunks, client.request_in_flight("sessions/bob/observe", {"text": TEXT * 100}):
        next(chunks)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: client.readiness() == "draining")
        assert httpx.get(f"{server.url}/livez").status_code == 200
        for path, body in (("completions", client.completion()), ("sessions/bob/observe", {"text": TEXT})):
            assert_error(httpx.post(f"{server.url}/v1/{path}", json=body), 503, "draining")
        received = list(chunks)
    assert received[-1]["choices"][0]["finish_reason"] == "length"
    assert received[-1]["adaptation"]["version_to"] == 1
    assert server.process.wait(WAIT_TIMEOUT_S) == 0
    assert find_valkey(server.data_dir) is None
    server.start()
    assert client.version("alice") == 1


def assert_ends_early(client: Client, server: Any, stop: Callable[[], None]) -> None:
    """Stop the server during two turns, and assert that it ends cleanly and committed neither."""
    with ThreadPoolExecutor(1) as pool, client.stream(**of_alice("", endless())) as chunks:
        next(chunks)
        reserved = client.metric("kv_tokens_reserved")
        observed = pool.submit(client.post, "sessions/bob/observe", {"text": HUGE})
        wait_until(lambda: client.metric("kv_tokens_reserved") > reserved)  # both run on the device
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: client.readiness() != "ready")
        stop()
        with pytest.raises(httpx.TransportError):
            list(chunks)
        assert_error(observed.result(), 503, "interrupted")
    assert server.process.wait(WAIT_TIMEOUT_S) == 0
    assert find_valkey(server.data_dir) is None
    server.start()
    assert client.version("alice") == client.version("bob") == 0


def test_a_second_signal_ends_the_server_at_once(slow: Callable[..., tuple[Any, Client]]) -> None:
    server, client = slow(drain_timeout_s=3600)
    assert_ends_early(client, server, lambda: server.process.send_signal(signal.SIGTERM))


def test_draining_ends_at_its_time_limit(slow: Callable[..., tuple[Any, Client]]) -> None:
    server, client = slow(drain_timeout_s=0.5)
    assert_ends_early(client, server, lambda: None)


def test_a_request_that_never_comes_does_not_keep_the_server(make_server: Callable[..., Any]) -> None:
    server = make_server(drain_timeout_s=0.5).start()
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{")
        with Client(server.url) as client:
            wait_until(lambda: client.metric("requests_in_flight") == 1)
        assert server.stop() == 0
