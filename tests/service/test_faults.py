"""Faults of the store, the clock and the network, and a check that the tests named in docs/reliability.md exist."""

from __future__ import annotations

import ast
import asyncio
import re
import resource
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from service.errors import StoreUnavailable
from service.store.embedded import EmbeddedValkey
from service.store.redis import connect
from service.store.redis.codec import PAGE_ROWS
from service.store.redis.store import RedisStore
from tests.conftest import Server, started
from tests.live import (
    Client,
    Json,
    assert_error,
    assert_success,
    connect_redis,
    find_valkey,
    in_background,
    state,
    wait_until,
)
from tests.service.stalling_proxy import StallingProxy
from tests.service.valkeys import free_ports, valkey
from tests.tiny import TEXT

ROOT = Path(__file__).parents[2]
CLOCK = """
import time
real = time.time
time.time = lambda: real() + float(open({path!r}).read() or 0)
"""


# --- the store --------------------------------------------------------------------------------------------------------


async def test_a_line_to_the_store_that_died_silently_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(connect, "CONNECT_TIMEOUT_S", 0.2)
    (port,) = free_ports(1)
    with valkey(tmp_path, port), StallingProxy(port).open() as proxy:
        store = RedisStore.from_url(f"redis://127.0.0.1:{proxy.port}")
        await store.ping()
        proxy.stall()
        for call in (store.ping(), store.load("t", "s"), store.begin_turn("t", "s", write="always")):
            with pytest.raises(StoreUnavailable):
                await call
        proxy.restore()
        assert await store.load("t", "s") is None
        await store.close()


def test_a_slow_store_delays_and_nothing_else(make_server: Callable[..., Any]) -> None:
    server = make_server().start()
    with Client(server.url) as client, connect_redis(server.data_dir) as raw:
        for version in (1, 2, 3):
            raw.execute_command("CLIENT PAUSE", 700, "WRITE")
            assert client.observe("alice", TEXT)["version"] == version
            assert client.observe("naive", TEXT)["version"] == version
        assert state(server.data_dir, "alice") == state(server.data_dir, "naive")


@pytest.mark.skipif(not hasattr(psutil.Process, "rlimit"), reason="limits of other processes are Linux's alone")
def test_a_full_disk_stops_learning_until_there_is_room(make_server: Callable[..., Any]) -> None:
    """The test limits the size of files; Valkey inherits the limit when the server starts Valkey again."""
    server = make_server().start()
    with Client(server.url) as client:
        client.observe("alice", TEXT * 20)
        before = state(server.data_dir, "alice")
        (log,) = (server.data_dir / "valkey" / "appendonlydir").glob("*.incr.aof")
        limit_files(server, log.stat().st_size + 500)
        for _ in range(3):
            assert_error(client.post("sessions/alice/observe", {"text": TEXT * 5}), 503, "store_unavailable")
            wait_until(lambda: client.http.get("/v1/sessions/alice").status_code == 200)
            assert state(server.data_dir, "alice") == before
        assert client.complete()["usage"]["completion_tokens"]
        limit_files(server, resource.RLIM_INFINITY)
        wait_until(lambda: client.post("sessions/alice/observe", {"text": TEXT * 5}).status_code == 200)
        client.observe("naive", TEXT * 20)
        client.observe("naive", TEXT * 5)
        assert state(server.data_dir, "alice") == state(server.data_dir, "naive")


def limit_files(server: Any, size: int) -> None:
    """Limit the size of the files that a server and its Valkey may write."""
    valkey_process = find_valkey(server.data_dir)
    for process in (psutil.Process(server.process.pid), *([valkey_process] if valkey_process else [])):
        hard = process.rlimit(resource.RLIMIT_FSIZE)[1]
        process.rlimit(resource.RLIMIT_FSIZE, (size, hard))


def test_a_damaged_row_is_an_error_of_its_session_alone(make_server: Callable[..., Any]) -> None:
    server = make_server().start()
    with Client(server.url) as client:
        for session in ("short", "odd", "torn", "whole"):
            client.observe(session, TEXT)
        server.stop()
        server.start()  # no session is resident now
        with connect_redis(server.data_dir) as raw:
            for session, num_intact, length in (("short", PAGE_ROWS, -1), ("odd", 0, None), ("torn", PAGE_ROWS, None)):
                key = f"imprint:{{default/{session}}}:rows:lexical"
                number, page = min(raw.hgetall(key).items())
                raw.hset(key, number, (page[:num_intact] + b"\xff" * (len(page) - num_intact))[:length])
        for session in ("short", "odd", "torn"):
            before = state(server.data_dir, session)
            for path, body in (
                (f"sessions/{session}/observe", {"text": TEXT}),
                (f"sessions/{session}/score", {"text": TEXT}),
                ("completions", client.completion(session=session)),
            ):
                assert_error(client.post(path, body), 500, "damaged_session")
            assert state(server.data_dir, session) == before
            assert client.http.delete(f"/v1/sessions/{session}").status_code == 200
            assert client.observe(session, TEXT)["version"] == 1
        assert client.observe("whole", TEXT)["version"] == 2


