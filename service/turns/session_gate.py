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
from service.store.base import Entered, Lease, Note, RowBatch, SessionMeta, Slots
from service.store.redis.store import RedisStore
from service.tenants import Tenant
from service.turns.idempotency import Call
from service.turns.locks import Locks, uninterrupted
from service.turns.quotas import Ledger

Write = Literal["always", "unless predict", "never"]
LATE_S = 1.0  # within which it shows that the client of a request is gone: one that gave it up, and sent it again
T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What a server allows and remembers.

    max_queue: requests in hand. session_bytes: of one session's rows; 0 = no limit. key_ttl_s, retry_ttl_s: for how
    long the answer to a request is remembered by its `Idempotency-Key`, and without one. lease_s: of `Keeping`.
    export_key: signs exports; empty = they are not signed.
    """

    max_queue: int = 256
    session_bytes: int = 0
    key_ttl_s: int = 86_400
    retry_ttl_s: int = 600
    lease_s: float = 10.0
    export_key: str = ""


@dataclass
class Held:
    """A session while one turn has it. meta: None only of a session that is not there; replay: what the request was
    answered before, and then nothing else counts; lease: given back by a commit."""

    call: Call
    meta: SessionMeta | None = None
    lease: Lease | None = None
    replay: dict[str, Any] | None = None


class Turnstile:
    """The way into sessions; "loading" until somebody says otherwise."""

    def __init__(self, store: RedisStore, ledger: Ledger, metrics: Metrics, limits: Limits) -> None:
        self.state: Literal["loading", "ready", "draining"] = "loading"
        self.in_flight = 0
        self.limits = limits
        self._store = store
        self._ledger = ledger
        self._metrics = metrics
        self._locks = Locks()

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
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
    async def ordered(self, tenant: Tenant, session: str) -> AsyncIterator[None]:
        """Holds a session against this server's other turns, in the order of asking."""
        async with self._locks.hold((tenant.name, session)):
            yield

    @asynccontextmanager
    async def hold(
        self,
        call: Call,
        session: str,
        *,
        write: Write = "always",
        if_match: str | None = None,
        may_create: bool = True,
    ) -> AsyncIterator[Held]:
        """A session for one turn, against this server's other turns and, if it may write, against all others.

        Raises NotFound for one that is not there, unless the turn may create it; then it has a place in its tenant's
        account."""
        async with self.ordered(call.tenant, session):
            entered, replay = await self._enter(call, session, write)
            if replay is not None:
                self._metrics.replays_total.inc()
                yield Held(call, replay=replay)
                return
            if call.began is None:
                call.began = 0 if entered.meta is None else entered.meta.version
            held = Held(call, entered.meta, entered.lease)
            keeper = asyncio.create_task(self._keep(entered.lease)) if entered.lease else None
            self._metrics.leases_held.inc(keeper is not None)
            try:
                require_match(if_match, entered.meta)
                async with AsyncExitStack() as stack:
                    if entered.meta is None:
                        if not may_create:
                            raise unknown(session)
                        await stack.enter_async_context(self._ledger.place(call.tenant, session))
                    yield held
            finally:
                self._metrics.leases_held.dec(keeper is not None)
                if keeper is not None:
                    keeper.cancel()
                if held.lease is not None:
                    with suppress(StoreUnavailable):  # it then ends by itself
                        await self._store.release(held.lease)

    async def _enter(self, call: Call, session: str, write: Write) -> tuple[Entered, dict[str, Any] | None]:
        """How a turn begins; and what it was answered before, if it was."""
        with self._counting_full():
            entered = await self._entered(call, session, write, call.names)
            if entered.record is None:
                return entered, None
            replay = call.replay(entered.record)
            if replay is None:
                if call.late(entered.record):
                    await asyncio.sleep(LATE_S)
                entered = await self._entered(call, session, write)
            return entered, replay

    async def _entered(self, call: Call, session: str, write: Write, names: Sequence[str] = ()) -> Entered:
        began = time.perf_counter()
        entered = await self._store.enter(call.tenant.name, session, write=write, names=names)
        if entered.lease is not None:
            self._metrics.lease_wait_seconds.observe(time.perf_counter() - began)
        return entered

    async def _keep(self, lease: Lease) -> None:
        """Renews a lease for as long as a turn runs; one that was lost stays so, and its commit will be refused."""
        while True:
            await asyncio.sleep(self.limits.lease_s / 3)
            with suppress(StoreUnavailable):
                await self._store.renew(lease)

    async def commit(
        self,
        held: Held,
        new: SessionMeta,
        sites: Mapping[str, RowBatch],
        *,
        gone: Mapping[str, Slots] | None = None,
        note: Note,
        tokens: int,
    ) -> None:
        """Commits what a turn did, and puts the tokens it learned on its tenant's account; once begun, it is not
        interrupted."""
        limit, before = self.limits.session_bytes, held.meta
        if limit and new.bytes > limit and new.bytes > (0 if before is None else before.bytes):
            raise TooLarge(f"Session {new.id!r} may have {limit} bytes of rows and would get {new.bytes}.")
        tenant = held.call.tenant

        async def commit() -> None:
            with self._counting_refusals(), self._metrics.commit_seconds.time():
                await self._store.commit(tenant.name, new, sites, gone=gone, lease=held.lease, note=note)
            await self._ledger.learned(tenant, new.id, new.bytes, tokens)

        await uninterrupted(commit())
        held.lease, held.call.committed = None, True
        self._metrics.commit_bytes.observe(sum(batch.data.nbytes for batch in sites.values()))

    @contextmanager
    def _counting_full(self) -> Iterator[None]:
        """Counts the turns that the store has no room for."""
        try:
            yield
        except StoreFull:
            self._metrics.store_full_total.inc()
            raise

    @contextmanager
    def _counting_refusals(self) -> Iterator[None]:
        """Counts the commits that another replica's were before, too."""
        try:
            with self._counting_full():
                yield
        except VersionConflict:
            self._metrics.turns_overtaken_total.inc()
            raise

    async def turn(self, once: Callable[[], Awaitable[T]]) -> T:
        """The result of a turn with a place in the queue, run once more if another replica changed the session
        meanwhile."""
        async with self.admitted():
            with suppress(VersionConflict):
                return await once()
            try:
                return await once()
            except VersionConflict as error:
                raise overtaken() from error


def overtaken() -> SessionBusy:
    return SessionBusy("Another replica changed the session during this request, of which nothing was learned.")


def unknown(session: str) -> NotFound:
    return NotFound(f"Session {session!r} does not exist.", param="id", code="session_not_found")


def require_match(if_match: str | None, meta: SessionMeta | None) -> None:
    """RFC 9110 §13.1.1; a session that does not exist counts as version 0, which only `*` tells apart."""
    if if_match is None:
        return
    tags = [tag.strip() for tag in if_match.split(",")]
    current = f'"v{0 if meta is None else meta.version}"'
    if not (current in tags or ("*" in tags and meta is not None)):
        raise PreconditionFailed(f"'If-Match' is {if_match[:80]}, the session is at {current}.", param="If-Match")


def known(held: Held) -> SessionMeta:
    """The meta of a session that is there, or is new."""
    assert held.meta is not None
    return held.meta
