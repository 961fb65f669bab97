"""Measure how long the server is silent while large bodies arrive: `python -m tests.loop_gap` prints a table.

Each row is one request. The gap is the longest time between two answers of `/livez` during the request. The CPU time is
the most that the server worked between two answers: on a busy machine, the rest of the gap is the work of others. The
growth is the server's peak of resident memory during the request, minus its resident memory before. A client gives up
on a request that takes longer than `--seconds`: a text of 15 MB takes hours to learn, but it is tokenised in seconds.
"""

from __future__ import annotations

import argparse
import json
import re
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
CHINESE = "天地玄黃宇宙洪荒日月盈昃辰宿列張。"


@dataclass
class Gap:
    """The longest time between two answers of `/livez`, and the server's most CPU time between two, in seconds."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0


@contextmanager
def measured_gap(url: str, pid: int = 0) -> Iterator[Gap]:
    """Ask `/livez` on one connection again and again, and keep the longest time between two answers.

    pid: the server's process, whose CPU time is kept as well; 0 = this process.
    """
    clock = (~pid << 3) | 2 if pid else time.CLOCK_PROCESS_CPUTIME_ID  # Linux' clock of another process
    gap, over, address = Gap(), threading.Event(), urlsplit(url)

    def probe() -> None:
        with socket.create_connection((address.hostname or "", address.port or 80), timeout=300) as connection:
            answered, worked = time.perf_counter(), time.clock_gettime(clock)
            while not over.is_set():
                connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
                answer = b""
                while not answer.endswith(b"}"):
                    answer += connection.recv(65536)
                assert answer.startswith(b"HTTP/1.1 200"), answer
                now, work = time.perf_counter(), time.clock_gettime(clock)
                gap.seconds, answered = max(gap.seconds, now - answered), now
                gap.cpu_seconds, worked = max(gap.cpu_seconds, work - worked), work
                over.wait(PROBE_EVERY_S)

    prober = threading.Thread(target=probe)
    prober.start()
    try:
        yield gap
    finally:
        over.set()
        prober.join()


def resident_mb(pid: int, field: str) -> float:
    """Return a process's resident memory in MiB: `VmRSS` now, `VmHWM` at its peak."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def reset_peak(pid: int) -> None:
    """Let the peak of a process's resident memory begin anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


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
        "observe a text": ("/v1/sessions/d/observe", {"text": text}),
        "observe a text without a space": ("/v1/sessions/d/observe", {"text": "a" * len(text)}),
        "observe a Chinese text of one line": ("/v1/sessions/d/observe", {"text": CHINESE * (len(text) // 51)}),
        "observe a text of special tokens": ("/v1/sessions/d/observe", {"text": "<|im_end|>" * (len(text) // 10)}),
        "score a text": ("/v1/sessions/d/score", {"text": text}),
        "observe a chat of one largest message": ("/v1/sessions/d/observe", {"messages": messages(1, text)}),
        "observe a chat of 1,000 large messages": (
            "/v1/sessions/d/observe",
            {"messages": messages(1000, text[: len(text) // 1000 - 40])},
        ),
        "observe a Chinese chat": (
            "/v1/sessions/d/observe",
            {"messages": messages(1, CHINESE * (len(text) // 51))},
        ),
        "observe a chat of special tokens": (
            "/v1/sessions/d/observe",
            {"messages": messages(1, "<|im_end|>" * (len(text) // 10))},
        ),
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


@dataclass(frozen=True)
class Row:
    """The measurements of one request: gap and duration in seconds, growth of resident memory in MiB."""

    gap: Gap
    duration_s: float
    growth_mb: float
    outcome: str


def measure(url: str, pid: int, seconds: float, send: Callable[[httpx.Client], httpx.Response]) -> Row:
    """Send a request and give up after `seconds`; the outcome is the status and the start of its error."""
    with httpx.Client(base_url=url, timeout=seconds) as client, measured_gap(url, pid) as gap:
        time.sleep(0.1)
        reset_peak(pid)
        before, began = resident_mb(pid, "VmRSS"), time.perf_counter()
        try:
            response = send(client)
            outcome = f"{response.status_code} {'' if response.is_success else response.text[22:130]}"
        except httpx.TransportError as error:
            outcome = type(error).__name__
        duration = time.perf_counter() - began
    return Row(gap, duration, resident_mb(pid, "VmHWM") - before, outcome)


def requests(server: Server, megabytes: int) -> Iterator[tuple[str, bytes, Callable[[httpx.Client], httpx.Response]]]:
    """Yield the name, the body and the sender of each request; the imports come last and need the session `a`."""

    def sender(method: str, path: str, content: bytes) -> Callable[[httpx.Client], httpx.Response]:
        headers = {"Content-Type": "application/json"} if method == "POST" else {}
        return lambda client: client.request(method, path, content=content, headers=headers)

    for name, (path, body) in bodies(server.model, megabytes).items():
        content = (
            body if isinstance(body, bytes) else b"" if body is None else json.dumps(body, ensure_ascii=False).encode()
        )
        yield name, content, sender("POST" if content else "GET", path, content)
    exported = httpx.get(f"{server.url}/v1/sessions/a/export", timeout=600).content
    for name, content in (("import", exported), ("import of a deep manifest", deep_manifest())):
        yield name, content, sender("PUT", "/v1/sessions/i/import", content)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="regular expression that the rows' names contain")
    parser.add_argument("--megabytes", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=60.0, help="a client gives up after so many")
    parser.add_argument("--base", help="folder of a base; default: a tiny one with random weights")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = arguments.base or build_tiny_base(Path(folder) / "tiny")
        server = Server(str(base), Path(folder) / "data").start(forked=False)
        assert server.process is not None
        try:
            print("| request | MB | gap (ms) | CPU (ms) | growth (MB) | duration (s) | answer |")
            print("| --- | --- | --- | --- | --- | --- | --- |")
            for name, content, send in requests(server, arguments.megabytes):
                if re.search(arguments.only, name):
                    row = measure(server.url, server.process.pid, arguments.seconds, send)
                    print(
                        f"| {name} | {len(content) / MB:.1f} | {row.gap.seconds * 1000:.0f} "
                        f"| {row.gap.cpu_seconds * 1000:.0f} | {row.growth_mb:.0f} "
                        f"| {row.duration_s:.2f} | {row.outcome} |",
                        flush=True,
                    )
        finally:
            server.stop()


def deep_manifest() -> bytes:
    """Return a safetensors file whose manifest is nested 200,000 deep."""
    header = json.dumps({"__metadata__": {"imprint": "[" * 200_000}}).encode()
    return len(header).to_bytes(8, "little") + header


if __name__ == "__main__":
    main()
