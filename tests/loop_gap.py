"""Measure how long the server is silent while large bodies arrive: `python -m tests.loop_gap` prints a table.

Each row is one request. The gap is the longest time between two answers of `/livez` during the request.
"""

from __future__ import annotations

import argparse
import json
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from tests.conftest import Server
from tests.tiny import TEXT, build_tiny_base

PROBE_EVERY_S = 0.01
MB = 2**20


@dataclass
class Gap:
    """The longest time between two answers of `/livez`, in seconds."""

    seconds: float = 0.0


@contextmanager
def measured_gap(url: str) -> Iterator[Gap]:
    """Ask `/livez` on one connection again and again, and keep the longest time between two answers."""
    gap, over, address = Gap(), threading.Event(), urlsplit(url)

    def probe() -> None:
        with socket.create_connection((address.hostname or "", address.port or 80), timeout=300) as connection:
            answered = time.perf_counter()
            while not over.is_set():
                connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
                answer = b""
                while not answer.endswith(b"}"):
                    answer += connection.recv(65536)
                assert answer.startswith(b"HTTP/1.1 200"), answer
                now = time.perf_counter()
                gap.seconds, answered = max(gap.seconds, now - answered), now
                over.wait(PROBE_EVERY_S)

    prober = threading.Thread(target=probe)
    prober.start()
    try:
        yield gap
    finally:
        over.set()
        prober.join()


def messages(count: int, content: str = "") -> list[dict[str, str]]:
    """Return a chat of `count` messages of a user."""
    return [{"role": "user", "content": content}] * count


def bodies(model: str, megabytes: int) -> dict[str, tuple[str, Any]]:
    """Return the largest request of each kind, by name: the path and the body."""
    text = (TEXT * (megabytes * MB // len(TEXT) + 1))[: megabytes * MB]
    chat, completion = "/v1/chat/completions", "/v1/completions"
    options = {"model": model, "max_tokens": 1}
    parts = [{"type": "text", "text": ""}] * (megabytes * MB // 32)
    wide = [{"role": "user", "content": [{"type": "text", "text": ""}] * 60}] * 1000
    return {
        "nothing": ("/v1/models", None),
        "chat of one 5 MB message": (chat, options | {"messages": messages(1, text[: 5 * MB])}),
        "chat of one largest message": (chat, options | {"messages": messages(1, text)}),
        "chat of 1,000 empty messages": (chat, options | {"messages": messages(1000)}),
        "chat of 20,000 empty messages": (chat, options | {"messages": messages(20_000)}),
        "chat of 200,000 empty messages": (chat, options | {"messages": messages(200_000)}),
        "chat of one message in many parts": (chat, options | {"messages": [{"role": "user", "content": parts}]}),
        "chat of 1,000 messages in 60 parts": (chat, options | {"messages": wide}),
        "observe a chat of one 0.25 MB message": ("/v1/sessions/c/observe", {"messages": messages(1, text[: MB // 4])}),
        "text prompt": (completion, options | {"prompt": text}),
        "128 text prompts": (completion, options | {"prompt": [text[: len(text) // 128]] * 128}),
        "list of token ids": (completion, options | {"prompt": [7] * (megabytes * MB // 3)}),
        "128 lists of token ids": (completion, options | {"prompt": [[7] * 2000] * 128}),
        "nested lists": (completion, options | {"prompt": [[[]]] * (megabytes * MB // 7)}),
        "list of numbers": ("/v1/sessions/p/predict", {"features": [0.5] * (megabytes * MB // 5)}),
        "many fields": (completion, {f"x{i}": 1 for i in range(megabytes * MB // 12)}),
        "escaped quotes": (completion, options | {"prompt": '",' * (megabytes * MB // 4)}),
        "no JSON": (completion, b'{"model": ' + b"[" * (megabytes * MB)),
        "observe a text of 0.25 MB": ("/v1/sessions/a/observe", {"text": text[: MB // 4]}),
        "score a text of 0.25 MB": ("/v1/sessions/a/score", {"text": text[: MB // 4]}),
        "score and learn a text of 0.25 MB": ("/v1/sessions/b/score", {"text": text[: MB // 4], "learn": True}),
        "large answer with logprobs": (
            chat,
            options
            | {"max_tokens": 400, "n": 8, "logprobs": True, "top_logprobs": 20, "logit_bias": {"2": -100}}
            | {"messages": messages(1, "Hello")},
        ),
        "echo with logprobs": (
            completion,
            {"model": model, "max_tokens": 0, "echo": True, "logprobs": 5, "prompt": [[7] * 500] * 128},
        ),
    }


def measure(url: str, send: Callable[[httpx.Client], httpx.Response]) -> tuple[float, float, str]:
    """Return the longest gap and the duration of a request in seconds, and its status with the start of its error."""
    with httpx.Client(base_url=url, timeout=600) as client, measured_gap(url) as gap:
        time.sleep(0.1)
        began = time.perf_counter()
        try:
            response = send(client)
            outcome = f"{response.status_code} {'' if response.is_success else response.text[22:130]}"
        except httpx.TransportError as error:
            outcome = type(error).__name__
        return gap.seconds, time.perf_counter() - began, outcome


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of a row's name")
    parser.add_argument("--megabytes", type=int, default=15)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = build_tiny_base(Path(folder) / "tiny")
        server = Server(str(base), Path(folder) / "data").start()
        try:
            print("| request | MB | gap (ms) | duration (s) | answer |\n| --- | --- | --- | --- | --- |")
            for name, (path, body) in bodies("tiny", arguments.megabytes).items():
                if arguments.only not in name:
                    continue
                content = body if isinstance(body, bytes) else json.dumps(body).encode()

                def send(client: httpx.Client, path: str = path, content: bytes = content) -> httpx.Response:
                    if content == b"null":
                        return client.get(path)
                    return client.post(path, content=content, headers={"Content-Type": "application/json"})

                gap, duration, outcome = measure(server.url, send)
                size = len(content) / MB
                print(f"| {name} | {size:.1f} | {gap * 1000:.0f} | {duration:.2f} | {outcome} |", flush=True)
            exported = httpx.get(f"{server.url}/v1/sessions/a/export", timeout=600).content
            for name, content in (("import", exported), ("import of a deep manifest", deep_manifest())):

                def upload(client: httpx.Client, content: bytes = content) -> httpx.Response:
                    return client.put("/v1/sessions/c/import", content=content)

                gap, duration, outcome = measure(server.url, upload)
                print(f"| {name} | {len(content) / MB:.1f} | {gap * 1000:.0f} | {duration:.2f} | {outcome} |")
        finally:
            server.stop()


def deep_manifest() -> bytes:
    """Return a safetensors file whose manifest is nested 200,000 deep."""
    header = json.dumps({"__metadata__": {"imprint": "[" * 200_000}}).encode()
    return len(header).to_bytes(8, "little") + header


if __name__ == "__main__":
    main()
