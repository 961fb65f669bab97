"""Chat templates: rendering messages to the text that the model was trained to continue.

The Jinja environment has the settings of `transformers`, so that a template renders to the same text. A template comes
with the model and is not trusted: it runs in Jinja's sandbox.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.text import tool_calls

MAX_SOURCE_CHARS = 2**20

Message = Mapping[str, str]
Span = tuple[int, int]

_PROBE = {"type": "function", "function": {"name": "probe", "description": "", "parameters": {"type": "object"}}}


class ChatTemplateError(Exception):
    """Messages that the model's chat template refuses, or a template that is broken or missing."""


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        """Compile a template. Raises `ChatTemplateError` if the source does not compile.

        variables: values that the template may use besides the messages, such as `bos_token`.
        """
        self._variables = dict(variables)
        try:
            if len(source) > MAX_SOURCE_CHARS:
                raise TemplateError(f"it may have {MAX_SOURCE_CHARS} characters, has {len(source)}")
            self._template = _environment().from_string(source)
        except (TemplateError, RecursionError, SyntaxError, ValueError, OverflowError, MemoryError) as error:
            raise ChatTemplateError(f"the chat template is broken: {error}") from error

    @cached_property
    def has_tools(self) -> bool:
        """Return whether the template lists tools, and in the form in which the calls of replies are read."""
        try:
            text = self._render([{"role": "user", "content": "probe"}], [_PROBE], False)
        except ChatTemplateError:
            return False
        return tool_calls.BEGIN in text and '"probe"' in text

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: str = "") -> str:
        """Render a chat to text. Raises `ChatTemplateError` with the template's own message.

        tools: the tools as JSON, one a line. A template without tools gets them, and their results, as text.
        """
        adapted, listed = [dict(message) for message in messages], None
        if (tools or any(message.get("role") == "tool" for message in messages)) and not self.has_tools:
            adapted = tool_calls.messages_as_text(messages, tools)
        elif tools:
            listed = [json.loads(tool) for tool in tools.split("\n")]
        return self._render(adapted, listed, add_generation_prompt)

    def _render(self, messages: list[dict[str, str]], tools: list[Any] | None, add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except Exception as error:  # a template is a program: it can fail in any way
            raise ChatTemplateError(f"the chat template refuses these messages: {error}") from error

    def render_with_spans(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: str = ""
    ) -> tuple[str, list[Span | None]]:
        """Render a chat to text. Returns the text, and for each message the half-open range of its content in the text.

        The range is None for a content that the template leaves out, or changes beyond trimming its white space.
        Raises `ChatTemplateError`.
        """
        text = self.render(messages, add_generation_prompt=add_generation_prompt, tools=tools)
        mark = next(unused_characters([text, *(message.get("content", "") for message in messages)]))
        for edges in (_whole, _trimmed):
            marked = [_mark(message, f"{mark}{i}{mark}", edges) for i, message in enumerate(messages)]
            try:
                rendered = self.render(marked, add_generation_prompt=add_generation_prompt, tools=tools)
            except ChatTemplateError:
                continue
            unmarked, spans = _find(rendered, mark, len(messages))
            if unmarked == text:
                return text, spans
        return text, [None] * len(messages)


def _whole(content: str) -> Span:
    return 0, len(content)


def _trimmed(content: str) -> Span:
    start = len(content) - len(content.lstrip())
    return start, start + len(content.strip())


def _mark(message: Message, mark: str, edges: Callable[[str], Span]) -> Message:
    """Return the message with marks around its content. An empty content stays empty, for templates test for that."""
    content = message.get("content", "")
    start, end = edges(content)
    if start == end:
        return message
    return {**message, "content": content[:start] + mark + content[start:end] + mark + content[end:]}


def _find(rendered: str, mark: str, messages: int) -> tuple[str, list[Span | None]]:
    """Remove the marks. Returns the text and the range between each message's marks, if there are exactly two."""
    positions: list[list[int]] = [[] for _ in range(messages)]
    pieces, length = [], 0
    for index, piece in enumerate(rendered.split(mark)):
        if index % 2:
            if not re.fullmatch("[0-9]{1,9}", piece) or int(piece) >= messages:
                return rendered, []  # the template has changed a mark
            positions[int(piece)].append(length)
        else:
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), [(found[0], found[1]) if len(found) == 2 else None for found in positions]


def unused_characters(texts: Sequence[str]) -> Iterator[str]:
    """Yield characters that no text contains and that templates leave as they are.

    Control characters of Latin-1 come first, because a character outside of Latin-1 doubles the memory of most texts.
    """
    for code in (*range(0x80, 0x85), *range(0x86, 0xA0), *range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE)):
        character = chr(code)
        if not any(character in text for text in texts):
            yield character


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


class _GenerationBlock(Extension):
    """The block `{% generation %}`, which marks the assistant's text for training. Here the block changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
