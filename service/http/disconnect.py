"""Cancelling the work for a client that disconnects."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

log = logging.getLogger(__name__)
T = TypeVar("T")


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T], on_disconnect: str | None = None) -> T:
    """Return the result of `work`, and cancel `work` as soon as the client disconnects.

    The body of the request must have been read before. `work` has ended when this function returns or raises.

    Args:
        receive: the ASGI channel from the client.
        work: the coroutine to run.
        on_disconnect: "commit" lets `work` run to its end without a client; anything else cancels `work`.

    Raises:
        ClientDisconnect: the client disconnected before `work` was done.
    """
    if on_disconnect == "commit":
        return await work
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_wait_for_disconnect(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        watcher.cancel()
        if task.cancel():
            await asyncio.wait((task,))
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("cancelling a turn failed", exc_info=error)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
