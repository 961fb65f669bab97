"""Anthropic's routes: messages, streamed or not, and the count of their tokens. Only text goes in and out."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from service.http.dependencies import ImprintHeadersDep, LearningRequest, LearningRequestDep, RulesDep, SessionsDep
from service.http.generation_schemas import (
    MAX_STOPS,
    ChatCompletionRequest,
    ChatMessage,
    ChatTextPart,
    StopText,
)
from service.http.json_route import JsonRoute
from service.http.openapi import error_responses
from service.http.openapi_examples import EXAMPLES
from service.http.routes.openai import answer, chat_job, latency_recorder
from service.http.schemas import (
    INT32,
    MAX_MESSAGES,
    ON_DISCONNECT,
    RECALL,
    WHOLE,
    Body,
    OnDisconnect,
    SessionId,
    TextOrParts,
    Unsupported,
)
from service.http.sse import EventStream
from service.http.text_formats import TextFormatter, as_chat, compact, require_foreign
from service.turns.completion import TurnEnd
from service.turns.prompts import ChatPrompt, encode_async
from service.turns.sessions import Sessions
from service.types import Adaptation, AdaptMode, LearnMode

OWN_FIELDS = ("session", "adapt", "learn", "recall", "on_disconnect")
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


class AnthropicMessage(Body):
    """A message of a chat: a text, or blocks of text."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["user", "assistant", "system"]
    content: Blocks


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
    tools: Annotated[Any, Unsupported(([],))] = None
    tool_choice: Annotated[Any, Unsupported(({"type": "auto"}, {"type": "none"}))] = None
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
        self._chat = as_chat((self.model_extra or {}) | self.fields())
        return self

    def fields(self) -> Json:
        """Return the fields of the chat completion that this request asks for."""
        system = [] if not self.system else [ChatMessage(role="system", content=self.system)]
        fields: Json = {name: getattr(self, name) for name in HINTS}
        fields["messages"] = [*system, *(ChatMessage(role=each.role, content=each.content) for each in self.messages)]
        fields["model"] = self.model
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
        return ChatPrompt([message.plain() for message in self._chat.messages], self._chat.ending)


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
    session: SessionId | None = Field(
        None, description="The session whose memory is used and updated; none = the frozen base."
    )
    adapt: AdaptMode | None = Field(None, description="Read and write the memory, only write, or only read.")
    learn: LearnMode | None = Field(None, description="The part that is learned.")
    recall: bool | None = RECALL
    on_disconnect: OnDisconnect | None = ON_DISCONNECT

    def fields(self) -> Json:
        names = ("max_tokens", "stream", "temperature", "top_p", "top_k", *OWN_FIELDS)
        return super().fields() | {name: getattr(self, name) for name in names} | {"stop": self.stop_sequences}


class MessageText(BaseModel):
    """A block of text."""

    type: Literal["text"]
    text: str


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
    content: list[MessageText]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence"] | None
    stop_sequence: str | None
    usage: MessageUsage
    adaptation: Adaptation | None


class TokenCount(BaseModel):
    """The reply of `POST /v1/messages/count_tokens`."""

    input_tokens: int


def _streamed() -> dict[int | str, Json]:
    """Return the description of an answer that may be a stream of named events."""
    kinds = [event["type"] for event in EXAMPLES["MessageEvent"]]
    data = {"type": "object", "properties": {"type": {"enum": [*kinds, "error"]}}, "required": ["type"]}
    fields: Json = {
        "event": {"enum": [*kinds, "error"]},
        "data": {"type": "string", "contentMediaType": "application/json", "contentSchema": data},
    }
    content: Json = {
        "text/event-stream": {
            "itemSchema": {"type": "object", "properties": fields, "required": ["event", "data"]},
            "example": "".join(MessageStream.frame(compact(event)) for event in EXAMPLES["MessageEvent"]),
        }
    }
    description = "The message, or a stream of its events. `message_delta` carries `adaptation`, after the commit."
    return {200: {"description": description, "content": content}}


class MessageStream(EventStream):
    """A stream of named events."""

    closing = ""

    @staticmethod
    def frame(event: str) -> str:
        return f"event: {json.loads(event)['type']}\ndata: {event}\n\n"


class MessageFormatter(TextFormatter):
    """The format of `/v1/messages`."""

    def __init__(self, learning: LearningRequest, prompt: ChatPrompt) -> None:
        super().__init__(latency_recorder(learning))
        self._sessions, self._ctx, self._prompt = learning.sessions, learning.ctx, prompt

    def whole(self, text: str, end: TurnEnd) -> Json:
        content, adaptation = [{"type": "text", "text": text}], end.adaptation and asdict(end.adaptation)
        usage = _usage(end.prompt_tokens, end.completion_tokens)
        return self._message(content, usage, **_stop(end)) | {"adaptation": adaptation}

    async def opening(self) -> Iterable[str]:
        message = self._message([], _usage(await _count(self._prompt, self._sessions), 0))
        block = {"type": "text", "text": ""}
        return [
            compact({"type": "message_start", "message": message}),
            compact({"type": "content_block_start", "index": 0, "content_block": block}),
        ]

    def piece(self, text: str) -> str:
        return compact({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}})

    def closing(self, end: TurnEnd) -> Iterable[str]:
        usage = _usage(end.prompt_tokens, end.completion_tokens)
        adaptation = end.adaptation and asdict(end.adaptation)
        return [
            compact({"type": "content_block_stop", "index": 0}),
            compact({"type": "message_delta", "delta": _stop(end), "usage": usage, "adaptation": adaptation}),
            compact({"type": "message_stop"}),
        ]

    def _message(
        self, content: list[Json], usage: Json, stop_reason: str | None = None, stop_sequence: str | None = None
    ) -> Json:
        head = {"id": f"msg_{self._ctx.id}", "type": "message", "role": "assistant", "model": self._sessions.model_id}
        return head | {"content": content, "stop_reason": stop_reason, "stop_sequence": stop_sequence, "usage": usage}


@router.post(
    "", summary="Reply to messages, for clients of Anthropic", response_model=MessageReply, responses=_streamed()
)
async def create_message(
    body: MessageRequest, learning: LearningRequestDep, headers: ImprintHeadersDep
) -> Json | Response:
    """Reply to a chat; with a session, use the session's memory and update the memory with what is new in the chat."""
    job = chat_job(body.chat, learning, headers)
    return await answer(learning, body.chat, job, MessageFormatter(learning, body.prompt), MessageStream)


@router.post("/count_tokens", summary="Count the tokens of messages, for clients of Anthropic")
async def count_message_tokens(body: CountTokensRequest, sessions: SessionsDep, rules: RulesDep) -> TokenCount:
    """Return the number of tokens of a chat as the model gets it. No session is used."""
    rules.resolve_model(body.model)
    return TokenCount(input_tokens=await _count(body.prompt, sessions))


async def _count(prompt: ChatPrompt, sessions: Sessions) -> int:
    return len((await encode_async(prompt, sessions.loaded_model.tokenizer, (), reply=True)).token_ids)


def _stop(end: TurnEnd) -> dict[str, str | None]:
    """Return why the text ended."""
    if (stop := end.stops[0]) is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": stop}
    return {"stop_reason": "max_tokens" if end.finish_reasons[0] == "length" else "end_turn", "stop_sequence": None}


def _usage(input_tokens: int, output_tokens: int) -> Json:
    cached = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
    return {"input_tokens": input_tokens, "output_tokens": output_tokens} | cached
