"""Answers that end with their client: work until a disconnect, and streams of server-sent events."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from service.http.error_responses import error_body, report_error

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


class EventStream(Response):
    """A stream of server-sent events; `[DONE]` is the last one. A subclass has other frames around the events.

    An error in the middle of the stream becomes one more event, because the status has been sent. The generator of the
    events is closed, and its turn is committed or rolled back, when the response ends for whatever reason.

    Args:
        request: the request that the stream answers.
        events: yields the text of each event, which `frame` completes.
        headers: headers of the response, in addition to those of every stream.
        on_disconnect: as in `until_disconnect`.
    """

    media_type = "text/event-stream"
    closing = "data: [DONE]\n\n"

    def __init__(
        self,
        request: Request,
        events: AsyncGenerator[str, None],
        *,
        headers: Mapping[str, str],
        on_disconnect: str | None,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]
        self._request = request
        self._events = events
        self._on_disconnect = on_disconnect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await until_disconnect(receive, self._stream(send), self._on_disconnect)

    @staticmethod
    def frame(event: str) -> str:
        """Return an event as it is sent."""
        return f"data: {event}\n\n"

    async def _stream(self, send: Send) -> None:
        async def send_text(text: str, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

        async with aclosing(self._events):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async for event in self._events:
                    await send_text(self.frame(event))
            except Exception as error:
                reported = error_body(self._request, await report_error(self._request, error))
                await send_text(self.frame(json.dumps(reported)))
        await send_text(self.closing, more=False)


class NamedEventStream(EventStream):
    """A stream of events that are named by their `type`."""

    closing = ""

    @staticmethod
    def frame(event: str) -> str:
        kind = event.split('"', 4)[3]  # the type is the first field
        return f"event: {kind}\ndata: {event}\n\n"
