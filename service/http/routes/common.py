"""What the routes share: the gate before every /v1 route, and answers that end when their client goes."""

import asyncio
import hashlib
import json
import logging
import re
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from email.message import Message as MimeHeader
from functools import lru_cache
from typing import Annotated, Any, Protocol, TypeVar, cast

import pydantic_core
from fastapi import Depends, Header, Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from service.errors import BadRequest, EngineError, ImprintError, NotReady, UnsupportedMediaType
from service.http.replies import ErrorReply
from service.metrics import Metrics
from service.turns.idempotency import RequestContext
from service.turns.sessions import Sessions
from service.versions.operations import Versions
from service.versions.views import Views

log = logging.getLogger(__name__)
T = TypeVar("T")

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorReply, "description": "The request can't be honoured; `param` names the field."},
    "5XX": {
        "model": ErrorReply,
        "description": "The server can't answer now; `Retry-After` says when to try again.",
    },
}


def get_sessions(request: Request) -> Sessions:
    """The one `Sessions` of this server."""
    return cast(Sessions, request.app.state.sessions)


def get_metrics(request: Request) -> Metrics:
    """The one `Metrics` of this server."""
    return cast(Metrics, request.app.state.metrics)


# What routes depend on is asynchronous, for FastAPI runs the rest on threads, and depends on nothing else: a hop costs
# a request some 0.1 ms, a dependency half as much.
async def _sessions(request: Request) -> Sessions:
    return get_sessions(request)


async def _versions(request: Request) -> Versions:
    return Versions(get_sessions(request))


async def _views(request: Request) -> Views:
    return Views(get_sessions(request))


async def _metrics(request: Request) -> Metrics:
    return get_metrics(request)


SessionsDep = Annotated[Sessions, Depends(_sessions)]
VersionsDep = Annotated[Versions, Depends(_versions)]
ViewsDep = Annotated[Views, Depends(_views)]
MetricsDep = Annotated[Metrics, Depends(_metrics)]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="A request of this key is learned once; sent again, it is given the same answer.",
    ),
]
IfMatch = Annotated[
    str | None,
    Header(description='Only if the session still has this ETag, as `"v3"`; else 412.', alias="If-Match"),
]


async def get_request_context(request: Request) -> RequestContext:
    """The request as the sessions see it; it stays with the request, whatever becomes of that.

    Raises BadRequest for a key that is none.
    """
    key = request.headers.get("idempotency-key")
    if key is not None and not re.fullmatch(r"[\x20-\x7e]{1,255}", key):
        raise BadRequest(
            f"'Idempotency-Key' must have 1 to 255 printable ASCII characters, got {key[:80]!r}.",
            param="Idempotency-Key",
        )
    retries = request.headers.get("x-stainless-retry-count", "")
    where = f"{request.method} {request.url.path}\n".encode()
    ctx = RequestContext(
        request.state.tenant,
        request_id=request.state.request_id,
        digest=hashlib.sha256(where + await request.body()).hexdigest(),
        key=key,
        attempt=int(retries) if re.fullmatch(r"[0-9]{1,9}", retries) else None,
    )
    request.state.ctx = ctx
    return ctx


def idempotency_headers(request: Request) -> dict[str, str]:
    """What the headers of an answer say about whether its request was, or is to be, repeated."""
    ctx: RequestContext | None = getattr(request.state, "ctx", None)
    if ctx is None or not ctx.committed:
        return {}
    return {"x-should-retry": "false"} | ({"Idempotent-Replayed": "true"} if ctx.replayed else {})


class _JsonRequest(Request):
    """A request whose body has been parsed."""

    parsed: Any = None

    async def json(self) -> Any:
        return self.parsed


class V1Route(APIRoute):
    """A route under /v1: answers only while the server is ready, and parses JSON strictly."""

    takes_json = True

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def gated(request: Request) -> Response:
            _require_ready(get_sessions(request))
            request = _JsonRequest(request.scope, request.receive)
            if (body := await request.body()) and self.takes_json:
                _require_json(request.headers.get("content-type", ""))
                request.parsed = _parse(body)
            return await handle(request)

        return gated


