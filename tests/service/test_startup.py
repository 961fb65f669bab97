"""A start that fails, and a start that is stopped, end soon, say why in one line, and leave no process behind."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError, ResponseError

from model.base.checkpoint import load_config
from model.memory.initial import default_config, random_memory
from model.memory.memory import save_memory
from service.child_process import spawn
from service.cli.checks import run_checks
from service.settings import Settings
from service.store.embedded import EmbeddedValkey
from tests.conftest import Server
from tests.live import Client, find_valkey, wait_until
from tests.service.small_disk import can_mount, fill, mounted

# A failed start ends within 5 s, and importing takes as long again; the machine of the tests may be ten times slower.
END_TIMEOUT_S = 100.0
NEEDS_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="other systems end no child with its parent")
NEEDS_MOUNT = pytest.mark.skipif(not can_mount(), reason="only root mounts file systems")


def processes_with(text: str) -> list[psutil.Process]:
    """Return the running processes whose command line has the text."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(
            text in word for word in process.info["cmdline"] or ()
        ):
            found.append(process)
    return found


def assert_start_fails(server: Server, words: str) -> None:
    """Start a server that cannot start, and check how the server ends."""
    server.start(wait=False)
    assert server.process is not None
    try:
        code = server.process.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        server.kill()
        pytest.fail(f"the start does not end:\n{server.log.read_text()}")
    lines = [line for line in server.log.read_text().splitlines() if not line.startswith("20")]  # no lines of the log
    assert code == 1
    assert len(lines) == 1, lines
    assert lines[0].startswith("imprint: ") and words in lines[0]
    assert processes_with(str(server.data_dir)) == []


def assert_doctor_fails(server: Server, name: str, words: str) -> None:
    """Check that `imprint doctor` finds the same cause."""
    settings: dict[str, Any] = {key.removeprefix("IMPRINT_").lower(): value for key, value in server.settings.items()}
    findings = {finding.name: finding for finding in run_checks(Settings(**settings))}
    assert findings[name].status == "fail"
    assert words in findings[name].found
    assert findings[name].do


# --- a start that fails ---


