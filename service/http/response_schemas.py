"""The bodies of OpenAI's Responses: requests with their items, and replies."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from service.errors import BadRequest
from service.http import field_rules
from service.http.generation_schemas import ChatUpTo, Samplers
from service.http.schemas import (
    ADAPT,
    LEARN,
    LEARN_TOOL_RESULTS,
    MAX_MESSAGES,
    MAX_PARTS,
    MODEL_NAME,
    ON_DISCONNECT,
    RECALL,
    TEXT_OR_PARTS,
    Body,
    CallId,
    OnDisconnect,
    SessionId,
    Text,
    ToolName,
    Unsupported,
    limit_entries,
)
from service.http.text_formats import require_foreign
from service.http.tool_schemas import MAX_TOOLS, Function, ToolChoice
from service.types import Adaptation, AdaptMode, LearnMode

MAX_METADATA = 16
LOGPROBS = "message.output_text.logprobs"

Json = dict[str, Any]


class InputPart(Body):
    """A part of a message's content; unknown fields, such as `annotations`, are ignored."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["input_text", "output_text", "text"]
    text: Text


InputContent = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[list[InputPart], Field(max_length=MAX_PARTS, fail_fast=True), Tag("<list>")],
    TEXT_OR_PARTS,
]


class InputItem(Body):
    """An item of the input; unknown fields, such as `id` and `status`, are ignored."""

    model_config = ConfigDict(extra="ignore")


