"""Idle sessions as files in an archive; of each, the store keeps a stub: the meta hash with few fields.

    imprint:{<tenant>/<id>}:meta       format `archived`, version, created, nonce, options, once_until, once_lost, and
                                       archived: the file's name, checksum and size, and the other fields of SessionMeta
                        …:archiving    the file that a server is about to make of the session; expires
    imprint:archive                    the folder of the archive that belongs to this store
    imprint:archiver                   the server that looks for idle sessions; expires

Order of an archiving: right to archive (`archiving`) → read and check → write the file → read it back → one script that
replaces the session by the stub, unless a commit came meanwhile, a turn has the lease, or the right has expired.
Order of a return: read and check the file → one script → a minute later, remove the file: a failover of Redis may bring
the stub back. A turn never waits for an archiving, and a server that stops between two steps leaves a whole session,
and perhaps a file that no stub names: `sweep` removes it. No name of a file is used twice, so a file without a stub
that is older than the right to archive never gets one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import secrets
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from service.errors import ArchiveUnavailable, EngineError, StoreUnavailable, Unavailable
from service.store import errors
from service.store.objects import Objects, StoredObject
from service.store.redis import codec
from service.store.redis.codec import ARCHIVED, FORMAT, Keys, tenant_and_session
from service.store.redis.connect import AnyRedis
from service.store.redis.index import SessionIndex
from service.store.redis.record import RecordError, SessionRecord, unpack_record
from service.store.redis.scripts import ALLOW_OOM, CLIENT_ERRORS, load_script, retry_while_away

RIGHT_S = 600  # time within which an archiving must end
ORPHAN_AGE_S = 3600.0  # of a file without a stub: no archiving takes so long, whatever the clocks of two machines say
LINGER_S = 60.0  # for which the file of a session that was brought back stays
MAX_LINGERING = 10_000  # files that a server removes itself; `sweep` removes the others
AT_ONCE = 2  # records in memory, of 1 MB as a rule; of 80 MiB, and three times in memory, at the limits
FETCHED_AT_ONCE = 4
WAIT_S = 10.0  # for which a request waits until its session may be fetched
SCANNED_AT_ONCE = 1000
MAX_READS = 16
SUFFIX = ".session"
MARK = "imprint.json"  # of a folder: tells an archive without a file from a folder that is not mounted
STUB_FIELDS = {b"format", b"version", b"created", b"nonce", b"options", b"once_until", b"once_lost"}
NOT_IN_STUB = {"digests", "options", "version", "created"}  # of SessionMeta: large, or fields of the stub itself
OF_NO_RECORD = {b"archived", b"brought", b"file"}  # fields of the meta hash that are about files

Outcome = Literal["done", "changed", "busy", "late", "empty", "gone", "damaged"]
Report = Callable[[str, float], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stub:
    """The place of the file of an archived session. raw: the field `archived` as it is stored."""

    name: str
    sha256: str
    size: int
    raw: bytes

    @classmethod
    def of(cls, raw: bytes) -> Stub:
        """Return the stub that the field `archived` holds."""
        values = json.loads(raw)
        return cls(values["file"], values["sha256"], values["size"], raw)


def file_name(folder: str, tenant: str, sid: str, unique: str) -> str:
    """Return the name of a file of a session. The letters before the names keep `..` from being a folder."""
    return f"{folder}/t.{tenant}/s.{sid}.{unique}{SUFFIX}"


def owner_of(name: str) -> tuple[str, str] | None:
    """Return the tenant and the session that a file belongs to; None for a file that is no session's."""
    _, tenant, file, *deeper = [*name.split("/"), "", ""]
    sid = file.removesuffix(SUFFIX).rpartition(".")[0]
    is_session = file.endswith(SUFFIX) and tenant.startswith("t.") and sid.startswith("s.") and not any(deeper)
    return (tenant[2:], sid[2:]) if is_session else None


