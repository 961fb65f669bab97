"""Fixtures for all tests: a tiny random base on disk, servers that run it, and the real default base."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import platformdirs
import pytest

from service.base_cache import resolve_base, resolve_encoder
from tests.forked import ForkedImprint
from tests.tiny import build_tiny_base

START_TIMEOUT_S = 300.0  # generous: the machine may be busy


class Server:
    """An `imprint serve` in a process of its own."""

    def __init__(self, model: str, data_dir: Path, **settings: object) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.model = Path(model).name
        self.data_dir = data_dir
        self.log = data_dir.parent / f"{data_dir.name}.log"
        # One thread: a tiny base gains nothing from more, and a test's own work needs the other core.
        variables = {"MODEL": model, "PORT": port, "DATA_DIR": data_dir, "THREADS": 1, "RECALL_ENCODER": "none"}
        variables |= {name.upper(): value for name, value in settings.items()}
        clean = {name: value for name, value in os.environ.items() if not name.startswith("IMPRINT_")}
        self.settings = {f"IMPRINT_{name}": str(value) for name, value in variables.items()}
        self._environment = clean | self.settings
        self.process: subprocess.Popen[bytes] | ForkedImprint | None = None

    def start(self, *, wait: bool = True, forked: bool = True) -> Server:
        """Start the process, and wait until the server is ready.

        forked: whether the process begins with its modules loaded, which saves most of the work of a start.
        """
        with self.log.open("ab") as log:
            if forked:
                self.process = ForkedImprint(["serve"], self._environment, stdout=self.log, stderr=self.log)
            else:
                command = [sys.executable, "-m", "service", "serve"]
                self.process = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)
        if wait:
            self.wait_until_ready()
        return self

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            assert self.process is not None
            if self.process.poll() is not None:
                break
            try:
                if httpx.get(f"{self.url}/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        self.kill()
        raise AssertionError(f"the server did not become ready:\n{self.log.read_text()}")

    def stop(self, *, timeout: float = START_TIMEOUT_S) -> int:
        """Send SIGTERM, wait for the end, and return the exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def kill(self) -> None:
        """Send SIGKILL to the server; on Linux its store ends with it."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()


@contextmanager
def started(servers: Sequence[Server]) -> Iterator[None]:
    """Start servers side by side, and stop them when the block ends."""
    with ExitStack() as stack:
        for server in servers:
            server.start(wait=False)
            stack.callback(server.stop)
        for server in servers:
            server.wait_until_ready()
        yield


@pytest.fixture(scope="session", autouse=True)
def heeded_ctrl_c() -> None:
    """Heed SIGINT, which tests send: a shell's background jobs ignore it, and hand that down to all that they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def shared_tls() -> Iterator[None]:
    """Let all HTTP clients of the tests share one TLS context: reading the authorities takes longer than most requests.

    No test speaks TLS, but httpx makes a context for each client, and OpenAI's and Anthropic's clients are built on it.
    """
    context = httpx.create_ssl_context()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("httpx._transports.default.create_ssl_context", lambda **settings: context)
        yield


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a base of two layers with random weights."""
    return build_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def base_folder() -> Path:
    """Return the folder of the default base; it is fetched into the user's cache if needed."""
    return resolve_base("smollm2-135m-instruct", user_cache(), progress=print)


@pytest.fixture(scope="session")
def encoder_folder() -> Path:
    """Return the folder of the default sentence encoder; it is fetched into the user's cache if needed."""
    folder = resolve_encoder("default", user_cache(), progress=print)
    assert folder is not None
    return folder


def user_cache() -> Path:
    return Path(os.environ.get("IMPRINT_CACHE_DIR") or platformdirs.user_cache_path("imprint"))


@pytest.fixture(scope="session")
def server(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield a server of the tiny base, shared by all tests that leave it running."""
    running = Server(str(tiny_base), tmp_path_factory.mktemp("server") / "data").start()
    yield running
    assert running.stop() == 0, running.log.read_text()


@pytest.fixture(scope="session")
def real_server(base_folder: Path, encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield a server of the default base and encoder, shared by tests that each use sessions of their own."""
    data_dir = tmp_path_factory.mktemp("real") / "data"
    encoder = str(encoder_folder)
    running = Server("smollm2-135m-instruct", data_dir, cache_dir=base_folder.parent, recall_encoder=encoder).start()
    yield running
    assert running.stop() == 0, running.log.read_text()


@pytest.fixture
def make_server(tiny_base: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Yield a function that makes servers which a test may kill, restart or overload; keywords are settings."""
    servers: list[Server] = []

    def make(name: str = "data", *, model: str | None = None, **settings: object) -> Server:
        servers.append(Server(model or str(tiny_base), tmp_path / name, **settings))
        return servers[-1]

    yield make
    for server in servers:
        if server.process is not None:
            server.stop()
