"""The session store in a real Valkey: formats, scripts, indexes, and what happens when the connection breaks.

`test_store.py` tests the promises that every store makes.
"""

from __future__ import annotations

import asyncio
import json
import struct
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import uvloop
from redis import Redis
from redis.exceptions import RedisError

from service.errors import Conflict, EngineError, StoreUnavailable, VersionConflict
from service.store import CommitMetadata, IdempotencyRecord, RetentionConfig
from service.store.embedded import EmbeddedValkey
from service.store.redis import codec, index
from service.store.redis import store as redis_store
from service.store.redis.codec import PAGE_ROWS, encode
from service.store.redis.scripts import retry_while_away
from service.store.redis.store import RedisStore
from service.turns.action_ids import format_action_id, parse_action_id
from tests.live import rows_of
from tests.service.faulty_store import Fault, faulty_store_proxy
from tests.service.store_backends import ROW_BYTES, assert_same, new_meta, rows, snapshot

PATIENT_S = 60.0  # time within which a slow machine has restarted a server


def contents(client: Redis, tenant: str) -> dict[bytes, Any]:
    """Return the meta hashes and the pages of the tenant's sessions."""
    keys = [*client.scan_iter(f"imprint:{{{tenant}/*:meta"), *client.scan_iter(f"imprint:{{{tenant}/*:rows:*")]
    return {key: client.hgetall(key) for key in keys}


