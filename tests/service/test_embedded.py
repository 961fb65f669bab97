"""The embedded Valkey: committed sessions survive every kill, and no process or socket is left behind."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import psutil
import pytest
from redis import Redis
from redis.exceptions import OutOfMemoryError

from service.errors import StoreUnavailable
from service.store import RowBatch, SessionMeta
from service.store import embedded as embedded_module
from service.store.embedded import COMMAND_LOGS, EmbeddedValkey, StoreError, StoreInUse
from service.store.redis.store import RedisStore

SITES = {"a": 300, "b": 40}


def new_meta(version: int) -> SessionMeta:
    return SessionMeta("s", version, "sha256:0", 0, 0, 0, 1.5, 2.5, 0, 0.0, 0.0, 0, {}, ())


def rows(version: int) -> dict[str, RowBatch]:
    """Return the rows of a version; every byte is the version."""
    return {
        site: RowBatch(np.arange(n, dtype=np.int32), np.full((n, 64), version % 256, np.uint8))
        for site, n in SITES.items()
    }


async def commit(store: RedisStore, version: int) -> None:
    await store.commit("t", new_meta(version), rows(version))


async def stored_version(url: str) -> int:
    """Return the stored version, after a check that all rows are of that version."""
    store = RedisStore.from_url(url)
    loaded = await store.load("t", "s")
    await store.close()
    if loaded is None:
        return 0
    assert {site: len(batch.slots) for site, batch in loaded.sites.items()} == SITES
    for batch in loaded.sites.values():
        assert set(batch.data.ravel()) == {loaded.meta.version % 256}
    return loaded.meta.version


def is_running(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def kill(valkey: EmbeddedValkey) -> None:
    """Kill Valkey with SIGKILL, and wait until the process is gone."""
    assert valkey.pid is not None
    os.kill(valkey.pid, signal.SIGKILL)
    while valkey.alive():
        pass


def socket_of(url: str) -> Path:
    return Path(unquote(url.removeprefix("unix://")))


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    valkey = EmbeddedValkey(tmp_path / "data")
    yield valkey
    valkey.stop()


# --- start and stop ---


def test_it_is_private_and_syncs_each_commit(valkey: EmbeddedValkey, tmp_path: Path) -> None:
    path = socket_of(valkey.start())
    assert valkey.alive()
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert valkey.pid is not None
    assert not [c for c in psutil.Process(valkey.pid).net_connections("inet")]
    # A Ctrl-C in the terminal signals the process group: it must not stop the store before the server.
    assert os.getpgid(valkey.pid) != os.getpgid(0)
    with Redis(unix_socket_path=str(path)) as client:
        config = client.config_get("appendonly", "appendfsync", "save", "aof-load-truncated")
    assert config == {"appendonly": "yes", "appendfsync": "always", "save": "", "aof-load-truncated": "yes"}


async def test_stop_leaves_no_process_and_no_socket(valkey: EmbeddedValkey) -> None:
    url = valkey.start()
    pid = valkey.pid
    assert pid is not None
    store = RedisStore.from_url(url)
    await commit(store, 1)
    await store.close()

    valkey.stop()
    valkey.stop()

    assert not psutil.pid_exists(pid)
    assert not socket_of(url).exists()
    assert valkey.pid is None and not valkey.alive()
    assert valkey.start() == url
    assert await stored_version(url) == 1


@pytest.mark.parametrize("name", ["x" * 120, "a b'\"%41\\{ü}#?"], ids=["long", "odd"])
async def test_any_data_folder_will_do(tmp_path: Path, name: str) -> None:
    valkey = EmbeddedValkey(tmp_path / name)
    url = valkey.start()
    store = RedisStore.from_url(url)
    await commit(store, 1)
    await store.close()
    assert stat.S_IMODE(socket_of(url).parent.stat().st_mode) == 0o700
    assert list((tmp_path / name / "valkey").glob("appendonlydir/*.aof"))
    valkey.stop()
    assert not socket_of(url).exists()


def test_a_folder_that_others_can_enter_gets_no_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        squatted = Path(folder) / f"imprint-{os.getuid()}"
        squatted.mkdir()
        squatted.chmod(0o777)
        with pytest.raises(StoreError, match=f"{squatted} must be a folder that only this user can enter"):
            EmbeddedValkey(tmp_path / ("x" * 120)).start()


def test_the_store_keeps_what_it_has_when_its_bytes_are_used_up(tmp_path: Path) -> None:
    valkey = EmbeddedValkey(tmp_path / "data", max_bytes=16 * 2**20)
    with Redis.from_url(valkey.start()) as client:
        with pytest.raises(OutOfMemoryError):
            for number in range(20):
                client.set(f"k{number}", bytes(2**20))
        assert client.get("k0") == bytes(2**20)
    valkey.stop()


def test_a_second_server_on_the_folder_is_refused(valkey: EmbeddedValkey, tmp_path: Path) -> None:
    valkey.start()
    second = EmbeddedValkey(tmp_path / "data")
    with pytest.raises(StoreInUse, match=f"another Imprint server uses the data folder {tmp_path / 'data'}"):
        second.start()
    second.stop()
    with pytest.raises(StoreInUse):
        valkey.start()
    assert valkey.alive()
    valkey.stop()
    second.start()
    second.stop()


def test_an_unusable_data_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=rf"the data folder {tmp_path / 'file'} can't be used: .*Not a dir"):
        EmbeddedValkey(tmp_path / "file").start()


async def test_a_damaged_file_is_not_served(valkey: EmbeddedValkey) -> None:
    url = valkey.start()
    store = RedisStore.from_url(url)
    await commit(store, 1)
    await store.close()
    valkey.stop()
    aof = aof_of(valkey)
    aof.write_bytes(aof.read_bytes().replace(b"HSET", b"\0\0\0\0", 1))
    with pytest.raises(StoreError, match=r"valkey did not start \(status 1\): .+ See .*valkey\.log"):
        valkey.start()
    assert not valkey.alive()


async def test_start_waits_until_the_data_is_read(valkey: EmbeddedValkey, tmp_path: Path) -> None:
    store = RedisStore.from_url(valkey.start())
    for v in range(1, 6):
        await commit(store, v)
    await store.close()
    valkey.stop()

    class Slow(EmbeddedValkey):
        def _options(self) -> list[str]:
            slowness = "--key-load-delay 10000 --loading-process-events-interval-bytes 1024"
            return [*super()._options(), *slowness.split()]

    slow = Slow(tmp_path / "data")
    url = slow.start()
    assert await stored_version(url) == 5
    slow.stop()


async def test_the_file_is_rewritten_in_time_so_that_what_was_erased_goes(tmp_path: Path) -> None:
    valkey = EmbeddedValkey(tmp_path / "data", rewrite_s=1)
    store = RedisStore.from_url(valkey.start())
    supervision = asyncio.create_task(valkey.supervise())
    await commit(store, 1)
    held = bytes([1] * 64)
    assert held in aof_of(valkey).read_bytes()
    await store.delete("t", "s")
    files = tmp_path / "data" / "valkey" / "appendonlydir"

    def is_gone() -> bool:
        with suppress(FileNotFoundError):  # a rewrite has replaced it
            return not any(held in path.read_bytes() for path in files.iterdir())
        return False

    while not is_gone():
        await asyncio.sleep(0.05)
    valkey.stop()
    await supervision
    await store.close()
    assert await stored_version(valkey.start()) == 0
    valkey.stop()


def test_no_log_of_commands_keeps_what_was_sent(valkey: EmbeddedValkey) -> None:
    with Redis.from_url(valkey.start()) as client:
        for log in COMMAND_LOGS:
            assert client.config_get(log) == {log: "-1"}
        client.set("text", b"x" * 2**21)
        assert client.slowlog_get() == []


# --- kills ---


async def test_what_commit_returned_for_survives_a_kill(valkey: EmbeddedValkey) -> None:
    for v in (1, 2, 3):
        url = valkey.start()
        store = RedisStore.from_url(url)
        await commit(store, v)
        kill(valkey)
        with pytest.raises(StoreUnavailable):
            await store.ping()
        await store.close()
        valkey.stop()
    assert await stored_version(valkey.start()) == 3


async def test_a_kill_between_commits_leaves_the_last_or_the_next(valkey: EmbeddedValkey) -> None:
    version = 0
    for delay_s in (0.01, 0.02, 0.03, 0.05):
        url = valkey.start()
        store = RedisStore.from_url(url)
        acknowledged = await stored_version(url)
        assert acknowledged == version

        async def stream(store: RedisStore = store) -> None:
            nonlocal acknowledged
            while True:
                await commit(store, acknowledged + 1)
                acknowledged += 1

        stream_task = asyncio.create_task(stream())
        while acknowledged == version:
            await asyncio.sleep(0.001)
        await asyncio.sleep(delay_s)
        kill(valkey)
        stream_task.cancel()
        with suppress(asyncio.CancelledError, StoreUnavailable):
            await stream_task
        await store.close()
        valkey.stop()
        version = await stored_version(valkey.start())
        valkey.stop()
        assert version in (acknowledged, acknowledged + 1)
    assert version > 0


async def test_a_commit_cut_anywhere_on_disk_never_happened(valkey: EmbeddedValkey, tmp_path: Path) -> None:
    store = RedisStore.from_url(valkey.start())
    await commit(store, 1)
    first_end = aof_of(valkey).stat().st_size
    await commit(store, 2)
    second_end = aof_of(valkey).stat().st_size
    await store.close()
    valkey.stop()
    rng = np.random.default_rng(0)
    between = rng.integers(first_end + 2, second_end - 1, 4)
    for i, cut in enumerate([first_end + 1, *between, second_end - 1, second_end]):
        copy = EmbeddedValkey(tmp_path / str(i))
        shutil.copytree(tmp_path / "data", tmp_path / str(i))
        os.truncate(aof_of(copy), cut)
        assert await stored_version(copy.start()) == (2 if cut == second_end else 1)
        copy.stop()


def aof_of(valkey: EmbeddedValkey) -> Path:
    """Return the append-only file."""
    (path,) = (valkey._home / "appendonlydir").glob("*.incr.aof")
    return path


# --- an orphan of a killed server ---

SERVER = """
import sys, time
from pathlib import Path
import service.child_process
from service.store.embedded import EmbeddedValkey
service.child_process.with_launcher = list  # as on a system that does not end children with their parent
valkey = EmbeddedValkey(Path(sys.argv[1]))
print(valkey.start(), valkey.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
async def orphan(tmp_path: Path) -> AsyncIterator[int]:
    """Yield the process id of a Valkey that stores version 1 and whose server was killed."""
    command = [sys.executable, "-c", SERVER, str(tmp_path / "data")]
    repository = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url, pid = server.stdout.readline().split()
        store = RedisStore.from_url(url)
        await commit(store, 1)
        await store.close()
        server.kill()
    assert is_running(int(pid))
    yield int(pid)
    with suppress(ProcessLookupError):
        os.kill(int(pid), signal.SIGKILL)


async def test_an_orphan_is_shut_down_and_its_data_kept(valkey: EmbeddedValkey, orphan: int) -> None:
    url = valkey.start()
    assert not is_running(orphan)
    assert valkey.pid != orphan
    assert await stored_version(url) == 1


async def test_an_orphan_that_does_not_react_keeps_the_folder(
    valkey: EmbeddedValkey, orphan: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_module, "STOP_TIMEOUT_S", 0.1)
    os.kill(orphan, signal.SIGSTOP)
    with pytest.raises(StoreInUse, match="left by an earlier server still uses"):
        valkey.start()
    os.kill(orphan, signal.SIGCONT)
    assert await stored_version(valkey.start()) == 1
    assert not is_running(orphan)


async def test_a_stale_socket_is_no_obstacle(valkey: EmbeddedValkey) -> None:
    url = valkey.start()
    valkey.stop()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(socket_of(url)))
    assert valkey.start() == url
    assert await stored_version(url) == 0


