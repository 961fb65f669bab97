"""Commits that a client knows of survive the end of every process, and are learned once."""

from __future__ import annotations

import fcntl
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from service.store.embedded import valkey_binary
from tests.live import (
    NO_EOS,
    Client,
    Json,
    assert_error,
    assert_success,
    connect_redis,
    find_valkey,
    in_background,
    retry_until_success,
    state,
    wait_until,
)
from tests.tiny import TEXT

State = dict[str, dict[bytes, bytes]]


@pytest.fixture(autouse=True)
def no_orphans(tmp_path: Path) -> Iterator[None]:
    """End the Valkey processes that killed servers leave behind, also when the test fails."""
    yield
    for folder in tmp_path.iterdir():
        if (valkey := find_valkey(folder)) is not None:
            valkey.terminate()


def teach(client: Client, session: str, turn: int) -> httpx.Response:
    """Run the turn of that number; all sessions here have the same turns."""
    if turn % 3 < 2:
        return client.post(f"sessions/{session}/observe", {"text": TEXT[turn % 50 :] * (1 + turn % 4)})
    options: Json = {"session": session, "learn": "all", "max_tokens": 40, "logit_bias": NO_EOS}
    return client.post("completions", client.completion(TEXT[turn % 50 :], **options))


@pytest.fixture(scope="module")
def replay(server: Any) -> Iterator[Callable[[int], State]]:
    """Return the state after a number of turns on a server that nothing happens to."""
    states: list[State] = [{}]
    with Client(server.url, server.model) as client:

        def after(turns: int) -> State:
            while len(states) <= turns:
                assert_success(teach(client, "replay", len(states) - 1))
                states.append(state(server.data_dir, "replay"))
            return states[turns]

        yield after


@contextmanager
def store_down(data_dir: Path) -> Iterator[None]:
    """Kill Valkey, and keep the server from starting Valkey again until the block ends."""
    valkey = find_valkey(data_dir)
    assert valkey is not None
    with (data_dir / "valkey" / "lock").open("r+b") as lock, ThreadPoolExecutor(1) as pool:
        locked = pool.submit(fcntl.flock, lock, fcntl.LOCK_EX)  # granted when Valkey dies
        valkey.kill()
        locked.result()
        yield


def refuses_sessions_only(client: Client) -> None:
    """Check that the server refuses sessions, and answers all else, without its store."""
    text: Json = {"text": TEXT}
    for path, body in (
        ("completions", client.completion(session="alice")),
        ("completions", client.completion(session="alice", stream=True)),
        ("sessions/alice/observe", text),
        ("sessions/alice/score", text),
    ):
        assert assert_error(client.post(path, body), 503, "store_unavailable")["type"] == "server_error"
    for method, path in (("GET", "/alice"), ("PUT", "/alice"), ("DELETE", "/alice"), ("GET", "")):
        assert_error(client.http.request(method, f"/v1/sessions{path}"), 503, "store_unavailable")
    assert client.complete()["usage"]["completion_tokens"] > 0
    assert client.readiness() == "ready"


def answers(client: Client) -> bool:
    return client.http.get("/v1/sessions").status_code == 200


# --- the server dies --------------------------------------------------------------------------------------------------


def test_a_killed_server_comes_back_with_all_that_it_committed(
    make_server: Callable[..., Any], replay: Callable[[int], State]
) -> None:
    server = make_server().start()
    with Client(server.url, server.model) as client:
        for turn in range(3):
            assert_success(teach(client, "alice", turn))
        orphan = find_valkey(server.data_dir)
        assert orphan is not None
        server.kill()
        server.start()
        assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
        assert client.version("alice") == 3
        assert state(server.data_dir, "alice") == replay(3)
        assert_success(teach(client, "alice", 3))
        assert state(server.data_dir, "alice") == replay(4)


def test_a_server_killed_in_the_midst_of_turns_has_each_of_them_wholly_or_not_at_all(
    make_server: Callable[..., Any], replay: Callable[[int], State]
) -> None:
    server = make_server().start()
    turns = {f"s{n}": 0 for n in range(6)}

    def run_turns(session: str) -> None:
        with Client(server.url, server.model) as client, suppress(httpx.TransportError):
            while True:
                assert_success(teach(client, session, turns[session]))
                turns[session] += 1

    def kill_after(num_turns: int) -> None:
        with ThreadPoolExecutor(len(turns)) as pool:
            users = [pool.submit(run_turns, session) for session in turns]
            wait_until(lambda: sum(turns.values()) >= num_turns or any(user.done() for user in users))
            server.kill()
            assert all(user.result() is None for user in users)

    for num_turns in (8, 24):
        kill_after(num_turns)
        server.start()
        with Client(server.url, server.model) as client:
            for session, committed in turns.items():
                version = client.version(session)
                assert version - committed in (0, 1)
                assert version == 0 or state(server.data_dir, session) == replay(version)
                turns[session] = version


# --- the store dies ---------------------------------------------------------------------------------------------------


def test_the_embedded_store_keeps_no_names_of_expired_sessions(make_server: Callable[..., Any]) -> None:
    server = make_server().start()
    with Client(server.url) as client:
        for name, options in {"kept": {}, "expired": {"ttl_s": 1}}.items():
            assert_success(client.http.put(f"/v1/sessions/{name}", json=options))
    server.stop()
    time.sleep(1.1)
    server.start()
    with connect_redis(server.data_dir) as redis:
        wait_until(lambda: redis.zrange("imprint:sessions:default", 0, -1) == [b"kept"])


