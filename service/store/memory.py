"""Sessions in the memory of this process, for tests. Nothing survives the process, and no other process sees them."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import inf
from typing import Any

import numpy as np

from service.store import errors
from service.store.answers import KEPT_OF_SESSION, KEPT_OF_TENANT, erased_answer
from service.store.base import (
    BEAT_EVERY_S,
    HEARTBEAT_S,
    MAX_LOG_ENTRIES,
    NO_COMMIT_METADATA,
    TOMBSTONE_S,
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
    UndoStep,
    WriteMode,
    check_name,
)
from service.store.memory_ledger import Clock, MemoryLedger

POLL_S = 0.005
SLOT_BYTES = 4
UNVERSIONED_FIELDS = ("options",)  # fields of SessionMeta that no commit changes


@dataclass
class _Site:
    """Rows of one site, by slot."""

    row_bytes: int
    rows: dict[int, bytes] = field(default_factory=dict)

    def batch(self) -> RowBatch:
        slots = sorted(self.rows)
        data = np.frombuffer(b"".join(self.rows[slot] for slot in slots), np.uint8).reshape(-1, self.row_bytes)
        return RowBatch(np.array(slots, np.int32), data.copy())

    @property
    def num_bytes(self) -> int:
        return len(self.rows) * (SLOT_BYTES + self.row_bytes)


@dataclass
class _Undo:
    """An undo step as it is stored."""

    version: int
    sites: dict[str, _Site]
    cleared_slots: dict[str, list[int]]
    meta: dict[str, Any]
    packed_tokens: bytes

    @property
    def num_bytes(self) -> int:
        slots = sum(SLOT_BYTES * len(cleared) for cleared in self.cleared_slots.values())
        return (
            sum(site.num_bytes for site in self.sites.values()) + slots + len(self.packed_tokens) + len(str(self.meta))
        )

    def step(self) -> UndoStep:
        cleared = {name: np.array(slots, np.int32) for name, slots in self.cleared_slots.items()}
        sites = {name: site.batch() for name, site in self.sites.items()}
        return UndoStep(self.version, sites, cleared, dict(self.meta), self.packed_tokens)


@dataclass
class _Record:
    """The entry of one session id. The lease, the fence and the tombstone do not end with the session."""

    meta: SessionMeta | None = None
    expires_at: float = inf
    sites: dict[str, _Site] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    undo: list[_Undo] = field(default_factory=list)  # oldest first
    answers: dict[str, tuple[float, bytes]] = field(default_factory=dict)  # name -> time of expiry, record
    responses: dict[str, tuple[float, bytes]] = field(default_factory=dict)  # the same, the newest last
    lease: str = ""
    lease_expires_at: float = 0.0
    fence: int = 0
    fence_expires_at: float = inf
    erased_fence: int = 0
    erased_expires_at: float = 0.0

    def forget_session(self) -> None:
        self.meta, self.expires_at = None, inf
        self.sites, self.log, self.undo, self.responses = {}, [], [], {}

    def expire(self, now: float) -> None:
        """Forget all that has expired."""
        if now >= self.expires_at:
            self.forget_session()
        self.answers = {name: answer for name, answer in self.answers.items() if now < answer[0]}
        self.responses = {name: kept for name, kept in self.responses.items() if now < kept[0]}
        if now >= self.lease_expires_at:
            self.lease, self.lease_expires_at = "", 0.0
        if now >= self.fence_expires_at:
            self.fence, self.fence_expires_at = 0, inf
        if now >= self.erased_expires_at:
            self.erased_fence, self.erased_expires_at = 0, 0.0

    @property
    def num_bytes(self) -> int:
        kept = [*self.answers.values(), *self.responses.values()]
        values = sum(map(len, self.log)) + sum(len(record) for _, record in kept)
        return values + sum(site.num_bytes for site in self.sites.values()) + sum(step.num_bytes for step in self.undo)


class _Database:
    """The records of all sessions, which all stores of one database share."""

    def __init__(self, clock: Clock, max_bytes: int) -> None:
        self.clock = clock
        self.max_bytes = max_bytes
        self.beats: dict[str, float] = {}  # owner -> time of the last heartbeat
        self.listeners: list[asyncio.Queue[tuple[str, str]]] = []
        self._records: dict[tuple[str, str], _Record] = {}

    def record(self, tenant: str, sid: str | None) -> _Record:
        """Return the record of a session; of None, what the tenant has of no session."""
        key = check_name("tenant", tenant), "" if sid is None else check_name("session id", sid)
        record = self._records.setdefault(key, _Record())
        record.expire(self.clock())
        return record

    def sessions(self, tenant: str) -> list[SessionMeta]:
        """Return the tenant's sessions in the order of their ids; forget records that hold nothing any more."""
        check_name("tenant", tenant)
        sessions = []
        for key in sorted(key for key in self._records if key[0] == tenant):
            record = self.record(tenant, key[1] or None)
            if record.meta is not None:
                sessions.append(record.meta)
            elif record == _Record():
                del self._records[key]
        return sessions

    @property
    def num_bytes(self) -> int:
        return sum(record.num_bytes for record in self._records.values())

    def require_room(self) -> None:
        if self.max_bytes and self.num_bytes >= self.max_bytes:
            raise errors.store_full()


