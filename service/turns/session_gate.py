"""Admission, locking, lease, replay and commit of a turn."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

from service.concurrency import LARGE, KeyedLocks, run_off_loop, shielded
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
from service.store.base import CommitMetadata, Lease, SessionMeta, SessionStore, TurnStart, WriteMode
from service.tenants import Tenant
from service.turns.commit import Commit
from service.turns.idempotency import RequestContext
from service.turns.quotas import Quotas

# A client may abandon a connection and send the request again on another one. The server notices the abandoned
# connection and cancels its turn within this time, so that the text of the retry is not learned twice.
CANCEL_GRACE_S = 1.0


@dataclass(frozen=True)
class ServerLimits:
    """Limits on what a server allows and remembers.

    Attributes:
        max_queue: number of turns that run or wait at once.
        session_bytes: bytes that the rows of one session may take; 0 = no limit.
        key_ttl_s: seconds for which the answer to a request with an `Idempotency-Key` is remembered.
        retry_ttl_s: seconds for which the answer to a request without a key is remembered.
        response_ttl_s: seconds for which a response is kept for clients that continue it; 0 = none is.
        lease_s: seconds that a lease lasts without renewal, as in `RetentionConfig`.
        export_key: the key that signs exports; empty = exports are not signed.
    """

    max_queue: int = 256
    session_bytes: int = 0
    key_ttl_s: int = 86_400
    retry_ttl_s: int = 600
    response_ttl_s: int = 86_400
    lease_s: float = 10.0
    export_key: str = ""


@dataclass(frozen=True)
class SessionTarget:
    """The session that a turn acquires, and on which conditions.

    Attributes:
        write: whether the turn takes a lease; "unless predict" = unless the session's option `adapt` is "predict".
        if_match: the request's `If-Match` header.
        may_create: whether the turn may begin with a session that does not exist.
        even_if_full: whether the turn also runs on a store that has no room.
    """

    session: str
    write: WriteMode = "always"
    if_match: str | None = None
    may_create: bool = True
    even_if_full: bool = False


@dataclass
class SessionHandle:
    """A session that one turn has acquired.

    Attributes:
        meta: the session's meta; None if the session does not exist, or if the turn has none.
        lease: the right to write; a commit gives the lease back.
        replay: the answer that the request got before; the turn then runs nothing.
    """

    ctx: RequestContext
    meta: SessionMeta | None = None
    lease: Lease | None = None
    replay: dict[str, Any] | None = None


class SessionGate:
    """Admits turns, gives each its session, and commits what the turn did. Its state is "loading" at first."""

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
        """Hold a place in the bounded queue. Raises NotReady, or Overloaded if the queue is full."""
        if self.state != "ready":
            raise NotReady(f"The server is {self.state}; try again later.", code=self.state)
        if self.in_flight >= self.limits.max_queue:
            raise Overloaded(
                f"The queue is full: {self.in_flight} requests run or wait, at most {self.limits.max_queue} may."
            )
        self.in_flight += 1
        self._metrics.turns_in_flight.inc()
        try:
            yield
        finally:
            self.in_flight -= 1
            self._metrics.turns_in_flight.dec()

    @asynccontextmanager
    async def lock_session(self, tenant: Tenant, session: str) -> AsyncIterator[None]:
        """Hold the lock of a session against the other turns of this server, first come, first served."""
        async with self._locks.acquire((tenant.name, session)):
            yield

    @asynccontextmanager
    async def acquire(self, ctx: RequestContext, target: SessionTarget | None) -> AsyncIterator[SessionHandle]:
        """Lock a session on this server for one turn; if the turn may write, take the store's lease too.

        A new session then gets a place in its tenant's account. Without a target, yield an empty handle.
        Raises NotFound for a session that does not exist and may not be created, PreconditionFailed, QuotaExceeded.
        """
        if target is None:
            yield SessionHandle(ctx)
            return
        async with self.lock_session(ctx.tenant, target.session):
            turn_start, replay = await self._begin_or_replay(ctx, target)
            if replay is not None:
                self._metrics.replays_total.inc()
                yield SessionHandle(ctx, replay=replay)
                return
            if ctx.start_version is None:
                ctx.start_version = 0 if turn_start.meta is None else turn_start.meta.version
            async with self._lease_kept(SessionHandle(ctx, turn_start.meta, turn_start.lease)) as handle:
                require_match(target.if_match, turn_start.meta)
                if turn_start.meta is not None:
                    yield handle
                    return
                if not target.may_create:
                    raise session_not_found(target.session)
                if target.write == "never":
                    yield handle
                    return
                async with self._quotas.reserve_session(ctx.tenant, target.session):
                    yield handle

    @asynccontextmanager
    async def _lease_kept(self, handle: SessionHandle) -> AsyncIterator[SessionHandle]:
        """Renew the lease of a handle, if there is one, and give back a lease that no commit has given back."""
        if handle.lease is None:
            yield handle
            return
        renewal = asyncio.create_task(self._renew_lease(handle.lease))
        self._metrics.leases_held.inc()
        try:
            yield handle
        finally:
            self._metrics.leases_held.dec()
            renewal.cancel()
            if handle.lease is not None:
                with suppress(StoreUnavailable):  # the lease then ends by itself
                    await self._store.release(handle.lease)

    async def _begin_or_replay(
        self, ctx: RequestContext, target: SessionTarget
    ) -> tuple[TurnStart, dict[str, Any] | None]:
        """Return the state that a turn begins with and, if the request was answered before, that answer."""
        with self._count_store_full():
            turn_start = await self._begin_in_store(ctx, target, ctx.names)
            if turn_start.record is None:
                return turn_start, None
            replay = await run_off_loop(len(turn_start.record), ctx.adopt_replay, turn_start.record)
            if replay is None:
                if ctx.has_later_attempt(turn_start.record):
                    await asyncio.sleep(CANCEL_GRACE_S)
                turn_start = await self._begin_in_store(ctx, target)
            return turn_start, replay

    async def _begin_in_store(self, ctx: RequestContext, target: SessionTarget, names: Sequence[str] = ()) -> TurnStart:
        started = time.perf_counter()
        turn_start = await self._store.begin_turn(
            ctx.tenant.name, target.session, write=target.write, names=names, even_if_full=target.even_if_full
        )
        if turn_start.lease is not None:
            self._metrics.lease_wait_seconds.observe(time.perf_counter() - started)
        return turn_start

    async def _renew_lease(self, lease: Lease) -> None:
        """Renew a lease again and again. A lost lease stays lost: the store then refuses the commit."""
        while True:
            await asyncio.sleep(self.limits.lease_s / 3)
            with suppress(StoreUnavailable):
                await self._store.renew(lease)

    async def commit(self, handle: SessionHandle, commit: Commit, answer: dict[str, Any], answer_size: int = 0) -> None:
        """Commit a turn with its answer, then account for the learned tokens. Nothing interrupts a commit once begun.

        answer_size: number of tokens that the answer may be about.
        Raises TooLarge, and what `SessionStore.commit` raises; nothing is stored then.
        """
        limit, new, before = self.limits.session_bytes, commit.meta, handle.meta
        if limit and new.bytes > limit and new.bytes > (0 if before is None else before.bytes):
            raise TooLarge(f"Session {new.id!r} may have {limit} bytes of rows and would get {new.bytes}.")
        ctx, limits = handle.ctx, self.limits
        record = await run_off_loop(
            answer_size,
            ctx.idempotency_record,
            answer,
            new.version,
            key_ttl_s=limits.key_ttl_s,
            retry_ttl_s=limits.retry_ttl_s,
            large=answer_size >= LARGE,
        )

        async def store_and_account() -> None:
            with self._count_conflicts(), self._metrics.commit_seconds.time():
                await self._store.commit(
                    ctx.tenant.name,
                    new,
                    commit.state_delta.sites,
                    cleared_slots=commit.state_delta.cleared_slots,
                    lease=handle.lease,
                    commit_metadata=CommitMetadata(
                        commit.log, commit.packed_tokens, record, commit.drops_responses, commit.erases_past
                    ),
                    even_if_full=commit.even_if_full,
                )
            await self._quotas.record_commit(ctx.tenant, new.id, new.bytes, commit.tokens)

        await shielded(store_and_account())
        handle.lease, ctx.committed = None, True
        self._metrics.commit_bytes.observe(sum(batch.data.nbytes for batch in commit.state_delta.sites.values()))

    @contextmanager
    def _count_store_full(self) -> Iterator[None]:
        """Count the turns for which the store has no room."""
        try:
            yield
        except StoreFull:
            self._metrics.store_full_total.inc()
            raise

    @contextmanager
    def _count_conflicts(self) -> Iterator[None]:
        """Count the commits that another replica's commit precedes, and those for which the store has no room."""
        try:
            with self._count_store_full():
                yield
        except VersionConflict:
            self._metrics.turns_overtaken_total.inc()
            raise


def session_changed() -> SessionBusy:
    """Return the error of a turn that lost its session to another replica twice."""
    return SessionBusy("Another replica changed the session during this request; nothing was learned.")


def version_conflict(session: str) -> VersionConflict:
    """Return the error of a turn whose session another replica has changed meanwhile; such a turn may run again."""
    return VersionConflict(f"Session {session!r} was changed by somebody else during this turn.")


def session_not_found(session: str) -> NotFound:
    """Return the error for a session that does not exist."""
    return NotFound(f"Session {session!r} does not exist.", param="id", code="session_not_found")


def require_match(if_match: str | None, meta: SessionMeta | None) -> None:
    """Raise PreconditionFailed unless `If-Match` (RFC 9110 §13.1.1) names the session's version.

    A session that does not exist counts as version 0, except for `*`.
    """
    if if_match is None:
        return
    tags = [tag.strip() for tag in if_match.split(",")]
    current = f'"v{0 if meta is None else meta.version}"'
    if not (current in tags or ("*" in tags and meta is not None)):
        raise PreconditionFailed(f"'If-Match' is {if_match[:80]}, the session is at {current}.", param="If-Match")
