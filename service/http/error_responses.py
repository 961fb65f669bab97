"""Errors at the edge: every exception becomes an answer in OpenAI's shape, is counted, and logged where needed."""

import logging
import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.routing import Match

from service.errors import EngineError, ImprintError, MethodNotAllowed, NotFound
from service.http.dependencies import get_metrics, idempotency_headers
from service.http.faults import MAX_SHOWN_CHARS, explain

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
NON_RETRYABLE = (409, 507)  # statuses that OpenAI's client would retry without success
ANTHROPIC_ERRORS = {  # the types of Anthropic's errors by status
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}

log = logging.getLogger(__name__)


def add_error_handlers(app: FastAPI) -> None:
    """Let `app` answer the errors of routes, validation and routing."""
    app.add_exception_handler(ImprintError, error_response)
    app.add_exception_handler(RequestValidationError, _invalid_response)
    app.add_exception_handler(404, _no_route_response)
    app.add_exception_handler(405, _wrong_method_response)


async def report_error(request: Request, error: Exception) -> ImprintError:
    """Count `error`, and return the error that the client may see.

    An error from outside the tree of `service.errors` is logged under the request's id, and its details are kept from
    the client.
    """
    if not isinstance(error, ImprintError):
        request_id = request.state.request_id
        log.error("request %s failed", request_id, exc_info=error)
        error = EngineError(
            f"The server failed on this request; its log has more under {request_id}.", code="internal_error"
        )
    (await get_metrics(request)).errors_total.labels(error.code or error.type).inc()
    return error


def error_body(request: Request, error: ImprintError) -> dict[str, Any]:
    """Return the body of an error, in the shape of the interface that the request's path belongs to."""
    path = request.url.path
    if path.startswith("/api/"):
        return {"error": error.message}
    if path.startswith("/v1/messages"):
        kind = ANTHROPIC_ERRORS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
        described = {"type": kind, "message": error.message}
        return {"type": "error", "error": described, "request_id": request.state.request_id}
    return error.body()


async def error_response(request: Request, error: Exception) -> JSONResponse:
    """Report `error`, and return the answer with its status, body and headers."""
    reported = await report_error(request, error)
    headers = {} if reported.retry_after is None else {"Retry-After": str(math.ceil(reported.retry_after))}
    headers |= dict(reported.headers) | idempotency_headers(getattr(request.state, "ctx", None))
    if reported.status in NON_RETRYABLE:
        headers["x-should-retry"] = "false"
    return JSONResponse(error_body(request, reported), reported.status, headers)


async def _invalid_response(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return await error_response(request, explain(error.errors()))


async def _no_route_response(request: Request, error: Exception) -> JSONResponse:
    route = f"{request.method} {request.url.path[:MAX_SHOWN_CHARS]}"
    return await error_response(request, NotFound(f"There is no route {route}.", code="unknown_url"))


async def _wrong_method_response(request: Request, error: Exception) -> JSONResponse:
    # The router names the methods of only the first route of this path.
    allowed = [
        method
        for method in METHODS
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in request.app.routes)
    ]
    message = f"{request.url.path[:MAX_SHOWN_CHARS]} takes {', '.join(allowed)}, not {request.method}."
    response = await error_response(request, MethodNotAllowed(message))
    response.headers["Allow"] = ", ".join(allowed)
    return response
