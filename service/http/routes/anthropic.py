"""Anthropic's routes: messages, streamed or not, and the count of their tokens."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Discriminator, Field, PrivateAttr, Tag, model_validator

from model.text.tool_calls import ReplyPiece
from service.errors import BadRequest
from service.http.dependencies import ImprintHeadersDep, LearningRequest, LearningRequestDep, RulesDep, SessionsDep
from service.http.faults import shorten
from service.http.generation_schemas import (
    MAX_STOPS,
    ChatCompletionRequest,
    ChatMessage,
    ChatTextPart,
    StopText,
)
from service.http.json_route import JsonRoute
from service.http.openapi import error_responses, named_events
from service.http.response_formats import call_id
from service.http.routes.openai import answer, chat_job, chat_prompt, latency_recorder
from service.http.schemas import (
    ADAPT,
    INT32,
    LEARN,
    MAX_MESSAGES,
    MAX_PARTS,
    ON_DISCONNECT,
    RECALL,
    SESSION,
    TEXT_OR_PARTS,
    WHOLE,
    Body,
    CallId,
    OnDisconnect,
    SessionId,
    Text,
    TextOrParts,
    ToolName,
    Unsupported,
)
from service.http.sse import NamedEventStream
from service.http.text_formats import TextFormatter, as_chat, compact, parsed_arguments, require_foreign
from service.http.tool_schemas import MAX_TOOLS, ObjectSchema
from service.turns.completion import TurnEnd
from service.turns.prompts import ChatPrompt, encode_async
from service.types import Adaptation, AdaptMode, LearnMode

OWN_FIELDS = ("session", "adapt", "learn", "recall", "on_disconnect")
STREAMED = "The message, or a stream of its events. `message_delta` carries `adaptation`, after the commit."
HINTS = ("metadata", "thinking", "service_tier", "cache_control", "context_management")

Json = dict[str, Any]


class AnthropicFault(BaseModel):
    """An error, described for a program (`type`) and for a person (`message`)."""

    type: str
    message: str


class AnthropicError(BaseModel):
    """The body of an error of Anthropic's routes."""

    type: Literal["error"]
    error: AnthropicFault
    request_id: str


router = APIRouter(
    prefix="/v1/messages",
    route_class=JsonRoute,
    tags=["Anthropic"],
    responses=error_responses(AnthropicError),
)

Blocks = TextOrParts[ChatTextPart]


class ToolUse(Body):
    """A call of a tool, which the assistant made."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["tool_use"]
    id: CallId
    name: ToolName
    input: dict[str, Any]


class ToolResult(Body):
    """The result of a call; `is_error` is ignored."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["tool_result"]
    tool_use_id: CallId
    content: Blocks | None = None


class Thinking(Body):
    """Thoughts of a model; ignored."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["thinking", "redacted_thinking"]


def _block_kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    kinds = {"tool_use": "<use>", "tool_result": "<result>", "thinking": "<thought>", "redacted_thinking": "<thought>"}
    return kinds.get(kind, "<text>") if isinstance(kind, str) else "<text>"


Block = Annotated[
    Annotated[ChatTextPart, Tag("<text>")]
    | Annotated[ToolUse, Tag("<use>")]
    | Annotated[ToolResult, Tag("<result>")]
    | Annotated[Thinking, Tag("<thought>")],
    Discriminator(_block_kind),
]
Content = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[list[Block], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True), Tag("<list>")],
    TEXT_OR_PARTS,
]


class AnthropicMessage(Body):
    """A message of a chat: a text, or blocks of text, calls of tools (the assistant's) and results (the user's)."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["user", "assistant", "system"]
    content: Content

    def chat_messages(self) -> Iterator[Json]:
        """Yield OpenAI's messages: each result is one, and so are the text and the calls of the others together."""
        if isinstance(self.content, str):
            yield {"role": self.role, "content": self.content}
            return
        text, calls, others = "", list[Json](), len(self.content)
        for block in self.content:
            match block:
                case ChatTextPart():
                    text += block.text
                case ToolUse():
                    function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
                    calls.append({"id": block.id, "type": "function", "function": function})
                case ToolResult():
                    others -= 1
                    content = block.content or ""
                    yield {"role": "tool", "content": content, "tool_call_id": block.tool_use_id}
        if others:
            yield {"role": self.role, "content": text} | ({"tool_calls": calls} if calls else {})


