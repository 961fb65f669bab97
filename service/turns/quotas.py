"""What each tenant has used, kept in the store so that it holds on every replica.

Keys, all of a tenant's in one hash slot of a cluster:

    imprint:{<tenant>}:sessions  hash: session id -> bytes of its rows, or since when it is new; `*` -> their sum
    imprint:{<tenant>}:tokens    hash: the bucket of tokens it may learn; expires when it is full again

A tenant without such limits has no keys and costs nothing. The sessions are another slot's: what a crash keeps from
being noted, or expires, is found out by reading the store, at the first use and before anybody is refused.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from service.errors import QuotaExceeded, RateLimited, Unavailable
from service.store.redis.store import RedisStore
from service.tenants import Tenant

PAGE_SIZE = 500
RECONCILE_AFTER_S = 60.0  # how long the account is believed against a tenant
RESERVATION_MS = (
    3_600_000  # how long a place is kept for a session that is not in the store: it may be in its first turn
)
MINUTE_S = 60.0

log = logging.getLogger(__name__)


class Quotas:
    """Holds tenants to their limits of sessions, bytes and learned tokens. Raises StoreUnavailable like the store."""

    def __init__(self, store: RedisStore) -> None:
        self._store = store
        self._script = store.script("ledger")
        self._reconciled_at: dict[str, float] = {}
        self._reconcile_lock = asyncio.Lock()

    @asynccontextmanager
    async def reserve_session(self, tenant: Tenant, session: str) -> AsyncIterator[None]:
        """A new session's place, given back if the session has not come to be by the end. Hold its lock.

        Raises:
            QuotaExceeded: the tenant has as many sessions as it may have.
        """
        if not await self._is_tracked(tenant):
            yield
            return
        limit = tenant.limits.sessions
        free, count = await self._run(tenant, "place", session, limit)
        if not free and await self._reconcile(tenant, RECONCILE_AFTER_S):
            free, count = await self._run(tenant, "place", session, limit)
        if not free:
            raise QuotaExceeded(
                f"The tenant may have {limit} sessions and has {count}; delete one to make room.", code="session_limit"
            )
        try:
            yield
        except BaseException:
            with suppress(Unavailable):
                if await self._store.meta(tenant.name, session) is None:
                    await self._run(tenant, "drop", session, 0)
            raise

    async def check_learning(self, tenant: Tenant) -> None:
        """Returns if the tenant may learn now.

        Raises:
            QuotaExceeded: its sessions hold as many bytes as they may hold.
            RateLimited: it has learned as many tokens as it may for now.
        """
        limits = tenant.limits
        is_tracked = await self._is_tracked(tenant)
        if not is_tracked and not limits.tokens_per_minute:
            return
        used_bytes, left = await self._read_usage(tenant)
        if limits.bytes and used_bytes >= limits.bytes and await self._reconcile(tenant, RECONCILE_AFTER_S):
            used_bytes, left = await self._read_usage(tenant)
        if limits.bytes and used_bytes >= limits.bytes:
            raise QuotaExceeded(
                f"The tenant's sessions may hold {limits.bytes} bytes and hold {used_bytes}; delete some to learn "
                "more, or ask with 'adapt': 'predict'.",
                code="byte_limit",
            )
        if limits.tokens_per_minute and left <= 0:
            raise RateLimited(
                f"The tenant may learn {limits.tokens_per_minute} tokens per minute and has {left} left; "
                "wait, or ask with 'adapt': 'predict'.",
                code="rate_limit_exceeded",
                retry_after=(1 - left) * MINUTE_S / limits.tokens_per_minute,
            )

    async def record_commit(self, tenant: Tenant, session: str, size: int, tokens: int) -> None:
        """Notes a commit: the bytes that the session holds now, and the tokens it has learned. Never fails the turn."""
        rate = tenant.limits.tokens_per_minute
        try:
            is_tracked = await self._is_tracked(tenant)
            if is_tracked or rate:
                await self._run(tenant, "hold", session, size if is_tracked else "", rate, tokens)
        except Unavailable:
            log.warning("a commit could not be noted in its tenant's account")

    async def drop(self, tenant: Tenant, session: str) -> None:
        """Notes that a session is deleted. Never fails."""
        try:
            if await self._is_tracked(tenant):
                await self._run(tenant, "drop", session, 0)
        except Unavailable:
            log.warning("a deletion could not be noted in its tenant's account")

    async def tokens(self, tenant: Tenant) -> tuple[int, float]:
        """Tokens that a tenant with such a limit may learn now, and seconds until it may learn all of them again."""
        rate = tenant.limits.tokens_per_minute
        _, left = await self._read_usage(tenant)
        return max(0, left), (rate - left) * MINUTE_S / rate

    async def _read_usage(self, tenant: Tenant) -> tuple[int, int]:
        used_bytes, left = await self._run(tenant, "look", tenant.limits.tokens_per_minute)
        return int(used_bytes), int(left)

    async def _is_tracked(self, tenant: Tenant) -> bool:
        """Whether the tenant's sessions are counted; they are, once the account names those there are."""
        if not (tenant.limits.sessions or tenant.limits.bytes):
            self._reconciled_at.pop(tenant.name, None)
            return False
        await self._reconcile(tenant, math.inf)
        return True

    async def _reconcile(self, tenant: Tenant, age_s: float) -> bool:
        """Brings the account in line with the store if that was not done within `age_s`; returns whether it was now."""
        async with self._reconcile_lock:
            last = self._reconciled_at.get(tenant.name)
            if last is not None and time.monotonic() - last <= age_s:
                return False
            recorded_ids = {name.decode() for name in await self._run(tenant, "names")} - {"*"}
            after = ""
            while page := await self._store.list(tenant.name, after=after, limit=PAGE_SIZE):
                await self._run(tenant, "state", *(word for meta in page for word in (meta.id, meta.bytes)))
                recorded_ids -= {meta.id for meta in page}
                after = page[-1].id
            for session in recorded_ids:
                await self._run(tenant, "drop", session, RESERVATION_MS)
            self._reconciled_at[tenant.name] = time.monotonic()
            return True

    async def _run(self, tenant: Tenant, *arguments: str | int) -> Any:
        account = f"imprint:{{{tenant.name}}}"
        return await self._script([f"{account}:sessions", f"{account}:tokens"], arguments)