class MemoryStore:
    """The `SessionStore` in this process's memory. No method waits, except `begin_turn` for a lease.

    Args:
        retention: what the store keeps, and for how long.
        exclusive: the database has no other store, so the store takes no leases.
        max_bytes: bytes of rows, undo steps, log entries and records at which writes are refused; 0 = no limit.
        clock: seconds; decides on every expiry, and on the wait for a lease.
    """

    def __init__(
        self,
        retention: RetentionConfig | None = None,
        *,
        exclusive: bool = False,
        max_bytes: int = 0,
        clock: Clock = time.monotonic,
    ) -> None:
        self.responses = MemoryResponses(self)
        self._retention = retention or RetentionConfig()
        self._exclusive = exclusive
        self._owner = secrets.token_hex(8)
        self._database = _Database(clock, max_bytes)
        self.ledger = MemoryLedger(clock, lambda tenant, sid: self._database.record(tenant, sid).meta is not None)

    def replica(self, retention: RetentionConfig | None = None) -> MemoryStore:
        """Return another server's store on the same database."""
        store = MemoryStore(retention or self._retention)
        store.ledger, store._database = self.ledger, self._database
        return store

    # --- a turn ----------------------------------------------------------------------------------------------------

    async def begin_turn(
        self, tenant: str, sid: str, *, write: WriteMode, names: Sequence[str] = (), even_if_full: bool = False
    ) -> TurnStart:
        deadline = self._database.clock() + self._retention.wait_s
        while True:
            record, now = self._database.record(tenant, sid), self._database.clock()
            for name in names:
                if name in record.answers:
                    return TurnStart(None, record=record.answers[name][1])
            writes = self._takes_lease(record.meta, write)
            owner = record.lease.rpartition(":")[0]
            is_dead = now - self._database.beats.get(owner, inf) > HEARTBEAT_S
            if not writes or owner in ("", self._owner) or is_dead:
                break
            if now >= deadline:
                raise errors.session_leased(sid, self._retention.wait_s)
            await asyncio.sleep(POLL_S)
        lease = None
        if writes:
            if not even_if_full:
                self._database.require_room()
            record.fence += 1
            record.lease, record.lease_expires_at = f"{self._owner}:{record.fence}", now + self._retention.lease_s
            record.fence_expires_at = now + TOMBSTONE_S
            lease = Lease(tenant, sid, record.lease)
        if record.meta is not None:
            self._restart_ttl(record)
        return TurnStart(record.meta and _copied(record.meta), lease)

    def _takes_lease(self, meta: SessionMeta | None, write: WriteMode) -> bool:
        if self._exclusive or write == "never":
            return False
        return write == "always" or meta is None or meta.options.get("adapt") != "predict"

    async def heartbeat(self) -> None:
        while True:
            self._database.beats[self._owner] = self._database.clock()
            await asyncio.sleep(BEAT_EVERY_S)

    async def renew(self, lease: Lease) -> bool:
        record = self._database.record(lease.tenant, lease.sid)
        if record.lease != lease.value:
            return False
        record.lease_expires_at = self._database.clock() + self._retention.lease_s
        return True

    async def release(self, lease: Lease) -> None:
        record = self._database.record(lease.tenant, lease.sid)
        if record.lease == lease.value:
            record.lease = ""

    async def load(self, tenant: str, sid: str) -> StoredSession | None:
        record = self._database.record(tenant, sid)
        if record.meta is None:
            return None
        return StoredSession(_copied(record.meta), {name: site.batch() for name, site in record.sites.items()})

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
        record = self._database.record(tenant, meta.id)
        _require_fence(record, meta.id, lease)
        _require_version(record, meta)
        _require_row_sizes(record, meta.id, sites)
        if not even_if_full:
            self._database.require_room()
        undo = _Undo(meta.version, {}, {}, _replaced_values(record.meta, meta), commit_metadata.packed_tokens)
        for name, batch in sites.items():
            emptied = () if cleared_slots is None or name not in cleared_slots else cleared_slots[name].tolist()
            undo.sites[name], undo.cleared_slots[name] = _write_site(record, name, batch, emptied)
        record.meta = _copied(meta) if record.meta is None else replace(meta, options=record.meta.options)
        self._remember(record, meta.version, undo, commit_metadata)
        self._restart_ttl(record)
        if lease is not None and record.lease == lease.value:
            record.lease = ""

    def _remember(self, record: _Record, version: int, undo: _Undo, metadata: CommitMetadata) -> None:
        """Keep what a commit brings besides the session itself, within the limits."""
        record.undo.append(undo)
        versions = 0 if metadata.erases_past else self._retention.versions
        while len(record.undo) > versions or (
            record.undo and sum(step.num_bytes for step in record.undo) > self._retention.history_bytes
        ):
            del record.undo[0]
        if metadata.log:
            record.log = [*record.log, json.dumps({"version": version, **metadata.log})][-MAX_LOG_ENTRIES:]
        if metadata.drops_responses or metadata.erases_past:
            record.responses = {}
        if metadata.erases_past:
            record.answers = {name: (end, erased_answer(version)) for name, (end, _) in record.answers.items()}
        answer = metadata.idempotency_record
        if answer is not None:
            ttl_s = min(answer.ttl_s, self._lifetime(record) or answer.ttl_s)
            record.answers[answer.name] = self._database.clock() + ttl_s, answer.record

    def _lifetime(self, record: _Record) -> int:
        """Return the seconds after its last use at which a session expires; 0 = never."""
        assert record.meta is not None
        return int(record.meta.options.get("ttl_s", self._retention.ttl_s))

    def _restart_ttl(self, record: _Record) -> None:
        ttl_s = self._lifetime(record)
        record.expires_at = self._database.clock() + ttl_s if ttl_s > 0 else inf
        record.fence_expires_at = record.expires_at + TOMBSTONE_S

    # --- sessions --------------------------------------------------------------------------------------------------

    async def meta(self, tenant: str, sid: str) -> SessionMeta | None:
        meta = self._database.record(tenant, sid).meta
        return meta and _copied(meta)

    async def create(self, tenant: str, meta: SessionMeta, lease: Lease | None = None) -> SessionMeta:
        record = self._database.record(tenant, meta.id)
        _require_fence(record, meta.id, lease)
        if record.meta is None:
            self._database.require_room()
            record.meta = _copied(meta)
            self._restart_ttl(record)
        return _copied(record.meta)

    async def configure(self, tenant: str, sid: str, options: Mapping[str, Option]) -> SessionMeta:
        record = self._database.record(tenant, sid)
        if record.meta is None:
            raise errors.session_missing(sid)
        self._database.require_room()
        record.meta = replace(record.meta, options=dict(options))
        self._restart_ttl(record)
        for kept in (record.answers, record.responses):
            kept |= {name: (min(end, record.expires_at), data) for name, (end, data) in kept.items()}
        return _copied(record.meta)

    async def delete(self, tenant: str, sid: str, *, version: int | None = None) -> bool:
        record = self._database.record(tenant, sid)
        found = 0 if record.meta is None else record.meta.version
        if version is not None and version != found:
            raise errors.version_differs(sid, found, version)
        existed = record.meta is not None
        record.forget_session()
        record.answers, record.lease = {}, ""
        record.fence += 1
        record.erased_fence = record.fence
        record.fence_expires_at = record.erased_expires_at = self._database.clock() + TOMBSTONE_S
        for listener in self._database.listeners:
            listener.put_nowait((tenant, sid))
        return existed

    async def erased(self) -> AsyncIterator[tuple[str, str] | None]:
        listener: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        self._database.listeners.append(listener)
        try:
            yield None
            while True:
                yield await listener.get()
        finally:
            self._database.listeners.remove(listener)

    async def history(self, tenant: str, sid: str, *, undo: bool, entries: int = MAX_LOG_ENTRIES) -> History | None:
        record = self._database.record(tenant, sid)
        if record.meta is None:
            return None
        steps = [step.step() for step in reversed(record.undo)] if undo else []
        return History(_copied(record.meta), [json.loads(entry) for entry in record.log[-entries:]], steps)

    async def list(self, tenant: str, *, after: str = "", limit: int = 100) -> list[SessionMeta]:
        later = [meta for meta in self._database.sessions(tenant) if meta.id > after]
        return [_copied(meta) for meta in later[: max(0, limit)]]

    async def count(self, tenant: str) -> int:
        return len(self._database.sessions(tenant))

    async def memory(self) -> tuple[int, int]:
        return self._database.num_bytes, self._database.max_bytes

    async def restore_list(self) -> int:
        return 0

    async def check_rights(self) -> None:
        pass

    async def may_evict(self) -> bool:
        return False

    async def close(self) -> None:
        pass


