"""The middleware, one job a class, from the outermost to the innermost.

The middleware is pure ASGI: streams stay streams, and a client that disconnects is noticed.
"""

import asyncio
import re
import time
import uuid
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from ipaddress import ip_address

from fastapi import Request
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.concurrency import run_off_loop
from service.errors import (
    BadRequest,
    MisdirectedRequest,
    Overloaded,
    PayloadTooLarge,
    RateLimited,
    StoreUnavailable,
    Unauthorized,
    Unavailable,
    UnsupportedMediaType,
)
from service.http.error_responses import error_response
from service.http.routes import page
from service.metrics import Metrics
from service.tenants import OPERATOR, ApiKeys, Tenant
from service.turns.sessions import Sessions

CLIENT_GONE = 499  # nginx's status for a client that disconnected; only the metrics see the status
PROBES = ("/livez", "/readyz", "/health", "/ping")
PUBLIC_PATHS = {*PROBES, "/version", "/openapi.json", *page.FILES}  # paths whose answers are the same for everybody
# paths of a base URL without /v1
UNVERSIONED = re.compile(r"/(models|policies|embeddings|responses|conversations|(chat/)?completions)(/|$)")
API_PATHS = ("/v1/", "/api/", "/infill", "/completion")
VERSIONED_HEALTH = "/v1/health"  # where clients look that have one base URL for everything
NOSNIFF = (b"x-content-type-options", b"nosniff")
SMALL_BODY_BYTES = 65_536
SAFE_REQUEST_ID = re.compile(r"[A-Za-z0-9._~:@+=/-]{1,128}")


class HttpMiddleware(ABC):
    """Base of the middleware: passes on everything that is no HTTP request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handle = self._handle if scope["type"] == "http" else self._app
        await handle(scope, receive, send)

    @abstractmethod
    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one HTTP request, as an ASGI application does."""


class RequestIdMiddleware(HttpMiddleware):
    """Gives the request its id: the client's own `X-Request-Id` where that id is fit for logs, else a new one.

    No browser may guess the type of an answer.
    """

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if SAFE_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                if all(name != NOSNIFF[0] for name, _ in headers):
                    headers.append(NOSNIFF)
                message["headers"] = headers
            await send(message)

        await self._app(scope, receive, send_with_id)


class BaseUrlMiddleware(HttpMiddleware):
    """Adds the `/v1` that is missing where a client was given the server's address as the base URL of OpenAI's API.

    The probe `/health` answers under `/v1` too.
    """

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if UNVERSIONED.match(scope["path"]):
            scope["path"] = f"/v1{scope['path']}"
        elif scope["path"] == VERSIONED_HEALTH:
            scope["path"] = VERSIONED_HEALTH.removeprefix("/v1")
        await self._app(scope, receive, send)


class MetricsMiddleware(HttpMiddleware):
    """Counts and times the requests. A client that disconnected counts as status 499."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        super().__init__(app)
        self._metrics = metrics

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived = scope["state"]["arrived"] = time.perf_counter()
        status: int | None = None

        async def send_and_note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        is_api = scope["path"].startswith(API_PATHS)
        self._metrics.requests_in_flight.inc(is_api)
        try:
            await self._app(scope, receive, send_and_note_status)
        except ClientDisconnect:
            status = CLIENT_GONE
        finally:
            self._metrics.requests_in_flight.dec(is_api)
            route = getattr(scope.get("route"), "path", "unmatched")
            self._metrics.requests_total.labels(route, str(status or CLIENT_GONE)).inc()
            self._metrics.request_latency_seconds.labels(route).observe(time.perf_counter() - arrived)


class ErrorMiddleware(HttpMiddleware):
    """Answers the errors that no handler has answered, unless the response has begun."""

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def send_and_note_start(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, send_and_note_start)
        except ClientDisconnect:
            raise
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError):
                error = Unavailable("The server ends; whether this request landed is unknown.", code="interrupted")
            response = await error_response(Request(scope), error)
            if not started:
                await response(scope, receive, send)


class AuthMiddleware(HttpMiddleware):
    """Finds the tenant of a request by the API key.

    The key comes in `Authorization`, else in `x-api-key`, as Anthropic's clients send it.
    The middleware stands before the routes: the paths in `PUBLIC_PATHS` need no key, and all others do. `/metrics` has
    a key of its own, because its numbers are of all tenants together.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        super().__init__(app)
        self._keys = keys

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] not in PUBLIC_PATHS:
            scope["state"]["tenant"] = self._tenant(scope)
        await self._app(scope, receive, send)

    def _tenant(self, scope: Scope) -> Tenant:
        headers = Headers(scope=scope)
        given = headers.getlist("authorization") or [f"Bearer {key}" for key in headers.getlist("x-api-key")]
        tenant = self._keys.tenant(given[0] if len(given) == 1 else None)
        if self._keys.required and (tenant.name == OPERATOR) != (scope["path"] == "/metrics"):
            raise Unauthorized(f"/metrics takes a key of {OPERATOR!r}, and all other routes take the other keys.")
        return tenant


