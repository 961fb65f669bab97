"""The edge of the server: request ids, the size limit, and every error in OpenAI's shape.

The middleware is pure ASGI, so streams stay streams and a client that goes is noticed.
"""

import asyncio
import json
import math
import re
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import (
    BadRequest,
    ImprintError,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    RateLimited,
    StoreUnavailable,
    Unauthorized,
    Unavailable,
)
from service.http.openapi_examples import document_examples
from service.http.routes import openai, ops, page, policies
from service.http.routes import sessions as session_routes
from service.http.routes.common import idempotency_headers, report_error
from service.metrics import Metrics
from service.settings import Settings
from service.tenants import OPERATOR, ApiKeys, Tenant
from service.turns.sessions import Sessions

ROUTERS = (
    openai.router,
    session_routes.router,
    session_routes.files,
    policies.router,
    ops.router,
    page.router,
)
CLIENT_GONE = 499  # nginx's status for it; the client itself never sees it
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
PUBLIC_PATHS = {"/livez", "/readyz", "/openapi.json", *page.FILES}  # what is the same for everybody
SAFE_REQUEST_ID = re.compile(r"[A-Za-z0-9._~:@+=/-]{1,128}")
NON_RETRYABLE = (409, 507)  # statuses that OpenAI's client would retry, to no avail
MAX_SHOWN_CHARS = 80  # characters of a client's own words that an error repeats


