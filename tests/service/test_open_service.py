"""A service without sockets and signals, mounted by whoever has its own: here by httpx, in the test's process."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from redis import Redis

from service.model_loading import StartError
from service.settings import Settings
from service.wiring import Service, open_service
from tests.service.valkeys import free_ports, valkey


def client_of(service: Service) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(service.app), base_url="http://localhost", timeout=60)


async def test_a_service_answers_learns_drains_and_keeps_its_sessions(tiny_base: Path, tmp_path: Path) -> None:
    settings = Settings(model=str(tiny_base), data_dir=tmp_path, recall_encoder="none", threads=1)
    async with open_service(settings) as service, client_of(service) as client:
        assert (await client.get("/livez")).status_code == 200
        await service.start()
        assert (await client.get("/readyz")).status_code == 200
        learned = await client.post("/v1/sessions/ada/observe", json={"text": "The fox sleeps at noon."})
        assert learned.json()["version"] == 1
        await service.drain(5.0)
        late = await client.post("/v1/sessions/ada/observe", json={"text": "The fox wakes."})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
    async with open_service(settings) as service, client_of(service) as client:
        await service.start()
        assert (await client.get("/v1/sessions/ada")).json()["version"] == 1


async def test_a_service_fails_as_a_server_does(tiny_base: Path, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with valkey(tmp_path / "valkey", port, "--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"):
        assert Redis(port=port).ping()
        settings = Settings(model=str(tmp_path / "none"), redis_url=f"redis://127.0.0.1:{port}", threads=1)
        async with open_service(settings) as service:
            with pytest.raises(StartError, match="evict"):
                await service.wait_failed()
            with pytest.raises(Exception, match="none"):
                await service.start()
