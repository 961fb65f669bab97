"""The route classes of /v1: readiness and strict JSON, checked before the handler of a route runs."""

import hashlib
from collections.abc import Callable, Coroutine
from email.message import Message as MimeHeader
from functools import lru_cache
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute

from service.errors import NotReady, UnsupportedMediaType
from service.http.dependencies import get_sessions
from service.http.json_body import parse_json
from service.off_loop import LARGE, run_off_loop


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
                request.parsed = await run_off_loop(len(body), self._read_json, body)
            route = f"{request.method} {request.url.path}\n"
            request.state.digest = await run_off_loop(len(body), _digest, route, body)
            return await handle(request)

        return check_and_handle

    def _read_json(self, body: bytes) -> Any:
        """Return the value of a JSON body; of a large body, the validated model, which FastAPI takes as it is.

        FastAPI validates on the event loop. Raises RequestValidationError for a large body that is not valid.
        """
        value = parse_json(body)
        if len(body) < LARGE or self.body_field is None:
            return value
        valid, errors = self.body_field.validate(value, loc=("body",))
        if errors:
            raise RequestValidationError(errors)
        return valid


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


def _digest(route: str, body: bytes) -> str:
    """Return the digest under which the store knows an equal request."""
    sha256 = hashlib.sha256(route.encode())
    sha256.update(body)
    return sha256.hexdigest()
