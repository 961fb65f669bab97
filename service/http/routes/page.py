"""The page at `/` and the files it is made of. They come with the package; nothing else of it can be reached."""

import hashlib
from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import APIRouter, Request, Response

TYPES = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml", "txt": "text/plain"}
SCRIPTS = ("app", "charts", "compare", "draft", "history", "manuscript", "server", "tokens", "watch")
PARTS = (
    *(f"{name}.js" for name in SCRIPTS),
    *("style.css", "icon.svg", "samples/keeper-1.txt", "samples/keeper-2.txt"),
    *("uplot/uPlot.iife.min.js", "uplot/uPlot.min.css", "uplot/LICENSE.txt"),
)
FILES = {"/": ("index.html", "text/html")} | {
    f"/playground/{name}": (name, TYPES[name.rpartition(".")[2]]) for name in PARTS
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = {
    "Cache-Control": "no-cache",  # kept, but asked about each time, so that a page never meets another release's script
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

router = APIRouter(include_in_schema=False)


def _serve(name: str, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    content = (files("service") / "playground" / name).read_bytes()
    headers = HEADERS | {"ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'}

    async def serve(request: Request) -> Response:
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if "*" in known or headers["ETag"] in known:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=media_type)

    return serve


for path, file in FILES.items():
    router.add_api_route(path, _serve(*file), methods=["GET", "HEAD"])
