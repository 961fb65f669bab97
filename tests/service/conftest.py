"""Fixtures for the tests of the service: the stores of the contract suite, and a server in this process."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from model.base.config import tiny_config
from service.store.embedded import EmbeddedValkey
from tests.live import Client
from tests.service.in_process import InProcessServer
from tests.service.store_backends import BACKENDS, MemoryBackend, StoreBackend, ValkeyBackend
from tests.tiny import build_tiny_base


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    valkey = EmbeddedValkey(tmp_path_factory.mktemp("contract"))
    yield valkey.start()
    valkey.stop()


@pytest.fixture(params=BACKENDS)
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[StoreBackend]:
    """Each kind of store in turn."""
    backend: StoreBackend
    backend = MemoryBackend() if request.param == "memory" else ValkeyBackend(request.getfixturevalue("valkey_url"))
    yield backend
    await backend.close()


@pytest.fixture
def tenant() -> str:
    return uuid.uuid4().hex


@pytest.fixture(scope="session")
def memory_server(tiny_base: Path) -> Iterator[InProcessServer]:
    """Yield a server of the tiny base in this process, with its sessions in memory; tests share it."""
    server = InProcessServer(tiny_base)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def roomy_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessServer]:
    """Yield a server like `memory_server` of a tiny base with room for tools in its context."""
    base = build_tiny_base(tmp_path_factory.mktemp("roomy") / "tiny", tiny_config(max_context=2048))
    server = InProcessServer(base)
    yield server
    server.stop()


@pytest.fixture
def client(request: pytest.FixtureRequest) -> Iterator[Client]:
    """Yield a client of the real `server` for a test that asks for that server, else of the one in this process."""
    name = "server" if "server" in request.fixturenames else "memory_server"
    server: Any = request.getfixturevalue(name)
    with Client(server.url, server.model) as client:
        yield client