class SessionArchive:
    """The archive of one store.

    Args:
        objects: where the files are; None: the server has no archive, and sessions that are in one cannot be used.
        ttl_s: seconds after its last use at which a session expires that has no option of its own; 0 = never.
        report: is called after each step with `archive`, `bring` or `remove` and the seconds that the step took; with
            `<step>_failed` if the step failed.
    """

    def __init__(
        self,
        client: AnyRedis,
        keys: Keys,
        index: SessionIndex,
        objects: Objects | None,
        ttl_s: int = 0,
        report: Report = lambda step, seconds: None,
    ) -> None:
        self._client: Any = client  # whose types would have replies be text
        self._keys, self._index, self._objects, self._report = keys, index, objects, report
        self._ttl_s = ttl_s
        self._folder = ""
        self._take = load_script(client, "take", first_line=ALLOW_OOM)
        self._archive = load_script(client, "common", "archive", first_line=ALLOW_OOM)
        self._bring = load_script(client, "common", "bring")
        self._upgrade = load_script(client, "common", "pages", "upgrade", first_line=ALLOW_OOM)
        self._archiving, self._fetching = asyncio.Semaphore(AT_ONCE), asyncio.Semaphore(FETCHED_AT_ONCE)
        self._coming: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._lingering: deque[tuple[float, str]] = deque()

    @property
    def objects(self) -> Objects:
        """Return where the files are. Raises ArchiveUnavailable if this server has none."""
        if self._objects is None:
            raise ArchiveUnavailable(
                "the session is in the archive, and this server has none: set IMPRINT_ARCHIVE_URL to its address"
            )
        return self._objects

    # --- one session -----------------------------------------------------------------------------------------------

    async def archive(self, tenant: str, sid: str) -> Outcome:
        """Move a session to the archive; return "done", or why the session stays as it is.

        Raises StoreUnavailable; the session is then whole, in the store or in the archive.
        """
        started = time.monotonic()
        async with self._archiving:
            try:
                outcome = await self._move(tenant, sid)
            except (Unavailable, EngineError):
                self._report("archive_failed", 0.0)
                raise
        if outcome in ("done", "damaged"):
            self._report("archive" if outcome == "done" else "archive_failed", time.monotonic() - started)
        return outcome

    async def _move(self, tenant: str, sid: str) -> Outcome:
        key = self._keys.session(tenant, sid, "archiving")
        name = file_name(await self.folder(), tenant, sid, secrets.token_hex(8))
        if not await self._is_there():
            raise _elsewhere()
        if not await retry_while_away(lambda: self._take([key], [name, 1000 * RIGHT_S])):
            return "busy"
        outcome: Outcome = "gone"
        try:
            record = await self._read_once(tenant, sid)
            if record is not None and not record.meta:
                return "changed"
            if record is None or record.meta.get(b"format") != FORMAT or b"nonce" not in record.meta:
                return "gone" if record is None else "empty"
            if damage := await asyncio.to_thread(record.find_damage):
                log.error("a session is damaged in the store and stays there: %s", damage)
                return "damaged"
            data = await asyncio.to_thread(record.pack)
            stub = _stub_of(record, name, data)
            await self._write_checked(name, data)
            args: list[str | bytes] = [name, record.meta[b"nonce"], stub]
            outcome = (await retry_while_away(lambda: self._archive([self._keys.meta(tenant, sid)], args))).decode()
            if outcome == "late" and (await self.stub(tenant, sid) or b"") == stub:
                outcome = "done"  # the reply to the first attempt was lost
            if outcome != "done":
                await self.remove(name)
            elif earlier := record.meta.get(b"file"):
                await self.remove(earlier.decode())  # it may linger, and nothing names it any more
            return outcome
        finally:
            if outcome != "done":
                await retry_while_away(lambda: self._client.unlink(key))

    async def _write_checked(self, name: str, data: bytes) -> None:
        """Write a file and read it back: keys that may write and not read would lose the session."""
        await self.objects.put(name, data)
        if await self.objects.get(name) != data:
            await self.remove(name)
            raise ArchiveUnavailable("the archive does not return what was written to it")

    async def bring_back(self, tenant: str, sid: str) -> None:
        """Bring an archived session back to the store. Idempotent; no effect on a session that is no stub.

        Callers at the same time share one return, which goes on when they are cancelled.
        Raises StoreUnavailable, StoreFull, or EngineError (`damaged_session`) if the file is missing or damaged.
        """
        key = (tenant, sid)
        if (task := self._coming.get(key)) is None:
            task = self._coming[key] = asyncio.create_task(self._bring_counted(tenant, sid))
            task.add_done_callback(lambda done: self._end_coming(key, done))
        await asyncio.shield(task)

    def _end_coming(self, key: tuple[str, str], task: asyncio.Task[None]) -> None:
        del self._coming[key]
        if not task.cancelled():
            task.exception()  # whoever still waits gets the exception; nobody may

    async def _bring_counted(self, tenant: str, sid: str) -> None:
        started = time.monotonic()
        try:
            async with asyncio.timeout(WAIT_S):
                await self._fetching.acquire()
            try:
                if await self._return(tenant, sid):
                    self._report("bring", time.monotonic() - started)
            finally:
                self._fetching.release()
        except (Unavailable, EngineError, TimeoutError) as error:
            self._report("bring_failed", 0.0)
            if isinstance(error, TimeoutError):
                raise ArchiveUnavailable("too many sessions wait for the archive, try again") from error
            raise

    async def _return(self, tenant: str, sid: str) -> bool:
        raw = await self.stub(tenant, sid)
        if raw is None:
            return False
        stub = Stub.of(raw)
        record = await self._fetch(tenant, sid, stub)
        if record is None:
            if await self.stub(tenant, sid) == raw:
                raise await self._missing(sid)
            return False  # another server has brought the session back, or somebody has erased it
        known = STUB_FIELDS - {b"format"} | OF_NO_RECORD
        meta = {field: value for field, value in record.meta.items() if field not in known}
        args = _bring_args(raw, self._ttl_s, {**meta, b"file": stub.name.encode()}, record)
        done = await retry_while_away(lambda: self._bring([self._keys.meta(tenant, sid)], args))
        if done == b"done" and len(self._lingering) < MAX_LINGERING:
            self._lingering.append((time.monotonic() + LINGER_S, stub.name))
        return bool(done == b"done")

    async def remove_lingering(self) -> None:
        """Remove the files of the sessions that this server brought back `LINGER_S` ago or earlier."""
        while self._lingering and self._lingering[0][0] <= time.monotonic():
            await self.remove(self._lingering.popleft()[1])

    async def _fetch(self, tenant: str, sid: str, stub: Stub) -> SessionRecord | None:
        """Return the record in the file of a stub; None if there is no such file."""
        data = await self.objects.get(stub.name)
        if data is None:
            return None
        try:
            return await asyncio.to_thread(_checked_record, data, tenant, sid, stub.sha256)
        except RecordError as error:
            raise errors.damaged_session(sid, f"its file in the archive is not what was written: {error}") from error

    async def remove(self, name: str) -> None:
        """Remove a file that no stub names. Never raises: `sweep` removes what stays."""
        try:
            await self.objects.delete(name)
            self._report("remove", 0.0)
        except Unavailable:
            log.error("a file of the archive that nobody needs could not be removed; a later sweep does it")
            self._report("remove_failed", 0.0)

    async def _missing(self, sid: str) -> Exception:
        """Return the error for a session whose file is not there."""
        is_missing = await self._is_there()
        return errors.damaged_session(sid, "its file is missing from the archive") if is_missing else _elsewhere()

    async def _is_there(self) -> bool:
        """Return whether the archive is where it was. A disk that is not mounted is an empty folder."""
        return await self.objects.exists(f"{await self.folder()}/{MARK}")

    async def remove_files(self, raw: bytes | None = None, name: bytes | None = None) -> None:
        """Remove the files of a session that is erased: that of its stub, and one that lingers. Never raises."""
        for file in ([Stub.of(raw).name] if raw else []) + ([name.decode()] if name else []):
            await self.remove(file)

    async def folder(self) -> str:
        """Return the folder of the archive that belongs to this store alone, so that stores can share an address."""
        key = self._keys.archive
        if not self._folder and await retry_while_away(lambda: self._client.get(key)) is None:
            new = secrets.token_hex(8)
            await self.objects.put(f"{new}/{MARK}", b"{}")  # first: a folder that the store names has its mark
            if not await retry_while_away(lambda: self._take([key], [new, ""])):
                await self.remove(f"{new}/{MARK}")
        self._folder = self._folder or (await retry_while_away(lambda: self._client.get(key))).decode()
        return self._folder

    async def stub(self, tenant: str, sid: str) -> bytes | None:
        """Return the field `archived` of a session; None if the session is not archived."""
        raw: bytes | None = await retry_while_away(lambda: self._client.hget(self._keys.meta(tenant, sid), "archived"))
        return raw

    # --- whole sessions, for backups -------------------------------------------------------------------------------

    async def record(self, tenant: str, sid: str) -> SessionRecord | None:
        """Return a session as one version has it, archived or not; None if there is no such session.

        Raises EngineError (`damaged_session`) for a session that is not whole.
        """
        for _ in range(MAX_READS):
            record = await self._read_once(tenant, sid)
            if record is None:
                return None
            if not record.meta:
                continue  # a commit came between the reads
            if record.meta.get(b"format") != ARCHIVED:
                if damage := await asyncio.to_thread(record.find_damage):
                    raise errors.damaged_session(sid, damage)
                return record
            stub = Stub.of(record.meta[b"archived"])
            if (archived := await self._fetch(tenant, sid, stub)) is not None:
                kept = {field: value for field, value in record.meta.items() if field in STUB_FIELDS - {b"format"}}
                return SessionRecord(tenant, sid, {**archived.meta, **kept}, archived.hashes, archived.log)
            if await self.stub(tenant, sid) == stub.raw:
                raise await self._missing(sid)
        raise StoreUnavailable(f"session {sid!r} changes too often to be read, try again", retry_after=1.0)

    async def store(self, record: SessionRecord, *, replace: bool) -> bool:
        """Store the session of a record; return False if there is a session of its id and `replace` is not set."""
        tenant, sid = record.tenant, record.sid
        old = await self.stub(tenant, sid) if replace else None
        foreign = OF_NO_RECORD | {b"once_until", b"once_lost"}  # no record has the remembered answers
        meta = {field: value for field, value in record.meta.items() if field not in foreign}
        args = _bring_args(b"*" if replace else b"", self._ttl_s, meta, record)
        async with self._index.naming(tenant, sid, new=True):
            done = await retry_while_away(lambda: self._bring([self._keys.meta(tenant, sid)], args))
        if old is not None:
            await self.remove(Stub.of(old).name)
        return bool(done == b"done")

    async def _read_once(self, tenant: str, sid: str) -> SessionRecord | None:
        """Return what the store has of a session; None if there is none; no meta if a commit came meanwhile."""
        meta = await retry_while_away(lambda: self._client.hgetall(self._keys.meta(tenant, sid)))
        if meta.get(b"format") in codec.OLD_FORMATS:
            await retry_while_away(lambda: self._upgrade([self._keys.meta(tenant, sid)], [self._ttl_s]))
            return SessionRecord(tenant, sid, {}, {}, [])
        names = [*(f"rows:{site}" for site in codec.row_sizes(meta)), "undo"]

        async def read() -> list[Any]:
            pipeline = self._client.pipeline(transaction=False)
            for name in names:
                pipeline.hgetall(self._keys.session(tenant, sid, name))
            pipeline.lrange(self._keys.session(tenant, sid, "log"), 0, -1)
            pipeline.hgetall(self._keys.meta(tenant, sid))
            return list(await pipeline.execute())

        if not meta:
            return None
        *hashes, entries, now = await retry_while_away(read)
        if any(meta.get(field) != now.get(field) for field in (b"format", b"created", b"nonce", b"archived")):
            return SessionRecord(tenant, sid, {}, {}, [])
        found = {name: fields for name, fields in zip(names, hashes, strict=True) if fields}
        return SessionRecord(tenant, sid, meta, found, entries)

    # --- all sessions ----------------------------------------------------------------------------------------------

    async def scan(self, *fields: str) -> AsyncIterator[list[tuple[str, str, dict[str, bytes | None]]]]:
        """Yield the sessions of the store, some at a time: tenant, id and these fields of the meta hash.

        A session may come twice, and one that is created or erased meanwhile may come or not.
        """
        keys, more = self._client.scan_iter(match=self._keys.meta_pattern, count=SCANNED_AT_ONCE), True
        while more:
            batch: list[bytes] = []
            try:
                while more and len(batch) < SCANNED_AT_ONCE:
                    batch.append(await anext(keys))
            except StopAsyncIteration:
                more = False
            except CLIENT_ERRORS as error:
                raise StoreUnavailable("the session store does not answer, try again") from error
            if batch:
                yield await self._fields(batch, fields)

    async def _fields(
        self, keys: Sequence[bytes], fields: Sequence[str]
    ) -> list[tuple[str, str, dict[str, bytes | None]]]:
        async def read() -> list[Any]:
            pipeline = self._client.pipeline(transaction=False)
            for key in keys:
                pipeline.hmget(key, list(fields))
            return list(await pipeline.execute())

        values = await retry_while_away(read)
        return [
            (*tenant_and_session(key), dict(zip(fields, found, strict=True)))
            for key, found in zip(keys, values, strict=True)
        ]

    async def archive_idle(self, idle_s: float) -> AsyncIterator[Counter[str]]:
        """Archive the sessions that nobody has taught, and that were not brought back, within `idle_s` seconds.

        Yields, now and then, how many sessions were "archived" before, are "active", or had which `Outcome`.
        """
        counts = Counter[str]()

        async def move(tenant: str, sid: str) -> None:
            try:
                counts[await self.archive(tenant, sid)] += 1
            except EngineError:
                counts["damaged"] += 1

        async for page in self.scan("format", "nonce", "updated", "brought"):
            oldest, idle = time.time() - idle_s, []
            for tenant, sid, found in page:
                last = max(float(found["updated"] or "inf"), float(found["brought"] or 0))
                if found["format"] == ARCHIVED or found["nonce"] is None or last > oldest:
                    counts["archived" if found["format"] == ARCHIVED else "active" if last > oldest else "empty"] += 1
                else:
                    idle.append((tenant, sid))
            for at in range(0, len(idle), AT_ONCE):
                await asyncio.gather(*(move(*session) for session in idle[at : at + AT_ONCE]))
            yield counts

    async def orphans(self, min_age_s: float = ORPHAN_AGE_S) -> AsyncIterator[list[StoredObject]]:
        """Yield, page by page, the files of sessions that no stub names and that are older than `min_age_s`."""
        async for page in self.objects.list(await self.folder()):
            owners = [(file, owner) for file in page if (owner := owner_of(file.name)) and file.age_s >= min_age_s]
            keys = [self._keys.meta(*owner).encode() for _, owner in owners]
            found = await self._fields(keys, ["archived", "file", "brought"]) if keys else []
            named = {Stub.of(raw).name for _, _, fields in found if (raw := fields["archived"]) is not None}
            since = time.time() - min(LINGER_S, min_age_s)
            lingering = {fields["file"] for _, _, fields in found if float(fields["brought"] or 0) > since}
            yield [file for file, _ in owners if file.name not in named and file.name.encode() not in lingering]

    async def sweep(self, min_age_s: float = ORPHAN_AGE_S) -> int:
        """Remove the files that no stub names: of sessions that have expired, or of steps that failed; count them."""
        removed = 0
        async for files in self.orphans(min_age_s):
            for file in files:
                await self.remove(file.name)
            removed += len(files)
        return removed

    async def take_turn(self, owner: str, duration_s: float) -> bool:
        """Return whether this server is the one that looks for idle sessions, for `duration_s` seconds from now."""
        key, duration_ms = self._keys.archiver, int(1000 * duration_s)
        if await retry_while_away(lambda: self._take([key], [owner, duration_ms])):
            return True
        if await retry_while_away(lambda: self._client.get(key)) != owner.encode():
            return False
        return bool(await retry_while_away(lambda: self._client.pexpire(key, duration_ms)))


