"""The session store against a real Valkey: commits are atomic, counted once, and touch their rows only."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import uvloop
from redis import Redis
from redis.exceptions import RedisError

from service.errors import EngineError, NotFound, StoreUnavailable, VersionConflict
from service.store import CommitMetadata, IdempotencyRecord, RedisStore, RowBatch, SessionMeta, StoredSession
from service.store.base import PAGE_ROWS
from service.store.embedded import EmbeddedValkey
from service.store.redis import store as redis_store
from tests.live import rows_of
from tests.service.faulty_store import Fault, faulty_store_proxy

ROW_BYTES = 128
ODD_ID = "a~:@+=-._Z9"


def new_meta(sid: str, version: int = 0) -> SessionMeta:
    return SessionMeta(
        id=sid,
        version=version,
        model="sha256:" + "ab" * 32,
        tokens_learned=10 * version,
        rows=3,
        bytes=3 * ROW_BYTES,
        created=1_700_000_000.123456,
        updated=1_700_000_000.1 + version,
        proof_tokens=7,
        loss_sum=0.1 + 0.2,
        frozen_loss_sum=1e-17,
        requests=version,
        options={"adapt": "both", "note": "naïve ☃"},
        digests=("00ff" * 4, "aa11" * 4),
    )


def rows(slots: Any, value: int | None = None, row_bytes: int = ROW_BYTES) -> RowBatch:
    """Random rows, or rows that are `value` in every byte."""
    slots = np.asarray(slots, np.int32)
    shape = (len(slots), row_bytes)
    if value is None:
        return RowBatch(slots, np.random.default_rng(len(slots)).integers(0, 256, shape, np.uint8))
    return RowBatch(slots, np.full(shape, value % 256, np.uint8))


def assert_same(loaded: StoredSession | None, meta: SessionMeta, sites: dict[str, RowBatch]) -> None:
    assert loaded is not None
    assert loaded.meta == meta
    assert loaded.sites.keys() == sites.keys()
    for site, batch in sites.items():
        np.testing.assert_array_equal(loaded.sites[site].slots, batch.slots)
        np.testing.assert_array_equal(loaded.sites[site].data, batch.data)


def snapshot(client: Redis, tenant: str) -> dict[bytes, Any]:
    """Every key of the tenant's sessions, byte for byte."""
    return {key: client.dump(key) for key in client.scan_iter(f"imprint:{{{tenant}/*")}


def contents(client: Redis, tenant: str) -> dict[bytes, Any]:
    """The meta and the rows of the tenant's sessions."""
    keys = [*client.scan_iter(f"imprint:{{{tenant}/*:meta"), *client.scan_iter(f"imprint:{{{tenant}/*:rows:*")]
    return {key: client.hgetall(key) for key in keys}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    valkey = EmbeddedValkey(tmp_path_factory.mktemp("data"))
    yield valkey.start()
    valkey.stop()


@pytest.fixture
def raw(url: str) -> Iterator[Redis]:
    with Redis.from_url(url) as client:
        yield client


@pytest.fixture
async def store(url: str) -> AsyncIterator[RedisStore]:
    store = RedisStore.from_url(url)
    yield store
    await store.close()


@pytest.fixture
def tenant() -> str:
    return uuid.uuid4().hex


# --- commit and load ---


async def test_load_returns_what_was_committed(store: RedisStore, tenant: str) -> None:
    meta = new_meta("s", 1)
    sites = {"lexical": rows([0, 5, 2**31 - 1]), "layer 22": rows(range(300), row_bytes=36)}
    assert await store.load(tenant, "s") is None
    assert await store.meta(tenant, "s") is None

    await store.commit(tenant, meta, sites)

    assert_same(await store.load(tenant, "s"), meta, sites)
    assert await store.meta(tenant, "s") == meta


