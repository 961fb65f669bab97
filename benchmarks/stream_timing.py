"""One generation as its client hears it, and the OpenAI-compatible servers that are asked for one."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx

from service.client.transport import SSEDecoder

Json = dict[str, Any]
TIMEOUT = httpx.Timeout(600, connect=10)


class PeerError(Exception):
    """A server that cannot be measured; the message is one line that says why."""


@dataclass
class StreamTiming:
    """sent: when the request went out; times: when each piece of text came; done: when the stream ended; tokens: how
    many were generated, as the server counts them. All times in seconds of `time.perf_counter`."""

    sent_at: float = 0.0
    times: list[float] = field(default_factory=list)
    done: float = 0.0
    tokens: int = 0

    @property
    def first(self) -> float:
        """Seconds to the first token; to the end, if no token had a text."""
        return (self.times[0] if self.times else self.done) - self.sent_at

    @property
    def tpot_s(self) -> float:
        """Seconds a token after the first one; of all, if fewer than two tokens had a text."""
        if len(self.times) < 2:
            return (self.done - self.sent_at) / self.tokens
        return (self.times[-1] - self.times[0]) / (self.tokens - 1)

    @property
    def inter_token_latencies(self) -> list[float]:
        """Seconds between one piece and the next."""
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


class Arm(Protocol):
    """What is measured beside others."""

    @property
    def name(self) -> str:
        """What it is called in the results."""

    async def generate(
        self, prompt: Sequence[int], tokens: int, *, stream: int = 0, n: int = 1, timing: StreamTiming | None = None
    ) -> StreamTiming:
        """Exactly so many greedy tokens after a prompt of token ids, n times over.

        stream: which of the arm's users asks. heard: is filled as the answer comes, and returned. Raises PeerError.
        """


class CompletionsEndpoint:
    """A server with OpenAI's `/v1/completions`; `fields` are added to each request."""

    def __init__(self, name: str, url: str, model: str, fields: Json) -> None:
        self.name, self.url, self.model = name, url, model
        self.fields: Json = {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}, **fields}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self.http = httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=limits)

    async def generate(
        self, prompt: Sequence[int], tokens: int, *, n: int = 1, timing: StreamTiming | None = None, **fields: Any
    ) -> StreamTiming:
        """`Arm.generate`, with more fields in the request."""
        timing = timing or StreamTiming()
        body = {"model": self.model, "prompt": list(prompt), "max_tokens": tokens, **self.fields, **fields}
        content = json.dumps(body | ({"n": n} if n > 1 else {})).encode()
        timing.sent_at = time.perf_counter()
        try:
            request = self.http.stream(
                "POST", "/v1/completions", content=content, headers={"Content-Type": "application/json"}
            )
            async with request as response:
                if response.status_code != 200:
                    raise PeerError(
                        f"{self.name} answered {response.status_code}: {_error_text(await response.aread())}"
                    )
                async for event in events(response.aiter_raw()):
                    _record_event(timing, event, self.name)
        except httpx.HTTPError as error:
            raise PeerError(f"{self.name} does not answer at {self.url}: {error or type(error).__name__}") from error
        timing.done = time.perf_counter()
        if timing.tokens != n * tokens:
            raise PeerError(f"{self.name} generated {timing.tokens} tokens instead of {n * tokens}")
        return timing

    async def close(self) -> None:
        await self.http.aclose()


async def events(parts: AsyncIterator[bytes]) -> AsyncIterator[Json]:
    """The JSON of each server-sent event, as soon as it is complete."""
    stream = SSEDecoder()
    async for part in parts:
        for data in stream.feed(part):
            if data != "[DONE]":
                yield json.loads(data)


async def first_model_id(name: str, url: str) -> str:
    """The first model that a server names. Raises PeerError."""
    try:
        async with httpx.AsyncClient(timeout=TIMEOUT) as http:
            return str((await http.get(f"{url}/v1/models")).json()["data"][0]["id"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, IndexError, TypeError) as error:
        raise PeerError(f"{name}: {url}/v1/models does not answer as an OpenAI server does: {error}") from error


def _record_event(timing: StreamTiming, event: Json, name: str) -> None:
    if "error" in event:
        raise PeerError(f"{name} broke off: {event['error']}")
    choices: Iterable[Json] = event.get("choices") or ()
    now = time.perf_counter()
    timing.times += [now for choice in choices if choice.get("text")]
    if usage := event.get("usage"):
        timing.tokens = int(usage["completion_tokens"])


def _error_text(body: bytes) -> str:
    return " ".join(body.decode(errors="replace").split())[:200]
