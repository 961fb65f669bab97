"""Several servers on one store: a cluster, Sentinels, and turns of replicas that stop, erase or die."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis

from service.errors import QuotaExceeded, RateLimited, VersionConflict
from service.store import CommitMetadata, RetentionConfig
from service.store.redis.store import RedisStore
from service.tenants import Tenant, TenantLimits
from service.turns.quotas import Quotas
from tests.conftest import Server
from tests.live import NO_EOS, Client, assert_error, assert_success, in_background, state, wait_until
from tests.service.store_backends import ODD_ID, new_meta, rows
from tests.service.test_leases import listen
from tests.service.valkeys import cluster, free_ports, sentinel, valkey, wait_for
from tests.tiny import TEXT

SHORT_LEASES = RetentionConfig(lease_s=0.3, wait_s=60.0)  # a wait that outlasts the lease on a slow machine, too


# --- a cluster, and Sentinels -----------------------------------------------------------------------------------------


async def run_turns(store: RedisStore, tenant: str, sid: str) -> None:
    """Take a new session through three turns, and check what the store has of the session."""
    for version in (1, 2, 3):
        lease = (await store.begin_turn(tenant, sid, write="always")).lease
        sites = {"a": rows([0, version], version), "b": rows(range(50), version)}
        await store.commit(
            tenant, new_meta(sid, version), sites, lease=lease, commit_metadata=CommitMetadata({"kind": "learn"})
        )
    loaded = await store.load(tenant, sid)
    assert loaded is not None and loaded.meta == new_meta(sid, 3)
    assert loaded.sites["a"].slots.tolist() == [0, 1, 2, 3]
    history = await store.history(tenant, sid, undo=True)
    assert history is not None and [entry["version"] for entry in history.log] == [1, 2, 3]


async def test_a_cluster_of_three_keeps_sessions(tmp_path: Path) -> None:
    with cluster(tmp_path) as ports:
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
        store = RedisStore.from_url(f"redis+cluster://{hosts}", SHORT_LEASES)
        other = RedisStore.from_url(f"redis+cluster://{hosts}", SHORT_LEASES)
        sids = [f"s{n}" for n in range(12)]
        for sid in sids:
            await run_turns(store, "t", sid)
        assert [meta.id for meta in await other.list("t")] == sorted(sids)
        nodes: list[Any] = [Redis(port=port) for port in ports]
        assert all(node.dbsize() for node in nodes), "all nodes have some"
        await run_turns(store, "t@1", ODD_ID)
        keys = [key for node in nodes for key in node.scan_iter("imprint:{t@1/*")]
        assert len(keys) == 6
        assert len({nodes[0].execute_command("CLUSTER KEYSLOT", key) for key in keys}) == 1
        assert await store.delete("t@1", ODD_ID)
        stale = (await store.begin_turn("t", "s", write="always")).lease
        assert (await other.begin_turn("t", "s", write="always")).lease is not None
        with pytest.raises(VersionConflict):
            await store.commit("t", new_meta("s", 1), {}, lease=stale)
        heard: list[tuple[str, str] | None] = []

        listening = asyncio.create_task(listen(other, heard))
        while not heard:
            await asyncio.sleep(0.01)
        for sid in sids:
            assert await store.delete("t", sid)
        while len(heard) <= len(sids):
            await asyncio.sleep(0.01)
        listening.cancel()
        assert await store.list("t") == []
        left = [key for node in nodes for key in node.scan_iter()]
        assert {key.rpartition(b":")[2] for key in left} <= {b"fence", b"erased", b"lease"}
        quotas, limited = Quotas(store), Tenant("limited", TenantLimits(sessions=1, tokens_per_minute=9))
        async with quotas.reserve_session(limited, "s"):
            await store.create(limited.name, new_meta("s"))
        await quotas.record_commit(limited, "s", 0, 10)
        for refused in (
            Quotas(other).reserve_session(limited, "r").__aenter__(),
            Quotas(other).check_learning(limited),
        ):
            with pytest.raises((QuotaExceeded, RateLimited)):
                await refused
        assert await store.configuration("appendonly") == {"appendonly": "no"}
        used, limit = await store.memory()
        assert used > max(node.info("memory")["used_memory"] for node in nodes) and limit == 0
        for node in nodes:
            node.config_set("maxmemory", 10**9)
        assert (await store.memory())[1] == 3 * 10**9
        await store.close()
        await other.close()
        for node in nodes:
            node.close()


async def test_a_fresh_client_of_a_cluster_hears_of_erasures_and_loads(tmp_path: Path) -> None:
    with cluster(tmp_path) as ports:
        url = "redis+cluster://" + ",".join(f"127.0.0.1:{port}" for port in ports)
        store, listener, reader = (RedisStore.from_url(url) for _ in range(3))
        heard: list[tuple[str, str] | None] = []
        listening = asyncio.create_task(listen(listener, heard))
        while not heard:
            assert not listening.done()
            await asyncio.sleep(0.01)
        await run_turns(store, "t", "s")
        threads = threading.active_count()
        loaded = await asyncio.gather(*(reader.load("t", "s") for _ in range(20)))
        assert all(session is not None and session.meta == new_meta("s", 3) for session in loaded)
        assert threading.active_count() == threads, "no thread reads"
        await store.check_rights()
        assert not await store.may_evict()
        nodes: list[Any] = [Redis(port=port) for port in ports]
        for node in nodes:
            for key in node.scan_iter("imprint:sessions:*"):
                node.delete(key)
            node.close()
        assert await store.restore_list() == 1 and len(await store.list("t")) == 1
        await store.delete("t", "s")
        async with asyncio.timeout(10):
            while ("t", "s") not in heard:
                await asyncio.sleep(0.01)
        listening.cancel()
        for each in (store, listener, reader):
            await each.close()


async def test_a_sentinel_names_the_master_that_took_over(tmp_path: Path) -> None:
    with sentinel(tmp_path) as (port, (_, replica), processes):
        store = RedisStore.from_url(f"redis+sentinel://127.0.0.1:{port}/mymaster/0")
        await run_turns(store, "t", "s")
        with Redis(port=replica) as client:
            wait_for(lambda: client.dbsize() > 0)
        await store.ping()
        processes[0].kill()
        with Redis(port=replica) as client:
            wait_for(lambda: dict(client.info("replication"))["role"] == "master")
        while True:
            try:
                assert await store.meta("t", "s") == new_meta("s", 3)
                break
            except Exception as error:
                assert getattr(error, "code", "") == "store_unavailable", error
        await store.commit("t", new_meta("s", 4), {"a": rows([9])})
        await store.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis+sentinel://h:1", "service"),
        ("redis+sentinel://h:x/m", "host:port"),
        ("redis+cluster://", "host:port"),
        ("redis+ring://h:1", "redis\\+ring"),
        ("http://h:1", "http|scheme"),
    ],
)
async def test_an_address_of_nothing_known_is_refused(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RedisStore.from_url(url)


# --- servers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    (port,) = free_ports(1)
    with valkey(tmp_path_factory.mktemp("redis"), port):
        yield f"redis://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def servers(tiny_base: Path, redis: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """Two replicas whose leases last a second; the last test kills the first replica."""
    folder = tmp_path_factory.mktemp("replicas")
    pair = [Server(str(tiny_base), folder / name, redis_url=redis, lease_s=1) for name in ("one", "two")]
    for server in pair:
        server.start()
    yield pair
    for server in pair:
        server.stop()


@pytest.fixture
def one(servers: list[Server]) -> Iterator[Client]:
    with Client(servers[0].url) as client:
        yield client


@pytest.fixture
def other(servers: list[Server]) -> Iterator[Client]:
    with Client(servers[1].url) as client:
        yield client


def memory_state(redis: str, session: str) -> Any:
    """Return the stored rows of a session."""
    return {key: value for key, value in state(redis, session).items() if key != "meta"}


def stream(client: Client, session: str) -> str:
    body = client.completion(TEXT, session=session, max_tokens=450, logit_bias=NO_EOS, stream=True)
    return httpx.post(f"{client.url}/v1/completions", json=body, timeout=60).text


def test_a_replica_that_stood_still_learns_at_the_version_it_finds(
    servers: list[Server], one: Client, other: Client, redis: str, tenant: str
) -> None:
    alice, bob, naive = (f"{tenant}-{name}" for name in ("alice", "bob", "naive"))
    stopped = servers[0].process
    assert stopped is not None
    with ThreadPoolExecutor(2) as pool:
        one.observe(alice, TEXT)
        late_turn = in_background(pool, one, lambda: one.post(f"sessions/{alice}/observe", {"text": TEXT * 150}))
        streamed = in_background(pool, one, lambda: stream(one, bob))
        wait_until(lambda: one.metric("leases_held") == 2)
        stopped.send_signal(signal.SIGSTOP)
        try:
            assert other.observe(alice, TEXT)["version"] == 2
            other.observe(bob, TEXT)
        finally:
            stopped.send_signal(signal.SIGCONT)
        assert assert_success(late_turn.result())["version"] == 3
        # A stream cannot take back what the client has: the stream ends in an error, and teaches nothing.
        assert "session_busy" in streamed.result() and streamed.result().endswith("data: [DONE]\n\n")
    assert other.version(bob) == 1
    for text in (TEXT, TEXT, TEXT * 150):
        other.observe(naive, text)
    assert memory_state(redis, alice) == memory_state(redis, naive)
    assert one.score(alice, TEXT) == other.score(alice, TEXT)


def test_a_session_erased_at_one_replica_is_gone_from_the_other(one: Client, other: Client, tenant: str) -> None:
    for client in (one, other):
        client.score(tenant, TEXT, learn=True)
    num_hot = other.metric("sessions_hot")
    assert one.http.delete(f"/v1/sessions/{tenant}").status_code == 200
    wait_until(lambda: other.metric("sessions_hot") == num_hot - 1)
    # The new session has the old one's name and version, and another content.
    for text in (TEXT[9:], TEXT[5:]):
        assert one.score(tenant, text, learn=True)["version"] <= 2
    assert other.score(tenant, TEXT) == one.score(tenant, TEXT)


def test_items_that_are_added_side_by_side_all_stay(one: Client, other: Client) -> None:
    conversation = assert_success(one.post("conversations", {}))["id"]
    said = [f"{name} has the number {number}." for name in ("Ada", "Bo") for number in range(12)]

    def add(client: Client, text: str) -> list[str]:
        item = {"type": "message", "role": "user", "content": text}
        added = assert_success(client.post(f"conversations/{conversation}/items", {"items": [item]}))["data"]
        return [each["content"][0]["text"] for each in added]

    response = {"model": one.model, "input": "Who has which number?", "conversation": conversation}
    with ThreadPoolExecutor(13) as pool:
        answered = pool.submit(one.post, "responses", response | {"max_output_tokens": 200, "logit_bias": NO_EOS})
        added = [pool.submit(add, (one, other)[number % 2], text) for number, text in enumerate(said)]
        assert [each.result() for each in added] == [[text] for text in said]
        output = assert_success(answered.result())["output"][0]["content"][0]["text"]
    listed = assert_success(other.http.get(f"/v1/conversations/{conversation}/items?limit=100"))["data"]
    texts = [each["content"][0]["text"] for each in listed]
    assert sorted(texts) == sorted([*said, response["input"], output])


def test_a_full_store_stops_learning_and_nothing_else(one: Client, other: Client, redis: str, tenant: str) -> None:
    full_before = one.metric("store_full_total")
    with Redis.from_url(redis) as raw:
        one.observe(tenant, TEXT)
        raw.config_set("maxmemory", 1)
        try:
            assert_error(one.post(f"sessions/{tenant}/observe", {"text": TEXT}), 503, "store_full")
            assert_error(one.post("completions", one.completion(session=tenant)), 503, "store_full")
            assert one.complete(session=tenant, adapt="predict")["adaptation"]["version_to"] == 1
            assert one.score(tenant, TEXT)["version"] == 1
            assert one.score(f"{tenant}-new", TEXT)["version"] == 0
            assert other.score(tenant, TEXT)["version"] == 1, "a session is loaded from a full store"
            assert other.http.get(f"/v1/sessions/{tenant}/export").status_code == 200
            assert other.post(f"sessions/{tenant}/unlearn", {"version": 1}).json()["version"] == 2
            assert other.post(f"sessions/{tenant}/rollback", {"version": 0}).json()["version"] == 3
            assert one.http.delete(f"/v1/sessions/{tenant}").status_code == 200
        finally:
            raw.config_set("maxmemory", 0)
    assert one.metric("store_full_total") == full_before + 2
    assert one.observe(tenant, TEXT)["version"] == 1


def test_a_killed_replicas_session_goes_on_at_the_other(
    servers: list[Server], one: Client, other: Client, tenant: str
) -> None:
    one.observe(tenant, TEXT)
    with one.request_in_flight(f"sessions/{tenant}/observe", {"text": TEXT * 200}):
        servers[0].kill()
    assert other.observe(tenant, TEXT)["version"] == 2


def test_a_session_has_room_for_so_many_bytes(make_server: Callable[..., Any]) -> None:
    server = make_server(session_max_bytes=4000).start()
    with Client(server.url) as client:
        assert client.observe("alice", TEXT[:60])["version"] == 1
        before = state(server.data_dir, "alice")
        answer = client.post("sessions/alice/observe", {"text": TEXT * 3})
        error = assert_error(answer, 507, "session_too_large")
        assert "4000" in error["message"] and answer.headers["x-should-retry"] == "false"
        assert state(server.data_dir, "alice") == before


def test_a_session_that_the_device_cannot_hold_is_told_so(make_server: Callable[..., Any]) -> None:
    server = make_server(hot_rows=54 * 8).start()
    with Client(server.url) as client:
        assert_error(client.post("sessions/alice/observe", {"text": TEXT}), 507, "session_too_large")
        assert client.complete()["usage"]["completion_tokens"] >= 0