class RateLimitMiddleware(HttpMiddleware):
    """Limits the requests that a tenant may have in flight, and reports the tenant's limits in headers."""

    def __init__(self, app: ASGIApp, sessions: Sessions) -> None:
        super().__init__(app)
        self._sessions = sessions
        self._in_flight: Counter[str] = Counter()

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        tenant: Tenant | None = scope["state"].get("tenant")
        if tenant is None:
            await self._app(scope, receive, send)
            return

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *await self._headers(tenant)]
            await send(message)

        limit = tenant.limits.requests
        if limit and self._in_flight[tenant.name] >= limit:
            error = RateLimited(f"The tenant may have {limit} requests in flight and has {limit}; try again later.")
            response = await error_response(Request(scope), error)
            await response(scope, receive, send_with_limits)
            return
        self._in_flight[tenant.name] += 1
        try:
            await self._app(scope, receive, send_with_limits)
        finally:
            self._in_flight[tenant.name] -= 1
            if not self._in_flight[tenant.name]:
                del self._in_flight[tenant.name]

    async def _headers(self, tenant: Tenant) -> list[tuple[bytes, bytes]]:
        """Return OpenAI's `x-ratelimit-*`: `requests` are those in flight, `tokens` are the learned ones."""
        values: dict[str, object] = {}
        if limit := tenant.limits.requests:
            free = limit - self._in_flight[tenant.name]
            values |= {"limit-requests": limit, "remaining-requests": free, "reset-requests": "0s" if free else "1s"}
        if limit := tenant.limits.tokens_per_minute:
            with suppress(StoreUnavailable):
                left, reset = await self._sessions.tokens_left(tenant)
                values |= {"limit-tokens": limit, "remaining-tokens": left, "reset-tokens": f"{reset:.3f}s"}
        return [(f"x-ratelimit-{name}".encode(), str(value).encode()) for name, value in values.items()]


class HostMiddleware(HttpMiddleware):
    """Refuses requests that call the server by another name than its own.

    A page of another site whose name resolves to this machine (DNS rebinding) could otherwise read the sessions of a
    server without keys: to the browser, page and server have one origin.

    Args:
        hosts: the names, in lower case; None allows names of the loopback interface.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None) -> None:
        super().__init__(app)
        self._hosts = hosts

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).getlist("host")
        if scope["path"] not in PROBES and not (len(given) == 1 and self._is_own(given[0])) and given:
            name = given[0][:80]
            raise MisdirectedRequest(f"The server is not called {name!r}; IMPRINT_HOSTS may name it.", param="Host")
        await self._app(scope, receive, send)

    def _is_own(self, host: str) -> bool:
        name = re.sub(r":[0-9]*$", "", host.lower()).strip("[]").rstrip(".")
        if self._hosts is not None:
            return name in self._hosts
        try:
            return ip_address(name).is_loopback
        except ValueError:
            return name == "localhost" or name.endswith(".localhost")


class BodyMiddleware(HttpMiddleware):
    """Takes the whole body of a request before the rest of the server sees the request, decoded if it is compressed.

    A client that sends slowly thus takes nobody's place. All bodies together are bounded; small bodies always fit.

    Args:
        limit: the most bytes of a body, whether its length is declared or it comes in chunks, packed or not.
        total: bytes of all bodies that the server holds, from which on large bodies are refused.
    """

    def __init__(self, app: ASGIApp, limit: int, total: int) -> None:
        super().__init__(app)
        self._limit = limit
        self._total = total
        self._held = 0

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > self._limit:
            raise self._too_large(f"{declared[:20]} bytes")
        encoding = headers.get("content-encoding", "identity").lower()
        if encoding not in ("identity", "gzip", "x-gzip"):
            raise UnsupportedMediaType(
                f"The body may be compressed with gzip, got Content-Encoding {encoding[:80]!r}.",
                param="Content-Encoding",
            )
        held = 0
        try:
            parts = []
            async for part in self._parts(receive):
                held += len(part)
                self._held += len(part)
                if held > self._limit:
                    raise self._too_large("more")
                if held >= SMALL_BODY_BYTES and self._held > self._total:
                    raise Overloaded("The server has no room for a body of this size now.", code="too_many_bytes")
                parts.append(part)
            body = b"".join(parts)
            parts.clear()
            if body and encoding != "identity":
                body = await run_off_loop(len(body), self._unpack, body)
            await self._app(scope, _then_disconnect(body, receive), send)
        finally:
            self._held -= held

    @staticmethod
    async def _parts(receive: Receive) -> AsyncIterator[bytes]:
        """Yield the parts of the body. Raises ClientDisconnect."""
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            yield message.get("body", b"")
            more = message.get("more_body", False)

    def _unpack(self, body: bytes) -> bytes:
        """Return the content of a body in gzip, with no more bytes in memory than the limit."""
        unpacker = zlib.decompressobj(16 + zlib.MAX_WBITS)
        try:
            content = unpacker.decompress(body, self._limit + 1)
        except zlib.error as error:
            raise BadRequest(f"The body is not gzip: {error}.", code="invalid_gzip") from None
        if len(content) > self._limit:
            raise self._too_large("more after unpacking")
        if not unpacker.eof or unpacker.unused_data:
            raise BadRequest("The body is not one whole gzip member.", code="invalid_gzip")
        return content

    def _too_large(self, got: str) -> PayloadTooLarge:
        return PayloadTooLarge(f"The body may have at most {self._limit} bytes, got {got}.")


def _then_disconnect(body: bytes, receive: Receive) -> Receive:
    """Return a channel that gives the whole body first, and then what `receive` gives."""
    pending = [body]

    async def receive_body() -> Message:
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        return await receive()

    return receive_body