def _require_uses(messages: Sequence[AnthropicMessage]) -> None:
    """Raise BadRequest for a block in a message of the wrong role, and for a result of a call that is not there."""
    called = set[str]()
    for index, message in enumerate(messages):
        for position, block in enumerate(() if isinstance(message.content, str) else message.content):
            param = f"messages.{index}.content.{position}"
            if isinstance(block, ToolUse):
                called.add(block.id)
                if message.role != "assistant":
                    raise BadRequest(f"'{param}': only messages of the assistant have 'tool_use'.", param=param)
            elif isinstance(block, ToolResult):
                if message.role != "user":
                    raise BadRequest(f"'{param}': only messages of the user have 'tool_result'.", param=param)
                if block.tool_use_id not in called:
                    got = shorten(block.tool_use_id)
                    fault = f"'{param}.tool_use_id' must be the id of a 'tool_use' before it, got {got}."
                    raise BadRequest(fault, param=f"{param}.tool_use_id")


class AnthropicTool(Body):
    """A tool that the client runs; unknown fields are ignored, and tools of the server are not supported."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: ObjectSchema
    strict: bool | None = None

    def chat_tool(self) -> Json:
        """Return the tool as chat completions have it."""
        described = {"name": self.name, "description": self.description, "strict": self.strict}
        return {"type": "function", "function": described | {"parameters": self.input_schema}}


class AnthropicChoice(Body):
    """The tools that the reply may, or must, call."""

    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = Field(None, description="Required for `tool`.")
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _with_name(self) -> "AnthropicChoice":
        if self.type == "tool" and self.name is None:
            raise BadRequest("'tool_choice.name' is required for 'tool'.", param="tool_choice.name")
        return self

    def chat_choice(self) -> Any:
        """Return the choice as chat completions have it."""
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return "required" if self.type == "any" else self.type


class AnthropicFormat(Body):
    """The JSON Schema that the text must follow."""

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class AnthropicOutput(Body):
    """The form of the text. `effort` is a hint; ignored."""

    model_config = ConfigDict(extra="ignore")

    format: AnthropicFormat | None = None


class CountTokensRequest(Body):
    """The body of `POST /v1/messages/count_tokens`, and the part of a request for a message that makes its prompt."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "examples": [
                {"model": "smollm2-135m-instruct", "messages": [{"role": "user", "content": "My cat is called Miso."}]}
            ]
        },
    )

    model: str
    messages: Annotated[list[AnthropicMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] = Field(
        description="A last message of the assistant is continued by the reply."
    )
    system: Blocks | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: AnthropicChoice | None = None
    mcp_servers: Annotated[Any, Unsupported(([],))] = None
    container: Annotated[Any, Unsupported()] = None
    output_format: Annotated[Any, Unsupported()] = None
    output_config: AnthropicOutput | None = None
    metadata: Annotated[Any, Field(description="A hint; ignored: `user_id` names no session.")] = None
    thinking: Annotated[Any, Field(description="A hint; ignored.")] = None
    service_tier: Annotated[Any, Field(description="A hint; ignored.")] = None
    cache_control: Annotated[Any, Field(description="A hint; ignored.")] = None
    context_management: Annotated[Any, Field(description="A hint; ignored.")] = None
    _chat: ChatCompletionRequest = PrivateAttr()

    @model_validator(mode="after")
    def _as_chat(self) -> "CountTokensRequest":
        require_foreign(self.model_extra)
        _require_uses(self.messages)
        self._chat = as_chat((self.model_extra or {}) | self.fields())
        return self

    def fields(self) -> Json:
        """Return the fields of the chat completion that this request asks for."""
        system = [] if not self.system else [ChatMessage(role="system", content=self.system)]
        fields: Json = {name: getattr(self, name) for name in HINTS}
        fields["messages"] = [*system, *(message for each in self.messages for message in each.chat_messages())]
        fields["model"] = self.model
        if self.tools:
            fields["tools"] = [tool.chat_tool() for tool in self.tools]
        if (choice := self.tool_choice) is not None:
            fields["tool_choice"] = choice.chat_choice()
            fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use if self.tools else None
        if self.messages[-1].role == "assistant":
            fields |= {"continue_final_message": True, "add_generation_prompt": False}
        if self.output_config is not None and self.output_config.format is not None:
            fields["json_schema"] = self.output_config.format.json_schema
        return fields

    @property
    def chat(self) -> ChatCompletionRequest:
        """Return the chat completion that this request asks for."""
        return self._chat

    @property
    def prompt(self) -> ChatPrompt:
        return chat_prompt(self._chat)


class MessageRequest(CountTokensRequest):
    """The body of `POST /v1/messages`: Anthropic's fields, and Imprint's own."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "smollm2-135m-instruct",
                    "max_tokens": 32,
                    "messages": [{"role": "user", "content": "My cat is called Miso. Say hello to her."}],
                    "session": "alice",
                    "stream": True,
                }
            ]
        }
    )

    max_tokens: Annotated[int, Field(ge=1, le=INT32), WHOLE] = Field(
        description="More than the context has room for: as many as fit."
    )
    stop_sequences: Annotated[list[StopText], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = Field(
        None, description="Default: the temperature that `sampling` of the model suggests."
    )
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32), WHOLE] | None = None
    session: SessionId | None = SESSION
    adapt: AdaptMode | None = ADAPT
    learn: LearnMode | None = LEARN
    recall: bool | None = RECALL
    on_disconnect: OnDisconnect | None = ON_DISCONNECT

    def fields(self) -> Json:
        names = ("max_tokens", "stream", "temperature", "top_p", "top_k", *OWN_FIELDS)
        return super().fields() | {name: getattr(self, name) for name in names} | {"stop": self.stop_sequences}


class MessageText(BaseModel):
    """A block of text."""

    type: Literal["text"]
    text: str


class MessageToolUse(BaseModel):
    """A call of a tool; `input` is empty if the reply was cut off within it."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class MessageUsage(BaseModel):
    """The numbers of tokens of one request. No prompt is cached."""

    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int


class MessageReply(BaseModel):
    """The reply of `POST /v1/messages`."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[MessageText | MessageToolUse]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: MessageUsage
    adaptation: Adaptation | None


class TokenCount(BaseModel):
    """The reply of `POST /v1/messages/count_tokens`."""

    input_tokens: int


class MessageFormatter(TextFormatter):
    """The format of `/v1/messages`."""

    def __init__(self, learning: LearningRequest, tools: str) -> None:
        super().__init__(latency_recorder(learning), tools)
        self._model, self._ctx = learning.sessions.model_id, learning.ctx
        self._blocks, self._calls = 0, 0  # of a stream, so far

    async def whole(self, parts: Sequence[ReplyPiece], end: TurnEnd) -> Json:
        content = [self._block(part) | _content_of(part) for part in parts or [ReplyPiece("")]]
        usage, adaptation = _usage(end.prompt_tokens, end.completion_tokens), end.adaptation and asdict(end.adaptation)
        calls = any(part.call is not None for part in parts)
        return self._message(content, usage, **_stop(end, calls)) | {"adaptation": adaptation}

    def opening(self, prompt_tokens: int) -> Iterable[str]:
        yield compact({"type": "message_start", "message": self._message([], _usage(prompt_tokens, 0))})

    def piece(self, piece: ReplyPiece) -> Iterable[str]:
        if piece.name is not None or not self._blocks:
            yield from self._end_block()
            empty = ReplyPiece("", piece.call, piece.name)
            self._blocks, self._calls = self._blocks + 1, self._calls + (piece.call is not None)
            block = self._block(empty) | _content_of(empty)
            yield compact({"type": "content_block_start", "index": self._blocks - 1, "content_block": block})
        if piece.text:
            text, call = {"type": "text_delta", "text": piece.text}, {"type": "input_json_delta"}
            delta = text if piece.call is None else call | {"partial_json": piece.text}
            yield compact({"type": "content_block_delta", "index": self._blocks - 1, "delta": delta})

    async def closing(self, end: TurnEnd) -> Iterable[str]:
        usage, stop = _usage(end.prompt_tokens, end.completion_tokens), _stop(end, self._calls > 0)
        adaptation = end.adaptation and asdict(end.adaptation)
        return [
            *(() if self._blocks else self.piece(ReplyPiece(""))),
            *self._end_block(),
            compact({"type": "message_delta", "delta": stop, "usage": usage, "adaptation": adaptation}),
            compact({"type": "message_stop"}),
        ]

    def _end_block(self) -> Iterator[str]:
        if self._blocks:
            yield compact({"type": "content_block_stop", "index": self._blocks - 1})

    def _block(self, part: ReplyPiece) -> Json:
        """Return the fields of a block that do not depend on its text."""
        if part.call is None:
            return {"type": "text"}
        return {"type": "tool_use", "id": call_id(self._ctx.id, 0, part.call, prefix="toolu"), "name": part.name}

    def _message(
        self, content: list[Json], usage: Json, stop_reason: str | None = None, stop_sequence: str | None = None
    ) -> Json:
        head = {"id": f"msg_{self._ctx.id}", "type": "message", "role": "assistant", "model": self._model}
        return head | {"content": content, "stop_reason": stop_reason, "stop_sequence": stop_sequence, "usage": usage}


@router.post(
    "",
    summary="Reply to messages, for clients of Anthropic",
    response_model=MessageReply,
    responses=named_events("MessageEvent", STREAMED, "error"),
)
async def create_message(
    body: MessageRequest, learning: LearningRequestDep, headers: ImprintHeadersDep
) -> Json | Response:
    """Reply to a chat; with a session, use the session's memory and update the memory with what is new in the chat."""
    job = chat_job(body.chat, learning, headers)
    formatter = MessageFormatter(learning, body.prompt.tools)
    return await answer(learning, body.chat, job, formatter, NamedEventStream)


@router.post("/count_tokens", summary="Count the tokens of messages, for clients of Anthropic")
async def count_message_tokens(body: CountTokensRequest, sessions: SessionsDep, rules: RulesDep) -> TokenCount:
    """Return the number of tokens of a chat as the model gets it. No session is used."""
    rules.resolve_model(body.model)
    encoded = await encode_async(body.prompt, sessions.loaded_model.tokenizer, (), reply=True)
    return TokenCount(input_tokens=len(encoded.token_ids))


def _content_of(part: ReplyPiece) -> Json:
    """Return the field of a block that has its content."""
    return {"text": part.text} if part.call is None else {"input": parsed_arguments(part.text)}


def _stop(end: TurnEnd, calls: bool) -> dict[str, str | None]:
    """Return why the text ended; `calls` says whether it calls tools."""
    if (stop := end.stops[0]) is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": stop}
    ended = "tool_use" if calls else "end_turn"
    return {"stop_reason": "max_tokens" if end.finish_reasons[0] == "length" else ended, "stop_sequence": None}


def _usage(input_tokens: int, output_tokens: int) -> Json:
    cached = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
    return {"input_tokens": input_tokens, "output_tokens": output_tokens} | cached