class FileRoute(V1Route):
    """A route under /v1 whose body is a file."""

    takes_json = False


def _require_ready(sessions: Sessions) -> None:
    if sessions.state != "ready":
        raise NotReady(f"The server is {sessions.state}; try again later.", code=sessions.state)


@lru_cache(maxsize=16)
def _require_json(content_type: str) -> None:
    header = MimeHeader()
    header["content-type"] = content_type
    charset = str(header.get_param("charset", "utf-8")).lower()
    if header.get_content_type() != "application/json" or charset not in ("utf-8", "utf8"):
        raise UnsupportedMediaType(
            f"The body must be application/json in UTF-8, got Content-Type {content_type[:80]!r}.",
            param="Content-Type",
        )


def _parse(body: bytes) -> Any:
    """One JSON value from UTF-8, without NaN, lone surrogates and nesting bombs."""
    try:
        return pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise BadRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from None


def report_error(request: Request, error: Exception) -> ImprintError:
    """Counts `error` and says what its client may know; the rest goes to the log under the request's id."""
    if not isinstance(error, ImprintError):
        request_id = request.state.request_id
        log.error("request %s failed", request_id, exc_info=error)
        error = EngineError(
            f"The server failed on this request; its log has more under {request_id}.", code="internal_error"
        )
    get_metrics(request).errors_total.labels(error.code or error.type).inc()
    return error


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T], on_disconnect: str | None = None) -> T:
    """The result of `work`, which is cancelled as soon as the client goes, unless `on_disconnect` is "commit".

    Whatever happens, `work` has ended when this returns. The body must have been read before.

    Raises:
        ClientDisconnect: the client went first.
    """
    if on_disconnect == "commit":
        return await work
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(receive))
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


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


RequestContextDep = Annotated[RequestContext, Depends(get_request_context)]


@dataclass(frozen=True)
class LearningRequest:
    """What every learning route is given beside its body: the request, the call that it is, and its `If-Match`."""

    request: Request
    response: Response
    ctx: RequestContext
    if_match: str | None

    def set_etag(self, version: int) -> None:
        """Puts the version that it led to, and whether it was or is to be repeated, on the answer."""
        self.response.headers.update({"ETag": etag(version)} | idempotency_headers(self.request))

    async def run_until_disconnect(self, work: Coroutine[Any, Any, T], on_disconnect: str | None = None) -> T:
        """`until_disconnect` of its client."""
        return await until_disconnect(self.request.receive, work, on_disconnect)


async def get_learning_request(
    request: Request,
    response: Response,
    if_match: IfMatch = None,
    idempotency_key: IdempotencyKey = None,
) -> LearningRequest:
    """The key is read in `get_request_context`; it stands here for the documentation."""
    return LearningRequest(request, response, await get_request_context(request), if_match)


LearningRequestDep = Annotated[LearningRequest, Depends(get_learning_request)]


def etag(version: int) -> str:
    return f'"v{version}"'


class EventWriter(Protocol):
    """Turns the events of a turn into the `data` fields of server-sent events."""

    def opening(self) -> Iterable[str]:
        """What comes before the first event."""

    def chunks(self, event: Any) -> Iterable[str]:
        """What tells of `event`."""


class EventStream(Response):
    """Server-sent events about a turn; the turn is over, or cancelled, when this ends for whatever reason.

    An error in its middle becomes one more event, since the status is long gone. `[DONE]` ends every stream.
    """

    media_type = "text/event-stream"

    def __init__(
        self, request: Request, events: AsyncGenerator[Any, None], writer: EventWriter, on_disconnect: str | None
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers | idempotency_headers(request))
        del self.headers["content-length"]
        self._request = request
        self._events = events
        self._writer = writer
        self._on_disconnect = on_disconnect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await until_disconnect(receive, self._answer(send), self._on_disconnect)

    async def _answer(self, send: Send) -> None:
        async def tell(data: str, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": more})

        async with aclosing(self._events):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                for data in self._writer.opening():
                    await tell(data)
                async for event in self._events:
                    for data in self._writer.chunks(event):
                        await tell(data)
            except Exception as error:
                await tell(json.dumps(report_error(self._request, error).body()))
        await tell("[DONE]", more=False)
