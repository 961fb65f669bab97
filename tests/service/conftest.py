"""The stores that the contract suite runs on, as fixtures."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator

import pytest

from service.store.embedded import EmbeddedValkey
from tests.service.store_backends import BACKENDS, MemoryBackend, StoreBackend, ValkeyBackend


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
