"""The ledger: a tenant has one account, on however many replicas."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from service.errors import QuotaExceeded, RateLimited, StoreFull
from service.store import RedisStore, SessionMeta
from service.store.base import RetentionConfig
from service.store.embedded import EmbeddedValkey
from service.tenants import Tenant, TenantLimits
from service.turns.quotas import Quotas


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    valkey = EmbeddedValkey(tmp_path_factory.mktemp("ledger"))
    yield valkey.start()
    valkey.stop()


def meta(name: str, size: int = 0) -> SessionMeta:
    return SessionMeta(name, 0, "m", 0, 0, size, 0.0, 0.0, 0, 0.0, 0.0, 0, {}, ())


async def test_two_replicas_never_make_more_sessions_than_the_limit(url: str) -> None:
    stores = [RedisStore.from_url(url) for _ in range(2)]
    ledgers = [Quotas(store) for store in stores]
    tenant = Tenant("crowded", TenantLimits(sessions=5))

    async def make(number: int) -> bool:
        try:
            async with ledgers[number % 2].reserve_session(tenant, f"s{number}"):
                await stores[number % 2].create(tenant.name, meta(f"s{number}"))
                return True
        except QuotaExceeded:
            return False

    assert sum(await asyncio.gather(*(make(number) for number in range(40)))) == 5
    assert len(await stores[0].list(tenant.name)) == 5
    for store in stores:
        await store.close()


async def test_a_place_that_was_not_used_is_given_back(url: str) -> None:
    store = RedisStore.from_url(url)
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
    await store.close()


async def test_tokens_learned_on_one_replica_count_on_the_other(url: str) -> None:
    stores = [RedisStore.from_url(url) for _ in range(2)]
    one, other = (Quotas(store) for store in stores)
    tenant = Tenant("busy", TenantLimits(tokens_per_minute=60_000))
    await one.record_commit(tenant, "s", 0, 60_050)
    with pytest.raises(RateLimited) as refused:
        await other.check_learning(tenant)
    assert refused.value.retry_after is not None and 0 < refused.value.retry_after <= 0.052
    await asyncio.sleep(0.1)
    await other.check_learning(tenant)  # 1,000 tokens a second come back
    left, reset = await one.tokens(tenant)
    assert 0 < left < 60_000 and 0 < reset <= 60
    for store in stores:
        await store.close()


async def test_a_limit_that_comes_later_counts_what_is_there(url: str) -> None:
    store = RedisStore.from_url(url)
    for number in range(3):
        await store.create("free-once", meta(f"s{number}", 100))
    tenant = Tenant("free-once", TenantLimits(sessions=3, bytes=300))
    with pytest.raises(QuotaExceeded, match="3 sessions and has 3"):
        async with Quotas(store).reserve_session(tenant, "s3"):
            pass
    with pytest.raises(QuotaExceeded, match="300 bytes and hold 300"):
        await Quotas(store).check_learning(tenant)
    await store.close()


async def test_the_account_is_settled_with_the_store(url: str) -> None:
    """After a crash between a commit and its note, say."""
    store = RedisStore.from_url(url)
    for number in range(3):
        await store.create("grown", meta(f"s{number}", 100))
    tenant = Tenant("grown", TenantLimits(sessions=4, bytes=400))
    await Quotas(store).record_commit(tenant, "lost", 1000, 0)
    settled = Quotas(store)
    await settled.check_learning(tenant)
    async with settled.reserve_session(tenant, "s3"):
        await store.create(tenant.name, meta("s3"))
    await settled.record_commit(tenant, "s3", 99, 0)
    await settled.record_commit(tenant, "s3", 100, 0)
    with pytest.raises(QuotaExceeded, match="400 bytes and hold 400"):
        await settled.check_learning(tenant)
    await settled.drop(tenant, "s0")
    await settled.check_learning(tenant)
    await store.close()


@pytest.mark.parametrize("end", ["erased", "expired"])
async def test_nobody_is_refused_for_sessions_that_are_gone(
    url: str, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """Nobody told the ledger."""
    monkeypatch.setattr("service.turns.quotas.SETTLE_S", 0.0)
    store = RedisStore.from_url(url, RetentionConfig(ttl_s=1))
    quotas, tenant = Quotas(store), Tenant(f"forgetful-{end}", TenantLimits(sessions=1, bytes=100))
    async with quotas.reserve_session(tenant, "s"):
        await store.create(tenant.name, meta("s", 100))
    await quotas.record_commit(tenant, "s", 100, 0)
    with pytest.raises(QuotaExceeded):
        await quotas.check_learning(tenant)
    if end == "erased":
        await store.delete(tenant.name, "s")
    while await store.meta(tenant.name, "s") is not None:
        await asyncio.sleep(0.05)
    await quotas.check_learning(tenant)
    async with quotas.reserve_session(tenant, "t"):
        await store.create(tenant.name, meta("t"))
    await store.close()


async def test_the_account_is_kept_when_the_store_is_full(url: str) -> None:
    """What has no room is refused by the store; places are given back, and erasing makes room in the account, too."""
    store = RedisStore.from_url(url)
    quotas, tenant = Quotas(store), Tenant("brimful", TenantLimits(sessions=1, bytes=100, tokens_per_minute=100))
    async with quotas.reserve_session(tenant, "s"):
        await store.create(tenant.name, meta("s"))
    await quotas.record_commit(tenant, "s", 100, 10)
    await store._client.config_set("maxmemory", 1)
    try:
        with pytest.raises(QuotaExceeded):
            await quotas.check_learning(tenant)
        await store.delete(tenant.name, "s")
        await quotas.drop(tenant, "s")
        for _ in range(2):
            with pytest.raises(StoreFull):
                async with quotas.reserve_session(tenant, "t"):
                    await quotas.check_learning(tenant)
                    await store.create(tenant.name, meta("t"))
    finally:
        await store._client.config_set("maxmemory", 0)
        await store.close()


async def test_a_tenant_without_limits_has_no_account(url: str) -> None:
    store = RedisStore.from_url(url)
    quotas, tenant = Quotas(store), Tenant("free")
    async with quotas.reserve_session(tenant, "s"):
        await quotas.record_commit(tenant, "s", 100, 100)
    await quotas.check_learning(tenant)
    await quotas.drop(tenant, "s")
    assert not await store._client.keys("imprint:{free}*")
    await store.close()