# --- the clock --------------------------------------------------------------------------------------------------------


def test_a_clock_that_jumps_changes_no_version_and_no_row(
    make_server: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offset, path = tmp_path / "offset", tmp_path / "site"
    path.mkdir()
    (path / "sitecustomize.py").write_text(CLOCK.format(path=str(offset)))
    offset.write_text("0")
    monkeypatch.setenv("PYTHONPATH", f"{path}:{ROOT}")
    server = make_server(session_ttl_s=60).start(forked=False)
    with Client(server.url) as client:
        for turn, jump in enumerate((0, -86_400, 10 * 86_400, -1e9), 1):
            offset.write_text(str(jump))
            answers = [observe(client, "alice", TEXT[turn:], **{"Idempotency-Key": f"k{turn}"}) for _ in range(2)]
            assert [assert_success(answer)["version"] for answer in answers] == [turn, turn]
            client.observe("naive", TEXT[turn:])
            if turn == 3:
                server.kill()
                server.start(forked=False)
        assert state(server.data_dir, "alice") == state(server.data_dir, "naive")
        assert assert_success(client.post("sessions/alice/rollback", {"version": 1}))["version"] == 5


def observe(client: Client, session: str, text: str, **headers: str) -> httpx.Response:
    return client.post(f"sessions/{session}/observe", {"text": text}, **headers)


# --- abandoned requests that are sent again ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def servers(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Any]]:
    """Two replicas whose leases last a second."""
    folder, (port,) = tmp_path_factory.mktemp("replicas"), free_ports(1)
    url = f"redis://127.0.0.1:{port}/0"
    replicas = [
        Server(str(tiny_base), folder / name, redis_url=url, lease_s=1, lease_wait_s=10) for name in ("one", "two")
    ]
    with valkey(folder / "valkey", port), started(replicas):
        yield replicas


def attempt(number: int) -> dict[str, str]:
    return {"x-stainless-retry-count": str(number)}


def test_a_turn_that_was_answered_elsewhere_is_not_learned_when_its_replica_wakes_up(servers: list[Any]) -> None:
    """The lost lease makes the turn begin anew, even without a key and with `on_disconnect: commit`."""
    body: Json = {"text": TEXT * 100, "on_disconnect": "commit"}
    with Client(servers[0].url) as one, Client(servers[1].url) as two, ThreadPoolExecutor(1) as pool:
        first = in_background(pool, one, lambda: one.post("sessions/alice/observe", body, **attempt(0)))
        wait_until(lambda: one.metric("kv_tokens_reserved") > 0)
        servers[0].process.send_signal(signal.SIGSTOP)
        try:
            answer = assert_success(two.post("sessions/alice/observe", body, **attempt(1)))
        finally:
            servers[0].process.send_signal(signal.SIGCONT)
        assert assert_success(first.result()) == answer
        assert two.version("alice") == 1


def test_a_first_attempt_that_comes_after_its_retry_is_not_learned_and_a_repetition_on_purpose_is(
    servers: list[Any],
) -> None:
    body: Json = {"text": TEXT}
    with Client(servers[0].url) as one, Client(servers[1].url) as two:
        servers[0].process.send_signal(signal.SIGSTOP)
        try:
            for n in range(5):
                with pytest.raises(httpx.ReadTimeout):
                    url = f"{one.url}/v1/sessions/s{n}/observe"
                    httpx.post(url, json=body, headers=attempt(0), timeout=httpx.Timeout(5, read=0.02))
                assert assert_success(two.post(f"sessions/s{n}/observe", body, **attempt(1)))["version"] == 1
        finally:
            servers[0].process.send_signal(signal.SIGCONT)
        assert assert_success(one.post("sessions/s0/observe", body, **attempt(0)))["version"] == 2
        wait_until(one.idle)
        assert [two.version(f"s{n}") for n in range(5)] == [2, 1, 1, 1, 1]


async def test_no_cancellation_is_lost_in_the_store(tmp_path: Path) -> None:
    """An abandoned turn must end at every point of its call of the store."""
    embedded = EmbeddedValkey(tmp_path)
    store = RedisStore.from_url(embedded.start())
    for steps in range(40):
        calls = [asyncio.create_task(store.begin_turn("t", f"{steps}-{n}", write="always")) for n in range(24)]
        for _ in range(steps):
            await asyncio.sleep(0)
        cancelled = [call for call in calls if call.cancel()]
        await asyncio.wait(calls)
        assert all(call.cancelled() for call in cancelled)
    await store.close()
    embedded.stop()


# --- the page ---------------------------------------------------------------------------------------------------------


def test_every_fault_names_tests_that_exist() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text()
    faults = [line for line in page.splitlines() if re.match(r"\| (?!fault|---)", line) and "`test_" in line]
    assert len(faults) >= 24
    tests = {
        node.name
        for file in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    named = re.findall(r"`(test_\w+)`", page)
    assert set(named) <= tests, set(named) - tests