def expiries(client: Redis, tenant: str, sid: str) -> set[int]:
    """Return the seconds after which the keys of a session expire, rounded up to tens; -1 = never."""
    return {-(-client.ttl(key) // 10) * 10 or -1 for key in snapshot(client, tenant) if f"/{sid}}}".encode() in key}


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


# --- keys and formats -------------------------------------------------------------------------------------------------


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


async def test_commit_after_the_server_forgot_its_scripts(store: RedisStore, raw: Redis, tenant: str) -> None:
    await store.commit(tenant, new_meta("s", 1), {})
    raw.script_flush()
    await store.commit(tenant, new_meta("s", 2), {"a": rows([1])})
    assert_same(await store.load(tenant, "s"), new_meta("s", 2), {"a": rows([1])})


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


async def test_a_format_of_a_later_release_is_refused(store: RedisStore, raw: Redis, tenant: str) -> None:
    await store.commit(tenant, new_meta("s", 1), {"a": rows([1])})
    raw.hset(f"imprint:{{{tenant}/s}}:meta", "format", "6")
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
        with pytest.raises(EngineError, match=r"'s' is stored in format 6, .* only formats up to 5") as refused:
            await call
        assert refused.value.code == "unknown_store_format"
    assert snapshot(raw, tenant) == before


async def test_a_long_list_keeps_the_event_loop_for_a_few_sessions_at_a_time(
    store: RedisStore, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(250):
        await store.create(tenant, new_meta(f"s{n:03}", 1))
    steps, decode = list[int](), codec.decode
    ended = False

    async def other_request() -> None:
        while not ended:
            steps.append(0)
            await asyncio.sleep(0)

    def counted(sid: str, meta_hash: dict[bytes, bytes]) -> Any:
        steps[-1] += 1
        return decode(sid, meta_hash)

    monkeypatch.setattr(index, "decode", counted)
    other = asyncio.create_task(other_request())
    await asyncio.sleep(0)
    listed = await store.list(tenant, limit=250)
    ended = True
    await other
    assert [meta.id for meta in listed] == [f"s{n:03}" for n in range(250)]
    assert max(steps) <= 100


async def test_list_skips_and_removes_names_without_a_session(store: RedisStore, raw: Redis, tenant: str) -> None:
    for sid in ("a", "b", "z"):
        await store.create(tenant, new_meta(sid))
    for stale in ("0", "aa", "b3", "zz"):
        raw.zadd(f"imprint:sessions:{tenant}", {stale: 0})
    assert await store.count(tenant) == 7
    assert [meta.id for meta in await store.list(tenant, limit=2)] == ["a", "b"]
    assert [meta.id for meta in await store.list(tenant)] == ["a", "b", "z"]
    assert await store.count(tenant) == 3


async def test_all_keys_of_a_session_expire_together(url: str, raw: Redis, tenant: str) -> None:
    store = RedisStore.from_url(url, RetentionConfig(ttl_s=1000))
    options: dict[str, dict[str, int]] = {"default": {}, "own": {"ttl_s": 500}, "never": {"ttl_s": 0}}
    for sid, own in options.items():
        meta = replace(new_meta(sid, 1), options=dict(own))
        await store.commit(tenant, meta, {"a": rows([1])}, commit_metadata=CommitMetadata({"kind": "learn"}, b"text"))
    await store.commit(tenant, new_meta("default", 2), {"b": rows([1])})
    assert {sid: expiries(raw, tenant, sid) for sid in options} == {"default": {1000}, "own": {500}, "never": {-1}}
    await store.configure(tenant, "default", {"ttl_s": 0})
    assert expiries(raw, tenant, "default") == {-1}
    await store.close()


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
    assert raw.hget(key, "format") == b"5"
    history = await store.history(tenant, "s", undo=True)
    assert history is not None and [undo.version for undo in history.undo] == [2]
    assert history.undo[0].sites["a"].data.tolist() == [[7] * 128]
    await store.close()


@pytest.mark.parametrize("format", ["2", "3"])
async def test_the_rows_of_an_older_format_are_all_taken_over(url: str, raw: Redis, tenant: str, format: str) -> None:
    """Format 2 has a field for each row, format 3 one for five slots, with zeros in a slot without a row."""
    store = RedisStore.from_url(url, RetentionConfig(ttl_s=100))
    expected, name = rows([*range(12_000), *range(20_000, 30_000, 7)], 3), f"imprint:{{{tenant}/s}}:"
    meta: dict[Any, Any] = encode(new_meta("s", 1)) | {"format": format, "site:a": "128"}
    raw.hset(f"{name}meta", mapping=meta)
    by_slot = {int(slot): row.tobytes() for slot, row in zip(expected.slots, expected.data, strict=True)}
    if format == "3":
        pages = {slot // 5: [by_slot.get(slot // 5 * 5 + offset) for offset in range(5)] for slot in by_slot}
        flags = {number: bytes(row is not None for row in page) for number, page in pages.items()}
        by_slot = {number: flags[number] + b"".join(row or bytes(128) for row in pages[number]) for number in pages}
    raw.hset(f"{name}rows:a", mapping={struct.pack("<I", number): value for number, value in by_slot.items()})
    raw.expire(f"{name}rows:a", 50)
    assert_same(await store.load(tenant, "s"), new_meta("s", 1), {"a": expected})
    assert raw.ttl(f"{name}rows:a") > 90 and raw.hget(f"{name}meta", "format") == b"5"
    await store.close()


async def test_a_session_that_counted_no_actions_keeps_their_ids(store: RedisStore, raw: Redis, tenant: str) -> None:
    await store.commit(tenant, new_meta("s", 1), {"a": rows([1])})
    raw.hdel(f"imprint:{{{tenant}/s}}:meta", "actions", "action_tags")
    raw.hset(f"imprint:{{{tenant}/s}}:meta", mapping={"format": "4", "version": "7"})
    meta = await store.meta(tenant, "s")
    assert meta is not None and (meta.actions, meta.action_tags) == (7, ((7, ""),))
    assert parse_action_id("act-5", meta) == 5
    await store.commit(tenant, replace(meta, version=8, actions=8), {})
    meta = await store.meta(tenant, "s")
    assert meta is not None and parse_action_id("act-5", meta) == 5
    assert parse_action_id(format_action_id(8, meta), meta) == 8
    with pytest.raises(Conflict):
        parse_action_id("act-8", meta)


async def test_deployments_of_two_prefixes_share_a_server(url: str, raw: Redis, tenant: str) -> None:
    one, other = (RedisStore.from_url(url, prefix=f"{name}-{tenant}") for name in ("one", "other"))
    heard: list[Any] = []

    async def listen() -> None:
        async for erased in other.erased():
            heard.append(erased)

    listening = asyncio.create_task(listen())
    while not heard:
        await asyncio.sleep(0.01)
    turn_start = await one.begin_turn("t", "s", write="always")
    await one.commit("t", new_meta("s", 1), {"a": rows([1])}, lease=turn_start.lease)
    await one.ledger.reserve("t", "s", 0)
    held = (await one.begin_turn("t", "s", write="always")).lease
    assert held and (await other.begin_turn("t", "s", write="always")).meta is None
    assert await other.load("t", "s") is None and await other.list("t") == [] and await other.restore_list() == 0
    assert await other.ledger.reserve("t", "other", 1) == (True, 0) and await one.ledger.reserve("t", "s", 1) == (
        True,
        1,
    )
    await other.create("t", new_meta("s"))
    await one.delete("t", "s")
    assert [meta.id for meta in await other.list("t")] == ["s"] and await one.list("t") == []
    await other.delete("t", "x")
    async with asyncio.timeout(5):
        while len(heard) < 2:
            await asyncio.sleep(0.01)
    assert heard == [None, ("t", "x")]
    names = [key.split(b":")[0] for key in raw.scan_iter() if tenant.encode() in key]
    assert set(names) == {f"{name}-{tenant}".encode() for name in ("one", "other")}
    listening.cancel()
    with pytest.raises(ValueError, match="prefix"):
        RedisStore.from_url(url, prefix="no:colon")
    for store in (one, other):
        await store.close()


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_write_to_a_lost_connection_is_repeated_on_uvloop_too(url: str) -> None:
    """redis-py does not translate the event loop's own error."""

    async def run() -> bytes:
        path = unquote(urlsplit(url).path)
        connections = [await asyncio.open_unix_connection(path) for _ in range(2)]
        connections[0][1].transport.abort()
        await asyncio.sleep(0)  # until the connection is closed

        async def ping() -> bytes:
            reader, writer = connections.pop(0)
            writer.write(b"PING\r\n")
            return await reader.readline()

        return await retry_while_away(ping)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(run()) == b"+PONG\r\n"


@pytest.mark.parametrize("fault", ["request", "reply", "late"])
async def test_a_broken_connection_commits_once(
    url: str, store: RedisStore, raw: Redis, tenant: str, fault: Fault
) -> None:
    async with faulty_store_proxy(url) as (proxy, remote):
        await remote.commit(tenant, new_meta("s", 1), {"a": rows([1], 1)})
        proxy.fault = fault
        await remote.commit(tenant, new_meta("s", 2), {"a": rows([1], 2)})
        assert proxy.triggered
        assert_same(await store.load(tenant, "s"), new_meta("s", 2), {"a": rows([1], 2)})

        before = snapshot(raw, tenant)
        await proxy.deliver_delayed()
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
    async with faulty_store_proxy(url) as (proxy, remote):
        await remote.commit(tenant, new_meta("s", 1), {})
        proxy.fault, proxy.down_after_fault = fault, True
        with pytest.raises(StoreUnavailable) as unavailable:
            await remote.commit(tenant, new_meta("s", 2), {})
        assert unavailable.value.retry_after == 1
        proxy.repair()
        truth = await store.meta(tenant, "s")
        assert truth == new_meta("s", 2 if fault == "reply" else 1)
        assert await remote.meta(tenant, "s") == truth


@pytest.mark.parametrize(
    ("others", "outcome"), [(1, VersionConflict), (2, StoreUnavailable)], ids=["lost for sure", "unknown"]
)
async def test_others_commit_while_the_connection_is_broken(
    url: str,
    store: RedisStore,
    tenant: str,
    others: int,
    outcome: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(redis_store, "COMMIT_RETRY_S", PATIENT_S)
    async with faulty_store_proxy(url) as (proxy, remote):
        await remote.commit(tenant, new_meta("s", 1), {})
        proxy.fault, proxy.down_after_fault = "request", True
        commit = asyncio.create_task(remote.commit(tenant, new_meta("s", 2), {"a": rows([1], 66)}))
        while not proxy.triggered:
            await asyncio.sleep(0.001)
        for v in range(2, 2 + others):
            await store.commit(tenant, new_meta("s", v), {"a": rows([1], v)})
        proxy.repair()
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


async def test_a_short_absence_goes_unnoticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_store, "COMMIT_RETRY_S", PATIENT_S)
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
