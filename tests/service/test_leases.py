"""The promises of `SessionStore` about leases, fences and erasures, on every store."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from service.errors import Conflict, SessionBusy, VersionConflict
from service.store import RetentionConfig, SessionStore
from service.store.base import HEARTBEAT_S, TOMBSTONE_S, Lease
from service.store.memory import MemoryStore
from tests.service.store_backends import StoreBackend, assert_same, new_meta, rows

LEASE_S = 60.0  # longer than any test takes: a lease ends when the test lets time pass


@pytest.fixture
def store(backend: StoreBackend) -> SessionStore:
    return backend.open()


@pytest.fixture
def two(backend: StoreBackend) -> tuple[SessionStore, SessionStore]:
    """The stores of two replicas."""
    retention = RetentionConfig(lease_s=LEASE_S, wait_s=LEASE_S)
    return backend.open(retention), backend.open(retention)


async def take(store: SessionStore, tenant: str) -> Lease:
    turn_start = await store.begin_turn(tenant, "s", write="always")
    assert turn_start.lease is not None
    return turn_start.lease


async def listen(store: SessionStore, heard: list[tuple[str, str] | None]) -> None:
    async for erased in store.erased():
        heard.append(erased)


async def test_a_lease_is_one_replicas_until_it_commits_gives_it_back_or_lets_it_end(
    two: tuple[SessionStore, SessionStore], backend: StoreBackend, tenant: str
) -> None:
    one, other = two
    hasty = backend.open(RetentionConfig(lease_s=LEASE_S, wait_s=0.0))
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
        backend.advance(tenant, LEASE_S / 2)
        assert await one.renew(lease)
    with pytest.raises(SessionBusy):
        await hasty.begin_turn(tenant, "s", write="always")
    backend.advance(tenant, LEASE_S + 1)
    await take(other, tenant)
    assert not await one.renew(lease)


async def test_a_turn_waits_for_the_lease_of_another_server_and_replaces_its_own(
    two: tuple[SessionStore, SessionStore], tenant: str
) -> None:
    one, other = two
    await take(one, tenant)
    lease = await take(one, tenant)
    waiting = asyncio.create_task(take(other, tenant))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await one.release(lease)
    await other.release(await waiting)


async def test_the_lease_of_a_dead_server_is_free_within_three_seconds(
    two: tuple[SessionStore, SessionStore], backend: StoreBackend, tenant: str
) -> None:
    one, other = two
    hasty = backend.open(RetentionConfig(lease_s=LEASE_S, wait_s=0.0))
    beating = asyncio.create_task(one.heartbeat())
    await asyncio.sleep(0.1)
    lease = await take(one, tenant)
    await asyncio.sleep(0.6)
    with pytest.raises(SessionBusy):
        await hasty.begin_turn(tenant, "s", write="always")
    beating.cancel()
    backend.advance(tenant, HEARTBEAT_S + 0.1)
    later = await asyncio.wait_for(take(other, tenant), 3.0)
    with pytest.raises(VersionConflict):
        await one.commit(tenant, new_meta("s", 1), {}, lease=lease)
    await other.commit(tenant, new_meta("s", 1), {}, lease=later)


async def test_a_stale_lease_commits_nothing(
    two: tuple[SessionStore, SessionStore], backend: StoreBackend, tenant: str
) -> None:
    one, other = two
    stale = await take(one, tenant)
    backend.advance(tenant, LEASE_S + 1)
    fresh = await take(other, tenant)
    before = backend.dump(tenant)
    with pytest.raises(VersionConflict, match="lease"):
        await one.commit(tenant, new_meta("s", 1), {"a": rows([1])}, lease=stale)
    with pytest.raises(VersionConflict, match="lease"):
        await one.create(tenant, new_meta("s"), stale)
    await one.release(stale)
    assert backend.dump(tenant) == before
    await other.commit(tenant, new_meta("s", 1), {"a": rows([1], 2)}, lease=fresh)
    assert_same(await one.load(tenant, "s"), new_meta("s", 1), {"a": rows([1], 2)})


async def test_a_lease_that_ended_but_that_nobody_took_still_commits(
    two: tuple[SessionStore, SessionStore], backend: StoreBackend, tenant: str
) -> None:
    lease = await take(two[0], tenant)
    backend.advance(tenant, LEASE_S + 1)
    assert not await two[0].renew(lease)
    await two[0].commit(tenant, new_meta("s", 1), {}, lease=lease)
    assert await two[1].meta(tenant, "s") == new_meta("s", 1)


@pytest.mark.parametrize("version", [0, 1])
async def test_a_late_commit_does_not_bring_back_what_was_erased(
    two: tuple[SessionStore, SessionStore], backend: StoreBackend, tenant: str, version: int
) -> None:
    one, other = two
    if version:
        await one.commit(tenant, new_meta("s", 1), {"a": rows([1])})
    lease = await take(one, tenant)
    assert await other.delete(tenant, "s") == bool(version)
    before = backend.dump(tenant)
    for call in (
        one.commit(tenant, new_meta("s", version + 1), {"a": rows([1])}, lease=lease),
        one.create(tenant, new_meta("s"), lease),
    ):
        with pytest.raises(Conflict) as erased:
            await call
        assert erased.value.code == "session_erased"
    assert backend.dump(tenant) == before
    await other.commit(tenant, new_meta("s", 1), {}, lease=await take(other, tenant))
    with pytest.raises(Conflict, match="erased"):
        await one.commit(tenant, new_meta("s", 2), {}, lease=lease)


async def test_a_tombstone_ends_after_its_time(store: SessionStore, backend: StoreBackend, tenant: str) -> None:
    lease = await take(store, tenant)
    await store.delete(tenant, "s")
    backend.advance(tenant, TOMBSTONE_S + 1)
    with pytest.raises(VersionConflict, match="lease"):
        await store.commit(tenant, new_meta("s", 1), {}, lease=lease)
    await store.commit(tenant, new_meta("s", 1), {}, lease=await take(store, tenant))


async def test_a_fence_never_goes_back(two: tuple[SessionStore, SessionStore], tenant: str) -> None:
    fences = []
    for turn in range(6):
        lease = await take(two[turn % 2], tenant)
        fences.append(int(lease.value.partition(":")[2]))
        if turn == 3:
            await two[0].delete(tenant, "s")
        await two[turn % 2].release(lease)
    assert fences == sorted(set(fences))


async def test_every_replica_hears_of_an_erasure(two: tuple[SessionStore, SessionStore], tenant: str) -> None:
    one, other = two
    heard: list[tuple[str, str] | None] = []
    listening = asyncio.create_task(listen(other, heard))
    while not heard:
        await asyncio.sleep(0.01)
    await one.commit(tenant, new_meta("s", 1), {})
    await one.delete(tenant, "s")
    while heard[1:] != [(tenant, "s")]:
        await asyncio.sleep(0.01)
    listening.cancel()


async def test_an_exclusive_store_takes_no_lease(tenant: str) -> None:
    store = MemoryStore(exclusive=True)
    assert (await store.begin_turn(tenant, "s", write="always")).lease is None
    await store.commit(tenant, new_meta("s", 1), {})
    assert (await store.begin_turn(tenant, "s", write="always")).meta == new_meta("s", 1)