def of_another_family(tiny_base: Path, folder: Path) -> Path:
    shutil.copytree(tiny_base, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def cut_off(tiny_base: Path, folder: Path) -> Path:
    shutil.copytree(tiny_base, folder)
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    return folder


def damaged_gguf(tiny_base: Path, folder: Path) -> Path:
    path = folder.with_suffix(".gguf")
    path.write_bytes(b"GGUF" + bytes(3000))
    return path


def missing(tiny_base: Path, folder: Path) -> Path:
    return folder


@pytest.mark.parametrize(
    ("make_base", "words"),
    [
        (missing, "model must be"),
        (of_another_family, "MambaForCausalLM"),
        (cut_off, "model.safetensors: damaged"),
        (damaged_gguf, "damaged or not GGUF"),
    ],
)
def test_a_base_that_cannot_be_loaded_ends_the_start(
    make_server: Callable[..., Any], tiny_base: Path, tmp_path: Path, make_base: Callable[..., Path], words: str
) -> None:
    model = make_base(tiny_base, tmp_path / "broken")
    server = make_server(model=str(model), cache_dir=tmp_path / "cache")
    assert_start_fails(server, words)
    assert_doctor_fails(server, "model", words)


@pytest.mark.parametrize("setting", ["memory", "policies"])
def test_a_checkpoint_that_cannot_be_read_ends_the_start(
    make_server: Callable[..., Any], tmp_path: Path, setting: str
) -> None:
    (tmp_path / "damaged").write_bytes(bytes(100))
    server = make_server(**{setting: tmp_path / "damaged"})
    assert_start_fails(server, "damaged")
    assert_doctor_fails(server, setting, "damaged")


def test_a_reading_prefix_that_cannot_be_read_ends_the_start(
    make_server: Callable[..., Any], tiny_base: Path, tmp_path: Path
) -> None:
    memory = tmp_path / "memory.safetensors"
    save_memory(random_memory(default_config(load_config(tiny_base).hidden_size), seed=0), memory)
    (tmp_path / "memory.reading.safetensors").write_bytes(b"damaged")
    server = make_server(memory=memory, recall_tokens=256)
    assert_start_fails(server, "memory.reading.safetensors: is no reading prefix")
    assert_doctor_fails(server, "memory", "is no reading prefix")


def test_a_port_in_use_ends_the_start(make_server: Callable[..., Any]) -> None:
    server = make_server()
    port = int(server.settings["IMPRINT_PORT"])
    with socket.create_server(("127.0.0.1", port)):
        assert_start_fails(server, f"cannot listen on 127.0.0.1:{port}")
        assert_doctor_fails(server, "port", str(port))


@pytest.mark.parametrize("name", ["data", "data/valkey", "data/valkey/valkey.log"])
def test_a_file_where_a_folder_is_wanted_ends_the_start(
    make_server: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    """The last case is the reverse: a folder where a file is wanted."""
    server = make_server()
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if name.endswith(".log") else path.touch()
    assert_start_fails(server, str(tmp_path / "data"))
    if name == "data":
        assert_doctor_fails(server, "disk", "is not a folder")


def test_a_data_folder_in_use_ends_the_start(make_server: Callable[..., Any]) -> None:
    first, second = make_server().start(), make_server()
    assert first.process is not None
    second.start(wait=False)
    assert second.process is not None and second.process.wait(END_TIMEOUT_S) == 1
    assert f"imprint: another Imprint server uses the data folder {second.data_dir}\n" in second.log.read_text()
    assert_doctor_fails(second, "store", "another Imprint server uses")
    assert first.process.poll() is None


@NEEDS_MOUNT
def test_a_read_only_folder_ends_the_start(make_server: Callable[..., Any], tmp_path: Path) -> None:
    with mounted(tmp_path / "mount", "-o", "ro") as folder:
        server = make_server("mount/data")
        server.log = tmp_path / "log"
        assert_start_fails(server, f"Read-only file system: {folder / 'data'}")
        assert_doctor_fails(server, "disk", "read-only")


@NEEDS_MOUNT
def test_a_full_disk_ends_a_first_start(make_server: Callable[..., Any], tmp_path: Path) -> None:
    with mounted(tmp_path / "mount", "-o", "size=1m") as folder:
        fill(folder)
        server = make_server("mount/data")
        server.log = tmp_path / "log"
        assert_start_fails(server, str(folder / "data"))
        assert "full" in server.log.read_text() or "No space left" in server.log.read_text()
        assert_doctor_fails(server, "disk", "free for")


# --- a start that is stopped ---


def while_python_loads_modules(server: Server) -> None:
    server.start(wait=False, forked=False)
    time.sleep(0.1)


def while_torch_is_loaded(server: Server) -> None:
    server.start(wait=False, forked=False)
    assert server.process is not None
    process = psutil.Process(server.process.pid)
    wait_until(lambda: any("libtorch" in file.path for file in process.memory_maps()))


def while_the_store_starts(server: Server) -> None:
    server.start(wait=False)
    wait_until(lambda: find_valkey(server.data_dir) is not None)


def while_the_model_is_loaded(server: Server) -> None:
    server.start(wait=False)
    with Client(server.url) as client:
        wait_until(lambda: client.readiness() == "loading")


def once_the_model_is_loaded(server: Server) -> None:
    server.start(wait=False)
    wait_until(lambda: ": loaded " in server.log.read_text())


INSTANTS = [
    while_python_loads_modules,
    while_torch_is_loaded,
    while_the_store_starts,
    while_the_model_is_loaded,
    once_the_model_is_loaded,
]


@pytest.mark.parametrize("start_until", INSTANTS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_start_at_any_instant(
    make_server: Callable[..., Any], number: signal.Signals, start_until: Callable[[Server], None]
) -> None:
    server = make_server()
    start_until(server)
    server.process.send_signal(number)
    # Before Python has begun, a signal ends the process by itself; while Python loads modules, it is an exception.
    early = (-number, 128 + number, 1) if start_until is while_python_loads_modules else ()
    assert server.process.wait(END_TIMEOUT_S) in (0, *early)
    wait_until(lambda: processes_with(str(server.data_dir)) == [])


def test_a_signal_ends_a_start_that_waits_for_its_store(make_server: Callable[..., Any]) -> None:
    server = make_server()
    (server.data_dir / "valkey").mkdir(parents=True)
    with (server.data_dir / "valkey" / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        server.start(wait=False)
        assert server.process is not None
        wait_until(lambda: "shutting down the valkey" in server.log.read_text())
        server.process.terminate()
        assert server.process.wait(END_TIMEOUT_S) == 0
    assert "stopped before the server was ready" in server.log.read_text()
    assert processes_with(str(server.data_dir)) == []


# --- children ---


@NEEDS_LINUX
def test_the_store_ends_with_a_killed_server(make_server: Callable[..., Any]) -> None:
    server = make_server().start()
    with Client(server.url) as client:
        client.observe("alice", "text")
    server.kill()
    wait_until(lambda: find_valkey(server.data_dir) is None)


@NEEDS_LINUX
def test_the_store_ends_with_a_killed_server_after_it_was_restarted(make_server: Callable[..., Any]) -> None:
    server = make_server().start()
    valkey = find_valkey(server.data_dir)
    assert valkey is not None
    valkey.kill()
    wait_until(lambda: (again := find_valkey(server.data_dir)) is not None and again.pid != valkey.pid)
    with Client(server.url) as client:
        wait_until(lambda: client.post("sessions/alice/observe", {"text": "text"}).status_code == 200)
    server.kill()
    wait_until(lambda: find_valkey(server.data_dir) is None)


PARENT = """
import subprocess, sys, time
from service.child_process import spawn
child = spawn(["sleep", "600"], stdin=subprocess.DEVNULL)
print(child.pid, flush=True)
time.sleep(600)
"""


@NEEDS_LINUX
def test_any_child_ends_with_its_killed_parent() -> None:
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_a_child_gets_its_arguments_files_and_exit_status() -> None:
    with spawn([sys.executable, "-c", "import sys; print(sys.argv[1:]); sys.exit(3)", "a b", ""], stdout=-1) as child:
        output, _ = child.communicate()
    assert (output, child.returncode) == (b"['a b', '']\n", 3)


# --- a full disk ---


@NEEDS_MOUNT
def test_a_full_disk_leaves_reading_alone(make_server: Callable[..., Any], tmp_path: Path) -> None:
    """The disk fills up while the server learns; the server is also started on the full disk."""
    with mounted(tmp_path / "mount", "-o", "size=32m") as folder:
        server = make_server("mount/data", session_ttl_s=3600)
        server.log = tmp_path / "log"
        server.start()
        with Client(server.url) as client:
            before = client.observe("alice", "The quick brown fox.")["version"]
            filler = fill(folder)
            for _ in range(2):
                assert_only_reading(client, before)
                server.stop()
                server.start()
            filler.unlink()
            wait_until(lambda: client.post("sessions/alice/observe", {"text": "And the dog."}).status_code == 200)
            wait_until(lambda: client.http.get("/readyz").json() == {"status": "ready", "store": "ok"})
            assert client.version("alice") == before + 1
            wait_until(lambda: client.metric("store_writable") == 1)


def assert_only_reading(client: Client, version: int) -> None:
    wait_until(lambda: client.http.get("/readyz").json() == {"status": "ready", "store": "read_only"})
    assert client.metric("store_writable") == 0
    for _ in range(5):
        refused = client.post("sessions/alice/observe", {"text": "And the dog."})
        assert refused.status_code == 503, refused.text
        for _ in range(4):
            assert client.session("alice")["version"] == version
            assert client.score("alice", "The quick brown fox.")["tokens"]
        assert client.complete(session="alice", adapt="predict")["usage"]["completion_tokens"] > 0
        assert client.http.get("/v1/sessions/alice/export").status_code == 200


@contextmanager
def file_size_limit(num_bytes: int, *processes: psutil.Process) -> Iterator[None]:
    """Limit the size of files for this process, its later children and some processes."""
    every = [psutil.Process(), *processes]
    before = [process.rlimit(psutil.RLIMIT_FSIZE) for process in every]
    for process, (_, hard) in zip(every, before, strict=True):
        process.rlimit(psutil.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        psutil.Process().rlimit(psutil.RLIMIT_FSIZE, before[0])


@NEEDS_LINUX
async def test_a_write_that_fails_costs_one_restart_and_no_read_after_it(tmp_path: Path) -> None:
    """Valkey exits at a write that fails. A limit on the size of files makes the write fail, as a quota would."""
    valkey = EmbeddedValkey(tmp_path / "data")
    client = Redis.from_url(valkey.start())
    supervisor = asyncio.create_task(valkey.supervise())
    size = 2**20
    await client.set("kept", bytes(size))
    with file_size_limit(size + 1000, psutil.Process(valkey.pid)):
        with pytest.raises(ConnectionError):
            await client.set("lost", bytes(size))
        await answers(client)
        statuses = [valkey.status]
        restarted = valkey.pid
        for _ in range(30):
            with pytest.raises(ResponseError, match="NOREPLICAS"):
                await client.set("lost", b"")
            assert await client.get("kept") == bytes(size)
            await asyncio.sleep(0.1)
        assert valkey.pid == restarted
    async with asyncio.timeout(END_TIMEOUT_S):
        while (status := valkey.status) != "ok":
            statuses.append(status)
            await asyncio.sleep(0.05)
    assert "ok" not in statuses
    assert await client.get("kept") == bytes(size)
    await client.set("new", b"")
    await client.aclose()
    supervisor.cancel()
    valkey.stop()


async def answers(client: Redis) -> None:
    """Wait until the server answers."""
    async with asyncio.timeout(END_TIMEOUT_S):
        while True:
            with suppress(ConnectionError):
                await client.ping()
                return
            await asyncio.sleep(0.02)
