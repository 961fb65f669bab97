"""The limits of each tenant: sessions, bytes and learned tokens, checked against its account in the store.

The store keeps the accounts (`QuotaLedger`), so a limit holds on every server. A tenant without such limits has no
account and costs nothing. A crash may keep a commit from an account, and a session may expire unnoticed: the account
is compared with the stored sessions at its first use, and again before a tenant is refused.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from service.errors import EngineError, QuotaExceeded, RateLimited, Unavailable
from service.store.base import SessionStore
from service.tenants import Tenant

PAGE_SIZE = 500
RECONCILE_AFTER_S = 60.0  # age from which on an account is compared with the store before it refuses a tenant
RESERVATION_S = 3600.0  # time for which a reservation stays without a stored session, which may be in its first turn
MINUTE_S = 60.0

log = logging.getLogger(__name__)


class Quotas:
    """The limits of sessions, bytes and learned tokens. Raises StoreUnavailable like the store.

    Args:
        store: where the accounts and the sessions are kept.
        clock: seconds; decides when an account is compared with the store.
    """

    def __init__(self, store: SessionStore, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._ledger = store.ledger
        self._clock = clock
        self._reconciled_at: dict[str, float] = {}
        self._reconcile_lock = asyncio.Lock()

    @asynccontextmanager
    async def reserve_session(self, tenant: Tenant, session: str) -> AsyncIterator[None]:
        """Reserve room for a new session; give the room back if the session does not exist after a failure.

        The caller must hold the session's lock.

        Raises:
            QuotaExceeded: the tenant has as many sessions as it may have.
        """
        if not await self._is_tracked(tenant):
            yield
            return
        limit = tenant.limits.sessions
        granted, count = await self._ledger.reserve(tenant.name, session, limit)
        if not granted and await self._reconcile(tenant, RECONCILE_AFTER_S):
            granted, count = await self._ledger.reserve(tenant.name, session, limit)
        if not granted:
            raise QuotaExceeded(
                f"The tenant may have {limit} sessions and has {count}; delete one to make room.", code="session_limit"
            )
        try:
            yield
        except BaseException:
            with suppress(Unavailable, EngineError):
                if await self._store.meta(tenant.name, session) is None:
                    await self._ledger.drop(tenant.name, session)
            raise

    async def check_learning(self, tenant: Tenant) -> None:
        """Return if the tenant may learn now.

        Raises:
            QuotaExceeded: the tenant's sessions hold as many bytes as they may hold.
            RateLimited: the tenant has learned as many tokens as it may for now.
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
        """Note a commit: the bytes that the session holds now, and the tokens that it has learned. Never raises."""
        rate = tenant.limits.tokens_per_minute
        try:
            is_tracked = await self._is_tracked(tenant)
            if is_tracked or rate:
                num_bytes = size if is_tracked else None
                await self._ledger.record(tenant.name, session, num_bytes=num_bytes, rate=rate, tokens=tokens)
        except Unavailable:
            log.warning("a commit could not be noted in its tenant's account")

    async def drop(self, tenant: Tenant, session: str) -> None:
        """Note that a session is deleted. Never raises."""
        try:
            if await self._is_tracked(tenant):
                await self._ledger.drop(tenant.name, session)
        except Unavailable:
            log.warning("a deletion could not be noted in its tenant's account")

    async def tokens(self, tenant: Tenant) -> tuple[int, float]:
        """Return the tokens that a tenant with a limit may learn now, and the seconds until its bucket is full."""
        rate = tenant.limits.tokens_per_minute
        _, left = await self._read_usage(tenant)
        return max(0, left), (rate - left) * MINUTE_S / rate

    async def _read_usage(self, tenant: Tenant) -> tuple[int, int]:
        return await self._ledger.usage(tenant.name, tenant.limits.tokens_per_minute)

    async def _is_tracked(self, tenant: Tenant) -> bool:
        """Return whether the tenant's sessions are counted; bring the account into being if they are."""
        if not (tenant.limits.sessions or tenant.limits.bytes):
            self._reconciled_at.pop(tenant.name, None)
            return False
        await self._reconcile(tenant, math.inf)
        return True

    async def _reconcile(self, tenant: Tenant, age_s: float) -> bool:
        """Compare the account with the store unless that was done within `age_s`; return whether it was done now."""
        async with self._reconcile_lock:
            last = self._reconciled_at.get(tenant.name)
            if last is not None and self._clock() - last <= age_s:
                return False
            recorded_ids = await self._ledger.session_ids(tenant.name)
            after = ""
            while page := await self._store.list(tenant.name, after=after, limit=PAGE_SIZE):
                await self._ledger.set_bytes(tenant.name, {meta.id: meta.bytes for meta in page})
                recorded_ids -= {meta.id for meta in page}
                after = page[-1].id
            for session in recorded_ids:
                await self._ledger.drop(tenant.name, session, min_age_s=RESERVATION_S)
            self._reconciled_at[tenant.name] = self._clock()
            return True
