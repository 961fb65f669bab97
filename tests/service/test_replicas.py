"""Several servers, one store: who may write, and that nobody else's turn lands."""

from __future__ import annotations

import asyncio
import json
import signal
import struct
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis

from service.errors import Conflict, QuotaExceeded, RateLimited, SessionBusy, StoreFull, VersionConflict
from service.store import CommitMetadata, RedisStore, RetentionConfig
from service.store.base import Lease
from service.store.codec import encode
from service.store.embedded import EmbeddedValkey
from service.tenants import Tenant, TenantLimits
from service.turns.quotas import Quotas
from tests.conftest import Server
from tests.live import NO_EOS, Client, assert_error, assert_success, in_background, state, wait_until
from tests.service.test_store import ODD_ID, assert_same, new_meta, rows, snapshot
from tests.service.valkeys import cluster, free_ports, sentinel, valkey, wait
from tests.tiny import TEXT


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    embedded = EmbeddedValkey(tmp_path_factory.mktemp("data"))
    yield embedded.start()
    embedded.stop()


@pytest.fixture
def raw(url: str) -> Iterator[Redis]:
    with Redis.from_url(url) as client:
        yield client


@pytest.fixture
async def two(url: str) -> AsyncIterator[tuple[RedisStore, RedisStore]]:
    """The stores of two replicas whose leases last a moment."""
    stores = [RedisStore.from_url(url, RetentionConfig(lease_s=0.3, wait_s=2.0)) for _ in range(2)]
    yield stores[0], stores[1]
    for store in stores:
        await store.close()


@pytest.fixture
def tenant() -> str:
    return uuid.uuid4().hex


async def take(store: RedisStore, tenant: str) -> Lease:
    turn_start = await store.begin_turn(tenant, "s", write="always")
    assert turn_start.lease is not None
    return turn_start.lease


# --- leases -----------------------------------------------------------------------------------------------------------


async def test_a_lease_is_one_replicas_until_it_commits_gives_it_back_or_lets_it_end(
    two: tuple[RedisStore, RedisStore], url: str, tenant: str
) -> None:
    one, other = two
    hasty = RedisStore.from_url(url, RetentionConfig(lease_s=0.3, wait_s=0.0))
    lease = await take(one, tenant)
    with pytest.raises(SessionBusy) as busy:
        await hasty.begin_turn(tenant, "s", write="always")
    assert busy.value.retry_after
    assert (await hasty.begin_turn(tenant, "s", write="never")).lease is None
    await one.create(tenant, replace(new_meta("s"), options={"adapt": "predict"}))
    assert (await hasty.begin_turn(tenant, "s", write="unless predict")).lease is None
    await one.commit(tenant, new_meta("s", 1), {}, lease=lease)
    lease = await take(other, tenant)
    await other.release(lease)
    lease = await take(one, tenant)
    for _ in range(4):
        await asyncio.sleep(0.15)
        assert await one.renew(lease)
    with pytest.raises(SessionBusy):
        await hasty.begin_turn(tenant, "s", write="always")
    await take(other, tenant)  # it ended by itself
    assert not await one.renew(lease)
    await hasty.close()


async def test_a_stale_lease_commits_nothing(two: tuple[RedisStore, RedisStore], raw: Redis, tenant: str) -> None:
    one, other = two
    stale = await take(one, tenant)
    fresh = await take(other, tenant)
    before = snapshot(raw, tenant)
    with pytest.raises(VersionConflict, match="lease"):
        await one.commit(tenant, new_meta("s", 1), {"a": rows([1])}, lease=stale)
    with pytest.raises(VersionConflict, match="lease"):
        await one.create(tenant, new_meta("s"), stale)
    await one.release(stale)
    assert snapshot(raw, tenant) == before
    await other.commit(tenant, new_meta("s", 1), {"a": rows([1], 2)}, lease=fresh)
    assert_same(await one.load(tenant, "s"), new_meta("s", 1), {"a": rows([1], 2)})


async def test_a_lease_that_ended_but_that_nobody_took_still_commits(
    two: tuple[RedisStore, RedisStore], tenant: str
) -> None:
    lease = await take(two[0], tenant)
    await asyncio.sleep(0.4)
    await two[0].commit(tenant, new_meta("s", 1), {}, lease=lease)
    assert await two[1].meta(tenant, "s") == new_meta("s", 1)


