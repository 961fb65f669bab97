"""The middleware, one job a class, from the outermost to the innermost.

The middleware is pure ASGI: streams stay streams, and a client that disconnects is noticed.
"""

import asyncio
import re
import time
import uuid
from abc import ABC, abstractmethod
from collections import Counter
from contextlib import suppress

from fastapi import Request
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import PayloadTooLarge, RateLimited, StoreUnavailable, Unauthorized, Unavailable
from service.http.error_responses import error_response
from service.http.routes import page
from service.metrics import Metrics
from service.tenants import OPERATOR, ApiKeys, Tenant
from service.turns.sessions import Sessions

CLIENT_GONE = 499  # nginx's status for a client that disconnected; only the metrics see the status
PUBLIC_PATHS = {"/livez", "/readyz", "/openapi.json", *page.FILES}  # paths whose answers are the same for everybody
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
    """Gives the request its id: the client's own `X-Request-Id` where that id is fit for logs, else a new one."""

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if SAFE_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        await self._app(scope, receive, send_with_id)


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

        is_api = scope["path"].startswith("/v1/")
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
        given = Headers(scope=scope).getlist("authorization")
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


class BodyLimitMiddleware(HttpMiddleware):
    """Refuses a body of more than `limit` bytes, whether the length is declared or the body comes in chunks."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        super().__init__(app)
        self._limit = limit

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self._limit:
            response = await error_response(Request(scope), self._too_large(f"{declared} bytes"))
            await response(scope, receive, send)
            return
        size = 0

        async def receive_limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._limit:
                raise self._too_large("more")
            return message

        await self._app(scope, receive_limited, send)

    def _too_large(self, got: str) -> PayloadTooLarge:
        return PayloadTooLarge(f"The body may have at most {self._limit} bytes, got {got}.")
