"""The limits of tenants: each tenant has one account, on however many replicas, in whatever store."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest

from service.errors import QuotaExceeded, RateLimited, StoreFull
from service.store import RetentionConfig, SessionMeta
from service.tenants import Tenant, TenantLimits
from service.turns import quotas as quotas_module
from service.turns.quotas import RECONCILE_AFTER_S, RESERVATION_S, Quotas
from tests.service.store_backends import ManualClock, StoreBackend


def meta(name: str, size: int = 0) -> SessionMeta:
    return SessionMeta(name, 0, "m", 0, 0, size, 0.0, 0.0, 0, 0.0, 0.0, 0, {}, ())


async def test_two_replicas_never_make_more_sessions_than_the_limit(backend: StoreBackend) -> None:
    stores = [backend.open() for _ in range(2)]
    quotas = [Quotas(store) for store in stores]
    tenant = Tenant("crowded", TenantLimits(sessions=5))

    async def make(number: int) -> bool:
        try:
            async with quotas[number % 2].reserve_session(tenant, f"s{number}"):
                await stores[number % 2].create(tenant.name, meta(f"s{number}"))
                return True
        except QuotaExceeded:
            return False

    assert sum(await asyncio.gather(*(make(number) for number in range(40)))) == 5
    assert len(await stores[0].list(tenant.name)) == 5


async def test_a_place_that_was_not_used_is_given_back(backend: StoreBackend) -> None:
    store = backend.open()
    quotas, tenant = Quotas(store), Tenant("wavering", TenantLimits(sessions=1))
    for failure in (ValueError, asyncio.CancelledError):
        with pytest.raises(failure):
            async with quotas.reserve_session(tenant, "s"):
                raise failure
    with pytest.raises(ValueError):
        async with quotas.reserve_session(tenant, "t"):
            await store.create(tenant.name, meta("t"))
            raise ValueError
    with pytest.raises(QuotaExceeded):
        async with quotas.reserve_session(tenant, "u"):
            pass


async def test_tokens_learned_on_one_replica_count_on_the_other(backend: StoreBackend) -> None:
    one, other = (Quotas(backend.open()) for _ in range(2))
    tenant = Tenant("busy", TenantLimits(tokens_per_minute=60_000))
    await one.record_commit(tenant, "s", 0, 90_000)
    with pytest.raises(RateLimited) as refused:
        await other.check_learning(tenant)
    assert refused.value.retry_after is not None and 0 < refused.value.retry_after <= 30.002
    backend.advance(tenant.name, 31)  # 1,000 tokens a second come back
    await other.check_learning(tenant)
    left, reset = await one.tokens(tenant)
    assert 0 < left < 60_000 and 0 < reset <= 60


async def test_a_limit_that_comes_later_counts_what_is_there(backend: StoreBackend) -> None:
    store = backend.open()
    for number in range(3):
        await store.create("free-once", meta(f"s{number}", 100))
    tenant = Tenant("free-once", TenantLimits(sessions=3, bytes=300))
    with pytest.raises(QuotaExceeded, match="3 sessions and has 3"):
        async with Quotas(store).reserve_session(tenant, "s3"):
            pass
    with pytest.raises(QuotaExceeded, match="300 bytes and hold 300"):
        await Quotas(store).check_learning(tenant)


async def test_the_account_is_settled_with_the_store(backend: StoreBackend) -> None:
    """A crash between a commit and its note leaves the account wrong, for example."""
    store = backend.open()
    for number in range(3):
        await store.create("grown", meta(f"s{number}", 100))
    tenant = Tenant("grown", TenantLimits(sessions=4, bytes=400))
    await Quotas(store).record_commit(tenant, "lost", 1000, 0)
    quotas = Quotas(store)
    await quotas.check_learning(tenant)
    async with quotas.reserve_session(tenant, "s3"):
        await store.create(tenant.name, meta("s3"))
    await quotas.record_commit(tenant, "s3", 99, 0)
    await quotas.record_commit(tenant, "s3", 100, 0)
    with pytest.raises(QuotaExceeded, match="400 bytes and hold 400"):
        await quotas.check_learning(tenant)
    await quotas.drop(tenant, "s0")
    await quotas.check_learning(tenant)


async def test_no_request_compares_all_of_a_large_account(
    backend: StoreBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each request compares few pages, until all have been; requests that would be refused compare them again."""
    monkeypatch.setattr(quotas_module, "PAGE_SIZE", 2)
    monkeypatch.setattr(quotas_module, "PAGES_AT_ONCE", 3)
    store, clock, pages = backend.open(RetentionConfig(ttl_s=1000)), ManualClock(), list[str]()
    read, tenant = store.list, Tenant("large", TenantLimits(sessions=20, bytes=1900))

    async def counted(*args: Any, **kwargs: Any) -> list[SessionMeta]:
        pages.append(kwargs["after"])
        return await read(*args, **kwargs)

    monkeypatch.setattr(store, "list", counted)
    for number in range(19):
        await store.create(tenant.name, meta(f"s{number:02}", 100))
    quotas = Quotas(store, clock=clock)
    for num_pages in (3, 4, 5):
        await quotas.check_learning(tenant)
        assert len(pages) == num_pages, "three pages at first, then one a request"
    with pytest.raises(QuotaExceeded, match="hold 1900"):
        for _ in range(10):
            await quotas.check_learning(tenant)
    assert pages == ["", *(f"s{number:02}" for number in range(1, 18, 2))]
    assert await store.ledger.is_settled(tenant.name)
    pages.clear()
    other = Quotas(store, clock=clock)
    async with other.reserve_session(tenant, "s19"):
        await store.create(tenant.name, meta("s19"))
    assert not pages, "a server trusts an account that another one has settled"
    backend.advance(tenant.name, 1001)
    for seconds, num_pages in ((0, 3), (0.5, 3), (1, 6)):
        clock.advance(seconds)
        with suppress(QuotaExceeded):
            await other.check_learning(tenant)
        assert len(pages) <= num_pages
    clock.advance(10)
    await other.check_learning(tenant)