@pytest.mark.parametrize("version", [0, 1])
async def test_a_late_commit_does_not_bring_back_what_was_erased(
    two: tuple[RedisStore, RedisStore], raw: Redis, tenant: str, version: int
) -> None:
    one, other = two
    if version:
        await one.commit(tenant, new_meta("s", 1), {"a": rows([1])})
    lease = await take(one, tenant)
    assert await other.delete(tenant, "s") == bool(version)
    before = snapshot(raw, tenant)
    for call in (
        one.commit(tenant, new_meta("s", version + 1), {"a": rows([1])}, lease=lease),
        one.create(tenant, new_meta("s"), lease),
    ):
        with pytest.raises(Conflict) as erased:
            await call
        assert erased.value.code == "session_erased"
    assert snapshot(raw, tenant) == before
    await other.commit(tenant, new_meta("s", 1), {}, lease=await take(other, tenant))
    with pytest.raises(Conflict, match="erased"):
        await one.commit(tenant, new_meta("s", 2), {}, lease=lease)


async def test_a_fence_never_goes_back(two: tuple[RedisStore, RedisStore], tenant: str) -> None:
    fences = []
    for turn in range(6):
        lease = await take(two[turn % 2], tenant)
        fences.append(int(lease.value.partition(":")[2]))
        if turn == 3:
            await two[0].delete(tenant, "s")
        await two[turn % 2].release(lease)
    assert fences == sorted(set(fences))


async def test_every_replica_hears_of_an_erasure(two: tuple[RedisStore, RedisStore], tenant: str) -> None:
    one, other = two
    heard: list[tuple[str, str] | None] = []

    async def listen() -> None:
        async for erased in other.erased():
            heard.append(erased)

    listening = asyncio.create_task(listen())
    while not heard:
        await asyncio.sleep(0.01)
    await one.commit(tenant, new_meta("s", 1), {})
    await one.delete(tenant, "s")
    while heard[1:] != [(tenant, "s")]:
        await asyncio.sleep(0.01)
    listening.cancel()


# --- what is kept, and for how long -----------------------------------------------------------------------------------


async def test_a_session_of_format_1_is_read_and_taken_over(url: str, raw: Redis, tenant: str) -> None:
    store = RedisStore.from_url(url)
    meta, key = new_meta("s", 1), f"imprint:{{{tenant}/s}}:meta"
    old: dict[Any, Any] = {"format": "1", "nonce": "00", "digests": json.dumps(meta.digests), "site:a": "128"}
    raw.hset(key, mapping=encode(meta) | old)
    raw.hset(f"imprint:{{{tenant}/s}}:rows:a", mapping={b"\1\0\0\0": b"\7" * 128})
    assert_same(await store.load(tenant, "s"), meta, {"a": rows([1], 7)})
    await store.commit(
        tenant, new_meta("s", 2), {"a": rows([1, 2], 8)}, commit_metadata=CommitMetadata({"kind": "learn"})
    )
    assert_same(await store.load(tenant, "s"), new_meta("s", 2), {"a": rows([1, 2], 8)})
    assert raw.hget(key, "format") == b"4"
    history = await store.history(tenant, "s", undo=True)
    assert history is not None and [undo.version for undo in history.undo] == [2]
    assert history.undo[0].sites["a"].data.tolist() == [[7] * 128]
    await store.close()


