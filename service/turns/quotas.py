"""The limits of each tenant: sessions, bytes and learned tokens, checked against its account in the store.

The store keeps the accounts (`QuotaLedger`), so a limit holds on every server. A tenant without such limits has no
account and costs nothing. A crash may keep a commit from an account, and a session may expire unnoticed: the account
is compared with the stored sessions at its first use, and again before a tenant is refused. No request compares more
than `PAGES_AT_ONCE` pages: of a tenant with more sessions, later requests compare the rest.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from service.errors import EngineError, QuotaExceeded, RateLimited, Unavailable
from service.store.base import SessionStore
from service.tenants import Tenant

PAGE_SIZE = 200
PAGES_AT_ONCE = 10
STEP_S = 1.0  # least time between two comparisons of so many pages for requests that would be refused
RECONCILE_AFTER_S = 60.0  # age from which on an account is compared with the store before it refuses a tenant
RESERVATION_S = 3600.0  # time for which a reservation stays without a stored session, which may be in its first turn
MINUTE_S = 60.0

log = logging.getLogger(__name__)


@dataclass
class _Walk:
    """A comparison of an account with the stored sessions, page by page.

    Attributes:
        after: the last id that was read from the list of sessions; None at its end.
        cursor: where to go on in the account, 0 at its beginning; None at its end.
        stepped_at: when a request compared the last pages.
    """

    after: str | None = ""
    cursor: int | None = 0
    stepped_at: float = -math.inf

    @property
    def is_done(self) -> bool:
        return self.after is None and self.cursor is None


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
        self._reconciled_at: dict[str, float] = {}  # also of tenants whose first comparison goes on
        self._walks: dict[str, _Walk] = {}
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
        if not granted and await self._reconcile(tenant):
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
                    await self._ledger.drop(tenant.name, [session])
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
        if limits.bytes and used_bytes >= limits.bytes and await self._reconcile(tenant):
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
                await self._ledger.drop(tenant.name, [session])
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
            self._walks.pop(tenant.name, None)
            return False
        if tenant.name not in self._reconciled_at:
            await self._begin(tenant)
        elif tenant.name in self._walks:
            async with self._reconcile_lock:
                await self._compare(tenant, 1)
        return True

    async def _begin(self, tenant: Tenant) -> None:
        """Compare the account with the store, unless any server has done so since the account began."""
        async with self._reconcile_lock:
            if tenant.name in self._reconciled_at:
                return
            is_settled = await self._ledger.is_settled(tenant.name)
            self._reconciled_at[tenant.name] = -math.inf
            if not is_settled:
                self._walks[tenant.name] = _Walk()
                await self._compare(tenant, PAGES_AT_ONCE)

    async def _reconcile(self, tenant: Tenant) -> bool:
        """Compare pages of the account with the store before the tenant is refused; return whether any were.

        None are within `RECONCILE_AFTER_S` of a whole comparison, nor within `STEP_S` of the last pages.
        """
        async with self._reconcile_lock:
            now = self._clock()
            if tenant.name not in self._walks and now - self._reconciled_at[tenant.name] <= RECONCILE_AFTER_S:
                return False
            walk = self._walks.setdefault(tenant.name, _Walk())
            if now - walk.stepped_at < STEP_S:
                return False
            await self._compare(tenant, PAGES_AT_ONCE)
            return True

    async def _compare(self, tenant: Tenant, num_pages: int) -> None:
        """Compare up to so many further pages of the list of sessions, and as many of the account."""
        if (walk := self._walks.get(tenant.name)) is None:
            return  # another request has ended it
        for _ in range(num_pages):
            if walk.after is not None:
                page = await self._store.list(tenant.name, after=walk.after, limit=PAGE_SIZE)
                await self._ledger.set_bytes(tenant.name, {meta.id: meta.bytes for meta in page})
                walk.after = page[-1].id if len(page) == PAGE_SIZE else None
            if walk.cursor is not None:
                cursor, gone = await self._ledger.gone(tenant.name, walk.cursor)
                if gone:
                    await self._ledger.drop(tenant.name, gone, min_age_s=RESERVATION_S)
                walk.cursor = cursor or None
            if walk.is_done:
                await self._ledger.mark_settled(tenant.name)
                del self._walks[tenant.name]
                self._reconciled_at[tenant.name] = self._clock()
                return
        walk.stepped_at = self._clock()
