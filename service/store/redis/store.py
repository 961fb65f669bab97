"""Sessions in Redis or Valkey: consistent reads, and commits that are atomic, durable, fenced and applied once.

Keys, all of a session's in one hash slot of a cluster (`imprint` is the default prefix, see `codec.Keys`):

    imprint:{<tenant>/<id>}:meta         hash: format, nonce of the last commit, the fields of SessionMeta as JSON,
                                         for each site that has rows `site:<name>` = bytes per row, and what proves the
                                         site whole: `pages:<name>` and `sum:<name>`, see pages.lua,
                                         once_until: when the last name of :onces expires, and once_lost: until
                                         when :onces may lack names, because the key was lost, and
                                         undo_from, undo_bytes: the oldest version kept, and the size of :undo,
                                         logged: the number of entries of :log
                        …:rows:<site>    hash: pages of rows, see pages.lua
                        …:log            list: one JSON object a commit
                        …:undo           hash: <version>:rows, :meta and :text = what undoes the version
                        …:once:<name>    the idempotency record of that name; expires
                        …:onces          sorted set of the names of records, by the time at which they expire
                        …:response:<name> a kept response; expires
                        …:responses      sorted set of the names of kept responses, by the time (µs) of their writing
                        …:lease          owner:fence of the server that may write; expires
                        …:fence          counter of leases that never goes back; outlives the session by a day
                        …:archiving      see archive.py
                        …:erased         the fence at which the session was erased; expires after a day
    imprint:{<tenant>/}:response:<name>, …:responses   the kept responses of no session
    imprint:alive:<owner>                a server's heartbeat; expires
    imprint:sessions:<tenant>            the tenant's index of sessions, see index.py

`ledger.py` lists the keys of the tenants' accounts. Every step on a session is one server-side script.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, cast

from redis.asyncio.client import PubSub
from redis.asyncio.cluster import RedisCluster

from service.errors import StoreRefused, StoreUnavailable, Unavailable
from service.store import errors
from service.store.base import (
    BEAT_EVERY_S,
    MAX_LOG_ENTRIES,
    NO_COMMIT_METADATA,
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
    WriteMode,
)
from service.store.objects import Objects
from service.store.redis import codec
from service.store.redis.archive import Report, SessionArchive
from service.store.redis.codec import DEFAULT_PREFIX, Keys, decode, pairs
from service.store.redis.connect import AnyRedis, connect
from service.store.redis.heartbeat import BEATING, Heartbeat
from service.store.redis.index import SessionIndex
from service.store.redis.ledger import RedisLedger
from service.store.redis.responses import RedisResponses
from service.store.redis.rights import Rights
from service.store.redis.scripts import (
    CLIENT_ERRORS,
    COMMIT_RETRY_S,
    SessionScripts,
    is_lost_connection,
    raise_for_verdict,
    retry_while_away,
)

FIRST_POLL_S, MAX_POLL_S = 0.01, 0.25
MAX_PAGES_ON_LOOP = 500  # pages that are checked and unpacked on the event loop, which takes 1 ms
MAX_READS = 16  # tries to read a session that commits change meanwhile
CONTENT_FIELDS = (b"format", b"created", b"version", b"nonce")  # of the meta hash: the same = the same rows
CHANNEL_TIMEOUT_S = 5.0
RECONNECT_S = 1.0
NO_EVICTION = "noeviction"

log = logging.getLogger(__name__)


class RedisStore:
    """The `SessionStore` on one Redis or Valkey server, a master that Sentinels name, or a cluster.

    The docstrings of `SessionStore` hold here; those below add what is particular to Redis.

    Args:
        client: must answer in bytes, and must not retry by itself: only this class knows what may be repeated.
        retention: what the store keeps, and for how long.
        exclusive: nobody else uses the server, so the store takes no leases: each lease would cost a sync to disk.
        prefix: begins the name of every key and channel.
        report_fault: is called with the fault of a change that happened: `unlisted` or `untold` (see the metric
            `imprint_store_faults_total`).
        objects: the archive of idle sessions; None: this server has none.
        report_archive: see `SessionArchive`.
    """

    def __init__(
        self,
        client: AnyRedis,
        retention: RetentionConfig | None = None,
        *,
        exclusive: bool = False,
        prefix: str = DEFAULT_PREFIX,
        report_fault: Callable[[str], None] = lambda fault: None,
        objects: Objects | None = None,
        report_archive: Report = lambda step, seconds: None,
    ) -> None:
        self._keys = Keys(prefix)
        self._client = client
        self._retention = retention or RetentionConfig()
        self.responses = RedisResponses(client, self._keys, self._retention.ttl_s)
        self._owner = secrets.token_hex(8)
        self._exclusive = exclusive
        self._known_sites: tuple[str, ...] = ()  # the sites at which any session had rows so far
        self._scripts = SessionScripts(client)
        self._heartbeat = Heartbeat(client, self._keys)
        self._report_fault = report_fault
        self._index = SessionIndex(client, self._keys, report_fault)
        self.ledger = RedisLedger(client, self._keys, self._index.absent)
        self.archive = SessionArchive(client, self._keys, self._index, objects, self._retention.ttl_s, report_archive)

    @classmethod
    def from_url(
        cls,
        url: str,
        retention: RetentionConfig | None = None,
        *,
        exclusive: bool = False,
        prefix: str = DEFAULT_PREFIX,
        **parts: Any,
    ) -> RedisStore:
        """Return a store on the server that `url` names (see `connect`); `parts` are the constructor's other arguments.

        Raises:
            ValueError: the URL is none that `connect` takes, or the prefix is not valid.
        """
        return cls(connect(url), retention, exclusive=exclusive, prefix=prefix, **parts)

    # --- a turn ----------------------------------------------------------------------------------------------------

    async def begin_turn(
        self, tenant: str, sid: str, *, write: WriteMode, names: Sequence[str] = (), even_if_full: bool = False
    ) -> TurnStart:
        key, retention, mode = self._keys.meta(tenant, sid), self._retention, "never" if self._exclusive else write
        dead = ""
        deadline, pause = time.monotonic() + retention.wait_s, FIRST_POLL_S
        script = self._scripts.enter_full if even_if_full else self._scripts.enter
        while True:
            args: list[str | int] = [self._owner, int(1000 * retention.lease_s), mode, retention.ttl_s, dead, *names]
            verdict, *reply = await retry_while_away(partial(script, [key], args))
            if verdict == b"again":
                return TurnStart(None, record=reply[0])
            if verdict == b"damaged":
                raise errors.damaged_session(sid, f"missing are {reply[0].decode()}")
            if verdict == b"archived":
                await self.archive.bring_back(tenant, sid)
                continue
            if verdict == b"entered":
                break
            held = reply[1].decode()
            if held != dead and await self._heartbeat.is_dead(Lease(tenant, sid, held)):
                log.warning("a server that has stopped holds the lease of a session, which is taken over")
                dead = held
                continue
            if time.monotonic() > deadline:
                raise errors.session_leased(sid, retention.wait_s)
            await asyncio.sleep(min(pause, 0.001 * max(1, int(reply[0]))))
            pause = min(1.5 * pause, MAX_POLL_S)
        lease = Lease(tenant, sid, reply[0].decode()) if reply[0] else None
        return TurnStart(decode(sid, pairs(reply[1:])) if reply[1:] else None, lease)

    async def heartbeat(self) -> None:
        owner = f"{BEATING}{self._owner.removeprefix(BEATING)}"
        while True:
            with suppress(Unavailable):
                await self._heartbeat.beat(owner)
                self._owner = owner
            await asyncio.sleep(BEAT_EVERY_S)

    async def renew(self, lease: Lease) -> bool:
        key, args = self._keys.meta(lease.tenant, lease.sid), (lease.value, int(1000 * self._retention.lease_s))
        return bool(await retry_while_away(lambda: self._scripts.lease([key], args)))

    async def release(self, lease: Lease) -> None:
        key, args = self._keys.meta(lease.tenant, lease.sid), [lease.value, ""]
        await retry_while_away(lambda: self._scripts.lease([key], args))

    async def load(self, tenant: str, sid: str) -> StoredSession | None:
        """Return the session, or None; take over a session of an older format first."""
        for _ in range(MAX_READS):
            sites = self._known_sites
            meta_hash, *pages, still = await retry_while_away(partial(self._read, tenant, sid, sites))
            if not _is_same_content(meta_hash, still):
                continue  # a commit came between the reads
            if not meta_hash:
                await self._check_absent(tenant, sid)
                return None
            if meta_hash.get(b"format") == codec.ARCHIVED:
                await self.archive.bring_back(tenant, sid)
                continue
            if meta_hash.get(b"format") in codec.OLD_FORMATS:
                await retry_while_away(
                    lambda: self._scripts.upgrade([self._keys.meta(tenant, sid)], [self._retention.ttl_s])
                )
                continue
            row_sizes = codec.row_sizes(meta_hash)
            if row_sizes.keys() <= set(sites):
                break
            self._known_sites = tuple({*sites, *row_sizes})
        else:
            raise StoreUnavailable(f"session {sid!r} changes too often to be read, try again", retry_after=1.0)
        meta, pages_by_site = decode(sid, meta_hash), dict(zip(sites, pages, strict=True))

        def unpack() -> dict[str, RowBatch]:
            for site in row_sizes:
                if damage := codec.find_damage(site, pages_by_site[site], meta_hash):
                    raise errors.damaged_session(sid, damage)
            return {site: codec.unpack_pages(pages_by_site[site], row_bytes) for site, row_bytes in row_sizes.items()}

        try:
            is_small = sum(map(len, pages_by_site.values())) <= MAX_PAGES_ON_LOOP
            rows = unpack() if is_small else await asyncio.to_thread(unpack)
        except ValueError as error:
            raise errors.damaged_session(sid) from error
        return StoredSession(meta, rows)

    async def _read(self, tenant: str, sid: str, sites: Sequence[str]) -> list[Any]:
        """Return the meta hash, the pages of these sites, and the meta hash once more.

        The pages are those of the meta hash if both meta hashes are of one commit. A transaction is refused by a full
        server; a script would have to copy every row twice, and the server would answer nobody else meanwhile.
        """
        pipeline = self._client.pipeline(transaction=False)
        pipeline.hgetall(self._keys.meta(tenant, sid))
        for site in sites:
            pipeline.hgetall(self._keys.session(tenant, sid, f"rows:{site}"))
        pipeline.hgetall(self._keys.meta(tenant, sid))
        return list(await pipeline.execute())

    async def _check_absent(self, tenant: str, sid: str) -> None:
        """Raise EngineError (`damaged_session`) if the meta hash that was not found is one that the store has lost."""
        meta, log_key = self._keys.meta(tenant, sid), self._keys.session(tenant, sid, "log")

        async def read() -> list[Any]:
            pipeline = self._client.pipeline(transaction=False)
            for key in (meta, log_key, meta):
                pipeline.exists(key)
            return list(await pipeline.execute())

        before, has_log, after = await retry_while_away(read)
        if has_log and not before and not after:  # else the session was created or erased meanwhile
            raise errors.damaged_session(sid, "missing are its meta")

    async def commit(
        self,
        tenant: str,
        meta: SessionMeta,
        sites: Mapping[str, RowBatch],
        *,
        cleared_slots: Mapping[str, Slots] | None = None,
        lease: Lease | None = None,
        commit_metadata: CommitMetadata = NO_COMMIT_METADATA,
        even_if_full: bool = False,
    ) -> None:
        """Commit one version in one script. A repetition after a lost reply carries the nonce of the first attempt,
        by which the script recognises a commit that has landed. The step is as durable as the server makes it."""
        key = self._keys.meta(tenant, meta.id)
        self._known_sites = tuple({*self._known_sites, *sites})
        args = self._commit_args(meta, sites, cleared_slots or {}, lease, commit_metadata)
        script = self._scripts.commit_full if even_if_full else self._scripts.commit
        attempts = 0

        async def attempt() -> Any:
            nonlocal attempts
            attempts += 1
            return await script([key], args)

        async with self._index.naming(tenant, meta.id, new=meta.version == 1):
            while (reply := await retry_while_away(attempt, COMMIT_RETRY_S))[0] == b"archived":
                await self.archive.bring_back(tenant, meta.id)
                attempts = 0  # none of them has landed
            verdict, detail = reply
        overtaken = verdict == b"conflict" and int(detail) > meta.version
        if attempts > 1 and (verdict in (b"fenced", b"erased") or overtaken):
            # An earlier attempt may have landed, and another commit since then may have replaced its nonce.
            raise StoreUnavailable(f"unknown whether session {meta.id!r} took the step to {meta.version}")
        raise_for_verdict(verdict, detail, meta)

    def _commit_args(
        self,
        meta: SessionMeta,
        sites: Mapping[str, RowBatch],
        cleared_slots: Mapping[str, Slots],
        lease: Lease | None,
        metadata: CommitMetadata,
    ) -> list[str | int | bytes]:
        """Return the arguments of `commit.lua`, in its order."""
        values, retention = codec.encode(meta), self._retention
        options = values.pop("options")
        args: list[str | int | bytes] = [meta.version - 1, values["created"], secrets.token_hex(16)]
        args += ["" if lease is None else lease.value, retention.ttl_s]
        args += [0 if metadata.erases_past else retention.versions, retention.history_bytes, MAX_LOG_ENTRIES]
        args += [json.dumps({"version": meta.version, **metadata.log}) if metadata.log else "", metadata.packed_tokens]
        record = metadata.idempotency_record
        args += ["", 0, b""] if record is None else [record.name, record.ttl_s, record.record]
        args += ["answers" if metadata.erases_past else "responses" if metadata.drops_responses else ""]
        args += [options, 2 * len(values), *codec.flatten(values)]
        for site, batch in sites.items():
            slots = cleared_slots.get(site)
            args += [site, batch.row_bytes, codec.pack_records(batch)]
            args += [b"" if slots is None else codec.pack_slots(slots)]
        return args

    # --- sessions --------------------------------------------------------------------------------------------------

    async def meta(self, tenant: str, sid: str) -> SessionMeta | None:
        key = self._keys.meta(tenant, sid)
        meta_hash = await retry_while_away(lambda: self._client.hgetall(key))
        if not meta_hash:
            await self._check_absent(tenant, sid)
            return None
        return decode(sid, cast(dict[bytes, bytes], meta_hash))

    async def create(self, tenant: str, meta: SessionMeta, lease: Lease | None = None) -> SessionMeta:
        key = self._keys.meta(tenant, meta.id)
        args: list[str | int] = ["" if lease is None else lease.value, self._retention.ttl_s]
        args += codec.flatten(codec.encode(meta))
        async with self._index.naming(tenant, meta.id, new=True):
            verdict, detail, *meta_hash = await retry_while_away(lambda: self._scripts.create([key], args))
        raise_for_verdict(verdict, detail, meta)
        return decode(meta.id, pairs(meta_hash))

    async def configure(self, tenant: str, sid: str, options: Mapping[str, Option]) -> SessionMeta:
        key, args = self._keys.meta(tenant, sid), (json.dumps(dict(options)), self._retention.ttl_s)
        meta_hash = await retry_while_away(lambda: self._scripts.configure([key], args))
        if not meta_hash:
            raise errors.session_missing(sid)
        return decode(sid, pairs(meta_hash))

    async def delete(self, tenant: str, sid: str, *, version: int | None = None) -> bool:
        """Erase the session. Never repeats the script: a second run could not tell whether the first found one."""
        key, args = self._keys.meta(tenant, sid), ["" if version is None else version, *self._known_sites]
        verdict, detail, *archived = await retry_while_away(lambda: self._scripts.delete([key], args), retry_s=0)
        if verdict == b"format":
            raise codec.unknown_format(sid, detail)
        if verdict == b"conflict":
            raise errors.version_differs(sid, detail.decode(), version)
        await self.archive.remove_files(*archived)
        try:
            await retry_while_away(
                lambda: self._client.execute_command("PUBLISH", self._keys.erased_channel, f"{tenant}/{sid}")
            )
            await self._index.remove(tenant, sid)
        except Unavailable as error:
            log.error("a session is erased, but other servers may keep a copy of it in their memory: %s", error)
            self._report_fault("untold")
        return bool(detail == b"1")

    async def erased(self) -> AsyncIterator[tuple[str, str] | None]:
        while True:
            try:
                async with await self._pubsub() as channel:
                    await channel.subscribe(self._keys.erased_channel)
                    yield None
                    while True:
                        message = await channel.get_message(ignore_subscribe_messages=True, timeout=CHANNEL_TIMEOUT_S)
                        if message is not None:
                            tenant, _, sid = message["data"].decode().partition("/")
                            if sid:
                                yield tenant, sid
            except CLIENT_ERRORS as error:
                if isinstance(error, RuntimeError | AttributeError) and not is_lost_connection(error):
                    raise
                log.debug("waiting for the session store: %s", error)
                await asyncio.sleep(RECONNECT_S)

    async def history(self, tenant: str, sid: str, *, undo: bool, entries: int = MAX_LOG_ENTRIES) -> History | None:
        key, args = self._keys.meta(tenant, sid), [entries, int(undo)]
        meta_hash, log_entries, steps = await retry_while_away(lambda: self._scripts.history([key], args))
        if not meta_hash:
            await self._check_absent(tenant, sid)
            return None
        if pairs(meta_hash).get(b"format") == codec.ARCHIVED:
            await self.archive.bring_back(tenant, sid)
            return await self.history(tenant, sid, undo=undo, entries=entries)
        if len(log_entries) < min(entries, logged := int(pairs(meta_hash).get(b"logged", 0))):
            raise errors.damaged_session(sid, f"entries of its log: it has {len(log_entries)} of {logged}")
        if lost := [step[0] for step in steps if step[1] is None or step[2] is None]:
            raise errors.damaged_session(sid, f"missing are the undo steps of the versions {min(lost)} to {max(lost)}")
        return History(
            decode(sid, pairs(meta_hash)),
            [json.loads(entry) for entry in log_entries],
            [codec.decode_undo(*step) for step in steps],
        )

    async def list(self, tenant: str, *, after: str = "", limit: int = 100) -> list[SessionMeta]:
        return await self._index.list_sessions(tenant, after, limit)

    async def count(self, tenant: str) -> int:
        return await self._index.count(tenant)

    # --- the server ------------------------------------------------------------------------------------------------

    async def memory(self) -> tuple[int, int]:
        """Return the bytes that the server (all masters of a cluster together) uses, and may use; 0 for what the
        server does not report or does not limit."""
        nodes = await self._memory_of_nodes()
        limits = [node["maxmemory"] for node in nodes]
        return sum(node["used_memory"] for node in nodes), sum(limits) if all(limits) else 0

    async def may_evict(self) -> bool:
        policies = [node.get("maxmemory_policy", NO_EVICTION) for node in await self._memory_of_nodes()]
        return any(policy != NO_EVICTION for policy in policies)

    async def _memory_of_nodes(self) -> Sequence[dict[str, Any]]:
        """Return what each server reports of its memory; nothing if the servers report nothing."""
        nodes_of_cluster = {"target_nodes": RedisCluster.PRIMARIES} if isinstance(self._client, RedisCluster) else {}
        try:
            reply: dict[str, Any] = await retry_while_away(lambda: self._client.info("memory", **nodes_of_cluster))
        except StoreRefused:
            return []
        return [reply] if "used_memory" in reply else [*reply.values()]

    async def restore_list(self) -> int:
        return await retry_while_away(self._index.restore)

    async def check_rights(self) -> None:
        await Rights(self._client, self._keys).check()

    async def _pubsub(self) -> PubSub:
        """Return a new subscriber. A message to any server of a cluster reaches the subscribers of all servers."""
        if isinstance(self._client, RedisCluster):
            await self._client.initialize()  # else the client does not know a server to subscribe at
        return self._client.pubsub()

    async def configuration(self, *names: str) -> dict[str, str]:
        """Return the server's own settings of these names; none if the server does not report them."""
        try:
            return cast(dict[str, str], await retry_while_away(lambda: self._client.config_get(*names)))
        except StoreRefused:
            return {}

    async def ping(self) -> None:
        """Return if the server answers right now.

        Raises:
            StoreUnavailable: the server does not answer.
        """
        await retry_while_away(lambda: self._client.ping(), retry_s=0)

    async def close(self) -> None:
        await self._client.aclose()


def _is_same_content(meta_hash: Mapping[bytes, bytes], other: Mapping[bytes, bytes]) -> bool:
    """Return whether two meta hashes of a session stand for the same rows."""
    return all(meta_hash.get(name) == other.get(name) for name in CONTENT_FIELDS)