async def test_commit_touches_its_rows_only(store: RedisStore, raw: Redis, tenant: str) -> None:
    await store.commit(tenant, new_meta("s", 1), {"a": rows(range(1000)), "b": rows(range(1000))})
    before = contents(raw, tenant)
    logged: Any = raw.info("persistence")
    await store.commit(tenant, new_meta("s", 2), {"a": rows([3, 999, 1000], 7)})
    grown: Any = raw.info("persistence")
    after = contents(raw, tenant)

    key_a, key_b, key_meta = (f"imprint:{{{tenant}/s}}:{name}".encode() for name in ("rows:a", "rows:b", "meta"))
    touched = {slot: b"\7" * ROW_BYTES for slot in (3, 999, 1000)}
    assert after[key_b] == before[key_b]
    assert rows_of(after[key_a]) == rows_of(before[key_a]) | touched
    assert after.keys() == before.keys() == {key_a, key_b, key_meta}
    # Nor is anything else persisted: the pages of three rows, two rows to go back, and the meta take a few kilobytes.
    assert grown["aof_current_size"] - logged["aof_current_size"] < 3 * PAGE_ROWS * ROW_BYTES + 2500


@pytest.mark.parametrize("version", [1, 2, 4])
async def test_conflict_changes_nothing(store: RedisStore, raw: Redis, tenant: str, version: int) -> None:
    for v in (1, 2):
        await store.commit(tenant, new_meta("s", v), {"a": rows([v], v)})
    before = snapshot(raw, tenant)
    with pytest.raises(VersionConflict, match="version 2"):
        await store.commit(tenant, new_meta("s", version), {"a": rows([1], 9), "new": rows([1], 9)})
    assert snapshot(raw, tenant) == before


async def test_a_later_session_of_the_same_id_is_another_one(store: RedisStore, tenant: str) -> None:
    await store.commit(tenant, new_meta("s", 1), {})
    await store.delete(tenant, "s")
    with pytest.raises(VersionConflict, match="version 0"):
        await store.commit(tenant, new_meta("s", 2), {})
    await store.commit(tenant, replace(new_meta("s", 1), created=2e9), {})
    with pytest.raises(VersionConflict, match="created again"):
        await store.commit(tenant, new_meta("s", 2), {"a": rows([1])})


async def test_one_of_many_concurrent_commits_wins(url: str, tenant: str) -> None:
    stores = [RedisStore.from_url(url) for _ in range(8)]
    outcomes = await asyncio.gather(
        *(s.commit(tenant, new_meta("s", 1), {"a": rows(range(50), i)}) for i, s in enumerate(stores)),
        return_exceptions=True,
    )
    (winner,) = [i for i, outcome in enumerate(outcomes) if outcome is None]
    assert sum(isinstance(outcome, VersionConflict) for outcome in outcomes) == 7
    assert_same(await stores[0].load(tenant, "s"), new_meta("s", 1), {"a": rows(range(50), winner)})
    for s in stores:
        await s.close()


async def test_load_is_of_one_version(store: RedisStore, url: str, tenant: str) -> None:
    writer = RedisStore.from_url(url)
    done = asyncio.Event()

    async def write() -> None:
        for v in range(1, 61):
            await writer.commit(tenant, new_meta("s", v), {"a": rows(range(200), v), "b": rows(range(50), v)})
        done.set()

    async def read() -> set[int]:
        versions = set()
        while not done.is_set():
            if (loaded := await store.load(tenant, "s")) is not None:
                version = loaded.meta.version
                assert_same(loaded, new_meta("s", version), {k: rows(range(n), version) for k, n in sizes})
                versions.add(version)
        return versions

    sizes = (("a", 200), ("b", 50))
    _, seen = await asyncio.gather(write(), read())
    assert len(seen) > 1
    await writer.close()


@pytest.mark.parametrize("count", [1, 1999, 2000, 2001, 20_000])
async def test_commit_of_any_size(store: RedisStore, tenant: str, count: int) -> None:
    slots = np.sort(np.random.default_rng(0).permutation(32_768)[:count])
    await store.commit(tenant, new_meta("s", 1), {"a": rows(slots), "b": rows(slots, 3, row_bytes=1)})
    assert_same(await store.load(tenant, "s"), new_meta("s", 1), {"a": rows(slots), "b": rows(slots, 3, row_bytes=1)})


@pytest.mark.parametrize("sites", [{}, {"a": rows([])}], ids=["no sites", "a site without rows"])
async def test_commit_without_rows(store: RedisStore, tenant: str, sites: dict[str, RowBatch]) -> None:
    await store.commit(tenant, new_meta("s", 1), sites)
    assert_same(await store.load(tenant, "s"), new_meta("s", 1), {})


