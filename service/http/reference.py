"""The page docs/http.md: the routes and the errors, as the code has them."""

import inspect
from collections.abc import Iterator

from fastapi import FastAPI

from service import errors
from service.http.middleware import ROUTERS


def markdown() -> str:
    """The page docs/http.md."""
    app = FastAPI(title="Imprint")
    for router in ROUTERS:
        app.include_router(router)
    routes = "\n".join(
        f"| `{method.upper()} {path}` | {operation['description']} |"
        for path, methods in app.openapi()["paths"].items()
        for method, operation in methods.items()
    )
    faults = "\n".join(
        f"| {kind.status} | `{kind.__name__}` | {_code(kind)} | {_meaning(kind)} |"
        for kind in _tree(errors.ImprintError)
    )
    return f"""\
# Routes and errors

Printed by `python -m service.http.reference`; edit the routes and `service/errors.py` instead of this page. A running
server describes every route at `/openapi.json`, with schemas and examples of requests and answers, and the key that it
takes where there are keys. OpenAI's routes are OpenAI's, streamed (server-sent events) or not.

## Routes

| route | |
| --- | --- |
{routes}

A session is named by the body's `session`, else by the header `X-Imprint-Session`, else by OpenAI's `user`. Answers of
the routes of a session have its version as their `ETag` (`"v3"`); `If-Match` makes a request depend on it. Completions
carry `adaptation`; streamed, it rides on the chunk with the `finish_reason`, which is sent after the commit.

## Learned once

A learning request with an `Idempotency-Key` is learned once, however often it arrives; again, it is given the first
answer, with `Idempotent-Replayed: true`. OpenAI's client needs none: it says that it repeats itself. Without either,
the same body sent twice is learned twice. The key is remembered for `IMPRINT_IDEMPOTENCY_TTL_S`.

## Errors

Bodies are OpenAI's: `{{"error": {{"message", "type", "param", "code"}}}}`. Answers of 429 and 503 have a `Retry-After`,
and those for which trying again is no use `x-should-retry: false`. `X-Request-Id` is the client's own, or a new one.
The class is that of the Python client and of the server; general ones stand before special ones. Some errors have a
`code` of their own beside these.

| status | class | code | meaning |
| --- | --- | --- | --- |
{faults}
"""


def _tree(root: type[errors.ImprintError]) -> Iterator[type[errors.ImprintError]]:
    for kind in sorted(root.__subclasses__(), key=lambda kind: kind.status):
        if kind.__module__ == errors.__name__:
            yield kind
            yield from _tree(kind)


def _code(kind: type[errors.ImprintError]) -> str:
    return f"`{kind.code}`" if kind.code else ""


def _meaning(kind: type[errors.ImprintError]) -> str:
    meaning = (inspect.getdoc(kind) or "").partition(": ")[2]
    return meaning[:1].upper() + meaning[1:]


if __name__ == "__main__":
    print(markdown(), end="")
