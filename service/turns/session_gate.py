"""Who may work on a session, when, and how it is left: the queue, the order, the lease, the repetitions, the commit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from service.errors import (
    NotFound,
    NotReady,
    Overloaded,
    PreconditionFailed,
    SessionBusy,
    StoreFull,
    StoreUnavailable,
    TooLarge,
    VersionConflict,
)
from service.metrics import Metrics
from service.store.base import CommitMetadata, Lease, RowBatch, SessionMeta, SessionStore, Slots, TurnStart, WriteMode
from service.tenants import Tenant
from service.turns.idempotency import RequestContext
from service.turns.locks import KeyedLocks, shielded
from service.turns.quotas import Quotas

CANCEL_GRACE_S = (
    1.0  # within which it shows that the client of a request is gone: one that gave it up, and sent it again
)
T = TypeVar("T")


@dataclass(frozen=True)
class ServerLimits:
    """What a server allows and remembers.

    max_queue: requests in hand. session_bytes: of one session's rows; 0 = no limit. key_ttl_s, retry_ttl_s: for how
    long the answer to a request is remembered by its `Idempotency-Key`, and without one. lease_s: of `RetentionConfig`.
    export_key: signs exports; empty = they are not signed.
    """

    max_queue: int = 256
    session_bytes: int = 0
    key_ttl_s: int = 86_400
    retry_ttl_s: int = 600
    lease_s: float = 10.0
    export_key: str = ""


@dataclass
class SessionHandle:
    """A session while one turn has it. meta: None only of a session that is not there; replay: what the request was
    answered before, and then nothing else counts; lease: given back by a commit."""

    ctx: RequestContext
    meta: SessionMeta | None = None
    lease: Lease | None = None
    replay: dict[str, Any] | None = None


class SessionGate:
    """The way into sessions; "loading" until somebody says otherwise."""

    def __init__(self, store: SessionStore, quotas: Quotas, metrics: Metrics, limits: ServerLimits) -> None:
        self.state: Literal["loading", "ready", "draining"] = "loading"
        self.in_flight = 0
        self.limits = limits
        self._store = store
        self._quotas = quotas
        self._metrics = metrics
        self._locks = KeyedLocks()

    @asynccontextmanager
    async def admit(self) -> AsyncIterator[None]:
        """A place in the bounded queue."""
        if self.state != "ready":
            raise NotReady(f"The server is {self.state}; try again later.", code=self.state)
        if self.in_flight >= self.limits.max_queue:
            raise Overloaded(f"The server has {self.in_flight} requests in hand and takes no more than that.")
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    @asynccontextmanager
    async def lock_session(self, tenant: Tenant, session: str) -> AsyncIterator[None]:
        """Holds a session against this server's other turns, in the order of asking."""
        async with self._locks.acquire((tenant.name, session)):
            yield

    @asynccontextmanager
    async def acquire(
        self,
        ctx: RequestContext,
        session: str,
        *,
        write: WriteMode = "always",
        if_match: str | None = None,
        may_create: bool = True,
    ) -> AsyncIterator[SessionHandle]:
        """A session for one turn, against this server's other turns and, if it may write, against all others.

        Raises NotFound for one that is not there, unless the turn may create it; then it has a place in its tenant's
        account."""
        async with self.lock_session(ctx.tenant, session):
            turn_start, replay = await self._begin_or_replay(ctx, session, write)
            if replay is not None:
                self._metrics.replays_total.inc()
                yield SessionHandle(ctx, replay=replay)
                return
            if ctx.began is None:
                ctx.began = 0 if turn_start.meta is None else turn_start.meta.version
            handle = SessionHandle(ctx, turn_start.meta, turn_start.lease)
            lease_renewal = asyncio.create_task(self._renew_lease(turn_start.lease)) if turn_start.lease else None
            self._metrics.leases_held.inc(lease_renewal is not None)
            try:
                require_match(if_match, turn_start.meta)
                async with AsyncExitStack() as stack:
                    if turn_start.meta is None:
                        if not may_create:
                            raise session_not_found(session)
                        await stack.enter_async_context(self._quotas.reserve_session(ctx.tenant, session))
                    yield handle
            finally:
                self._metrics.leases_held.dec(lease_renewal is not None)
                if lease_renewal is not None:
                    lease_renewal.cancel()
                if handle.lease is not None:
                    with suppress(StoreUnavailable):  # it then ends by itself
                        await self._store.release(handle.lease)

    async def _begin_or_replay(
        self, ctx: RequestContext, session: str, write: WriteMode
    ) -> tuple[TurnStart, dict[str, Any] | None]:
        """How a turn begins; and what it was answered before, if it was."""
        with self._count_store_full():
            turn_start = await self._begin_in_store(ctx, session, write, ctx.names)
            if turn_start.record is None:
                return turn_start, None
            replay = ctx.replay(turn_start.record)
            if replay is None:
                if ctx.has_later_attempt(turn_start.record):
                    await asyncio.sleep(CANCEL_GRACE_S)
                turn_start = await self._begin_in_store(ctx, session, write)
            return turn_start, replay

    async def _begin_in_store(
        self, ctx: RequestContext, session: str, write: WriteMode, names: Sequence[str] = ()
    ) -> TurnStart:
        began = time.perf_counter()
        turn_start = await self._store.begin_turn(ctx.tenant.name, session, write=write, names=names)
        if turn_start.lease is not None:
            self._metrics.lease_wait_seconds.observe(time.perf_counter() - began)
        return turn_start

    async def _renew_lease(self, lease: Lease) -> None:
        """Renews a lease for as long as a turn runs; one that was lost stays so, and its commit will be refused."""
        while True:
            await asyncio.sleep(self.limits.lease_s / 3)
            with suppress(StoreUnavailable):
                await self._store.renew(lease)

    async def commit(
        self,
        handle: SessionHandle,
        new: SessionMeta,
        sites: Mapping[str, RowBatch],
        *,
        cleared_slots: Mapping[str, Slots] | None = None,
        commit_metadata: CommitMetadata,
        tokens: int,
    ) -> None:
        """Commits what a turn did, and puts the tokens it learned on its tenant's account; once begun, it is not
        interrupted."""
        limit, before = self.limits.session_bytes, handle.meta
        if limit and new.bytes > limit and new.bytes > (0 if before is None else before.bytes):
            raise TooLarge(f"Session {new.id!r} may have {limit} bytes of rows and would get {new.bytes}.")
        tenant = handle.ctx.tenant

        async def commit() -> None:
            with self._count_conflicts(), self._metrics.commit_seconds.time():
                await self._store.commit(
                    tenant.name,
                    new,
                    sites,
                    cleared_slots=cleared_slots,
                    lease=handle.lease,
                    commit_metadata=commit_metadata,
                )
            await self._quotas.record_commit(tenant, new.id, new.bytes, tokens)

        await shielded(commit())
        handle.lease, handle.ctx.committed = None, True
        self._metrics.commit_bytes.observe(sum(batch.data.nbytes for batch in sites.values()))

    @contextmanager
    def _count_store_full(self) -> Iterator[None]:
        """Counts the turns that the store has no room for."""
        try:
            yield
        except StoreFull:
            self._metrics.store_full_total.inc()
            raise

    @contextmanager
    def _count_conflicts(self) -> Iterator[None]:
        """Counts the commits that another replica's were before, too."""
        try:
            with self._count_store_full():
                yield
        except VersionConflict:
            self._metrics.turns_overtaken_total.inc()
            raise

    async def turn(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """The result of a turn with a place in the queue, run once more if another replica changed the session
        meanwhile."""
        async with self.admit():
            with suppress(VersionConflict):
                return await attempt()
            try:
                return await attempt()
            except VersionConflict as error:
                raise session_changed() from error


def session_changed() -> SessionBusy:
    return SessionBusy("Another replica changed the session during this request, of which nothing was learned.")


def session_not_found(session: str) -> NotFound:
    return NotFound(f"Session {session!r} does not exist.", param="id", code="session_not_found")


def require_match(if_match: str | None, meta: SessionMeta | None) -> None:
    """RFC 9110 §13.1.1; a session that does not exist counts as version 0, which only `*` tells apart."""
    if if_match is None:
        return
    tags = [tag.strip() for tag in if_match.split(",")]
    current = f'"v{0 if meta is None else meta.version}"'
    if not (current in tags or ("*" in tags and meta is not None)):
        raise PreconditionFailed(f"'If-Match' is {if_match[:80]}, the session is at {current}.", param="If-Match")


def known(handle: SessionHandle) -> SessionMeta:
    """The meta of a session that is there, or is new."""
    assert handle.meta is not None
    return handle.meta
