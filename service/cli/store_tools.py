"""The work of `imprint store`: on the store of the settings, with a line that shows how far it is."""

from __future__ import annotations

import asyncio
import heapq
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from service.cli.console import err
from service.errors import CommandError, EngineError
from service.settings import Settings
from service.store.base import RetentionConfig
from service.store.embedded import EmbeddedValkey, StoreError, in_use
from service.store.objects import Objects, ObjectsError
from service.store.redis import backup as backups
from service.store.redis.archive import AT_ONCE, SessionArchive, Stub
from service.store.redis.store import RedisStore

IDLE_BOUNDS = {"an hour": 3600, "a day": 86_400, "a week": 604_800, "30 days": 2_592_000}
LARGEST = 10

Note = Callable[[Counter[str]], None]


@dataclass
class StoreReport:
    """The content of a store. largest: (bytes of rows, session), the largest first."""

    sessions: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    idle: Counter[str] = field(default_factory=Counter)
    largest: list[tuple[int, str]] = field(default_factory=list)


def measure_store() -> StoreReport:
    """Return what the store holds, from the meta hashes of all sessions."""
    report = StoreReport(idle=Counter(dict.fromkeys([*(f"up to {name}" for name in IDLE_BOUNDS), "longer"], 0)))

    async def work(store: RedisStore, note: Note) -> None:
        async for page in store.archive.scan("format", "updated", "brought", "bytes", "undo_bytes", "archived"):
            for tenant, sid, found in page:
                _add(report, f"{tenant}/{sid}", found)
            note(report.sessions)
        report.bytes["memory of the store"], _ = await store.memory()

    _run(work)
    report.largest.sort(reverse=True)
    return report


def _add(report: StoreReport, name: str, found: dict[str, bytes | None]) -> None:
    stub = None if found["archived"] is None else Stub.of(found["archived"])
    meta = json.loads(found["archived"] or b"{}").get("meta", {})
    rows, undo = int(found["bytes"] or meta.get("bytes") or 0), int(found["undo_bytes"] or 0)
    report.sessions["archived" if stub else "stored"] += 1
    report.bytes.update({"archive": stub.size} if stub else {"rows": rows, "undo steps": undo})
    (heapq.heappush if len(report.largest) < LARGEST else heapq.heappushpop)(report.largest, (rows, name))
    last = max(float(found["updated"] or meta.get("updated") or 0), float(found["brought"] or 0))
    fitting = (f"up to {name}" for name, bound in IDLE_BOUNDS.items() if time.time() - last <= bound)
    report.idle[next(fitting, "longer")] += 1


def archive_sessions(sessions: Sequence[str], idle_s: int | None) -> Counter[str]:
    """Archive the sessions `tenant/id`, or those that have been idle for `idle_s`; count them by what happened."""
    counts, settings = Counter[str](), Settings.load()
    if not sessions and idle_s is None and not settings.archive_after_s:
        raise CommandError("say which sessions: --idle SECONDS, TENANT/ID, or IMPRINT_ARCHIVE_AFTER_S")

    async def work(store: RedisStore, note: Note) -> None:
        _ = store.archive.objects  # says so now if there is no archive
        for name in sessions:
            tenant, _, sid = name.rpartition("/")
            counts[await store.archive.archive(tenant or "default", sid)] += 1
        if not sessions:
            idle = settings.archive_after_s if idle_s is None else idle_s
            async for so_far in store.archive.archive_idle(idle):
                note(so_far)
                counts.update(so_far - counts)

    _run(work)
    return counts


