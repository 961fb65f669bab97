"""Sessions in Redis or Valkey: consistent reads, and commits that are atomic, durable, fenced and counted once.

Keys, all of a session's in one hash slot of a cluster:

    imprint:{<tenant>/<id>}:meta         hash: format, nonce of the last commit, SessionMeta's fields as JSON,
                                         `site:<name>` = bytes per row, for each site that has rows, and
                                         undo_from, undo_bytes: the oldest version kept, and the size of :undo
                        …:rows:<site>    hash: pages of rows, see pages.lua
                        …:log            list: one JSON object a commit
                        …:undo           hash: <version>:rows, :meta and :text = what leads back to the one before
                        …:once:<name>    the answer of a request that was learned; expires
                        …:onces          sorted set of those names, by the time at which they expire
                        …:lease          owner:fence of who may write; expires
                        …:fence          counts leases and never goes back; outlives the session by a day
                        …:erased         the fence at which the session was erased; expires after a day
    imprint:sessions:<tenant>            sorted set of ids, all of score 0, hence in the order of their bytes

Every step on a session is one server-side script. The index cannot be part of it (another slot), so it is
written first: it may name sessions that do not exist, which readers skip and clean, but misses none.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from importlib.resources import files
from typing import Any, Literal, TypeVar, cast

from redis.asyncio.cluster import RedisCluster
from redis.commands.core import AsyncScript
from redis.exceptions import (
    ClusterDownError,
    ConnectionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TimeoutError,
    TryAgainError,
)

from service.errors import Conflict, EngineError, NotFound, SessionBusy, StoreFull, StoreUnavailable, VersionConflict
from service.store import codec
from service.store.base import (
    CommitMetadata,
    History,
    Lease,
    Option,
    RetentionConfig,
    RowBatch,
    SessionMeta,
    Slots,
    StoredSession,
    TurnStart,
)
from service.store.codec import damaged, decode, index_key, meta_key, pairs, unknown_format
from service.store.redis.connect import AnyRedis, connect

READ_RETRY_S = 0.5
COMMIT_RETRY_S = 2.0
MAX_POLL_S = 0.25
MAX_LOG_ENTRIES = 512  # entries of a session's log
ERASED_CHANNEL = "imprint:erased"  # the channel that tells every replica of erased sessions
TICK_S = 5.0
NO_COMMIT_METADATA = CommitMetadata()
ALLOW_OOM_FLAGS = "#!lua flags=allow-oom\n"  # a script that runs although the server has no memory left
_SCRIPTS = ("create", "configure", "enter", "lease", "history")

_UNAVAILABLE_ERRORS = (
    ConnectionError,
    TimeoutError,
    ClusterDownError,
    RedisClusterException,
    TryAgainError,
    ReadOnlyError,
    OSError,
)
_UNAVAILABLE_REPLIES = ("BUSY", "MISCONF", "NOREPLICAS", "MASTERDOWN", "CLUSTERDOWN", "UNBLOCKED")

T = TypeVar("T")

log = logging.getLogger(__name__)


class RedisStore:
    """Sessions of all tenants, kept in one Redis or Valkey server (or cluster).

    Every method raises `StoreUnavailable` when the server does not answer, or not yet; nothing has to be
    restarted when it comes back; and `StoreFull` when the server has no memory for a write. A session in a format
    that this release does not know is refused with `EngineError`, and names that could break out of a key with
    `ValueError`.

    Args:
        client: must answer in bytes, and not retry by itself: only this class knows what may be repeated.
        alone: nobody else uses the server, so no leases are taken: each would cost a sync to disk.
    """

    def __init__(self, client: AnyRedis, retention: RetentionConfig | None = None, *, exclusive: bool = False) -> None:
        self._client = client
        self._retention = retention or RetentionConfig()
        self._owner = secrets.token_hex(8)
        self._exclusive = exclusive
        self._sites: tuple[str, ...] = ()  # of which rows were found so far
        scripts = [self._script("common", name) for name in _SCRIPTS]
        self._create, self._configure, self._enter, self._lease, self._history = scripts
        self._commit, self._upgrade = (self._script("common", "pages", name) for name in ("commit", "upgrade"))
        self._delete = self._script("common", "delete", flags=ALLOW_OOM_FLAGS)

    def _script(self, *parts: str, flags: str = "") -> AsyncScript:
        here = files(__package__) / "lua"
        text = flags + "".join(here.joinpath(f"{part}.lua").read_text("utf-8") for part in parts)
        return self._client.register_script(text)

    @classmethod
    def from_url(cls, url: str, retention: RetentionConfig | None = None, *, exclusive: bool = False) -> RedisStore:
        """A store on what `connect` takes. Raises ValueError."""
        return cls(connect(url), retention, exclusive=exclusive)

    # --- a turn ----------------------------------------------------------------------------------------------------

    async def begin_turn(
        self, tenant: str, sid: str, *, write: Literal["always", "unless predict", "never"], names: Sequence[str] = ()
    ) -> TurnStart:
        """How a turn begins: with the answer that is remembered under one of `names`, else with the session's meta and,
        if it may write, a lease; waits while somebody else holds that.

        Raises:
            SessionBusy: somebody else held it all the time.
        """
        key, retention, wanted = meta_key(tenant, sid), self._retention, "never" if self._exclusive else write
        args: list[str | int] = [self._owner, int(1000 * retention.lease_s), wanted, retention.ttl_s, *names]
        deadline, pause = time.monotonic() + retention.wait_s, 0.01
        while True:
            verdict, *reply = await _retry_while_away(lambda: self._enter([key], args))
            if verdict == b"again":
                return TurnStart(None, record=reply[0])
            if verdict == b"entered":
                break
            if time.monotonic() > deadline:
                raise SessionBusy(
                    f"Session {sid!r} is being taught by another replica, for more than {retention.wait_s:g} s now."
                )
            await asyncio.sleep(min(pause, 0.001 * max(1, int(reply[0]))))
            pause = min(1.5 * pause, MAX_POLL_S)
        lease = Lease(tenant, sid, reply[0].decode()) if reply[0] else None
        return TurnStart(decode(sid, pairs(reply[1:])) if reply[1:] else None, lease)

    async def renew(self, lease: Lease) -> bool:
        """Prolongs a lease; returns whether it was still held."""
        key, args = meta_key(lease.tenant, lease.sid), (lease.value, int(1000 * self._retention.lease_s))
        return bool(await _retry_while_away(lambda: self._lease([key], args)))

    async def release(self, lease: Lease) -> None:
        """Gives a lease back, if it is still held."""
        key = meta_key(lease.tenant, lease.sid)
        await _retry_while_away(lambda: self._lease([key], [lease.value, ""]))

    async def load(self, tenant: str, sid: str) -> StoredSession | None:
        """The session with all its rows, both of the same version; None if there is no such session."""
        key = meta_key(tenant, sid)
        while True:
            sites = self._sites
            raw, *pages = await _retry_while_away(lambda key=key, sites=sites: self._read(key, sites))  # type: ignore[misc]
            if not raw:
                return None
            if raw.get(b"format") in codec.OLD_FORMATS:
                await _retry_while_away(lambda: self._upgrade([key], [self._retention.ttl_s]))
                continue
            widths = codec.sites_of(raw)
            if widths.keys() <= set(sites):
                break
            self._sites = tuple({*sites, *widths})
        meta = decode(sid, raw)
        try:
            rows = {
                site: RowBatch.of_pages(found, widths[site])
                for site, found in zip(sites, pages, strict=True)
                if site in widths
            }
        except ValueError as error:
            raise damaged(sid) from error
        return StoredSession(meta, rows)

    async def _read(self, key: str, sites: Sequence[str]) -> list[dict[bytes, bytes]]:
        """A session's meta, and the pages of these sites, at one moment."""
        # A script would have to copy every row twice, and nobody else is served meanwhile.
        transaction = self._client.pipeline(transaction=True)
        transaction.hgetall(key)
        for site in sites:
            transaction.hgetall(f"{key.removesuffix('meta')}rows:{site}")
        return cast(list[dict[bytes, bytes]], await transaction.execute())

    async def commit(
        self,
        tenant: str,
        meta: SessionMeta,
        sites: Mapping[str, RowBatch],
        *,
        cleared_slots: Mapping[str, Slots] | None = None,
        lease: Lease | None = None,
        commit_metadata: CommitMetadata = NO_COMMIT_METADATA,
    ) -> None:
        """Takes the session from version `meta.version - 1` to `meta.version`, entirely or not at all, and gives the
        lease back.

        When this returns, the step is as durable as the server makes it. A lost reply is resolved by
        repeating the commit under its nonce, which the server applies once. Shield this call: cancelling it
        leaves the outcome open.

        Args:
            meta: the new meta; its options are stored only if the session is new.
            sites: the touched rows alone, by site.
            gone: slots to empty, of sites that are in `sites`.
            lease: None only where nobody else can write.

        Raises:
            VersionConflict: the stored session is not at that version any more, or somebody else has taken the lease
                since; nothing was written.
            Conflict: the session was erased since the turn began; nothing was written.
            StoreUnavailable: nothing was written, or the outcome is unknown: load again before the next turn.
        """
        key, retention, idempotency_record = (
            meta_key(tenant, meta.id),
            self._retention,
            commit_metadata.idempotency_record,
        )
        values = codec.encode(meta)
        options = values.pop("options")
        entry = json.dumps({"version": meta.version, **commit_metadata.log}) if commit_metadata.log else ""
        args: list[str | int | bytes] = [meta.version - 1, values["created"], secrets.token_hex(16)]
        args += [
            "" if lease is None else lease.value,
            retention.ttl_s,
            retention.versions,
            retention.history_bytes,
            MAX_LOG_ENTRIES,
        ]
        args += [
            entry,
            commit_metadata.text,
            *(
                ("", 0, b"")
                if idempotency_record is None
                else (idempotency_record.name, idempotency_record.ttl_s, idempotency_record.record)
            ),
        ]
        args += [options, 2 * len(values), *codec.flat(values)]
        for site, batch in sites.items():
            slots = (cleared_slots or {}).get(site)
            args += [site, batch.row_bytes, batch.pack(), b"" if slots is None else codec.pack_slots(slots)]
        attempts = 0

        async def attempt() -> Any:
            nonlocal attempts
            attempts += 1
            return await self._commit([key], args)

        async with self._indexed(tenant, meta.id, new=meta.version == 1):
            verdict, detail = await _retry_while_away(attempt, COMMIT_RETRY_S)
        if attempts > 1 and (
            verdict in (b"fenced", b"erased") or (verdict == b"conflict" and int(detail) > meta.version)
        ):
            # An earlier attempt may have landed, and another commit since then have replaced its nonce.
            raise StoreUnavailable(f"unknown whether session {meta.id!r} took the step to {meta.version}")
        _check(verdict, detail, meta)

    # --- sessions --------------------------------------------------------------------------------------------------

    async def meta(self, tenant: str, sid: str) -> SessionMeta | None:
        """The session without its rows; None if there is no such session."""
        key = meta_key(tenant, sid)
        raw = await _retry_while_away(lambda: self._client.hgetall(key))
        return decode(sid, cast(dict[bytes, bytes], raw)) if raw else None

    async def create(self, tenant: str, meta: SessionMeta, lease: Lease | None = None) -> SessionMeta:
        """Stores a session without rows, unless there is one of that id; returns what is stored then.

        Raises VersionConflict and Conflict as `commit` does."""
        key = meta_key(tenant, meta.id)
        args: list[str | int] = ["" if lease is None else lease.value, self._retention.ttl_s]
        args += codec.flat(codec.encode(meta))
        async with self._indexed(tenant, meta.id, new=True):
            verdict, detail, *flat = await _retry_while_away(lambda: self._create([key], args))
        _check(verdict, detail, meta)
        return decode(meta.id, pairs(flat))

    async def configure(self, tenant: str, sid: str, options: Mapping[str, Option]) -> SessionMeta:
        """Replaces the session's options, and leaves its version.

        Raises:
            NotFound: there is no such session.
        """
        key, args = meta_key(tenant, sid), (json.dumps(dict(options)), self._retention.ttl_s)
        flat = await _retry_while_away(lambda: self._configure([key], args))
        if not flat:
            raise NotFound(f"session {sid!r} does not exist")
        return decode(sid, pairs(flat))

    async def delete(self, tenant: str, sid: str, *, version: int | None = None) -> bool:
        """Deletes every key of the session, and bars turns that have begun from bringing it back; returns whether
        there was one.

        Raises:
            VersionConflict: it is not at `version`.
        """
        key, args = meta_key(tenant, sid), ["" if version is None else version]
        # Not repeated: a second attempt could not tell whether the first one found a session.
        verdict, detail = await _retry_while_away(lambda: self._delete([key], args), retry_s=0)
        if verdict == b"format":
            raise unknown_format(sid, detail)
        if verdict == b"conflict":
            raise VersionConflict(f"session {sid!r} is at version {detail.decode()}, not {version}")
        await _retry_while_away(lambda: self._client.execute_command("PUBLISH", ERASED_CHANNEL, f"{tenant}/{sid}"))
        await self._unindex(tenant, sid)
        return bool(detail == b"1")

    async def erased(self) -> AsyncIterator[tuple[str, str] | None]:
        """The tenant and id of each session that anybody erases, as it happens; None when some may have been missed.

        Never ends; waits for a server that is away."""
        while True:
            try:
                async with self._client.pubsub() as channel:
                    await channel.subscribe(ERASED_CHANNEL)
                    yield None
                    while True:
                        message = await channel.get_message(ignore_subscribe_messages=True, timeout=TICK_S)
                        if message is not None:
                            tenant, _, sid = message["data"].decode().partition("/")
                            yield tenant, sid
            except (RedisError, OSError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and not _is_lost(error):
                    raise
                log.debug("waiting for the session store: %s", error)
                await asyncio.sleep(1.0)

    async def history(self, tenant: str, sid: str, *, undo: bool, entries: int = MAX_LOG_ENTRIES) -> History | None:
        """How the session came to be what it is; `undo`: with the versions that can be undone."""
        key, args = meta_key(tenant, sid), [entries, int(undo)]
        flat, log_entries, steps = await _retry_while_away(lambda: self._history([key], args))
        if not flat:
            return None
        return History(
            decode(sid, pairs(flat)),
            [json.loads(entry) for entry in log_entries],
            [codec.decode_undo(*step) for step in steps],
        )

    async def list(self, tenant: str, *, after: str = "", limit: int = 100) -> list[SessionMeta]:
        """Up to `limit` sessions whose ids follow `after`, in order of their ids; fewer only at the end."""
        found: list[SessionMeta] = []
        while len(found) < limit:
            missing = limit - len(found)
            page = await _retry_while_away(partial(self._page, tenant, after, missing))
            if not page:
                break
            found += [decode(sid, raw) for sid, raw in page if raw]
            for sid, raw in page:
                if not raw:
                    await self._unindex(tenant, sid)
            after = page[-1][0]
        return found

    async def count(self, tenant: str) -> int:
        """How many sessions the index names."""
        count: int = await _retry_while_away(lambda: self._client.zcard(index_key(tenant)))
        return count

    def script(self, name: str) -> Callable[[Sequence[str], Sequence[str | int]], Awaitable[Any]]:
        """A script of this package, to be called with keys of one hash tag and arguments; it writes little, and does
        so on a full server, too."""
        script = self._script(name, flags=ALLOW_OOM_FLAGS)
        return lambda keys, args: _retry_while_away(lambda: script(keys, args))

    async def memory(self) -> tuple[int, int]:
        """Bytes of memory that the server (the masters of a cluster) uses, and that it may use.

        0 of what it does not tell, or does not limit."""
        everywhere = {"target_nodes": RedisCluster.PRIMARIES} if isinstance(self._client, RedisCluster) else {}
        try:
            reply: dict[str, Any] = await _retry_while_away(lambda: self._client.info("memory", **everywhere))
        except ResponseError:
            return 0, 0
        nodes = [reply] if "used_memory" in reply else list(reply.values())
        limits = [node["maxmemory"] for node in nodes]
        return sum(node["used_memory"] for node in nodes), sum(limits) if all(limits) else 0

    async def configuration(self, *names: str) -> dict[str, str]:
        """The server's own settings of these names; none where it does not tell them."""
        try:
            return cast(dict[str, str], await _retry_while_away(lambda: self._client.config_get(*names)))
        except ResponseError:
            return {}

    async def ping(self) -> None:
        """Returns if the server answers right now."""
        await _retry_while_away(lambda: self._client.ping(), retry_s=0)

    async def close(self) -> None:
        await self._client.aclose()

    async def _page(self, tenant: str, after: str, limit: int) -> Sequence[tuple[str, dict[bytes, bytes]]]:
        """The next ids of the index with their meta hashes, empty where an entry has no session."""
        start = f"({after}" if after else "-"
        names = await self._client.zrangebylex(index_key(tenant), start, "+", 0, limit)
        ids = [name.decode() for name in cast(list[bytes], names)]
        pipeline = self._client.pipeline(transaction=False)
        for sid in ids:
            pipeline.hgetall(meta_key(tenant, sid))
        return list(zip(ids, await pipeline.execute(), strict=True))

    @asynccontextmanager
    async def _indexed(self, tenant: str, sid: str, *, new: bool) -> AsyncIterator[None]:
        """Names a new session in the tenant's index: before it is there, so that none is missed, and after it again,
        should somebody have taken the name for a stale one meanwhile (see `_unindex`)."""

        async def name() -> None:
            if new:
                await _retry_while_away(lambda: self._client.zadd(index_key(tenant), {sid: 0}))

        await name()
        yield
        await name()

    async def _unindex(self, tenant: str, sid: str) -> None:
        """Takes a session that is not there out of the index; puts it back if it is there after all."""
        await _retry_while_away(lambda: self._client.zrem(index_key(tenant), sid))
        if await _retry_while_away(lambda: self._client.exists(meta_key(tenant, sid))):
            await _retry_while_away(lambda: self._client.zadd(index_key(tenant), {sid: 0}))


def _is_lost(error: RuntimeError) -> bool:
    """Whether it tells of a write to a connection that is lost: uvloop's way, which redis-py does not know."""
    return "handler is closed" in str(error)


async def _retry_while_away(call: Callable[[], Awaitable[T]], retry_s: float = READ_RETRY_S) -> T:
    """Repeats a call while the server is away, for `retry_s` seconds from the first failure."""
    deadline, pause = None, 0.01
    task = asyncio.current_task()
    cancellations = task.cancelling() if task else 0
    while True:
        cause: Exception | None = None
        try:
            result = await call()
        except OutOfMemoryError as error:
            raise _full() from error
        except _UNAVAILABLE_ERRORS as error:
            cause = error
        except ResponseError as error:
            if "OOM " in str(error)[:80]:
                raise _full() from error
            if not str(error).startswith(_UNAVAILABLE_REPLIES):
                raise
            cause = error
        except RuntimeError as error:
            if not _is_lost(error):
                raise
            cause = error
        if task and task.cancelling() > cancellations:
            # Python 3.11's `asyncio.wait_for`, which the client uses, loses a cancellation that comes with a result:
            # a turn that was given up would go on, and be learned.
            raise asyncio.CancelledError
        if cause is None:
            return result
        deadline = deadline or time.monotonic() + retry_s
        if time.monotonic() + pause > deadline:
            log.warning("the session store is away: %s: %s", type(cause).__name__, cause)
            raise StoreUnavailable("the session store does not answer, try again", retry_after=1.0) from cause
        await asyncio.sleep(pause)
        pause *= 2


def _full() -> StoreFull:
    return StoreFull("The session store is full: nothing can be learned until there is room in it again.")


def _check(verdict: bytes, detail: bytes, meta: SessionMeta) -> None:
    """Raises the error that a script's verdict stands for, if it is not `done`."""
    found, session = detail.decode(), f"session {meta.id!r}"
    match verdict:
        case b"format":
            raise unknown_format(meta.id, detail)
        case b"conflict":
            raise VersionConflict(f"{session} is at version {found}, the turn began at {meta.version - 1}")
        case b"renewed":
            raise VersionConflict(f"{session} was deleted and created again since the turn began")
        case b"fenced":
            raise VersionConflict(f"somebody else has taken the lease of {session} since the turn began")
        case b"erased":
            raise Conflict(f"Session {meta.id!r} was erased while this request ran.", code="session_erased")
        case b"width":
            raise EngineError(f"rows of {session} at site {found}")
