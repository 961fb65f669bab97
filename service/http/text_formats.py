"""The formats of interfaces other than OpenAI's: the events of a turn of one text as a whole reply, or as a stream."""

import json
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from pydantic import ValidationError

from model.text.tool_calls import ReplyPiece, ReplyReader, read_message, tool_names
from service.concurrency import run_off_loop
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
    """Formats a turn of one text, in which there may be calls of tools; a subclass has the words of its interface.

    latency: gets the times of the text. tools: those that the reply may call, as the prompt lists them; "" for none.
    """

    def __init__(self, latency: LatencyRecorder, tools: str = "") -> None:
        self._latency = latency
        self._names = tool_names(tools) if tools else None

    async def reply(self, events: AsyncIterator[TurnEvent]) -> Json | list[bytes]:
        """Return the whole reply."""
        texts = list[str]()
        async for event in events:
            if isinstance(event, TurnEnd):
                return await self.whole(self._parts("".join(texts)), event)
            if isinstance(event, TurnRestarted):
                texts.clear()
            else:
                texts.append(event.text)
            self.take(event)
        raise AssertionError("a turn ends with a TurnEnd")

    async def stream(self, events: AsyncGenerator[TurnEvent, None]) -> AsyncGenerator[str, None]:
        """Yield the events of a stream, and close `events` at the end."""
        reader, opened = None if self._names is None else ReplyReader(self._names), False
        async with aclosing(events):
            async for event in events:
                assert not isinstance(event, TurnRestarted), "a streamed turn is never restarted"
                for opening in () if opened else self.opening(event.prompt_tokens):
                    yield opening
                opened = True
                if isinstance(event, Delta):
                    self.take(event)
                    text = event.text
                    pieces = reader.feed(text) if reader else [ReplyPiece(text)] if text else []
                else:
                    pieces = reader.finish() if reader else []
                for piece in pieces:
                    for output in await run_off_loop(self.work, list, self.piece(piece)):
                        yield output
                if isinstance(event, TurnEnd):
                    for closing in await self.closing(event):
                        yield closing

    def _parts(self, text: str) -> list[ReplyPiece]:
        """Return the content, unless it is empty, and the calls of a reply."""
        if self._names is None:
            return [ReplyPiece(text)] if text else []
        content, calls = read_message(text, self._names)
        parts = [ReplyPiece(arguments, index, name) for index, (name, arguments) in enumerate(calls)]
        return [ReplyPiece(content), *parts] if content else parts

    @property
    def work(self) -> int:
        """Return the work on the next piece of a stream, as `run_off_loop` counts it."""
        return 0

    def take(self, event: Delta | TurnRestarted) -> None:
        """Take what is told of new text besides the text."""
        if isinstance(event, Delta):
            self._latency.record(event.choice)

    def opening(self, prompt_tokens: int) -> Iterable[str]:
        """Return the events of a stream before the text."""
        return ()

    @abstractmethod
    async def whole(self, parts: Sequence[ReplyPiece], end: TurnEnd) -> Json:
        """Return the whole reply, of whose parts each is the content or a call."""

    @abstractmethod
    def piece(self, piece: ReplyPiece) -> Iterable[str]:
        """Return the events of a stream with the next text."""

    @abstractmethod
    async def closing(self, end: TurnEnd) -> Iterable[str]:
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


def parsed_arguments(arguments: str) -> Json:
    """Return the arguments of a call; none of a call that was cut off."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def compact(value: Json) -> str:
    """Return an event as JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
