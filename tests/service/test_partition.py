"""Replicas that cannot reach the store: no late commit lands after another replica has gone on."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from service.store.redis.store import RedisStore
from tests.conftest import Server, started
from tests.live import NO_EOS, Client, Json, assert_error, assert_success, state, wait_until
from tests.service.stalling_proxy import StallingProxy
from tests.service.valkeys import free_ports, valkey
from tests.tiny import TEXT

LONG: Json = {"prompt": TEXT, "max_tokens": 300, "logit_bias": NO_EOS, "temperature": 0, "learn": "all"}


@dataclass
class PartitionedReplicas:
    """Two replicas on one store; a proxy can isolate the first replica from the store."""

    url: str
    proxy: StallingProxy
    isolated_client: Client
    connected_client: Client

    def has_buffered_commit(self, mark: bytes) -> bool:
        return mark in self.proxy.buffered


@pytest.fixture(scope="module")
def mark() -> bytes:
    """Return bytes that every commit on the wire contains: the script's digest."""
    return RedisStore.from_url("redis://127.0.0.1")._scripts.commit.sha.encode()


@pytest.fixture(scope="module")
def replicas(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PartitionedReplicas]:
    folder = tmp_path_factory.mktemp("partition")
    (port,) = free_ports(1)
    with valkey(folder / "valkey", port), StallingProxy(port).open() as proxy, ExitStack() as stack:
        urls = [f"redis://127.0.0.1:{each}/0" for each in (proxy.port, port)]
        # A turn that recalls asks the store once more before it commits, and would not come so far.
        options = {"lease_s": 1, "recall_tokens": 0}
        servers = [Server(str(tiny_base), folder / f"{n}", redis_url=url, **options) for n, url in enumerate(urls)]
        stack.enter_context(started(servers))
        isolated_client, connected_client = (stack.enter_context(Client(server.url)) for server in servers)
        yield PartitionedReplicas(urls[1], proxy, isolated_client, connected_client)


@pytest.fixture
def session(replicas: PartitionedReplicas) -> str:
    """Return a session that both replicas have taught; the session `<session>-naive` is its equal."""
    session = uuid4().hex
    for name in (session, f"{session}-naive"):
        replicas.connected_client.observe(name, TEXT[:80])
    with ThreadPoolExecutor(8) as pool:  # a connection that is opened through a stalled proxy gets no commit through
        list(pool.map(lambda n: replicas.isolated_client.observe(f"{session}-{n}", TEXT), range(8)))
    return session


def completion(client: Client, session: str) -> Any:
    return client.post("completions", {"model": client.model, "session": session} | LONG)


def test_a_commit_that_comes_late_is_refused_and_its_turn_learned_after_the_others(
    replicas: PartitionedReplicas, session: str, mark: bytes
) -> None:
    """The commit reaches the store after another replica has taken the lease and gone on."""
    with ThreadPoolExecutor(1) as pool:
        turn = pool.submit(completion, replicas.isolated_client, session)
        wait_until(lambda: replicas.isolated_client.metric("kv_tokens_reserved") > 0)
        replicas.proxy.stall()
        assert replicas.connected_client.observe(session, TEXT[30:])["version"] == 2
        before = state(replicas.url, session)
        wait_until(lambda: replicas.has_buffered_commit(mark))
        assert state(replicas.url, session) == before
        replicas.proxy.restore()
        adaptation = assert_success(turn.result())["adaptation"]
    assert (adaptation["version_from"], adaptation["version_to"]) == (2, 3)
    replicas.connected_client.observe(f"{session}-naive", TEXT[30:])
    assert_success(completion(replicas.connected_client, f"{session}-naive"))
    assert state(replicas.url, session) == state(replicas.url, f"{session}-naive")


def test_a_stream_whose_commit_comes_late_ends_with_an_error_and_teaches_nothing(
    replicas: PartitionedReplicas, session: str, mark: bytes
) -> None:
    with replicas.isolated_client.stream(session=session, **LONG) as chunks:
        next(chunks)
        replicas.proxy.stall()
        assert replicas.connected_client.observe(session, TEXT[30:])["version"] == 2
        before = state(replicas.url, session)
        wait_until(lambda: replicas.has_buffered_commit(mark))
        replicas.proxy.restore()
        with pytest.raises(AssertionError, match="session_busy"):
            list(chunks)
    wait_until(replicas.isolated_client.idle)
    assert state(replicas.url, session) == before
    assert replicas.isolated_client.observe(session, TEXT)["version"] == 3, "the replica sees what the other did"


def test_a_replica_that_is_cut_off_refuses_and_finds_its_way_back(replicas: PartitionedReplicas, session: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        turn = pool.submit(completion, replicas.isolated_client, session)
        wait_until(lambda: replicas.isolated_client.metric("kv_tokens_reserved") > 0)
        replicas.proxy.cut()
        assert replicas.connected_client.observe(session, TEXT[30:])["version"] == 2
        before = state(replicas.url, session)
        assert_error(turn.result(), 503, "store_unavailable")
        assert_error(
            replicas.isolated_client.post(f"sessions/{session}/observe", {"text": TEXT}), 503, "store_unavailable"
        )
        assert replicas.isolated_client.complete()["choices"][0]["finish_reason"], "the base needs no store"
        replicas.proxy.restore()
    assert state(replicas.url, session) == before
    wait_until(lambda: replicas.isolated_client.http.get(f"/v1/sessions/{session}").status_code == 200)
    assert replicas.isolated_client.observe(session, TEXT)["version"] == 3
