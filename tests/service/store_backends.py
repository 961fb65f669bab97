"""The stores that the contract suite runs on, and the sessions, rows and comparisons that its tests share.

A new store joins the suite with a `StoreBackend` in `BACKENDS`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np
from redis import Redis

from service.store import RetentionConfig, RowBatch, SessionMeta, SessionStore, StoredSession
from service.store.memory import MemoryStore
from service.store.redis.store import RedisStore

ROW_BYTES = 128
ODD_ID = "a~:@+=-._Z9"
BACKENDS = ("memory", "valkey")


class ManualClock:
    """A clock that stands still until a test advances it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class StoreBackend(Protocol):
    """One kind of store, with what a test must be able to do behind the back of its stores."""

    def open(self, retention: RetentionConfig | None = None) -> SessionStore:
        """Return the store of one more server; all servers share the sessions."""
        ...

    def dump(self, tenant: str) -> Any:
        """Return all that is stored of the tenant's sessions, for comparison."""
        ...

    def advance(self, tenant: str, seconds: float) -> None:
        """Let time pass for all that is stored of the tenant."""
        ...

    def full(self) -> AbstractContextManager[None]:
        """Leave the store no room for writes during the block."""
        ...

    def has_account(self, tenant: str) -> bool:
        """Return whether the store keeps an account of the tenant."""
        ...

    async def close(self) -> None:
        """Close all stores that were opened."""
        ...


class MemoryBackend:
    """Stores of one in-memory database, on a clock that stands still."""

    def __init__(self) -> None:
        self._clock = ManualClock()
        self._store = MemoryStore(clock=self._clock)

    def open(self, retention: RetentionConfig | None = None) -> SessionStore:
        return self._store.replica(retention)

    def dump(self, tenant: str) -> Any:
        records = copy.deepcopy(self._store._database._records)
        return {key: record for key, record in records.items() if key[0] == tenant}

    def advance(self, tenant: str, seconds: float) -> None:
        self._clock.advance(seconds)

    @contextmanager
    def full(self) -> Iterator[None]:
        self._store._database.max_bytes = -1
        try:
            yield
        finally:
            self._store._database.max_bytes = 0

    def has_account(self, tenant: str) -> bool:
        ledger = self._store.ledger
        return tenant in ledger._bytes or tenant in ledger._buckets

    async def close(self) -> None:
        await self._store.close()


class ValkeyBackend:
    """Stores on a real Valkey. Time passes there, but far less than the tests let pass."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stores: list[RedisStore] = []

    def open(self, retention: RetentionConfig | None = None) -> SessionStore:
        self._stores.append(RedisStore.from_url(self._url, retention))
        return self._stores[-1]

    def dump(self, tenant: str) -> Any:
        with Redis.from_url(self._url) as client:
            return snapshot(client, tenant)

    def advance(self, tenant: str, seconds: float) -> None:
        with Redis.from_url(self._url) as client:
            advance_time(client, tenant, round(1000 * seconds))

    @contextmanager
    def full(self) -> Iterator[None]:
        with Redis.from_url(self._url) as client:
            client.config_set("maxmemory", 1)
            try:
                yield
            finally:
                client.config_set("maxmemory", 0)

    def has_account(self, tenant: str) -> bool:
        with Redis.from_url(self._url) as client:
            return bool(client.keys(f"imprint:{{{tenant}}}*"))

    async def close(self) -> None:
        for store in self._stores:
            await store.close()


def advance_time(client: Redis, tenant: str, milliseconds: int) -> None:
    """Bring every expiry and every stored time of a tenant's keys nearer, as if time had passed on the server."""
    raw: Any = client
    for key in [*raw.scan_iter(f"imprint:{{{tenant}/*"), *raw.scan_iter(f"imprint:{{{tenant}}}:*")]:
        left_ms = raw.pttl(key)
        if 0 <= left_ms <= milliseconds:
            raw.delete(key)
        elif left_ms > milliseconds:
            raw.pexpire(key, left_ms - milliseconds)
        if key.endswith(b":meta") and raw.hexists(key, "once_until"):
            raw.hincrby(key, "once_until", -(milliseconds // 1000))
        if key.endswith(b"}:tokens") and raw.exists(key):
            raw.hincrby(key, "at", -milliseconds)
        if key.endswith(b"}:sessions"):
            reserved = {sid: value for sid, value in raw.hgetall(key).items() if value.startswith(b"new ")}
            for sid, value in reserved.items():
                raw.hset(key, sid, f"new {int(value[4:]) - milliseconds}")
        if key.endswith(b":onces"):
            for name in raw.zrange(key, 0, -1):
                raw.zincrby(key, -milliseconds / 1000, name)


def snapshot(client: Redis, tenant: str) -> dict[bytes, Any]:
    """Return every key of the tenant's sessions, byte for byte."""
    return {key: client.dump(key) for key in client.scan_iter(f"imprint:{{{tenant}/*")}


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
    """Return random rows, or rows that are `value` in every byte."""
    slots = np.asarray(slots, np.int32)
    shape = (len(slots), row_bytes)
    if value is None:
        return RowBatch(slots, np.random.default_rng(len(slots)).integers(0, 256, shape, np.uint8))
    return RowBatch(slots, np.full(shape, value % 256, np.uint8))


def assert_same_rows(found: dict[str, RowBatch], expected: dict[str, RowBatch]) -> None:
    assert found.keys() == expected.keys()
    for site, batch in expected.items():
        np.testing.assert_array_equal(found[site].slots, batch.slots)
        np.testing.assert_array_equal(found[site].data, batch.data)


def assert_same(loaded: StoredSession | None, meta: SessionMeta, sites: dict[str, RowBatch]) -> None:
    assert loaded is not None
    assert loaded.meta == meta
    assert_same_rows(loaded.sites, sites)
