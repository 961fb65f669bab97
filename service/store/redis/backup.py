"""Copies of all sessions, in a folder or bucket of their own, and their return to a store.

    sessions/t.<tenant>/s.<id>.<content>.copy    one session at one version; written once, shared by all later backups
    backups/<UTC time>/<number>.jsonl            which files a backup consists of, LINES sessions a part
    backups/<UTC time>/complete.json             written last: without it the backup does not count

A session is copied as one version has it; the sessions of a backup are of the times at which each was copied. A backup
that was interrupted leaves its copies to the next one. Recorded answers, kept responses and accounts are not copied.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from service.errors import EngineError
from service.store.objects import Objects
from service.store.redis.archive import AT_ONCE, SessionArchive
from service.store.redis.record import RecordError, unpack_record

LINES = 10_000
DAY_S = 86_400.0
TIME_FORMAT = "%Y%m%dT%H%M%S.%fZ"
IDENTITY = ("version", "created", "nonce", "options")  # fields of the meta hash that tell contents apart

Progress = Callable[[Counter[str]], None]


class BackupError(Exception):
    """A backup cannot be used. The message says why in one line."""


@dataclass(frozen=True)
class Backup:
    """A complete backup. time: when it began. counts: of sessions, by what happened to each."""

    name: str
    time: datetime
    parts: int
    counts: dict[str, int]


async def back_up(archive: SessionArchive, target: Objects, progress: Progress = lambda counts: None) -> Backup:
    """Copy every session of a store that no earlier backup has as it is now.

    Counts "copied" and "unchanged" sessions, those "gone" meanwhile, and those "damaged", which are not copied.
    """
    began = datetime.now(UTC)
    name, parts, lines, counts = began.strftime(TIME_FORMAT), 0, list[str](), Counter[str]()

    async def copy(tenant: str, sid: str, found: dict[str, bytes | None]) -> None:
        file = _file_name(tenant, sid, found)
        if await target.exists(file):
            counts["unchanged"] += 1
        else:
            try:
                record = await archive.record(tenant, sid)
            except EngineError:
                counts["damaged"] += 1
                return
            if record is None:
                counts["gone"] += 1
                return
            file = _file_name(tenant, sid, {field: record.meta.get(field.encode()) for field in IDENTITY})
            await target.put(file, await asyncio.to_thread(record.pack))
            counts["copied"] += 1
        lines.append(json.dumps({"tenant": tenant, "id": sid, "file": file}))

    async for page in archive.scan(*IDENTITY):
        for at in range(0, len(page), AT_ONCE):
            await asyncio.gather(*(copy(*session) for session in page[at : at + AT_ONCE]))
            progress(counts)
        while len(lines) >= LINES:
            await target.put(f"backups/{name}/{parts:06}.jsonl", "\n".join(lines[:LINES]).encode())
            parts, lines = parts + 1, lines[LINES:]
    if lines:
        await target.put(f"backups/{name}/{parts:06}.jsonl", "\n".join(lines).encode())
        parts += 1
    summary = {"time": began.isoformat(), "parts": parts, "sessions": dict(counts)}
    await target.put(f"backups/{name}/complete.json", json.dumps(summary).encode())
    return Backup(name, began, parts, dict(counts))


async def list_backups(source: Objects) -> list[Backup]:
    """Return the complete backups, the oldest first."""
    names = set()
    async for page in source.list("backups"):
        names |= {file.name.split("/")[-2] for file in page if file.name.endswith("/complete.json")}
    backups = []
    for name in sorted(names):
        summary: dict[str, Any] = json.loads(await source.get(f"backups/{name}/complete.json") or b"{}")
        time = datetime.fromisoformat(summary["time"])
        backups.append(Backup(name, time, summary["parts"], summary["sessions"]))
    return backups


async def choose_backup(source: Objects, at: datetime | None) -> Backup:
    """Return the newest backup that began at `at` or earlier. Raises BackupError if there is none."""
    backups = await list_backups(source)
    fitting = [backup for backup in backups if at is None or backup.time <= at]
    if not fitting:
        if not backups:
            raise BackupError(f"{source.url} has no complete backup")
        oldest = f"the oldest is of {backups[0].time:%Y-%m-%d %H:%M:%S} UTC"
        raise BackupError(f"{source.url} has no complete backup from {at} or before: {oldest}")
    return fitting[-1]


async def restore(
    archive: SessionArchive,
    source: Objects,
    backup: Backup,
    *,
    tenant: str | None = None,
    session: str | None = None,
    replace: bool = False,
    progress: Progress = lambda counts: None,
) -> Counter[str]:
    """Store the sessions of a backup, or those of one tenant, or one session.

    Counts the sessions "restored", those that the store "kept" because it has a session of that id (unless `replace`),
    and those "damaged" or missing in the backup. Can be repeated.
    """
    counts = Counter[str]()

    async def bring(owner: str, sid: str, file: str) -> None:
        data = await source.get(file)
        try:
            if data is None:
                raise RecordError("it is missing")
            record = await asyncio.to_thread(unpack_record, data, owner, sid)
        except RecordError:
            counts["damaged"] += 1
            return
        counts["restored" if await archive.store(record, replace=replace) else "kept"] += 1

    async for lines in _parts(source, backup):
        wanted = [
            (line["tenant"], line["id"], line["file"])
            for line in lines
            if tenant in (None, line["tenant"]) and session in (None, line["id"])
        ]
        for at in range(0, len(wanted), AT_ONCE):
            await asyncio.gather(*(bring(*each) for each in wanted[at : at + AT_ONCE]))
            progress(counts)
    return counts


async def _parts(source: Objects, backup: Backup) -> AsyncIterator[list[dict[str, str]]]:
    for number in range(backup.parts):
        data = await source.get(f"backups/{backup.name}/{number:06}.jsonl")
        if data is None:
            raise BackupError(f"part {number} of {backup.parts} of the backup {backup.name} is missing")
        yield [json.loads(line) for line in data.splitlines()]


async def prune(target: Objects, keep: int, progress: Progress = lambda counts: None) -> Counter[str]:
    """Remove all backups but the newest `keep`, and the copies that no backup names; count "backups" and "copies".

    What is younger than a day stays if no complete backup names it: a backup may be under way.
    """
    backups, counts = await list_backups(target), Counter[str]()
    kept = {backup.name for backup in backups[-keep:]}
    async for page in target.list("backups"):
        for file in page:
            name = file.name.split("/")[-2]
            if name not in kept and (file.age_s > DAY_S or any(backup.name == name for backup in backups)):
                await target.delete(file.name)
                counts["backups"] += file.name.endswith("/complete.json")
    needed = [np.zeros(0, np.uint64)]  # 8 bytes a file, of which there may be millions
    for backup in backups[-keep:]:
        async for lines in _parts(target, backup):
            needed.append(np.array([_short(line["file"]) for line in lines], np.uint64))
    all_needed = np.unique(np.concatenate(needed))
    async for page in target.list("sessions"):
        found = np.isin(np.array([_short(file.name) for file in page], np.uint64), all_needed)
        for file, is_needed in zip(page, found.tolist(), strict=True):
            if not is_needed and file.age_s > DAY_S:
                await target.delete(file.name)
                counts["copies"] += 1
        progress(counts)
    return counts


def _short(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def _file_name(tenant: str, sid: str, found: dict[str, bytes | None]) -> str:
    """Return the name of the file that holds a session's content, by the fields that tell contents apart."""
    values = (found[name] or b"" for name in IDENTITY)
    content = hashlib.sha256(b"\0".join(values)).hexdigest()[:24]
    return f"sessions/t.{tenant}/s.{sid}.{content}.copy"
