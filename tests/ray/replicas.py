"""Replicas on Ray that say in `x-replica` which of them has answered, for the tests of `service.ray`."""

from __future__ import annotations

from typing import Any

from ray import serve
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.ray import Replica


class NamedReplica(Replica):
    """A replica that adds its id to each answer."""

    def __serve_build_asgi_app__(self) -> ASGIApp:
        inner, name = super().__serve_build_asgi_app__(), serve.get_replica_context().replica_id.unique_id

        async def named(scope: Scope, receive: Receive, send: Send) -> None:
            async def send_named(message: Message) -> Any:
                if message["type"] == "http.response.start":
                    rank = serve.get_replica_context().rank.rank
                    message["headers"] = [
                        *message["headers"],
                        (b"x-replica", name.encode()),
                        (b"x-rank", str(rank).encode()),
                    ]
                await send(message)

            await inner(scope, receive, send_named)

        return named
