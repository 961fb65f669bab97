"""The timing of one generation at its client, and the endpoint of an OpenAI-compatible server."""

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
    """An error of a server that cannot be measured, with the reason in one line."""


@dataclass
class StreamTiming:
    """The timing of one generation, in seconds of `time.perf_counter`.

    sent_at: time when the request was sent
    token_times: time of each piece of text
    done_at: time when the stream ended
    tokens: number of generated tokens, as the server counts them
    """

    sent_at: float = 0.0
    token_times: list[float] = field(default_factory=list)
    done_at: float = 0.0
    tokens: int = 0

    @property
    def ttft_s(self) -> float:
        """Return the seconds to the first token, or to the end if no token has text."""
        return (self.token_times[0] if self.token_times else self.done_at) - self.sent_at

    @property
    def tpot_s(self) -> float:
        """Return the seconds per token after the first one, or of all tokens if fewer than two have text."""
        if len(self.token_times) < 2:
            return (self.done_at - self.sent_at) / self.tokens
        return (self.token_times[-1] - self.token_times[0]) / (self.tokens - 1)

    @property
    def inter_token_latencies(self) -> list[float]:
        """Return the seconds between successive pieces of text."""
        return [later - earlier for earlier, later in zip(self.token_times, self.token_times[1:], strict=False)]


class Arm(Protocol):
    """One compared server, in one mode."""

    @property
    def name(self) -> str:
        """Return the name of the arm in the results."""

    async def generate(
        self, prompt: Sequence[int], tokens: int, *, stream: int = 0, n: int = 1, timing: StreamTiming | None = None
    ) -> StreamTiming:
        """Generate exactly `tokens` greedy tokens after a prompt of token ids, `n` times.

        stream: number of the arm's user who sends the request
        timing: filled while the answer arrives, and returned
        Raises PeerError.
        """


class CompletionsEndpoint:
    """A server with OpenAI's `/v1/completions`. The client adds `fields` to each request."""

    def __init__(self, name: str, url: str, model: str, fields: Json) -> None:
        self.name, self.url, self.model = name, url, model
        self.fields: Json = {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}, **fields}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self.http = httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=limits)

    async def generate(
        self, prompt: Sequence[int], tokens: int, *, n: int = 1, timing: StreamTiming | None = None, **fields: Any
    ) -> StreamTiming:
        """Generate as `Arm.generate` does, with more fields in the request."""
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
        timing.done_at = time.perf_counter()
        if timing.tokens != n * tokens:
            raise PeerError(f"{self.name} generated {timing.tokens} tokens instead of {n * tokens}")
        return timing

    async def close(self) -> None:
        """Close the connections."""
        await self.http.aclose()


async def events(parts: AsyncIterator[bytes]) -> AsyncIterator[Json]:
    """Yield the JSON of each server-sent event as soon as the event is complete."""
    stream = SSEDecoder()
    async for part in parts:
        for data in stream.feed(part):
            if data != "[DONE]":
                yield json.loads(data)


async def first_model_id(name: str, url: str) -> str:
    """Return the first model that a server lists. Raises PeerError."""
    try:
        async with httpx.AsyncClient(timeout=TIMEOUT) as http:
            return str((await http.get(f"{url}/v1/models")).json()["data"][0]["id"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, IndexError, TypeError) as error:
        raise PeerError(f"{name}: {url}/v1/models does not answer as an OpenAI server does: {error}") from error


def _record_event(timing: StreamTiming, event: Json, name: str) -> None:
    """Add an event to the timing. Raises PeerError for an error event."""
    if "error" in event:
        raise PeerError(f"{name} broke off: {event['error']}")
    choices: Iterable[Json] = event.get("choices") or ()
    now = time.perf_counter()
    timing.token_times += [now for choice in choices if choice.get("text")]
    if usage := event.get("usage"):
        timing.tokens = int(usage["completion_tokens"])


def _error_text(body: bytes) -> str:
    return " ".join(body.decode(errors="replace").split())[:200]