@pytest.mark.parametrize("format", ["2", "3"])
async def test_the_rows_of_an_older_format_are_all_taken_over(url: str, raw: Redis, tenant: str, format: str) -> None:
    """Format 2 had a field for each row, format 3 for five slots, with zeros where there is no row."""
    store = RedisStore.from_url(url, RetentionConfig(ttl_s=100))
    held, name = rows([*range(12_000), *range(20_000, 30_000, 7)], 3), f"imprint:{{{tenant}/s}}:"
    meta: dict[Any, Any] = encode(new_meta("s", 1)) | {"format": format, "site:a": "128"}
    raw.hset(f"{name}meta", mapping=meta)
    by_slot = {int(slot): row.tobytes() for slot, row in zip(held.slots, held.data, strict=True)}
    if format == "3":
        pages = {slot // 5: [by_slot.get(slot // 5 * 5 + place) for place in range(5)] for slot in by_slot}
        flags = {number: bytes(row is not None for row in page) for number, page in pages.items()}
        by_slot = {number: flags[number] + b"".join(row or bytes(128) for row in pages[number]) for number in pages}
    raw.hset(f"{name}rows:a", mapping={struct.pack("<I", number): value for number, value in by_slot.items()})
    raw.expire(f"{name}rows:a", 5)
    assert_same(await store.load(tenant, "s"), new_meta("s", 1), {"a": held})
    assert raw.ttl(f"{name}rows:a") > 90 and raw.hget(f"{name}meta", "format") == b"4"
    await store.close()


async def test_a_session_is_forgotten_when_it_was_not_used_for_its_time(url: str, raw: Redis, tenant: str) -> None:
    store = RedisStore.from_url(url, RetentionConfig(ttl_s=100))
    sids = ("default", "own", "never")
    for sid, options in zip(sids, ({}, {"ttl_s": 1}, {"ttl_s": 0}), strict=True):
        meta = replace(new_meta(sid, 1), options=dict(options))
        await store.commit(tenant, meta, {"a": rows([1])}, commit_metadata=CommitMetadata({"kind": "learn"}, b"text"))
    await store.commit(tenant, new_meta("default", 2), {"b": rows([1])})
    assert {sid: {raw.ttl(key) for key in snapshot(raw, tenant) if f"/{sid}}}".encode() in key} for sid in sids} == {
        "default": {100},
        "own": {1},
        "never": {-1},
    }
    for _ in range(4):  # use, even that which only reads, counts
        await asyncio.sleep(0.4)
        assert (await store.begin_turn(tenant, "own", write="never")).meta is not None
    assert [meta.id for meta in await store.list(tenant)] == ["default", "never", "own"]
    await asyncio.sleep(1.2)
    assert [meta.id for meta in await store.list(tenant)] == ["default", "never"]
    assert await store.count(tenant) == 2, "the index is cleaned"
    await store.configure(tenant, "default", {"ttl_s": 0})
    assert {raw.ttl(key) for key in snapshot(raw, tenant) if b"/default}" in key} == {-1}
    await store.close()


async def test_a_full_store_learns_nothing_and_can_be_read_and_emptied(url: str, raw: Redis, tenant: str) -> None:
    store = RedisStore.from_url(url)
    await store.commit(tenant, new_meta("s", 1), {"a": rows([1])})
    before = snapshot(raw, tenant)
    raw.config_set("maxmemory", 1)
    try:
        for call in (
            store.commit(tenant, new_meta("s", 2), {"a": rows([2])}),
            store.create(tenant, new_meta("new")),
            store.begin_turn(tenant, "s", write="always"),
        ):
            with pytest.raises(StoreFull) as full:
                await call
            assert full.value.code == "store_full" and full.value.retry_after
        assert snapshot(raw, tenant) == before
        assert (await store.begin_turn(tenant, "s", write="never")).meta == new_meta("s", 1)
        assert_same(await store.load(tenant, "s"), new_meta("s", 1), {"a": rows([1])})
        assert await store.delete(tenant, "s")
    finally:
        raw.config_set("maxmemory", 0)
    await store.close()


# --- a cluster, and Sentinels -----------------------------------------------------------------------------------------


async def life(store: RedisStore, tenant: str, sid: str) -> None:
    """Some of everything that a store does."""
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
        store = RedisStore.from_url(f"redis+cluster://{hosts}", RetentionConfig(lease_s=0.3, wait_s=2))
        other = RedisStore.from_url(f"redis+cluster://{hosts}", RetentionConfig(lease_s=0.3, wait_s=2))
        sids = [f"s{n}" for n in range(12)]
        for sid in sids:
            await life(store, "t", sid)
        assert [meta.id for meta in await other.list("t")] == sorted(sids)
        nodes: list[Any] = [Redis(port=port) for port in ports]
        assert all(node.dbsize() for node in nodes), "all nodes have some"
        await life(store, "t@1", ODD_ID)
        of_one = [key for node in nodes for key in node.scan_iter("imprint:{t@1/*")]
        assert len(of_one) == 6
        assert len({nodes[0].execute_command("CLUSTER KEYSLOT", key) for key in of_one}) == 1
        assert await store.delete("t@1", ODD_ID)
        stale = await take(store, "t")
        await take(other, "t")
        with pytest.raises(VersionConflict):
            await store.commit("t", new_meta("s", 1), {}, lease=stale)
        heard: list[Any] = []

        async def listen() -> None:
            async for erased in other.erased():
                heard.append(erased)

        listening = asyncio.create_task(listen())
        while not heard:
            await asyncio.sleep(0.01)
        for sid in sids:
            assert await store.delete("t", sid)
        while len(heard) <= len(sids):
            await asyncio.sleep(0.01)
        listening.cancel()
        assert await store.list("t") == []
        kept = [key for node in nodes for key in node.scan_iter()]
        assert {key.rpartition(b":")[2] for key in kept} <= {b"fence", b"erased", b"lease"}
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


async def test_a_sentinel_names_the_master_that_took_over(tmp_path: Path) -> None:
    with sentinel(tmp_path) as (port, (_, replica), processes):
        store = RedisStore.from_url(f"redis+sentinel://127.0.0.1:{port}/mymaster/0")
        await life(store, "t", "s")
        with Redis(port=replica) as client:
            wait(lambda: client.dbsize() > 0)
        await store.ping()
        processes[0].kill()
        with Redis(port=replica) as client:
            wait(lambda: dict(client.info("replication"))["role"] == "master")
        while True:
            try:
                assert await store.meta("t", "s") == new_meta("s", 3)
                break
            except Exception as error:
                assert getattr(error, "code", "") == "store_unavailable", error
        await store.commit("t", new_meta("s", 4), {"a": rows([9])})
        await store.close()


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("redis+sentinel://h:1", "service"),
        ("redis+sentinel://h:x/m", "host:port"),
        ("redis+cluster://", "host:port"),
        ("redis+ring://h:1", "redis\\+ring"),
        ("http://h:1", "http|scheme"),
    ],
)
async def test_an_address_of_nothing_known_is_refused(url: str, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        RedisStore.from_url(url)


# --- servers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    (port,) = free_ports(1)
    with valkey(tmp_path_factory.mktemp("redis"), port):
        yield f"redis://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def servers(tiny_base: Path, redis: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """Two replicas whose leases last a second; the last test kills one."""
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


def memory(redis: str, session: str) -> Any:
    return {key: value for key, value in state(redis, session).items() if key != "meta"}


def stream(client: Client, session: str) -> str:
    body = client.completion(TEXT, session=session, max_tokens=450, logit_bias=NO_EOS, stream=True)
    return httpx.post(f"{client.url}/v1/completions", json=body, timeout=60).text


def test_a_replica_that_stood_still_learns_at_the_version_it_finds(
    servers: list[Server], one: Client, other: Client, redis: str, tenant: str
) -> None:
    alice, bob, naive = (f"{tenant}-{name}" for name in ("alice", "bob", "naive"))
    stuck = servers[0].process
    assert stuck is not None
    with ThreadPoolExecutor(2) as pool:
        one.observe(alice, TEXT)
        late = in_background(pool, one, lambda: one.post(f"sessions/{alice}/observe", {"text": TEXT * 150}))
        streamed = in_background(pool, one, lambda: stream(one, bob))
        wait_until(lambda: one.metric("leases_held") == 2)
        stuck.send_signal(signal.SIGSTOP)
        try:
            assert other.observe(alice, TEXT)["version"] == 2
            other.observe(bob, TEXT)
        finally:
            stuck.send_signal(signal.SIGCONT)
        assert assert_success(late.result())["version"] == 3
        # What a stream has said can't be unsaid: it ends in an error, and nothing of it is learned.
        assert "session_busy" in streamed.result() and streamed.result().endswith("data: [DONE]\n\n")
    assert other.version(bob) == 1
    for text in (TEXT, TEXT, TEXT * 150):
        other.observe(naive, text)
    assert memory(redis, alice) == memory(redis, naive)
    assert one.score(alice, TEXT) == other.score(alice, TEXT)


def test_a_session_erased_at_one_replica_is_gone_from_the_other(one: Client, other: Client, tenant: str) -> None:
    for client in (one, other):
        client.score(tenant, TEXT, learn=True)
    hot = other.metric("sessions_hot")
    assert one.http.delete(f"/v1/sessions/{tenant}").status_code == 200
    wait_until(lambda: other.metric("sessions_hot") == hot - 1)
    # Of the same name and version, and yet another one.
    for text in (TEXT[9:], TEXT[5:]):
        assert one.score(tenant, text, learn=True)["version"] <= 2
    assert other.score(tenant, TEXT) == one.score(tenant, TEXT)


def test_a_full_store_stops_learning_and_not_predicting(one: Client, redis: str, tenant: str) -> None:
    counted = one.metric("store_full_total")
    with Redis.from_url(redis) as raw:
        one.observe(tenant, TEXT)
        raw.config_set("maxmemory", 1)
        try:
            assert_error(one.post(f"sessions/{tenant}/observe", {"text": TEXT}), 503, "store_full")
            assert_error(one.post("completions", one.completion(session=tenant)), 503, "store_full")
            assert one.complete(session=tenant, adapt="predict")["adaptation"]["version_to"] == 1
            assert one.score(tenant, TEXT)["version"] == 1
        finally:
            raw.config_set("maxmemory", 0)
    assert one.metric("store_full_total") == counted + 2
    assert one.observe(tenant, TEXT)["version"] == 2


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
