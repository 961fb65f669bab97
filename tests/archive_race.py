"""Turns that race archivings: servers teach and read sessions while others archive them, on a real Valkey.

    python -m tests.archive_race --archivings 10000 --processes 2 --pause 0.3

Each process has two stores, that is, two servers. Every version writes a row of its own. In the end each session must
have exactly the versions that its teachers were told, with all rows. An archiving counts as a race if it ended while a
turn of its session ran or had just committed: as `changed`, `busy` or `late`; `done` are sessions that were archived,
and that the next turn brought back.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import tempfile
import time
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from service.errors import Conflict, SessionBusy, VersionConflict
from service.store import CommitMetadata
from service.store.objects import Objects
from service.store.redis.store import RedisStore
from tests.service.store_backends import new_meta, rows
from tests.service.valkeys import free_ports, valkey

SESSIONS = 6
TENANT = "race"


@dataclass
class Race:
    """The turns and archivings of one process.

    Attributes:
        url, folder: the Redis and the archive, which all processes share.
        archivings: number of archivings to try.
        pause_s: most seconds between two turns of a teacher; a longer one leaves archivings more time to be done.
        outcomes: of the archivings; "refused" counts turns that another server's turn preceded.
        told: by session, the versions that teachers were told.
    """

    url: str
    folder: str
    archivings: int
    seed: int = 0
    pause_s: float = 0.3
    outcomes: Counter[str] = field(default_factory=Counter)
    told: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

    async def run(self) -> Race:
        """Teach, read and archive until there were enough archivings."""
        rng = random.Random(self.seed)
        async with AsyncExitStack() as stack:
            servers = [RedisStore.from_url(self.url, objects=Objects(self.folder)) for _ in range(2)]
            for server in servers:
                stack.push_async_callback(server.close)
            sessions = [f"s{number}" for number in range(SESSIONS)]
            archivers = [self._archive(server, sessions, rng) for server in servers]
            teachers = [self._teach(server, sid, rng) for server in servers for sid in sessions]
            others = [asyncio.create_task(work) for work in (*teachers, self._read(servers[0], sessions, rng))]
            await asyncio.gather(*archivers)
            for task in others:
                task.cancel()
            for task in others:
                with suppress(asyncio.CancelledError):
                    await task
        return self

    async def _archive(self, server: RedisStore, sessions: list[str], rng: random.Random) -> None:
        while self.outcomes.total() - self.outcomes["refused"] < self.archivings:
            self.outcomes[await server.archive.archive(TENANT, rng.choice(sessions))] += 1
            await asyncio.sleep(0.002 * rng.random())

    async def _teach(self, server: RedisStore, sid: str, rng: random.Random) -> None:
        while True:
            await asyncio.sleep(self.pause_s * rng.random() ** 3)
            turn = asyncio.create_task(self._turn(server, sid, rng.random() < 0.5))
            try:
                await asyncio.shield(turn)
            except asyncio.CancelledError:
                await turn  # a commit whose outcome is open would be none that a teacher was told
                raise

    async def _turn(self, server: RedisStore, sid: str, pauses: bool) -> None:
        try:
            turn = await server.begin_turn(TENANT, sid, write="always")
            version = 1 + (turn.meta.version if turn.meta else 0)
            if pauses:
                await asyncio.sleep(0.003)
            sites = {"a": rows([0, version], version)}
            metadata = CommitMetadata({"kind": "learn"}, b"tokens")
            await server.commit(TENANT, new_meta(sid, version), sites, lease=turn.lease, commit_metadata=metadata)
            self.told[sid].append(version)
        except (VersionConflict, Conflict, SessionBusy):
            self.outcomes["refused"] += 1

    async def _read(self, server: RedisStore, sessions: list[str], rng: random.Random) -> None:
        while True:
            loaded = await server.load(TENANT, rng.choice(sessions))
            assert loaded is None or loaded.sites["a"].slots.tolist() == list(range(loaded.meta.version + 1))
            await asyncio.sleep(0.02)


async def check(url: str, folder: str, told: dict[str, list[int]]) -> list[str]:
    """Return what is wrong with the sessions, given the versions that their teachers were told."""
    store, wrong = RedisStore.from_url(url, objects=Objects(folder)), []
    for sid, versions in told.items():
        loaded = await store.load(TENANT, sid)
        history = await store.history(TENANT, sid, undo=True)
        assert loaded is not None and history is not None
        if sorted(versions) != list(range(1, loaded.meta.version + 1)):
            wrong.append(f"{sid}: version {loaded.meta.version}, {len(versions)} told, {len(set(versions))} distinct")
        slots, values = loaded.sites["a"].slots.tolist(), loaded.sites["a"].data[1:, 0].tolist()
        if slots != list(range(loaded.meta.version + 1)) or values != [slot % 256 for slot in slots[1:]]:
            wrong.append(f"{sid}: rows are missing or changed")
        if [entry["version"] for entry in history.log] != list(range(1, loaded.meta.version + 1))[-512:]:
            wrong.append(f"{sid}: the log has gaps")
    await store.archive.sweep(0)
    left = [file async for page in store.archive.objects.list() for file in page if file.name.endswith(".session")]
    wrong += [f"a file is left: {file.name}" for file in left]
    await store.close()
    return wrong


def _race(url: str, folder: str, archivings: int, seed: int, pause_s: float) -> Race:
    return asyncio.run(Race(url, folder, archivings, seed, pause_s).run())


def main() -> None:
    """Run the races and print what happened; exit with 1 if a session is not as its teachers were told."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--archivings", type=int, default=10_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--pause", type=float, default=0.3)
    arguments = parser.parse_args()
    (port,) = free_ports(1)
    url, started, share = f"redis://127.0.0.1:{port}", time.monotonic(), arguments.archivings // arguments.processes
    context = multiprocessing.get_context("spawn")
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # syncs to a disk would take most of the time
    with tempfile.TemporaryDirectory(dir=memory) as folder, valkey(Path(folder) / "valkey", port):
        place = str(Path(folder) / "archive")
        with ProcessPoolExecutor(arguments.processes, mp_context=context) as pool:
            races = [
                pool.submit(_race, url, place, share, seed, arguments.pause) for seed in range(arguments.processes)
            ]
            told, outcomes = defaultdict[str, list[int]](list), Counter[str]()
            for race in races:
                outcomes += race.result().outcomes
                for sid, versions in race.result().told.items():
                    told[sid] += versions
        wrong = asyncio.run(check(url, place, told))
    commits = sum(map(len, told.values()))
    report = {"seconds": round(time.monotonic() - started), "outcomes": outcomes, "commits": commits, "wrong": wrong}
    print(json.dumps(report))
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
