"""The fields of chat completions about tools: what may be called, and what the reply must call."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from model.text.grammar import JSON_SPACE, GrammarSource
from model.text.tool_calls import CallableTool, calls_grammar
from service.errors import BadRequest
from service.http.faults import shorten
from service.http.schemas import Body, Message, ToolName
from service.http.structured_output import MAX_GRAMMAR_CHARS

MAX_TOOLS = 128
MAX_TOOLS_CHARS = 131_072  # of all tools of a request as JSON
OF_AN_OBJECT = WithJsonSchema({"type": "object", "properties": {"type": {"const": "object"}}})
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


def _schema_of_an_object(schema: dict[str, Any]) -> dict[str, Any]:
    if schema.get("type", "object") != "object":
        raise PydanticCustomError("no_object", "should be the schema of an object ('type': 'object')")
    if (length := len(json.dumps(schema, ensure_ascii=False))) > MAX_GRAMMAR_CHARS:
        raise PydanticCustomError("too_long", f"may have {MAX_GRAMMAR_CHARS} characters as JSON, not {length}")
    return schema


ObjectSchema = Annotated[dict[str, Any], AfterValidator(_schema_of_an_object), OF_AN_OBJECT]


class Function(Body):
    """A function that a reply may call; unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore")

    name: ToolName
    description: str | None = None
    parameters: ObjectSchema | None = Field(
        None, description="The JSON Schema of the arguments, which calls follow; none: no arguments."
    )
    strict: bool | None = Field(
        None,
        description="True: a keyword of `parameters` that cannot be followed is refused. Default: it is left out.",
    )


class Tool(Body):
    """A tool; unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["function"]
    function: Function

    def listed(self) -> str:
        """Return the tool as the prompt lists it: a line of JSON."""
        fields = self.function.model_dump(include={"name", "description"}, exclude_none=True)
        function = fields | {"parameters": self._parameters}
        return json.dumps({"type": "function", "function": function}, ensure_ascii=False)

    def callable(self) -> CallableTool:
        """Return the tool as the grammar of a reply knows it."""
        return CallableTool(self.function.name, self._parameters, bool(self.function.strict))

    @property
    def _parameters(self) -> dict[str, Any]:
        return NO_PARAMETERS if self.function.parameters is None else self.function.parameters


def _limited(tools: list[Tool]) -> list[Tool]:
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise PydanticCustomError("twice", f"should have one tool of a name, not two of the name '{twice}'")
    if (length := len(listed_tools(tools))) > MAX_TOOLS_CHARS:
        raise PydanticCustomError("too_long", f"may have {MAX_TOOLS_CHARS} characters as JSON, not {length}")
    return tools


def listed_tools(tools: Sequence[Tool]) -> str:
    """Return the tools as the prompt lists them, one a line."""
    return "\n".join(tool.listed() for tool in tools)


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True), AfterValidator(_limited)]
_NAMED = {"type": "object", "required": ["type", "function"], "properties": {"type": {"const": "function"}}}
_ALLOWED = {"type": "object", "required": ["type", "allowed_tools"], "properties": {"type": {"const": "allowed_tools"}}}
ToolChoice = Annotated[Any, WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required", None]}, _NAMED, _ALLOWED]})]


@dataclass(frozen=True)
class OfferedTools:
    """The tools that a reply may call.

    Attributes:
        listed: the tools, as the prompt lists them.
        callable: the tools, as the grammar of the reply knows them.
        required: whether the reply must call one of them.
        parallel: whether the reply may have several calls.
    """

    listed: str
    callable: list[CallableTool]
    required: bool
    parallel: bool

    def grammar(self, form: tuple[GrammarSource, str] | None) -> GrammarSource:
        """Return the grammar of a reply that calls tools, or has the form that another field asks for.

        Raises BadRequest if that field is no JSON Schema.
        """
        content = None if form is None else _schema_beside_tools(*form)
        text = calls_grammar(
            self.callable, required=self.required, parallel=self.parallel, content=content, space=JSON_SPACE
        )
        return GrammarSource("lark", text)


def offered_tools(tools: Sequence[Tool] | None, choice: Any, parallel: bool | None) -> OfferedTools | None:
    """Return the tools that a reply may call; None if it may call none.

    Raises BadRequest if `tool_choice` has a form that is not known, or names a tool that is not in `tools`.
    """
    mode, names = _chosen(choice)
    if mode == "required" and not tools:
        raise BadRequest(f"'tool_choice' needs 'tools', got {shorten(choice)} without them.", param="tool_choice")
    known = {tool.function.name: tool for tool in tools or ()}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        message = f"'tool_choice' must name a tool of 'tools', got {shorten(unknown[0])}."
        raise BadRequest(message, param="tool_choice")
    if mode == "none" or not tools:
        return None
    chosen = [tool for name, tool in known.items() if names is None or name in names]
    callable_tools = [tool.callable() for tool in chosen]
    return OfferedTools(listed_tools(chosen), callable_tools, mode == "required", parallel is not False)


def require_calls(messages: Sequence[Message]) -> None:
    """Raise BadRequest if a message of a tool answers no call that stands before it."""
    called: set[str] = set()
    for index, message in enumerate(messages):
        called.update(call.id for call in message.tool_calls or ())
        if message.role == "tool" and message.tool_call_id not in called:
            param = f"messages.{index}.tool_call_id"
            got = shorten(message.tool_call_id)
            raise BadRequest(f"'{param}' must be the id of a call in a message before it, got {got}.", param=param)


def _chosen(choice: Any) -> tuple[str, list[str] | None]:
    """Return the mode of a `tool_choice`, and the names of the tools that may be called; None: all."""
    match choice:
        case None:
            return "auto", None
        case "none" | "auto" | "required":
            return choice, None
        case {"type": "function", "function": {"name": str(name)}}:
            return "required", [name]
        case {"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required" as mode, "tools": [*tools]}}:
            names = [tool["function"]["name"] for tool in tools if _is_named(tool)]
            if 0 < len(names) == len(tools):
                return mode, names
    raise BadRequest(
        f"'tool_choice' has no form that this server supports, got {shorten(choice)}.", param="tool_choice"
    )


def _is_named(tool: Any) -> bool:
    match tool:
        case {"type": "function", "function": {"name": str()}}:
            return True
    return False


def _schema_beside_tools(form: GrammarSource, param: str) -> dict[str, Any]:
    """Return the JSON Schema of a reply that calls no tool. Raises BadRequest for other forms."""
    if form.kind == "json_schema":
        with suppress(ValueError):
            if isinstance(schema := json.loads(form.text), dict):
                return schema
    raise BadRequest(f"'{param}' goes with 'tools' only as a JSON Schema that is an object.", param=param)
