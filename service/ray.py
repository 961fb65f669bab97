"""The service on Ray Serve: a replica mounts the web application, and a session's requests go to one replica.

`serve deploy deploy/ray/serve.yaml` starts it. The extra `ray` has what this module needs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter, _hash_bytes
from starlette.types import ASGIApp, Receive, Scope, Send

from service.client.operations import SESSION_HEADER
from service.model_loading import StartError
from service.settings import Settings
from service.wiring import open_service

HEADER_VARIABLE = "RAY_SERVE_SESSION_ID_HEADER_KEY"  # names the header by which Ray's proxies know a session
RANKS_EVERY_S = 1.0  # between two looks of the routers for the ranks of replicas


class SessionRouter(ConsistentHashRouter):  # type: ignore[misc]
    """Sends the requests of a session to one replica, by consistent hashing of the ranks of replicas.

    Ray's own router hashes the ids of replicas, which are new after each deployment, so that every session moves. A
    rank is taken again by the replica that takes the place of another.
    """

    def update_replicas(self, replicas: list[Any]) -> None:
        """Take over which replicas run, and build the ring anew if replicas or ranks have changed."""
        super().update_replicas(replicas)
        if self._names() != getattr(self, "_names_in_ring", None):
            self._rebuild_ring(frozenset(self._replica_id_set))

    def _rebuild_ring(self, new_snapshot: frozenset[Any]) -> None:
        names = self._names()
        places = [
            (_hash_bytes(f"{names[replica]}:{number}".encode()), names[replica], replica)
            for replica in new_snapshot
            for number in range(self._num_virtual_nodes)
        ]
        places.sort(key=lambda place: place[:2])
        self._ring_hashes, self._ring_replicas = [place[0] for place in places], [place[2] for place in places]
        self._replica_set_snapshot, self._names_in_ring = new_snapshot, names

    def _names(self) -> dict[Any, str]:
        """Return the name of each replica in the ring: its rank, or its id until the rank is known."""
        return {
            replica_id: str(replica.routing_stats.get("rank", replica_id.unique_id))
            for replica_id, replica in self._replicas.items()
        }


class Replica:
    """A replica of the service, ready when its model is loaded. Ray mounts the application that it builds.

    settings: by their names without IMPRINT_, beside those of the environment (docs/settings.md)
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = Settings.load(**settings)
        if self._settings.redis_url is None:
            raise StartError("IMPRINT_REDIS_URL is needed with Ray, since all replicas have the same sessions")
        if (header := os.environ.get(HEADER_VARIABLE, "")).lower() != SESSION_HEADER.lower():
            raise StartError(f"{HEADER_VARIABLE} must be {SESSION_HEADER} on every node, got {header!r}")
        self._app: ASGIApp | None = None

    def record_routing_stats(self) -> dict[str, int]:
        """Return the rank of this replica, which the routers hash."""
        return {"rank": serve.get_replica_context().rank.rank}

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the application, which opens the service when Ray starts it, and drains when Ray ends it."""

        async def mounted(scope: Scope, receive: Receive, send: Send) -> None:  # uvicorn takes a method for ASGI 2
            if scope["type"] == "lifespan":
                await self._run(receive, send)
            elif self._app is not None:
                await self._app(scope, receive, send)

        return mounted

    async def _run(self, receive: Receive, send: Send) -> None:
        """Open the service, and keep it open until Ray ends the replica: the life of an ASGI application."""
        await receive()
        async with open_service(self._settings) as service:
            await service.start()
            self._app = service.app
            await send(_message("lifespan.startup.complete"))
            await receive()
            await service.drain(self._settings.drain_timeout_s)
        await send(_message("lifespan.shutdown.complete"))


def deployment_of(replica: type[Replica]) -> serve.Deployment:
    """Return the Serve deployment of a class of replicas."""
    router = RequestRouterConfig(
        request_router_class=f"{SessionRouter.__module__}:{SessionRouter.__qualname__}",
        request_routing_stats_period_s=RANKS_EVERY_S,
    )
    deployed: serve.Deployment = serve.deployment(name="imprint", request_router_config=router)(
        serve.ingress()(replica)
    )
    return deployed


def app(settings: dict[str, Any]) -> serve.Application:
    """Return the application that a Serve config names: `import_path: service.ray:app`, and settings as `args`."""
    return deployment_of(Replica).bind(settings)


def _message(kind: str) -> MutableMapping[str, Any]:
    return {"type": kind}