class MemoryResponses:
    """The `ResponseStore` in this process's memory."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    async def put(
        self,
        tenant: str,
        sid: str,
        name: str,
        record: bytes,
        *,
        ttl_s: int,
        created: float | None,
        after: str | None = None,
    ) -> bool:
        stored, database = self._store._database.record(tenant, sid or None), self._store._database
        if created is not None:
            if stored.meta is None or stored.meta.created != created:
                return False
            ttl_s = min(ttl_s, self._store._lifetime(stored) or ttl_s)
        database.require_room()
        if after is not None:
            if name in stored.responses:
                return True
            if next(reversed(stored.responses), "") != after:
                raise errors.newest_response_moved(sid)
        stored.responses.pop(name, None)
        stored.responses[name] = database.clock() + ttl_s, record
        for oldest in list(stored.responses)[: -KEPT_OF_SESSION if sid else -KEPT_OF_TENANT]:
            del stored.responses[oldest]
        return True

    async def get(self, tenant: str, sid: str, name: str | None) -> bytes | None:
        responses = self._store._database.record(tenant, sid or None).responses
        found = next(reversed(responses.values()), None) if name is None else responses.get(name)
        return found and found[1]

    async def delete(self, tenant: str, sid: str, name: str) -> bool:
        return self._store._database.record(tenant, sid or None).responses.pop(name, None) is not None


def _copied(meta: SessionMeta) -> SessionMeta:
    """Return a meta whose options nobody else can change."""
    return replace(meta, options=dict(meta.options))


def _require_fence(record: _Record, sid: str, lease: Lease | None) -> None:
    """Raise Conflict or VersionConflict if the holder of `lease` must not write any more."""
    if lease is None:
        return
    fence = int(lease.value.rpartition(":")[2])
    if record.erased_fence > fence:
        raise errors.session_erased(sid)
    if record.fence != fence:
        raise errors.lease_lost(sid)


def _require_version(record: _Record, meta: SessionMeta) -> None:
    """Raise VersionConflict unless `meta` is the version after the stored one."""
    found = 0 if record.meta is None else record.meta.version
    if found != meta.version - 1:
        raise errors.version_moved(meta.id, found, meta.version - 1)
    if record.meta is not None and record.meta.created != meta.created:
        raise errors.session_renewed(meta.id)


def _require_row_sizes(record: _Record, sid: str, sites: Mapping[str, RowBatch]) -> None:
    """Raise EngineError for a site whose stored rows have another size."""
    for name, batch in sites.items():
        site = record.sites.get(name)
        if site is not None and site.row_bytes != batch.row_bytes:
            raise errors.row_size_differs(sid, f"{name} are {site.row_bytes} bytes each, not {batch.row_bytes}")


def _replaced_values(old: SessionMeta | None, new: SessionMeta) -> dict[str, Any]:
    """Return the values of the old meta that a commit replaces, by name."""
    if old is None:
        return {}
    names = [field.name for field in fields(SessionMeta) if field.name not in UNVERSIONED_FIELDS]
    return {name: getattr(old, name) for name in names if getattr(old, name) != getattr(new, name)}


def _write_site(record: _Record, name: str, batch: RowBatch, emptied: Sequence[int]) -> tuple[_Site, list[int]]:
    """Write and empty slots of a site; return the rows that were replaced, and the slots that were empty."""
    site = record.sites.setdefault(name, _Site(batch.row_bytes))
    rows = {slot: row.tobytes() for slot, row in zip(batch.slots.tolist(), batch.data, strict=True)}
    touched = sorted({*rows, *emptied})
    replaced = _Site(batch.row_bytes, {slot: site.rows[slot] for slot in touched if slot in site.rows})
    was_empty = [slot for slot in touched if slot not in site.rows]
    site.rows |= rows
    for slot in emptied:
        site.rows.pop(slot, None)
    if not site.rows:
        del record.sites[name]
    return replaced, was_empty
