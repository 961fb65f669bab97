"""The page: the conversation at `/`, the laboratory, the dashboard, and their files.

No other file of the package is served.
"""

import hashlib
from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import APIRouter, Request, Response

TYPES = {
    "js": "text/javascript",
    "css": "text/css",
    "svg": "image/svg+xml",
    "txt": "text/plain",
    "json": "application/json",
}
CONVERSATION = ("changes", "conversation", "elements", "known", "person", "turns")
LABORATORY = ("app", "charts", "compare", "draft", "guide", "history", "manuscript", "tokens", "watch")
DASHBOARD = ("alerts", "dashboard", "panels", "promql", "samples", "units")
PARTS = (
    *(f"{name}.js" for name in (*CONVERSATION, *LABORATORY, *DASHBOARD, "server", "shell")),
    *(
        "conversation.css",
        "dashboard.css",
        "dashboard.json",
        "style.css",
        "icon.svg",
        "samples/keeper-1.txt",
        "samples/keeper-2.txt",
    ),
    *("uplot/uPlot.iife.min.js", "uplot/uPlot.min.css", "uplot/LICENSE.txt"),
)
PAGES = {"/": "index.html", "/laboratory": "laboratory.html", "/dashboard": "dashboard.html"}
FILES = {path: (name, "text/html") for path, name in PAGES.items()} | {
    f"/playground/{name}": (name, TYPES[name.rpartition(".")[2]]) for name in PARTS
}
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = {
    "Cache-Control": "no-cache",  # browsers revalidate each file: a page never runs a script of another release
    "Content-Security-Policy": CONTENT_POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

router = APIRouter(include_in_schema=False)


def _serve(name: str, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    """Return a handler that serves one file of the playground, or 304 to a client that has the file."""
    content = (files("service") / "playground" / name).read_bytes()
    headers = HEADERS | {"ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'}

    async def serve(request: Request) -> Response:
        client_tags = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if "*" in client_tags or headers["ETag"] in client_tags:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=media_type)

    return serve


for path, file in FILES.items():
    router.add_api_route(path, _serve(*file), methods=["GET", "HEAD"])
