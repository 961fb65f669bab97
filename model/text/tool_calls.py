"""Tool calls as text: how tools, calls and results read in a prompt, and how the calls of a reply are found.

The form is Hermes' and Qwen's: `<tool_call>`, a JSON object with `name` and `arguments`, `</tool_call>`. The grammar of
a reply allows exactly the form that `call_text` writes. Bases that were not trained on this form often write the object
by itself, perhaps as a block of code: a reply that begins as such a call of a known tool is one, and nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

BEGIN = "<tool_call>"
END = "}\n</tool_call>"  # a JSON text has no line break inside a string, so that no arguments contain it
CALL_START = '\n{"name": "'
ARGUMENTS = '", "arguments": '
MAX_CALLS = 128  # in a message
HEAD = re.compile(f'{re.escape(CALL_START)}([^"]*){ARGUMENTS}')
FENCES = ("", "```", "```json")
BARE_HEAD = r'[ \n]*(?:```(?:json)?[ \n]*)?\{{[ \n]*"name":[ \n]*"({})",[ \n]*"arguments":[ \n]*'
BARE_END = r"[ \n]*\}([ \n]*```)?[ \n]*"
BARE = re.compile(BARE_HEAD.format('[^"]*') + r"(?=\{)")
LISTED = """\
# Tools

You may call tools. Each line within <tools></tools> describes one of them:
<tools>
{}
</tools>

To call a tool, write its name and its arguments as JSON within <tool_call></tool_call>:
<tool_call>
{{"name": <name>, "arguments": <object>}}
</tool_call>"""


@dataclass(frozen=True)
class CallableTool:
    """A tool that a reply may call.

    parameters: the JSON Schema of its arguments. strict: a keyword of the schema that cannot be followed is a fault;
    otherwise such a keyword is left out.
    """

    name: str
    parameters: Mapping[str, Any]
    strict: bool = False


def call_text(name: str, arguments: str) -> str:
    """Return the text of a call; `arguments` is JSON, unless the call is somebody's mistake."""
    return f"{BEGIN}{CALL_START}{name}{ARGUMENTS}{arguments}{END}"


def message_text(content: str, calls: Sequence[tuple[str, str]]) -> str:
    """Return the text of an assistant's message: its content, then its calls as (name, arguments)."""
    if not calls:
        return content
    return "\n".join([*filter(None, [content.rstrip()]), *(call_text(*call) for call in calls)])


def tool_names(tools: str) -> list[str]:
    """Return the names of tools, of which there is one a line, as JSON."""
    return [json.loads(tool)["function"]["name"] for tool in tools.split("\n")]


def plain_arguments(arguments: str) -> str:
    """Return the arguments of a call as the prompt has them: in one spelling, or unchanged where they are no JSON."""
    try:
        text = json.dumps(json.loads(arguments or "{}"), ensure_ascii=False)
        text.encode()
    except (ValueError, RecursionError):  # ValueError: no JSON, an integer of too many digits, or a lone surrogate
        return arguments
    return text


def known_text(text: str) -> str:
    """Return an assistant's message in the spelling by which it is known again.

    Clients parse the arguments of a call and write them anew when they resend the call: the order of the keys and the
    white space may differ.
    """
    content, calls = read_message(text)
    if message_text(content, calls) != text:
        return text  # not all of the text is a content with calls
    return message_text(content, [(name, _sorted(arguments)) for name, arguments in calls])


def _sorted(arguments: str) -> str:
    try:
        return json.dumps(json.loads(arguments), sort_keys=True)
    except (ValueError, RecursionError):
        return arguments.strip()


def messages_as_text(messages: Sequence[Mapping[str, str]], tools: str) -> list[dict[str, str]]:
    """Return messages for a template that knows no tools.

    The system's message lists the tools, of which there is one a line of `tools`, and the results of tools come in
    messages of the user: all results after one message are one message, since many templates want turns to alternate.
    """
    adapted: list[dict[str, str]] = []
    previous: str | None = None
    for message in messages:
        role = message.get("role")
        if role == "tool":
            result = f"<tool_response>\n{message.get('content', '')}\n</tool_response>"
            if previous == "tool":
                adapted[-1]["content"] += f"\n{result}"
            else:
                adapted.append({"role": "user", "content": result})
        else:
            adapted.append(dict(message))
        previous = role
    if tools:
        listed = LISTED.format(tools)
        if adapted and adapted[0].get("role") == "system":
            adapted[0]["content"] += f"\n\n{listed}"
        else:
            adapted.insert(0, {"role": "system", "content": listed})
    return adapted


def calls_grammar(
    tools: Sequence[CallableTool], *, required: bool, parallel: bool, content: Mapping[str, Any] | None, space: str
) -> str:
    """Return the rules (Lark, as llguidance extends it) of a reply that may call tools.

    required: the reply calls a tool, and has no text; otherwise it is a text, perhaps with calls after it.
    parallel: there may be several calls.
    content: the JSON Schema of a reply that calls no tool; None allows any text.
    space: the white space that JSON may have, as a regular expression.
    """
    names = " | ".join(f"tool_{index}" for index in range(len(tools)))
    more = json.dumps(f"\n{BEGIN}")
    rules = [
        f"calls: call ({more} call){{0,{MAX_CALLS - 1}}}" if parallel else "calls: call",
        f"call: {json.dumps(CALL_START)} ({names}) {json.dumps(END)}",
    ]
    if required:
        rules.append(f'start: "{BEGIN}" calls')
    elif content is not None:
        rules.append(f'start: "{BEGIN}" calls | {_json_rule(content, space)}')
    else:
        any_bare = BARE_HEAD.format("|".join(_pattern(tool.name) for tool in tools))
        rules += [
            "start: TEXT | before calls | bare",
            f"TEXT: /(.|\\n)*/ & ~/(.|\\n)*{BEGIN}(.|\\n)*/ & ~/{any_bare}(.|\\n)*/",
            "before[lazy]: BEFORE",
            f"BEFORE: /(.|\\n)*{BEGIN}/ & ~/{any_bare}(.|\\n)*/",
            f"bare: ({' | '.join(f'BARE_{index} arguments_{index}' for index in range(len(tools)))}) BARE_END",
            f"BARE_END: /{BARE_END}/",
            *(f"BARE_{index}: /{BARE_HEAD.format(_pattern(tool.name))}/" for index, tool in enumerate(tools)),
        ]
    for index, tool in enumerate(tools):
        schema = {"type": "object", **tool.parameters}
        rules.append(f"tool_{index}: {json.dumps(tool.name + ARGUMENTS)} arguments_{index}")
        rules.append(f"arguments_{index}: {_json_rule(schema, space, lenient=not tool.strict)}")
    return "\n".join(rules)