class InputMessage(InputItem):
    """A message of a chat."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: InputContent


class InputCall(InputItem):
    """A call of a function, which the assistant made."""

    type: Literal["function_call"]
    call_id: CallId
    name: ToolName
    arguments: str


class InputResult(InputItem):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: CallId
    output: InputContent


class InputReasoning(InputItem):
    """Thoughts of a model; ignored."""

    type: Literal["reasoning"]


class InputReference(InputItem):
    """An item of a kept response, by its id."""

    type: Literal["item_reference"]
    id: CallId


def _item_kind(value: Any) -> str | None:
    kind = value.get("type", "message") if isinstance(value, dict) else getattr(value, "type", None)
    known = ("message", "function_call", "function_call_output", "reasoning", "item_reference")
    return f"<{kind}>" if kind in known else None


Item = Annotated[
    Annotated[InputMessage, Tag("<message>")]
    | Annotated[InputCall, Tag("<function_call>")]
    | Annotated[InputResult, Tag("<function_call_output>")]
    | Annotated[InputReasoning, Tag("<reasoning>")]
    | Annotated[InputReference, Tag("<item_reference>")],
    Discriminator(
        _item_kind,
        custom_error_type="item_type",
        custom_error_message="should be an item of the type message, function_call, function_call_output, reasoning or"
        " item_reference",
    ),
]
Input = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True), Tag("<list>")],
    Discriminator(
        lambda value: "<text>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None,
        custom_error_type="input_type",
        custom_error_message="should be a string or a list of items",
    ),
]


class TypedTool(Body):
    """A tool of a kind."""

    type: Literal["function"]


class ResponseTool(Function, TypedTool):
    """A function that the reply may call; no other kind of tool is supported."""


class ResponseForm(Body):
    """The form of the text: any text, any JSON object, or JSON that follows a schema."""

    model_config = ConfigDict(extra="ignore", json_schema_extra=field_rules.FORM)

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema", description="Required for `json_schema`.")
    strict: bool | None = None

    @model_validator(mode="after")
    def _with_schema(self) -> "ResponseForm":
        if self.type == "json_schema" and self.json_schema is None:
            raise BadRequest("'text.format.schema' is required for 'json_schema'.", param="text.format.schema")
        return self


class ResponseText(Body):
    """The form of the text. `verbosity` is a hint; ignored."""

    model_config = ConfigDict(extra="ignore")

    format: ResponseForm | None = None


class NamedConversation(Body):
    """A conversation by its id."""

    model_config = ConfigDict(extra="ignore")

    id: SessionId


Conversation = Annotated[
    Annotated[SessionId, Tag("<text>")] | Annotated[NamedConversation, Tag("<object>")],
    Discriminator(lambda value: "<text>" if isinstance(value, str) else "<object>"),
]
Metadata = Annotated[
    dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]],
    Field(json_schema_extra={"maxProperties": MAX_METADATA}),
    BeforeValidator(lambda value: limit_entries(value, MAX_METADATA)),
]


def _without_logprobs(value: str) -> str:
    if value == LOGPROBS:
        raise PydanticCustomError("unsupported", "is not supported by this server")
    return value


Included = Annotated[str, AfterValidator(_without_logprobs), Field(json_schema_extra={"not": {"const": LOGPROBS}})]


class ResponseRequest(Samplers):
    """The body of `POST /v1/responses`: OpenAI's fields, vLLM's samplers, and Imprint's own."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "examples": [
                {
                    "model": "smollm2-135m-instruct",
                    "input": "My cat is called Miso. Say hello to her.",
                    "max_output_tokens": 32,
                    "conversation": "alice",
                }
            ],
            **field_rules.RESPONSE,
        },
    )

    model: str | None = MODEL_NAME
    input: Input
    instructions: Text | None = Field(
        None, description="A message of the system before all others; no later response has it."
    )
    stream: bool | None = None
    store: bool | None = Field(
        None,
        description="False: no session learns, and the response is not kept. True: later requests can go on with the"
        " response (`previous_response_id`, `conversation`). Default: true, unless the request only reads a session.",
    )
    previous_response_id: str | None = Field(
        None, description="A kept response whose chat goes on; its session is the session of this request."
    )
    conversation: Conversation | None = Field(
        None, description="Names the session, whose newest kept response goes on, if there is one."
    )
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = Field(None, description="False: at most one call. Default: true.")
    text: ResponseText | None = None
    max_output_tokens: ChatUpTo | None = Field(None, description="Default, and more than fit: as many as fit.")
    temperature: Annotated[float, Field(ge=0, le=100)] | None = Field(
        None, description="Default: the temperature that `sampling` of the model suggests."
    )
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    metadata: Metadata | None = Field(None, description="Comes back with the response.")
    truncation: Annotated[Any, Unsupported(("disabled",))] = None
    background: Annotated[Any, Unsupported((False,))] = None
    include: Annotated[list[Included], Field(max_length=64, fail_fast=True)] | None = Field(
        None, description="Ignored, but for log-probabilities, which are a 400: no response of this server has more."
    )
    top_logprobs: Annotated[Any, Unsupported((0,))] = None
    prompt: Annotated[Any, Unsupported()] = None
    context_management: Annotated[Any, Unsupported(([],))] = None
    stream_options: Annotated[Any, Field(description="A hint; ignored.")] = None
    max_tool_calls: Annotated[Any, Field(description="Of tools of the server, of which there are none.")] = None
    user: str | None = Field(
        None, description="Names the session only where the server's setting `IMPRINT_USER_SESSIONS` says so."
    )
    session: SessionId | None = Field(
        None, description="The session whose memory is used and updated, without going on with its newest response."
    )
    adapt: AdaptMode | None = ADAPT
    learn: LearnMode | None = LEARN
    recall: bool | None = RECALL
    learn_tool_results: bool | None = LEARN_TOOL_RESULTS
    on_disconnect: OnDisconnect | None = ON_DISCONNECT

    @model_validator(mode="after")
    def _combinations(self) -> "ResponseRequest":
        require_foreign(self.model_extra)
        for name in ("previous_response_id", "session"):
            if self.conversation is not None and getattr(self, name) is not None:
                raise BadRequest(f"Give 'conversation' or {name!r}, not two of them.", param=name)
        if self.store is False and self.adapt not in (None, "predict"):
            raise BadRequest(f"'store': false learns nothing, but 'adapt' is '{self.adapt}'.", param="adapt")
        return self

    @property
    def conversation_id(self) -> str | None:
        """Return the id of the conversation."""
        return self.conversation.id if isinstance(self.conversation, NamedConversation) else self.conversation

    def fields(self) -> Json:
        """Return the fields of the chat completion that this request asks for, without messages and session."""
        names = (
            *("model", "stream", "temperature", "top_p", "parallel_tool_calls", "user"),
            *("adapt", "learn", "recall", "learn_tool_results", "on_disconnect"),
            *Samplers.model_fields,
        )
        fields = (self.model_extra or {}) | {name: getattr(self, name) for name in names}
        fields |= {"max_completion_tokens": self.max_output_tokens, "tool_choice": _chat_choice(self.tool_choice)}
        if self.store is False and (self.session or self.conversation or self.previous_response_id):
            fields["adapt"] = "predict"
        if self.tools is not None:
            fields["tools"] = [
                {"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in self.tools
            ]
        form = self.text.format if self.text is not None else None
        if form is not None:
            schema = {"json_schema": {"schema": form.json_schema}} if form.type == "json_schema" else {}
            fields["response_format"] = {"type": form.type} | schema
        return fields

    def echoed(self) -> Json:
        """Return the fields of the request that come back with the response."""
        form = self.text.format if self.text is not None else None
        text = {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "text": {"format": text},
            "tool_choice": self.tool_choice or "auto",
            "tools": [tool.model_dump() for tool in self.tools or ()],
            "truncation": "disabled",
        }


def _chat_choice(choice: Any) -> Any:
    """Return a `tool_choice` in the form of chat completions, which have the name of a function one level deeper."""
    match choice:
        case {"type": "function", "name": str(name)}:
            return {"type": "function", "function": {"name": name}}
        case {"type": "allowed_tools", "tools": [*tools], **more}:
            return {"type": "allowed_tools", "allowed_tools": more | {"tools": [_chat_choice(tool) for tool in tools]}}
    return choice


def chat_messages(items: str | Sequence[Item]) -> list[Json]:
    """Return the input as messages of a chat, without references.

    Calls belong to the assistant's message right before them, as in a reply; or to one without a content.
    """
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages: list[Json] = []
    joins = False  # whether a call belongs to the last message
    for item in items:
        match item:
            case InputMessage():
                messages.append({"role": item.role, "content": _text(item.content)})
                joins = item.role == "assistant"
            case InputCall():
                if not joins:
                    messages.append({"role": "assistant", "content": None})
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                messages[-1].setdefault("tool_calls", []).append(call)
                joins = True
            case InputResult():
                messages.append({"role": "tool", "content": _text(item.output), "tool_call_id": item.call_id})
                joins = False
    return messages


def require_calls_before(messages: Iterable[Json], items: str | Sequence[Item], field: str = "input") -> None:
    """Raise BadRequest for the result of a call that stands neither in the messages before nor in an item before.

    field: the request's field that has the items.
    """
    called = {call["id"] for message in messages for call in message.get("tool_calls", ())}
    for index, item in enumerate(() if isinstance(items, str) else items):
        if isinstance(item, InputCall):
            called.add(item.call_id)
        elif isinstance(item, InputResult) and item.call_id not in called:
            param = f"{field}.{index}.call_id"
            raise BadRequest(f"'{param}' must be the id of a call before it, got {item.call_id[:80]!r}.", param=param)


def _text(content: str | Sequence[InputPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class OutputText(BaseModel):
    """The text of a message."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputMessage(BaseModel):
    """A message of the assistant."""

    id: str
    type: Literal["message"]
    status: ItemStatus
    role: Literal["assistant"]
    content: list[OutputText]


class OutputCall(BaseModel):
    """A call of a function; `arguments` is JSON, unless the reply was cut off."""

    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


class ResponseFault(BaseModel):
    """The error that ended a response."""

    code: str
    message: str


class ResponseIncomplete(BaseModel):
    """The reason for an early end."""

    reason: Literal["max_output_tokens"]


class InputDetails(BaseModel):
    """The parts of an input. No prompt is cached."""

    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(BaseModel):
    """The parts of an output."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    """The numbers of tokens of one request."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ConversationName(BaseModel):
    """The conversation of a response."""

    id: str


class ResponseReply(BaseModel):
    """The reply of `POST /v1/responses` and `GET /v1/responses/{id}`."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    error: ResponseFault | None
    incomplete_details: ResponseIncomplete | None
    instructions: str | None
    conversation: ConversationName | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage | OutputCall]
    parallel_tool_calls: bool
    previous_response_id: str | None
    store: bool = Field(description="Whether the response is kept.")
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    adaptation: Adaptation | None


class ResponseDeleted(BaseModel):
    """The reply of `DELETE /v1/responses/{id}`."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]
