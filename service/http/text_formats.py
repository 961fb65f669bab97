"""The formats of interfaces other than OpenAI's: the events of a turn of one text as a whole reply, or as a stream."""

import json
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing
from typing import Any, Protocol

from pydantic import ValidationError

from service.errors import BadRequest
from service.http.faults import explain
from service.http.generation_schemas import ChatCompletionRequest
from service.http.response_formats import LatencyRecorder
from service.turns.completion import Delta, TurnEnd
from service.turns.run import TurnRestarted

Json = dict[str, Any]
TurnEvent = Delta | TurnRestarted | TurnEnd


class Formatter(Protocol):
    """Formats the events of one request's turn."""

    async def reply(self, events: AsyncIterator[TurnEvent]) -> Json | list[bytes]:
        """Return the whole reply; pieces of JSON, the last one first, if the reply is large."""
        ...

    def stream(self, events: AsyncGenerator[TurnEvent, None]) -> AsyncGenerator[str, None]:
        """Yield the events of a stream, and close `events` at the end."""
        ...


class TextFormatter(ABC):
    """Formats a turn of one text; a subclass has the words of its interface.

    latency: gets the times of the text.
    """

    def __init__(self, latency: LatencyRecorder) -> None:
        self._latency = latency

    async def reply(self, events: AsyncIterator[TurnEvent]) -> Json:
        """Return the whole reply."""
        texts = list[str]()
        async for event in events:
            if isinstance(event, TurnEnd):
                return self.whole("".join(texts), event)
            if isinstance(event, TurnRestarted):
                texts.clear()
            else:
                self._latency.record(event.choice)
                texts.append(event.text)
        raise AssertionError("a turn ends with a TurnEnd")

    async def stream(self, events: AsyncGenerator[TurnEvent, None]) -> AsyncGenerator[str, None]:
        """Yield the events of a stream, and close `events` at the end."""
        async with aclosing(events):
            for opening in await self.opening():
                yield opening
            async for event in events:
                if isinstance(event, TurnEnd):
                    for closing in self.closing(event):
                        yield closing
                elif isinstance(event, Delta) and event.text:
                    self._latency.record(event.choice)
                    yield self.piece(event.text)

    async def opening(self) -> Iterable[str]:
        """Return the events of a stream before the text."""
        return ()

    @abstractmethod
    def whole(self, text: str, end: TurnEnd) -> Json:
        """Return the whole reply."""

    @abstractmethod
    def piece(self, text: str) -> str:
        """Return the event of a stream with the next text."""

    @abstractmethod
    def closing(self, end: TurnEnd) -> Iterable[str]:
        """Return the events of a stream after the text."""


def as_chat(fields: Json) -> ChatCompletionRequest:
    """Return the chat completion that a request of another interface asks for. Raises BadRequest."""
    try:
        return ChatCompletionRequest.model_validate(fields)
    except ValidationError as error:
        raise explain([fault | {"loc": ("body", *fault["loc"])} for fault in error.errors()]) from error


def require_foreign(extra: Json | None, prefix: str = "") -> None:
    """Refuse fields that OpenAI's chats have and another interface lacks: what has an effect there is not ignored here.

    prefix: of the names, where the fields lie in an object of their own.
    """
    for name in extra or {}:
        if name in ChatCompletionRequest.model_fields:
            raise BadRequest(f"Unknown field '{prefix}{name}'.", param=f"{prefix}{name}")


def compact(value: Json) -> str:
    """Return an event as JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
