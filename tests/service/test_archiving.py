"""The background work of the archive: who looks for idle sessions, which it finds, and what goes wrong meanwhile."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from service import archiving
from service.background import keep_running
from service.errors import ArchiveUnavailable
from service.metrics import Metrics
from service.store import objects
from service.store.redis.store import RedisStore
from tests.service.archives import assert_whole, files, opened, teach
from tests.service.store_backends import new_meta
from tests.service.valkeys import free_ports, valkey


@pytest.fixture
def raw(tmp_path: Path) -> Iterator[Any]:
    (port,) = free_ports(1)
    with valkey(tmp_path / "redis", port), Redis(port=port) as client:
        yield client


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "archive"


@pytest.fixture
async def store(raw: Any, folder: Path) -> AsyncIterator[RedisStore]:
    async with opened(f"redis://127.0.0.1:{raw.get_connection_kwargs()['port']}", folder) as store:
        yield store


async def test_only_idle_sessions_are_archived(store: RedisStore, raw: Any, folder: Path) -> None:
    for sid in ("idle", "used", "returned"):
        await teach(store, sid)
    await store.create("t", new_meta("empty"))
    raw.hset("imprint:{t/used}:meta", "updated", raw.time()[0] - 50)
    await store.archive.archive("t", "returned")
    await store.load("t", "returned")
    assert [counts async for counts in store.archive.archive_idle(100)] == [{"done": 1, "active": 2, "empty": 1}]
    assert [counts async for counts in store.archive.archive_idle(100)] == [{"archived": 1, "active": 2, "empty": 1}]
    assert await store.archive.take_turn("one", 10) and await store.archive.take_turn("one", 10)
    assert not await store.archive.take_turn("two", 10)


async def test_the_background_work_sweeps_also_where_nothing_is_idle(store: RedisStore, raw: Any, folder: Path) -> None:
    await teach(store)
    await store.archive.archive("t", "s")
    raw.delete("imprint:{t/s}:meta")
    os.utime(files(folder)[0], (0, 0))
    work = asyncio.create_task(archiving.archive_idle(store.archive, 0, Metrics(), "one"))
    async with asyncio.timeout(60):
        while files(folder):
            await asyncio.sleep(0.01)
    work.cancel()


async def test_the_background_work_goes_on_after_a_failure(
    store: RedisStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that fails holds the right to look for idle sessions, and does not wait for itself."""

    async def fail(idle_s: float) -> AsyncIterator[Counter[str]]:
        monkeypatch.undo()
        raise OSError("of a kind that nobody has foreseen")
        yield

    await teach(store)
    monkeypatch.setattr(store.archive, "archive_idle", fail)
    metrics = Metrics()
    work = asyncio.create_task(
        keep_running("archive_idle", partial(archiving.archive_idle, store.archive, 1, metrics, "one"), metrics)
    )
    async with asyncio.timeout(60):
        while not files(folder):
            await asyncio.sleep(0.01)
    work.cancel()


async def test_a_folder_that_goes_during_a_writing_is_an_archive_that_is_away(
    store: RedisStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sync(file: Path, root: Path, real: Callable[[Path, Path], None] = objects._sync) -> None:
        folder.rename(folder.with_name("moved"))
        real(file, root)

    await teach(store)
    monkeypatch.setattr(objects, "_sync", sync)
    with pytest.raises(ArchiveUnavailable):
        await store.archive.archive("t", "s")
    folder.with_name("moved").rename(folder)
    await assert_whole(store, "s", 3)