# --- supervision ---


async def test_supervise_restarts_valkey_until_stop(valkey: EmbeddedValkey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_module, "WATCH_S", 0.01)
    store = RedisStore.from_url(valkey.start())
    supervisor = asyncio.create_task(valkey.supervise())
    for v in (1, 2, 3):
        await commit(store, v)  # the client stays the same throughout
        killed = valkey.pid
        kill(valkey)
        async with asyncio.timeout(10):
            while valkey.pid == killed or not valkey.alive():
                await asyncio.sleep(0.005)
    loaded = await store.load("t", "s")
    assert loaded is not None and loaded.meta.version == 3
    await store.close()
    valkey.stop()
    await asyncio.wait_for(supervisor, 5)
    assert not valkey.alive()


async def test_supervise_keeps_trying(valkey: EmbeddedValkey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_module, "WATCH_S", 0.01)
    store = RedisStore.from_url(valkey.start())
    await commit(store, 1)
    aof = aof_of(valkey)
    hidden = aof.with_suffix(".hidden")
    supervisor = asyncio.create_task(valkey.supervise())
    aof.rename(hidden)
    kill(valkey)
    while "Unable to obtain the AOF file" not in (valkey._home / "valkey.log").read_text():
        await asyncio.sleep(0.005)
    hidden.rename(aof)
    async with asyncio.timeout(10):
        while True:
            with suppress(StoreUnavailable):
                await store.ping()
                break
            await asyncio.sleep(0.005)
    await commit(store, 2)
    await store.close()
    supervisor.cancel()