def _elsewhere() -> ArchiveUnavailable:
    return ArchiveUnavailable(
        "IMPRINT_ARCHIVE_URL names a place without the archive of this store; is a disk not mounted?"
    )


def _checked_record(data: bytes, tenant: str, sid: str, sha256: str) -> SessionRecord:
    if hashlib.sha256(data).hexdigest() != sha256:
        raise RecordError("its checksum differs")
    return unpack_record(data, tenant, sid)


def _stub_of(record: SessionRecord, name: str, data: bytes) -> bytes:
    """Return the field `archived` of the stub that stands for a record."""
    meta = {field.decode(): value.decode() for field, value in record.meta.items()}
    values = {field: meta[field] for field in codec.META_FIELDS - NOT_IN_STUB if field in meta}
    stub = {"file": name, "sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "meta": values}
    return json.dumps(stub, separators=(",", ":")).encode()


def _bring_args(
    expected: bytes, ttl_s: int, meta: Mapping[bytes, bytes], record: SessionRecord
) -> list[str | int | bytes]:
    """Return the arguments of `bring.lua`."""
    args: list[str | int | bytes] = [expected, ttl_s]
    for name, fields in {"meta": meta, **record.hashes}.items():
        args += [name, 2 * len(fields)]
        for field, value in fields.items():
            args += (field, value)
    return [*args, "log", len(record.log), *record.log] if record.log else args
