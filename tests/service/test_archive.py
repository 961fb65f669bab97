"""The archive of idle sessions: what goes there comes back whole, whoever races, fails or dies meanwhile."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from service.errors import ArchiveUnavailable, EngineError, StoreFull, StoreUnavailable
from service.store import CommitMetadata
from service.store.objects import Objects
from service.store.redis import archive as archive_module
from service.store.redis.archive import file_name, owner_of
from service.store.redis.backup import back_up, choose_backup, list_backups, prune, restore
from service.store.redis.store import RedisStore
from tests.archive_race import Race, check
from tests.service.archives import assert_whole, content, files, opened, teach
from tests.service.killed_archiver import ARCHIVE_STEPS, BRING_STEPS, run_killed
from tests.service.store_backends import ODD_ID, new_meta, rows, snapshot
from tests.service.valkeys import cluster, free_ports, valkey

RACES = 300


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    (port,) = free_ports(1)
    with valkey(tmp_path_factory.mktemp("redis"), port):
        yield f"redis://127.0.0.1:{port}"


@pytest.fixture
def raw(url: str) -> Iterator[Any]:
    with Redis.from_url(url) as client:
        client.flushall()  # another test's sessions would have other archives
        yield client


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "archive"


@pytest.fixture
async def store(url: str, raw: Any, folder: Path) -> AsyncIterator[RedisStore]:
    async with opened(url, folder) as store:
        yield store


async def test_a_session_comes_back_byte_for_byte(store: RedisStore, raw: Any, folder: Path) -> None:
    await teach(store, ODD_ID)
    await store.responses.put("t", ODD_ID, "r", b"kept", ttl_s=100, created=None)
    await store.ledger.record("t", ODD_ID, num_bytes=384, rate=0, tokens=0)
    before, account = content(raw, "t"), raw.hgetall("imprint:{t}:sessions")
    assert await store.archive.archive("t", ODD_ID) == "done"
    assert await store.archive.archive("t", ODD_ID) == "empty", "it is archived already"
    stub = {key.rpartition(b":")[2] for key in snapshot(raw, "t")}
    assert stub == {b"meta", b"fence", b"onces", b"n1", b"n2", b"n3", b"responses", b"r"}
    assert len(files(folder)) == 1
    assert await store.list("t") == [await store.meta("t", ODD_ID)] and await store.count("t") == 1
    listed = await store.meta("t", ODD_ID)
    assert listed is not None and listed.bytes == new_meta(ODD_ID, 3).bytes and listed.options == new_meta("s").options
    assert raw.hgetall("imprint:{t}:sessions") == account
    assert (await store.begin_turn("t", ODD_ID, write="always", names=["n3"])).record == b"the answer"
    assert await store.archive.stub("t", ODD_ID), "a remembered answer needs no session"
    turn = await store.begin_turn("t", ODD_ID, write="always")
    assert turn.meta == new_meta(ODD_ID, 3) and turn.lease is not None
    assert content(raw, "t") == before
    await store.release(turn.lease)
    await assert_whole(store, ODD_ID, 3)
    await teach(store, ODD_ID, 1)
    await assert_whole(store, ODD_ID, 4)


@pytest.mark.parametrize("use", ["load", "history", "commit"])
async def test_every_use_brings_a_session_back(store: RedisStore, folder: Path, use: str) -> None:
    await teach(store)
    turn = await store.begin_turn("t", "s", write="always")
    assert turn.lease is not None
    await store.release(turn.lease)  # as if the lease had expired: its holder may still commit
    assert await store.archive.archive("t", "s") == "done"
    if use == "commit":
        metadata = CommitMetadata({"kind": "learn"})
        await store.commit("t", new_meta("s", 4), {"a": rows([4], 4)}, lease=turn.lease, commit_metadata=metadata)
    else:
        assert await (store.load("t", "s") if use == "load" else store.history("t", "s", undo=False))
    assert await store.archive.stub("t", "s") is None
    await assert_whole(store, "s", 4 if use == "commit" else 3)


async def test_options_change_without_a_return(store: RedisStore) -> None:
    await teach(store)
    await store.archive.archive("t", "s")
    options: dict[str, str | int | bool] = {"adapt": "predict"}
    assert (await store.configure("t", "s", options)).options == options
    assert (await store.create("t", new_meta("s"))).version == 3
    assert await store.archive.stub("t", "s")
    loaded = await store.load("t", "s")
    assert loaded is not None and loaded.meta.options == options


async def test_only_one_of_many_who_ask_fetches_the_file(url: str, store: RedisStore, folder: Path) -> None:
    await teach(store)
    await store.archive.archive("t", "s")
    async with opened(url, folder) as other:
        loads = (each.load("t", "s") for each in (store, other) for _ in range(10))
        assert all(loaded and loaded.meta.version == 3 for loaded in await asyncio.gather(*loads))
    await assert_whole(store, "s", 3)


async def test_an_erased_session_is_nowhere(store: RedisStore, raw: Any, folder: Path) -> None:
    for sid in ("archived", "returned", "twice"):
        await teach(store, sid)
        await store.archive.archive("t", sid)
    await store.load("t", "returned")
    await store.load("t", "twice")
    assert await store.archive.archive("t", "twice") == "done"
    assert len(files(folder)) == 3, "the file of a session that has come back lingers, and goes at the next archiving"
    for sid in ("archived", "returned", "twice"):
        assert await store.delete("t", sid)
    assert not files(folder)
    assert {key.rpartition(b":")[2] for key in snapshot(raw, "t")} == {b"fence", b"erased"}


async def test_the_file_of_an_expired_session_is_swept(store: RedisStore, raw: Any, folder: Path) -> None:
    await teach(store)
    await teach(store, "other")
    await store.configure("t", "s", {"ttl_s": 1000})
    left = raw.pttl("imprint:{t/s}:meta")
    await store.archive.archive("t", "s")
    await store.archive.archive("t", "other")
    assert 0 < raw.pttl("imprint:{t/s}:meta") <= left, "an archiving is no use of the session"
    raw.delete("imprint:{t/s}:meta")
    assert await store.archive.sweep() == 0, "too young: an archiving may be under way"
    assert await store.archive.sweep(0) == 1 and len(files(folder)) == 1
    await assert_whole(store, "other", 3)


async def test_a_returned_session_keeps_its_time_to_live(store: RedisStore, raw: Any) -> None:
    await teach(store)
    await store.configure("t", "s", {"ttl_s": 1000})
    await store.archive.archive("t", "s")
    await store.load("t", "s")
    keys = [key for key in snapshot(raw, "t") if b":once" not in key and not key.endswith(b"fence")]
    assert all(0 < raw.ttl(key) <= 1000 for key in keys), {key: raw.ttl(key) for key in keys}


async def test_files_linger_for_a_failover_and_are_then_removed(
    store: RedisStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await teach(store)
    await store.archive.archive("t", "s")
    monkeypatch.setattr(archive_module, "LINGER_S", 0.0)
    await store.load("t", "s")
    await store.archive.remove_lingering()
    assert not files(folder)


async def test_stores_that_share_an_archive_leave_each_other_alone(
    store: RedisStore, folder: Path, tmp_path: Path
) -> None:
    await teach(store)
    await store.archive.archive("t", "s")
    (port,) = free_ports(1)
    with valkey(tmp_path / "other", port):
        async with opened(f"redis://127.0.0.1:{port}", folder) as other:
            await teach(other)
            await other.archive.archive("t", "s")
            assert len(files(folder)) == 2
            assert await other.archive.sweep(0) == 0 == await store.archive.sweep(0)
            assert await other.delete("t", "s")
    await assert_whole(store, "s", 3)


@pytest.mark.parametrize("name", ["x/t.../s.....1f.session", "x/t.a/s.b.c.1f.session"])
def test_the_owner_of_a_file(name: str) -> None:
    owner = owner_of(name)
    assert owner is not None and file_name("x", *owner, "1f") == name
    assert ".." not in Path(file_name("x", "..", "..", "1f")).parts
    for other in ("x/imprint.json", "t.a/s.b.1f.session", "x/y/t.a/s.b.1f.session", "x/t.a/b.1f.session", "x/t.a/s.b"):
        assert owner_of(other) is None


# --- failures ---------------------------------------------------------------------------------------------------------


async def test_an_archive_that_is_away_costs_no_session(store: RedisStore, folder: Path) -> None:
    await teach(store)
    await teach(store, "later")
    await store.archive.archive("t", "s")
    away = folder.rename(folder.with_name("away"))
    for call in (store.load("t", "s"), store.begin_turn("t", "s", write="always")):
        with pytest.raises(StoreUnavailable, match="IMPRINT_ARCHIVE_URL") as refused:
            await call
        assert refused.value.code == "archive_unavailable" and refused.value.retry_after
    folder.mkdir()
    with pytest.raises(ArchiveUnavailable, match="mounted"):
        await store.archive.archive("t", "later")
    folder.rmdir()
    folder.write_text("no folder")
    with pytest.raises(StoreUnavailable) as refused:
        await store.archive.archive("t", "later")
    assert refused.value.code == "archive_unavailable"
    await assert_whole(store, "later", 3)
    folder.unlink()
    away.rename(folder)
    await assert_whole(store, "s", 3)
    assert await store.archive.archive("t", "later") == "done"


@pytest.mark.parametrize("damage", ["gone", "changed"])
async def test_a_damaged_file_is_named_and_erased(store: RedisStore, folder: Path, damage: str) -> None:
    await teach(store)
    await store.archive.archive("t", "s")
    (file,) = files(folder)
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.unlink() if damage == "gone" else file.write_bytes(data)
    with pytest.raises(EngineError, match="its file") as refused:
        await store.load("t", "s")
    assert refused.value.code == "damaged_session"
    assert await store.meta("t", "s") is not None
    assert await store.delete("t", "s") and not files(folder)


async def test_a_full_store_archives_and_brings_nothing_back(store: RedisStore, raw: Any) -> None:
    await teach(store)
    await teach(store, "other")
    await store.archive.archive("t", "other")
    raw.config_set("maxmemory", 1)
    try:
        with pytest.raises(StoreFull):
            await store.load("t", "other")
        assert await store.archive.archive("t", "s") == "done"
        assert await store.archive.take_turn("one", 10)
    finally:
        raw.config_set("maxmemory", 0)
    await assert_whole(store, "other", 3)
    await assert_whole(store, "s", 3)


async def test_a_server_without_the_archive_says_so(url: str, store: RedisStore) -> None:
    await teach(store)
    await store.archive.archive("t", "s")
    async with opened(url, None) as other:
        with pytest.raises(StoreUnavailable, match="IMPRINT_ARCHIVE_URL"):
            await other.load("t", "s")
        assert len(await other.list("t")) == 1
    await assert_whole(store, "s", 3)


async def test_a_damaged_session_stays_in_the_store(store: RedisStore, raw: Any, folder: Path) -> None:
    await teach(store)
    page = raw.hkeys("imprint:{t/s}:rows:a")[0]
    raw.hset("imprint:{t/s}:rows:a", page, b"another")
    assert await store.archive.archive("t", "s") == "damaged"
    assert not files(folder) and raw.exists("imprint:{t/s}:undo")


async def test_what_the_archive_does_not_return_is_not_archived(
    store: RedisStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await teach(store)

    async def cut(name: str) -> bytes:
        return b""

    monkeypatch.setattr(store.archive.objects, "get", cut)
    with pytest.raises(StoreUnavailable):
        await store.archive.archive("t", "s")
    assert not files(folder)
    await assert_whole(store, "s", 3)


@pytest.mark.parametrize("step", [*ARCHIVE_STEPS, *BRING_STEPS])
async def test_a_server_that_is_killed_between_two_steps_loses_nothing(
    url: str, store: RedisStore, raw: Any, folder: Path, step: str
) -> None:
    await teach(store)
    if step in BRING_STEPS:
        await store.archive.archive("t", "s")
    run_killed(url, str(folder), step, "t", "s")
    raw.delete("imprint:{t/s}:archiving")  # as if the right had expired
    is_archived = await store.archive.stub("t", "s") is not None
    assert is_archived == (step in ("_archive", "_fetch"))
    await store.archive.sweep(0)
    assert len(files(folder)) == is_archived
    await assert_whole(store, "s", 3)
    assert await store.archive.archive("t", "s") == "done"
    await teach(store, "s", 1)
    await assert_whole(store, "s", 4)


# --- races ------------------------------------------------------------------------------------------------------------


async def begin_and_commit(store: RedisStore) -> str:
    await teach(store, "s", 1)
    return "changed"


async def begin_only(store: RedisStore) -> str:
    await store.begin_turn("t", "s", write="always")
    return "busy"


async def erase(store: RedisStore) -> str:
    await store.delete("t", "s")
    return "late"


async def erase_and_teach(store: RedisStore) -> str:
    await store.delete("t", "s")
    await teach(store, "s", 1)
    return "late"


async def read(store: RedisStore) -> str:
    await store.load("t", "s")
    await store.begin_turn("t", "s", write="never")
    return "done"


async def configure(store: RedisStore) -> str:
    await store.configure("t", "s", {"adapt": "predict"})
    return "done"


@pytest.mark.parametrize("step", ["_read_once", "put", "_write_checked"])
@pytest.mark.parametrize("rival", [begin_and_commit, begin_only, erase, erase_and_teach, read, configure])
async def test_what_happens_between_two_steps_of_an_archiving(
    url: str,
    store: RedisStore,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    rival: Callable[[RedisStore], Awaitable[str]],
) -> None:
    await teach(store)
    expected = []
    async with opened(url, folder) as other:
        await store.archive.folder()  # its `put` is none of the session's
        owner: Any = store.archive.objects if step == "put" else store.archive
        call = getattr(owner, step)

        async def interrupted(*args: Any) -> Any:
            result = await call(*args)
            expected.append(await rival(other))
            return result

        monkeypatch.setattr(owner, step, interrupted)
        assert await store.archive.archive("t", "s") == expected[0]
        monkeypatch.undo()
        assert len(files(folder)) == (expected[0] == "done")
        if rival is erase:
            assert await store.load("t", "s") is None
            return
        loaded = await other.load("t", "s")
        assert loaded is not None
        version = 4 if rival is begin_and_commit else 1 if rival is erase_and_teach else 3
        assert loaded.meta.version == version
        if rival is configure:
            assert loaded.meta.options == {"adapt": "predict"}
        else:
            await assert_whole(store, "s", version)


async def test_turns_that_race_archivings_lose_no_commit(url: str, store: RedisStore, folder: Path) -> None:
    """Servers teach and read sessions while others archive them; what each turn was told is what is stored."""
    race = await Race(url, str(folder), RACES).run()
    assert not await check(url, str(folder), race.told)
    assert race.outcomes["done"] and race.told, race.outcomes


# --- all sessions -----------------------------------------------------------------------------------------------------


async def test_the_sessions_of_a_cluster_are_archived(tmp_path: Path, folder: Path) -> None:
    with cluster(tmp_path) as ports:
        url = "redis+cluster://" + ",".join(f"127.0.0.1:{port}" for port in ports)
        async with opened(url, folder) as store:
            for number in range(6):
                await teach(store, f"s{number}", 2)
            assert [counts async for counts in store.archive.archive_idle(100)] == [{"done": 6}] and len(
                files(folder)
            ) == 6
            assert await store.archive.sweep(0) == 0
            for number in range(6):
                await assert_whole(store, f"s{number}", 2)
            assert await store.archive.sweep(0) == 6


async def test_the_copies_that_a_kept_backup_needs_stay(store: RedisStore, folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "backups"
    target = Objects(str(place))
    await teach(store, "same")
    await teach(store, "changed")
    for _ in range(3):
        await teach(store, "changed", 1)
        await back_up(store.archive, target)
    assert len([*place.rglob("*.copy")]) == 4
    assert await prune(target, 2) == {"backups": 1}, "a copy of today may belong to a backup that is under way"
    for copy in place.rglob("*.copy"):
        os.utime(copy, (0, 0))
    assert await prune(target, 2) == {"copies": 1}
    assert [backup.counts for backup in await list_backups(target)] == [{"copied": 1, "unchanged": 1}] * 2
    for sid in ("same", "changed"):
        await store.delete("t", sid)
    restored = await restore(store.archive, target, await choose_backup(target, None))
    assert restored == {"restored": 2}
    await assert_whole(store, "same", 3)
    await assert_whole(store, "changed", 6)