@pytest.mark.parametrize("end", ["erased", "expired"])
async def test_nobody_is_refused_for_sessions_that_are_gone(backend: StoreBackend, end: str) -> None:
    """The account learns of no session's end until it is compared with the store."""
    store, clock = backend.open(RetentionConfig(ttl_s=1000)), ManualClock()
    quotas, tenant = Quotas(store, clock=clock), Tenant(f"forgetful-{end}", TenantLimits(sessions=1, bytes=100))
    async with quotas.reserve_session(tenant, "s"):
        await store.create(tenant.name, meta("s", 100))
    await quotas.record_commit(tenant, "s", 100, 0)
    with pytest.raises(QuotaExceeded):
        await quotas.check_learning(tenant)
    if end == "erased":
        await store.delete(tenant.name, "s")
    else:
        backend.advance(tenant.name, 1001)
    assert await store.meta(tenant.name, "s") is None
    clock.advance(RECONCILE_AFTER_S + 1)
    await quotas.check_learning(tenant)
    async with quotas.reserve_session(tenant, "t"):
        await store.create(tenant.name, meta("t"))


async def test_a_reservation_without_a_session_ends_after_its_time(backend: StoreBackend) -> None:
    store, clock = backend.open(), ManualClock()
    quotas, tenant = Quotas(store, clock=clock), Tenant("slow", TenantLimits(sessions=1))
    first_turn = quotas.reserve_session(tenant, "s")
    await first_turn.__aenter__()
    clock.advance(RECONCILE_AFTER_S + 1)
    with pytest.raises(QuotaExceeded):
        async with quotas.reserve_session(tenant, "t"):
            pass
    backend.advance(tenant.name, RESERVATION_S + 1)
    clock.advance(RECONCILE_AFTER_S + 1)
    async with quotas.reserve_session(tenant, "t"):
        await store.create(tenant.name, meta("t"))
    assert await store.ledger.reserve(tenant.name, "t", 1) == (True, 1)


async def test_the_account_is_kept_when_the_store_is_full(backend: StoreBackend) -> None:
    """A full store refuses what has no room; places are given back, and erasing makes room in the account, too."""
    store = backend.open()
    quotas, tenant = Quotas(store), Tenant("brimful", TenantLimits(sessions=1, bytes=100, tokens_per_minute=100))
    async with quotas.reserve_session(tenant, "s"):
        await store.create(tenant.name, meta("s"))
    await quotas.record_commit(tenant, "s", 100, 10)
    with backend.full():
        with pytest.raises(QuotaExceeded):
            await quotas.check_learning(tenant)
        await store.delete(tenant.name, "s")
        await quotas.drop(tenant, "s")
        for _ in range(2):
            with pytest.raises(StoreFull):
                async with quotas.reserve_session(tenant, "t"):
                    await quotas.check_learning(tenant)
                    await store.create(tenant.name, meta("t"))


async def test_a_tenant_without_limits_has_no_account(backend: StoreBackend) -> None:
    quotas, tenant = Quotas(backend.open()), Tenant("free")
    async with quotas.reserve_session(tenant, "s"):
        await quotas.record_commit(tenant, "s", 100, 100)
    await quotas.check_learning(tenant)
    await quotas.drop(tenant, "s")
    assert not backend.has_account(tenant.name)