def _pattern(name: str) -> str:
    return re.escape(name).replace("/", r"\/")


def _json_rule(schema: Mapping[str, Any], space: str, *, lenient: bool = False) -> str:
    options = {"whitespace_pattern": space, "lenient": lenient}
    return f"%json {json.dumps({**schema, 'x-guidance': options})}"


@dataclass(frozen=True)
class ReplyPiece:
    """New text of a reply: of its content, or of the arguments of call number `call`. `name` begins a call."""

    text: str
    call: int | None = None
    name: str | None = None


class ReplyReader:
    """Finds the calls in a reply that comes piece by piece and follows `calls_grammar`.

    White space at the end of the content is kept back until more content comes, since calls may follow. The arguments
    of a call that is all of the reply come when they are complete.

    Attributes:
        num_calls: number of calls that have begun.
        in_call: whether a call has begun and not ended.
    """

    def __init__(self, names: Collection[str] = ()) -> None:
        """names: of the tools of which a call may be all of the reply, without `<tool_call>`."""
        self.num_calls = 0
        self._names = names
        self._bare = [f'{fence}{{"name":"{name}","arguments":' for fence in FENCES for name in names]
        self._part: Literal["start", "content", "head", "arguments", "bare", "end"] = "start"
        self._held = ""

    @property
    def in_call(self) -> bool:
        return self._part in ("head", "arguments", "bare")

    def feed(self, text: str) -> Iterator[ReplyPiece]:
        """Yield what new text adds to the message."""
        self._held += text
        while True:
            if self._part == "start":
                if (bare := BARE.match(self._held)) and bare[1] in self._names:
                    yield self._begin(bare, "bare")
                elif self._may_be_bare():
                    return
                else:
                    self._part = "content"
            elif self._part == "bare":
                if not (length := _object_length(self._held)):
                    return
                yield ReplyPiece(self._held[:length], 0)
                self._part = "end"
            elif self._part == "end":
                self._held = ""
                return
            elif self._part == "content":
                released, found = self._release(BEGIN)
                if content := released.rstrip() if found else released:
                    yield ReplyPiece(content)
                if not found:
                    return
                self._part = "head"
            elif self._part == "head":
                head = HEAD.match(self._held)
                if head is None:
                    return
                yield self._begin(head, "arguments")
            else:
                released, found = self._release(END)
                if released:
                    yield ReplyPiece(released, self.num_calls - 1)
                if not found:
                    return
                self._part = "content"

    def finish(self) -> Iterator[ReplyPiece]:
        """Yield what was kept back at the end of the reply, unless it is the form of a call that was cut off."""
        rest, self._held = self._held, ""
        if self._part in ("start", "content") and (rest.strip() or not self.num_calls) and rest:
            yield ReplyPiece(rest)
        elif self._part == "bare" and rest:
            yield ReplyPiece(rest, 0)

    def _begin(self, head: re.Match[str], part: Literal["arguments", "bare"]) -> ReplyPiece:
        self._held, self._part = self._held[head.end() :], part
        self.num_calls += 1
        return ReplyPiece("", self.num_calls - 1, head[1])

    def _may_be_bare(self) -> bool:
        compact = "".join(self._held.split())
        return any(bare.startswith(compact) for bare in self._bare)

    def _release(self, mark: str) -> tuple[str, bool]:
        """Return the text up to a mark, and whether the mark is there; what may belong to the mark stays held."""
        released, found, rest = self._held.partition(mark)
        if found:
            self._held = rest
            return released, True
        length = len(released) - next(n for n in range(len(mark) - 1, -1, -1) if released.endswith(mark[:n]))
        if self._part == "content":
            length = len(released[:length].rstrip())
        self._held = released[length:]
        return released[:length], False


def _object_length(text: str) -> int:
    """Return the length of the JSON object at the start of a text; 0 if its end is not there yet."""
    try:
        return json.JSONDecoder().raw_decode(text)[1]
    except (ValueError, RecursionError):
        return 0


def read_message(text: str, names: Collection[str] = ()) -> tuple[str, list[tuple[str, str]]]:
    """Return the content and the calls, as (name, arguments), of an assistant's message or reply.

    names: as for `ReplyReader`.
    """
    reader, content = ReplyReader(names), ""
    calls: list[tuple[str, str]] = []
    for piece in (*reader.feed(text), *reader.finish()):
        if piece.call is None:
            content += piece.text
        elif piece.name is not None:
            calls.append((piece.name, piece.text))
        else:
            name, arguments = calls[-1]
            calls[-1] = name, arguments + piece.text
    return content, calls