def install(app: FastAPI, *, sessions: Sessions, metrics: Metrics, settings: Settings, keys: ApiKeys) -> None:
    """Makes `app` serve `sessions`: the routes, what turns errors into answers, and the middleware."""
    app.state.sessions = sessions
    app.state.metrics = metrics
    metrics.ready_state.set_function(lambda: sessions.state == "ready")
    app.router.redirect_slashes = False
    for router in ROUTERS:
        app.include_router(router)
    document_examples(app)
    if keys.required:
        document_api_keys(app)
    app.add_exception_handler(ImprintError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(404, _answer_no_route)
    app.add_exception_handler(405, _answer_wrong_method)
    app.add_middleware(BodyLimitMiddleware, limit=settings.max_body_bytes)
    app.add_middleware(AuthMiddleware, keys=keys, sessions=sessions)
    app.add_middleware(RequestMiddleware, metrics=metrics)


class RequestMiddleware:
    """The outermost layer: gives the request its id, measures it, and answers what nobody else has caught."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrived = time.perf_counter()
        request_id = _request_id(Headers(scope=scope).get("x-request-id", ""))
        scope.setdefault("state", {}).update(request_id=request_id, arrived=arrived)
        status: int | None = None

        async def send_identified(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        counted = scope["path"].startswith("/v1/")
        self._metrics.requests_in_flight.inc(counted)
        try:
            await self._app(scope, receive, send_identified)
        except ClientDisconnect:
            status = CLIENT_GONE
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError):
                error = Unavailable("The server ends; whether this request landed is unknown.", code="interrupted")
            response = await _answer_error(Request(scope), error)
            if status is None:
                await response(scope, receive, send_identified)
        finally:
            self._metrics.requests_in_flight.dec(counted)
            route = getattr(scope.get("route"), "path", "unmatched")
            self._metrics.requests_total.labels(route, str(status or CLIENT_GONE)).inc()
            self._metrics.request_latency_seconds.labels(route).observe(time.perf_counter() - arrived)


def _request_id(given: str) -> str:
    """The client's own id where it is fit for logs, else a new one."""
    return given if SAFE_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


class AuthMiddleware:
    """Tells whose request it is by its API key, and holds tenants to the requests they may have in flight.

    It stands before the routes, so that what needs no key is what `PUBLIC_PATHS` names, and nothing else. `/metrics`
    tells of all tenants together, so none of them may read it: it has a key of its own.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, sessions: Sessions) -> None:
        self._app = app
        self._keys = keys
        self._sessions = sessions
        self._in_flight: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PUBLIC_PATHS:
            await self._app(scope, receive, send)
            return
        tenant = self._tenant(scope)
        scope["state"]["tenant"] = tenant
        limit = tenant.limits.requests

        async def send_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *await self._headers(tenant)]
            await send(message)

        refused = limit and self._in_flight[tenant.name] >= limit
        self._in_flight[tenant.name] += not refused
        try:
            if refused:
                error = RateLimited(f"The tenant may have {limit} requests in flight and has {limit}; try again later.")
                await (await _answer_error(Request(scope), error))(scope, receive, send_limits)
            else:
                await self._app(scope, receive, send_limits)
        finally:
            self._in_flight[tenant.name] -= not refused
            if not self._in_flight[tenant.name]:
                del self._in_flight[tenant.name]

    def _tenant(self, scope: Scope) -> Tenant:
        given = Headers(scope=scope).getlist("authorization")
        tenant = self._keys.tenant(given[0] if len(given) == 1 else None)
        if self._keys.required and (tenant.name == OPERATOR) != (scope["path"] == "/metrics"):
            raise Unauthorized(f"/metrics takes a key of {OPERATOR!r}, and all other routes take the other keys.")
        return tenant

    async def _headers(self, tenant: Tenant) -> list[tuple[bytes, bytes]]:
        """OpenAI's `x-ratelimit-*`: `requests` are those in flight, `tokens` the learned ones."""
        told: dict[str, object] = {}
        if limit := tenant.limits.requests:
            free = limit - self._in_flight[tenant.name]
            told |= {"limit-requests": limit, "remaining-requests": free, "reset-requests": "0s" if free else "1s"}
        if limit := tenant.limits.tokens_per_minute:
            with suppress(StoreUnavailable):
                left, reset = await self._sessions.tokens_left(tenant)
                told |= {"limit-tokens": limit, "remaining-tokens": left, "reset-tokens": f"{reset:.3f}s"}
        return [(f"x-ratelimit-{name}".encode(), str(value).encode()) for name, value in told.items()]


def document_api_keys(app: FastAPI) -> None:
    """Says in /openapi.json which routes take which key, as `AuthMiddleware` has it."""
    describe = app.openapi

    def page() -> dict[str, Any]:
        told = describe()
        told["components"]["securitySchemes"] = {
            name: {"type": "http", "scheme": "bearer", "description": f"A key of `imprint keys new {tenant}`."}
            for name, tenant in (("tenant", "TENANT"), ("operator", OPERATOR))
        }
        for path, methods in told["paths"].items():
            takes = "operator" if path == "/metrics" else "tenant"
            for operation in methods.values():
                operation["security"] = [] if path in PUBLIC_PATHS else [{takes: []}]
        return told

    app.openapi = page  # type: ignore[method-assign]


class BodyLimitMiddleware:
    """Refuses a body of more than `limit` bytes, whether its length is declared or it comes in chunks."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self._limit:
            response = await _answer_error(Request(scope), self._too_large(f"{declared} bytes"))
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


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    told = report_error(request, error)
    headers = {} if told.retry_after is None else {"Retry-After": str(math.ceil(told.retry_after))}
    headers |= dict(told.headers) | idempotency_headers(request)
    if told.status in NON_RETRYABLE:
        headers["x-should-retry"] = "false"
    return JSONResponse(told.body(), told.status, headers)


async def _answer_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return await _answer_error(request, explain(error.errors()))


async def _answer_no_route(request: Request, error: Exception) -> JSONResponse:
    where = f"{request.method} {request.url.path[:MAX_SHOWN_CHARS]}"
    return await _answer_error(request, NotFound(f"There is no route {where}.", code="unknown_url"))


async def _answer_wrong_method(request: Request, error: Exception) -> JSONResponse:
    # The router names the methods of the first route of this path only.
    allowed = [
        method
        for method in METHODS
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in request.app.routes)
    ]
    where = f"{request.url.path[:MAX_SHOWN_CHARS]} takes {', '.join(allowed)}, not {request.method}."
    response = await _answer_error(request, MethodNotAllowed(where))
    response.headers["Allow"] = ", ".join(allowed)
    return response


def explain(faults: Sequence[Any]) -> BadRequest:
    """The first of pydantic's `faults` in one sentence that names the field, the limit and the value."""
    fault = faults[0]
    where, *path = (str(part) for part in fault["loc"] if not _is_union_tag(part))
    param = ".".join(path)[: 2 * MAX_SHOWN_CHARS] or None
    name = f"'{param}'" if param else f"The {where}"
    match fault["type"]:
        case "missing":
            message = f"{name} is required."
        case "extra_forbidden":
            message = f"Unknown field {name}."
        case "model_attributes_type" | "model_type":
            message = f"{name} should be a JSON object, got {_show(fault['input'])}."
        case _:
            reason = fault["msg"][:1].lower() + fault["msg"][1:]
            message = f"{name}: {reason}, got {_show(fault['input'])}."
    return BadRequest(message, param=param)


def _is_union_tag(part: str | int) -> bool:
    return isinstance(part, str) and (part.startswith("<") or part == "[key]")


def _show(value: Any) -> str:
    """A client's value, short and in JSON's words."""
    match value:
        case str():
            return json.dumps(value[:MAX_SHOWN_CHARS], ensure_ascii=False) + (
                "…" if len(value) > MAX_SHOWN_CHARS else ""
            )
        case list():
            return f"a list of {len(value)}"
        case dict():
            return "an object"
        case int() if value.bit_length() > 64:
            return f"an integer of {value.bit_length()} bits"
        case None | bool() | int() | float():
            return json.dumps(value)
        case _:
            return f"a {type(value).__name__}"