async def test_rows_of_another_size_are_refused(store: RedisStore, raw: Redis, tenant: str) -> None:
    await store.commit(tenant, new_meta("s", 1), {"a": rows([1])})
    before = snapshot(raw, tenant)
    with pytest.raises(EngineError, match="site a are 128 bytes each, not 64"):
        await store.commit(tenant, new_meta("s", 2), {"b": rows([1]), "a": rows([1], row_bytes=64)})
    assert snapshot(raw, tenant) == before


async def test_commit_after_the_server_forgot_its_scripts(store: RedisStore, raw: Redis, tenant: str) -> None:
    await store.commit(tenant, new_meta("s", 1), {})
    raw.script_flush()
    await store.commit(tenant, new_meta("s", 2), {"a": rows([1])})
    assert_same(await store.load(tenant, "s"), new_meta("s", 2), {"a": rows([1])})


@pytest.mark.parametrize(
    ("slots", "data", "message"),
    [
        (np.zeros(1, np.int64), np.zeros((1, 4), np.uint8), r"slots must be int32 \[n\], not int64 \[1\]"),
        (np.zeros(1, np.int32), np.zeros((1, 4), np.float32), r"data must be uint8 .* not float32 \[1, 4\]"),
        (np.zeros(1, np.int32), np.zeros((1, 0), np.uint8), r"not uint8 \[1, 0\]"),
        (np.zeros(1, np.int32), np.zeros((2, 4), np.uint8), "1 slots do not match 2 rows"),
        (np.array([2, 2], np.int32), np.zeros((2, 4), np.uint8), "strictly increasing"),
        (np.array([-1], np.int32), np.zeros((1, 4), np.uint8), "none negative"),
    ],
)
def test_malformed_rows_are_refused(slots: Any, data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RowBatch(slots, data)


# --- create, configure, delete, list ---


async def test_create_keeps_a_session_that_exists(store: RedisStore, tenant: str) -> None:
    assert await store.create(tenant, new_meta("s")) == new_meta("s")
    later = replace(new_meta("s"), created=2e9, options={})
    assert await store.create(tenant, later) == new_meta("s")
    await store.commit(tenant, new_meta("s", 1), {"a": rows([1])})
    assert await store.create(tenant, later) == new_meta("s", 1)
    assert_same(await store.load(tenant, "s"), new_meta("s", 1), {"a": rows([1])})


async def test_configure_replaces_the_options_alone(store: RedisStore, tenant: str) -> None:
    with pytest.raises(NotFound, match="'s'"):
        await store.configure(tenant, "s", {"adapt": "predict"})
    assert await store.meta(tenant, "s") is None

    await store.commit(tenant, new_meta("s", 1), {})
    configured = await store.configure(tenant, "s", {"adapt": "predict"})
    assert configured == replace(new_meta("s", 1), options={"adapt": "predict"})
    # A turn that began before carries the old options; its commit must not bring them back.
    await store.commit(tenant, new_meta("s", 2), {})
    assert await store.meta(tenant, "s") == replace(new_meta("s", 2), options={"adapt": "predict"})


async def test_delete_leaves_no_key(store: RedisStore, raw: Redis, tenant: str) -> None:
    for sid in ("s", "s2"):
        await store.commit(tenant, new_meta(sid, 1), {"a": rows([1]), "b:rows": rows([2])})
    await store.begin_turn(tenant, "s", write="always")
    again = IdempotencyRecord("key", 60, b"answer")
    await store.commit(
        tenant, new_meta("s", 2), {"a": rows([2])}, commit_metadata=CommitMetadata({"kind": "learn"}, b"text", again)
    )
    others = {key: value for key, value in snapshot(raw, tenant).items() if b"/s2}" in key}
    assert len(snapshot(raw, tenant)) - len(others) == 9

    assert await store.delete(tenant, "s") is True

    left = {f"imprint:{{{tenant}/s}}:{name}".encode() for name in ("fence", "erased")}
    assert snapshot(raw, tenant).keys() == others.keys() | left
    assert all(0 < raw.ttl(key) <= 86_400 for key in left), "a tombstone, for a day"
    assert {key: value for key, value in snapshot(raw, tenant).items() if key not in left} == others
    assert raw.zrange(f"imprint:sessions:{tenant}", 0, -1) == [b"s2"]
    assert await store.load(tenant, "s") is None
    assert await store.delete(tenant, "s") is False


async def test_list_pages_through_the_ids_in_order(store: RedisStore, raw: Redis, tenant: str) -> None:
    ids = sorted(["B", "a", "a.b", "a~", "b10", "b2", "z", "Z", ODD_ID])
    for sid in reversed(ids):
        await store.create(tenant, new_meta(sid))
    for stale in ("0", "aa", "b3", "zz"):  # named by the index, never committed
        raw.zadd(f"imprint:sessions:{tenant}", {stale: 0})
    await store.create(tenant + "2", new_meta("c"))
    await store.delete(tenant, "b2")
    ids.remove("b2")

    for limit in (1, 3, 100):
        seen: list[str] = []
        while page := await store.list(tenant, after=seen[-1] if seen else "", limit=limit):
            assert len(page) <= limit
            seen += [meta.id for meta in page]
        assert seen == ids
    assert await store.list(tenant, limit=0) == []
    assert await store.list("nobody") == []
    assert await store.count(tenant + "2") == 1
    assert await store.count("nobody") == 0


async def test_sessions_of_tenants_are_apart(store: RedisStore, tenant: str) -> None:
    await store.commit(tenant, new_meta(ODD_ID, 1), {"a": rows([1], 1)})
    await store.commit(tenant + "2", new_meta(ODD_ID, 1), {"a": rows([1], 2)})
    assert_same(await store.load(tenant, ODD_ID), new_meta(ODD_ID, 1), {"a": rows([1], 1)})
    assert await store.delete(tenant + "2", ODD_ID)
    assert_same(await store.load(tenant, ODD_ID), new_meta(ODD_ID, 1), {"a": rows([1], 1)})


@pytest.mark.parametrize("name", ["", "a}b", "a{b", "a/b", "a b", "a\n", "*"])
async def test_names_that_could_leave_their_key_are_refused(store: RedisStore, name: str) -> None:
    with pytest.raises(ValueError, match="session id must match"):
        await store.load("t", name)
    with pytest.raises(ValueError, match="tenant must match"):
        await store.commit(name, new_meta("s", 1), {})
    with pytest.raises(ValueError, match="tenant must match"):
        await store.list(name)


async def test_a_format_of_a_later_release_is_refused(store: RedisStore, raw: Redis, tenant: str) -> None:
    await store.commit(tenant, new_meta("s", 1), {"a": rows([1])})
    raw.hset(f"imprint:{{{tenant}/s}}:meta", "format", "5")
    before = snapshot(raw, tenant)
    for call in (
        store.load(tenant, "s"),
        store.meta(tenant, "s"),
        store.create(tenant, new_meta("s")),
        store.configure(tenant, "s", {}),
        store.commit(tenant, new_meta("s", 2), {"a": rows([1], 5)}),
        store.delete(tenant, "s"),
        store.list(tenant),
    ):
        with pytest.raises(EngineError, match=r"'s' is stored in format 5, .* only formats up to 4") as refused:
            await call
        assert refused.value.code == "unknown_store_format"
    assert snapshot(raw, tenant) == before


# --- failures ---


def test_a_write_to_a_lost_connection_is_repeated_on_uvloop_too(url: str) -> None:
    """redis-py lets the loop's own error through."""

    async def run() -> bytes:
        path = unquote(urlsplit(url).path)
        lines = [await asyncio.open_unix_connection(path) for _ in range(2)]
        lines[0][1].transport.abort()
        await asyncio.sleep(0)  # until it is closed

        async def ping() -> bytes:
            reader, writer = lines.pop(0)
            writer.write(b"PING\r\n")
            return await reader.readline()

        return await redis_store._retry_while_away(ping)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(run()) == b"+PONG\r\n"


@pytest.mark.parametrize("fault", ["request", "reply", "late"])
async def test_a_broken_connection_commits_once(
    url: str, store: RedisStore, raw: Redis, tenant: str, fault: Fault
) -> None:
    async with faulty_store_proxy(url) as (line, remote):
        await remote.commit(tenant, new_meta("s", 1), {"a": rows([1], 1)})
        line.fault = fault
        await remote.commit(tenant, new_meta("s", 2), {"a": rows([1], 2)})
        assert line.triggered
        assert_same(await store.load(tenant, "s"), new_meta("s", 2), {"a": rows([1], 2)})

        before = snapshot(raw, tenant)
        await line.deliver_delayed()
        assert snapshot(raw, tenant) == before
        await remote.commit(tenant, new_meta("s", 3), {"a": rows([1], 3)})


@pytest.mark.parametrize("fault", ["request", "reply"])
async def test_an_outcome_that_stays_unknown_is_reported_as_such(
    url: str,
    store: RedisStore,
    tenant: str,
    fault: Fault,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(redis_store, "COMMIT_RETRY_S", 0.1)
    async with faulty_store_proxy(url) as (line, remote):
        await remote.commit(tenant, new_meta("s", 1), {})
        line.fault, line.down_after_fault = fault, True
        with pytest.raises(StoreUnavailable) as unavailable:
            await remote.commit(tenant, new_meta("s", 2), {})
        assert unavailable.value.retry_after == 1
        line.repair()
        truth = await store.meta(tenant, "s")
        assert truth == new_meta("s", 2 if fault == "reply" else 1)
        assert await remote.meta(tenant, "s") == truth


@pytest.mark.parametrize(
    ("others", "outcome"), [(1, VersionConflict), (2, StoreUnavailable)], ids=["lost for sure", "unknown"]
)
async def test_others_commit_while_the_connection_is_broken(
    url: str, store: RedisStore, tenant: str, others: int, outcome: type[Exception]
) -> None:
    async with faulty_store_proxy(url) as (line, remote):
        await remote.commit(tenant, new_meta("s", 1), {})
        line.fault, line.down_after_fault = "request", True
        commit = asyncio.create_task(remote.commit(tenant, new_meta("s", 2), {"a": rows([1], 66)}))
        while not line.triggered:
            await asyncio.sleep(0.001)
        for v in range(2, 2 + others):
            await store.commit(tenant, new_meta("s", v), {"a": rows([1], v)})
        line.repair()
        with pytest.raises(outcome):
            await commit
        last = 1 + others
        assert_same(await store.load(tenant, "s"), new_meta("s", last), {"a": rows([1], last)})


async def test_a_store_that_went_away_comes_back(tmp_path: Path) -> None:
    valkey = EmbeddedValkey(tmp_path)
    store = RedisStore.from_url(valkey.start())
    await store.commit("t", new_meta("s", 1), {"a": rows([1])})
    valkey.stop()
    for call in (store.ping(), store.load("t", "s"), store.list("t"), store.delete("t", "s")):
        with pytest.raises(StoreUnavailable) as unavailable:
            await call
        assert unavailable.value.retry_after == 1
    valkey.start()
    await store.ping()
    await store.commit("t", new_meta("s", 2), {})
    assert_same(await store.load("t", "s"), new_meta("s", 2), {"a": rows([1])})
    await store.close()
    valkey.stop()


async def test_a_short_absence_goes_unnoticed(tmp_path: Path) -> None:
    valkey = EmbeddedValkey(tmp_path)
    store = RedisStore.from_url(valkey.start())
    await store.commit("t", new_meta("s", 1), {})
    valkey.stop()
    commit = asyncio.create_task(store.commit("t", new_meta("s", 2), {}))
    await asyncio.sleep(0.02)
    await asyncio.to_thread(valkey.start)
    await commit
    assert await store.meta("t", "s") == new_meta("s", 2)
    await store.close()
    valkey.stop()


async def test_a_cancelled_call_leaves_no_reply_to_the_next(store: RedisStore, tenant: str) -> None:
    sites = {"a": rows(range(2000))}
    for i in range(20):
        commit = asyncio.create_task(store.commit(tenant, new_meta(f"s{i}", 1), sites))
        await asyncio.sleep(i * 0.0005)
        commit.cancel()
        await asyncio.wait([commit])
        assert await store.meta(tenant, "nobody") is None
        if (loaded := await store.load(tenant, f"s{i}")) is not None:
            assert_same(loaded, new_meta(f"s{i}", 1), sites)


async def test_a_busy_server_is_an_unavailable_one(store: RedisStore, raw: Redis, url: str) -> None:
    raw.config_set("busy-reply-threshold", 1)
    endless = asyncio.create_task(asyncio.to_thread(raw.eval, "while true do end", 0))
    with pytest.raises(StoreUnavailable):
        while True:
            await store.ping()
    with Redis.from_url(url) as other:
        other.script_kill()
    with pytest.raises(RedisError, match="killed"):
        await endless
    raw.config_set("busy-reply-threshold", 5000)
    await store.ping()
