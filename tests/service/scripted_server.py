"""An HTTP server that gives prepared answers, to misbehave in ways that a real server cannot be made to."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], bytes]


class ScriptedServer:
    """A server that gives `answers` in order, one per request, and records the requests; then it hangs."""

    def __init__(self, *answers: Answer, port: int = 0) -> None:
        self.answers = list(answers)
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.hanging, self.closing = threading.Event(), threading.Event()
        scripted_server = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                scripted_server.requests.append((self.path, dict(self.headers), json.loads(body or "null")))
                if not scripted_server.answers:
                    scripted_server.hanging.set()
                    scripted_server.closing.wait()
                    return
                status, headers, content = scripted_server.answers.pop(0)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = answer  # noqa: N815

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


OBSERVED = {"tokens_learned": 3, "rows_written": 3, "loss": 1.0, "version": 1}
CHUNK = {"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": "tiny", "system_fingerprint": "fp_1"}


def ok(body: object) -> Answer:
    return 200, {}, json.dumps(body).encode()


def error_answer(status: int, code: str, **headers: str) -> Answer:
    error = {"message": f"It is {code}.", "type": "server_error", "param": None, "code": code}
    return status, headers, json.dumps({"error": error}).encode()


def stream(*chunks: object) -> Answer:
    frames = [json.dumps(chunk, ensure_ascii=False) if chunk != "[DONE]" else "[DONE]" for chunk in chunks]
    return 200, {"Content-Type": "text/event-stream"}, "".join(f"data: {frame}\n\n" for frame in frames).encode()


def text_chunk(text: str) -> dict[str, Any]:
    piece = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
    return {**CHUNK, "choices": [piece]}


MODEL = {"id": "tiny", "object": "model", "created": 1, "owned_by": "imprint", "fingerprints": {}}
MODELS = ok({"object": "list", "data": [MODEL]})