def verify_store(*, repair: bool) -> tuple[Counter[str], list[str]]:
    """Read every session, and list the files without a session; return the counts, and what is damaged."""
    counts, damaged = Counter[str](), list[str]()

    async def check(archive: SessionArchive, tenant: str, sid: str, is_archived: bool) -> None:
        try:
            if await archive.record(tenant, sid) is not None:
                counts["whole, archived" if is_archived else "whole"] += 1
        except EngineError as error:
            counts["damaged"] += 1
            damaged.append(f"tenant {tenant!r}: {error.message}")

    async def work(store: RedisStore, note: Note) -> None:
        async for page in store.archive.scan("archived"):
            for at in range(0, len(page), AT_ONCE):
                batch = page[at : at + AT_ONCE]
                checks = (check(store.archive, tenant, sid, x["archived"] is not None) for tenant, sid, x in batch)
                await asyncio.gather(*checks)
                note(counts)
        if Settings.load().archive_url:
            async for files in store.archive.orphans():
                counts["files without a session"] += len(files)
            if repair:
                counts["files removed"] = await store.archive.sweep()

    _run(work)
    return counts, damaged


def back_up(target: str, keep: int) -> Counter[str]:
    """Make a backup, and remove all but the newest `keep`, unless that is 0; count what happened."""
    counts, place = Counter[str](), _objects(target)

    async def work(store: RedisStore, note: Note) -> None:
        counts.update((await backups.back_up(store.archive, place, note)).counts)
        if keep:
            counts.update({f"removed {name}": n for name, n in (await backups.prune(place, keep, note)).items()})

    _run(work)
    return counts


def restore(
    source: str, *, tenant: str | None, session: str | None, at: datetime | None, replace: bool
) -> Counter[str]:
    """Store the sessions of a backup; count what happened."""
    counts, place = Counter[str](), _objects(source)

    async def work(store: RedisStore, note: Note) -> None:
        chosen = await backups.choose_backup(place, at)
        err.print(f"the backup of {chosen.time:%Y-%m-%d %H:%M:%S} UTC")
        counts.update(
            await backups.restore(
                store.archive, place, chosen, tenant=tenant, session=session, replace=replace, progress=note
            )
        )

    _run(work, may_be_new=True)
    if session is not None and not counts:
        raise CommandError(f"the backup has no session {session!r}" + (f" of tenant {tenant!r}" if tenant else ""))
    return counts


def counts_line(counts: Counter[str]) -> str:
    """Return counts as one line of text."""
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items()) if count) or "no sessions"


def _run(work: Callable[[RedisStore, Note], Awaitable[None]], *, may_be_new: bool = False) -> None:
    """Run a command's work on the store of the settings, with a line that shows how far it is."""

    async def run() -> None:
        async with _store(Settings.load(), may_be_new=may_be_new) as store:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
                task = progress.add_task("")
                await work(store, lambda counts: progress.update(task, description=counts_line(counts)))

    try:
        asyncio.run(run())
    except (StoreError, backups.BackupError) as error:
        raise CommandError(str(error)) from None


@asynccontextmanager
async def _store(settings: Settings, *, may_be_new: bool) -> AsyncIterator[RedisStore]:
    """Yield the store of the settings: their Redis, or the Valkey of the data folder, which a server may run."""
    embedded = EmbeddedValkey(settings.data_dir)
    is_own = settings.redis_url is None and not in_use(settings.data_dir)
    if is_own and not may_be_new and not (settings.data_dir / "valkey").exists():
        raise CommandError(f"IMPRINT_DATA_DIR: {settings.data_dir} has no store; for a Redis, set IMPRINT_REDIS_URL")
    if is_own:
        await asyncio.to_thread(embedded.start)
    try:
        store = RedisStore.from_url(
            settings.redis_url or embedded.url,
            RetentionConfig(ttl_s=settings.session_ttl_s),
            exclusive=settings.redis_url is None,
            **({} if settings.redis_url is None else {"prefix": settings.redis_prefix}),
            objects=_objects(settings.archive_url, "IMPRINT_ARCHIVE_URL") if settings.archive_url else None,
        )
    except ValueError as error:
        raise CommandError(f"IMPRINT_REDIS_URL: {error}") from None
    try:
        yield store
    finally:
        await store.close()
        if is_own:
            await asyncio.to_thread(embedded.stop)


def _objects(url: str, name: str = "DIR|URL") -> Objects:
    try:
        return Objects(url)
    except ObjectsError as error:
        raise CommandError(f"{name}: {error}") from None