def test_without_its_store_a_server_refuses_sessions_until_it_has_restarted_it(
    make_server: Callable[..., Any], replay: Callable[[int], State]
) -> None:
    server = make_server().start()
    with Client(server.url, server.model) as client, ThreadPoolExecutor(2) as pool:
        for turn in range(2):
            assert_success(teach(client, "alice", turn))
        running = in_background(pool, client, lambda: client.post("sessions/bob/observe", {"text": TEXT * 100}))
        with client.stream(prompt=TEXT, max_tokens=400, session="carol", logit_bias=NO_EOS) as chunks:
            next(chunks)
            with store_down(server.data_dir):
                refuses_sessions_only(client)
                assert_error(running.result(), 503, "store_unavailable")
                with pytest.raises(AssertionError, match="store_unavailable"):
                    list(chunks)
        wait_until(lambda: answers(client))
        assert (client.version("alice"), client.version("bob"), client.version("carol")) == (2, 0, 0)
        assert state(server.data_dir, "alice") == replay(2)
        assert_success(teach(client, "alice", 2))
        assert state(server.data_dir, "alice") == replay(3)
        assert client.observe("bob", TEXT)["version"] == 1


def test_a_store_that_keeps_dying_loses_and_doubles_nothing(
    make_server: Callable[..., Any], replay: Callable[[int], State]
) -> None:
    server = make_server().start()
    last = 8

    def run_turns(session: str) -> None:
        with Client(server.url, server.model) as client:
            turn = 0
            while turn < last:
                response = teach(client, session, turn)
                if response.status_code == 200:
                    turn += 1
                else:
                    assert_error(response, 503, "store_unavailable")
                    version = retry_until_success(lambda: client.version(session))
                    assert version - turn in (0, 1)
                    turn = version

    def kill_valkey_after(learned: int, client: Client) -> None:
        wait_until(lambda: client.metric("tokens_learned_total") > learned and answers(client))
        valkey = find_valkey(server.data_dir)
        assert valkey is not None
        valkey.kill()

    with ThreadPoolExecutor(4) as pool, Client(server.url, server.model) as client:
        users = [pool.submit(run_turns, f"s{n}") for n in range(4)]
        for learned in (100, 500, 900):
            kill_valkey_after(learned, client)
        assert all(user.result() is None for user in users)
        for number in range(4):
            assert client.version(f"s{number}") == last
            assert state(server.data_dir, f"s{number}") == replay(last)


# --- an external Redis ------------------------------------------------------------------------------------------------


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[tuple[str, Callable[[], subprocess.Popen[bytes]]]]:
    """Yield the URL of a Valkey, and a function that starts the Valkey."""
    started: list[subprocess.Popen[bytes]] = []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "redis").mkdir()
    options = {"port": port, "bind": "127.0.0.1", "dir": tmp_path / "redis", "save": "", "appendonly": "yes"}
    command = [valkey_binary(), *(str(part) for name, value in options.items() for part in (f"--{name}", value))]

    def start() -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([*command, "--appendfsync", "always"], stdout=subprocess.DEVNULL))
        return started[-1]

    yield f"redis://127.0.0.1:{port}/0", start
    for process in started:
        process.kill()
        process.wait()


def test_an_external_redis_keeps_the_sessions_and_may_go_away_for_a_while(
    make_server: Callable[..., Any], redis: tuple[str, Callable[[], subprocess.Popen[bytes]]]
) -> None:
    url, start = redis
    process = start()
    server = make_server(redis_url=url).start()
    with Client(server.url, server.model) as client:
        wait_until(lambda: answers(client))
        client.observe("alice", TEXT)
        scored = client.score("alice", TEXT)
        assert find_valkey(server.data_dir) is None
        for end in (signal.SIGTERM, signal.SIGKILL):
            process.send_signal(end)
            process.wait()
            refuses_sessions_only(client)
            process = start()
            wait_until(lambda: answers(client))
            assert client.score("alice", TEXT) == scored
        assert server.stop() == 0
        server.start()
        assert client.score("alice", TEXT) == scored
        assert client.observe("alice", TEXT)["version"] == 2


def test_two_servers_of_one_redis_take_turns_with_a_session(
    make_server: Callable[..., Any],
    redis: tuple[str, Callable[[], subprocess.Popen[bytes]]],
    replay: Callable[[int], State],
) -> None:
    url, start = redis
    start()
    servers = [make_server(name, redis_url=url).start() for name in ("one", "two")]
    with Client(servers[0].url) as one, Client(servers[1].url) as two:
        wait_until(lambda: answers(one) and answers(two))
        for turn, client in enumerate((one, two, two, one, two, one)):
            assert_success(teach(client, "alice", turn))
        assert state(url, "alice") == replay(6)

        def learn(client: Client) -> int:
            responses = [client.post("sessions/bob/observe", {"text": TEXT}) for _ in range(10)]
            for refused in (response for response in responses if response.status_code != 200):
                assert_error(refused, 409, "version_conflict")
            return sum(response.status_code == 200 for response in responses)

        with ThreadPoolExecutor(2) as pool:
            learned = sum(pool.map(learn, (one, two)))
        assert one.version("bob") == learned >= 10
        assert assert_success(teach(two, "bob", 0))["version"] == learned + 1
