"""The route classes of /v1: readiness and strict JSON, checked before the handler of a route runs."""

from collections.abc import Callable, Coroutine
from email.message import Message as MimeHeader
from functools import lru_cache
from typing import Any

import pydantic_core
from fastapi import Request, Response
from fastapi.routing import APIRoute

from service.errors import BadRequest, NotReady, UnsupportedMediaType
from service.http.dependencies import get_sessions


class ParsedRequest(Request):
    """A request whose JSON body has been parsed."""

    parsed: Any = None

    async def json(self) -> Any:
        return self.parsed


class JsonRoute(APIRoute):
    """A route under /v1: answers only while the server is ready, and parses a JSON body strictly."""

    parses_json = True

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return a handler that checks a request before FastAPI's handler gets the request.

        Raises:
            NotReady: the server is loading or draining.
            UnsupportedMediaType: the body is not declared as JSON in UTF-8.
            BadRequest: the body is not JSON.
        """
        handle = super().get_route_handler()

        async def check_and_handle(request: Request) -> Response:
            state = (await get_sessions(request)).state
            if state != "ready":
                raise NotReady(f"The server is {state}; try again later.", code=state)
            request = ParsedRequest(request.scope, request.receive)
            body = await request.body()
            if body and self.parses_json:
                _require_json(request.headers.get("content-type", ""))
                request.parsed = _parse(body)
            return await handle(request)

        return check_and_handle


class FileRoute(JsonRoute):
    """A route under /v1 whose body is a file."""

    parses_json = False


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
    """Parse one JSON value from UTF-8; refuse NaN, lone surrogates and deep nesting."""
    try:
        return pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise BadRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from None
