"""The bodies of Ollama's routes: requests and replies."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PrivateAttr, Tag, model_validator

from model.text.tool_calls import MAX_CALLS
from service.errors import BadRequest
from service.http.generation_schemas import (
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    RepetitionPenalty,
    Stop,
)
from service.http.schemas import (
    ADAPT,
    INT32,
    LEARN,
    MAX_MESSAGES,
    ON_DISCONNECT,
    RECALL,
    SESSION,
    WHOLE,
    Body,
    OnDisconnect,
    Seed,
    SessionId,
    Text,
    ToolName,
    Unsupported,
    text_or_list,
)
from service.http.text_formats import as_chat, require_foreign
from service.http.tool_schemas import Tools
from service.types import SUGGESTED_SAMPLING, Adaptation, AdaptMode, LearnMode

MAX_TEXTS = 2048  # OpenAI's limit

Json = dict[str, Any]


def without_tag(model: str) -> str:
    """Return the name of a model without the tag `latest`, which Ollama's clients add."""
    return re.sub(":latest(?=@|$)", "", model, count=1)


class OllamaError(BaseModel):
    """The body of an error of Ollama's routes."""

    error: str


class OllamaOptions(Body):
    """Ollama's options of sampling. Options of loading, such as `num_ctx`, are ignored."""

    model_config = ConfigDict(extra="allow")

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32), WHOLE] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    num_predict: Annotated[int, Field(ge=-2, le=INT32), WHOLE] | None = Field(
        None, description="The most tokens; default, 0, -1 and -2: as many as fit."
    )
    repeat_penalty: RepetitionPenalty | None = None
    repeat_last_n: Annotated[int, Field(ge=-1, le=INT32), WHOLE] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None

    def fields(self) -> Json:
        """Return the options by OpenAI's and llama.cpp's names."""
        require_foreign(self.model_extra, "options.")
        given = {name: value for name, value in self if value is not None}
        num_predict = given.pop("num_predict", 0)
        return given | ({"n_predict": num_predict} if num_predict > 0 else {})


class OllamaRequest(Body):
    """The fields that Ollama's chats and texts share, and Imprint's own."""

    model_config = ConfigDict(extra="allow")

    model: str
    stream: bool | None = Field(None, description="Default: true.")
    format: Literal["", "json"] | dict[str, Any] | None = Field(
        None, description="`json`, or the JSON Schema that the text must follow."
    )
    options: OllamaOptions | None = None
    keep_alive: Annotated[Any, Field(description="A hint; ignored.")] = None
    think: Annotated[Any, Field(description="A hint; ignored.")] = None
    logprobs: Annotated[Any, Unsupported((False,))] = None
    top_logprobs: Annotated[Any, Unsupported((0,))] = None
    session: SessionId | None = SESSION
    adapt: AdaptMode | None = ADAPT
    learn: LearnMode | None = LEARN
    recall: bool | None = RECALL
    on_disconnect: OnDisconnect | None = ON_DISCONNECT

    @property
    def streams(self) -> bool:
        return self.stream is not False

    def fields(self) -> Json:
        """Return the fields of a completion, without the prompt."""
        require_foreign(self.model_extra)
        own = {name: getattr(self, name) for name in ("session", "adapt", "learn", "recall", "on_disconnect")}
        fields: Json = {"model": without_tag(self.model), "stream": self.streams, "think": self.think}
        fields |= (self.model_extra or {}) | own | {"keep_alive": self.keep_alive}
        if self.options is not None:
            fields |= self.options.fields()
        if self.format == "json":
            fields["response_format"] = {"type": "json_object"}
        elif self.format:
            fields["json_schema"] = self.format
        return fields


class OllamaFunction(Body):
    """A tool that was called, and its arguments."""

    model_config = ConfigDict(extra="ignore")

    name: ToolName
    arguments: dict[str, Any]


class OllamaCall(Body):
    """A call of a tool, which the assistant made."""

    model_config = ConfigDict(extra="ignore")

    function: OllamaFunction


class OllamaMessage(Body):
    """A message of a chat. Unknown fields, such as `thinking`, are ignored."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "user", "assistant", "tool"]
    content: Text | None = None
    images: Annotated[Any, Unsupported(([],))] = None
    tool_calls: Annotated[list[OllamaCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None = None
    tool_name: ToolName | None = Field(None, description="The tool whose result a message of the role `tool` is.")


def _chat_messages(messages: Sequence[OllamaMessage]) -> list[Json]:
    """Return OpenAI's messages. Calls get ids: a result answers the first call of its tool that has none before it.

    Raises BadRequest for a result without a call.
    """
    found, waiting = list[Json](), list[tuple[str, str]]()
    for index, message in enumerate(messages):
        plain: Json = {"role": message.role, "content": message.content or ""}
        if message.tool_calls:
            plain["tool_calls"] = []
            for number, call in enumerate(message.tool_calls):
                name, arguments = call.function.name, json.dumps(call.function.arguments, ensure_ascii=False)
                waiting.append((f"call_{index}_{number}", name))
                function = {"name": name, "arguments": arguments}
                plain["tool_calls"].append({"id": waiting[-1][0], "type": "function", "function": function})
        elif message.role == "tool":
            answered = [call for call in waiting if message.tool_name in (None, call[1])]
            if not answered:
                param = f"messages.{index}"
                raise BadRequest(f"'{param}' must be the result of a call in a message before it.", param=param)
            waiting.remove(answered[0])
            plain["tool_call_id"] = answered[0][0]
        found.append(plain)
    return found


class OllamaChatRequest(OllamaRequest):
    """The body of `POST /api/chat`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "smollm2-135m-instruct",
                    "messages": [{"role": "user", "content": "My cat is called Miso. Say hello to her."}],
                    "options": {"num_predict": 32},
                    "session": "alice",
                }
            ]
        }
    )

    messages: Annotated[list[OllamaMessage], Field(max_length=MAX_MESSAGES, fail_fast=True)] = Field(
        [], description="None: the answer says that the model is loaded."
    )
    tools: Tools | None = Field(None, description="Functions that the reply may call; never learned.")
    _chat: ChatCompletionRequest | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _as_chat(self) -> "OllamaChatRequest":
        messages = _chat_messages(self.messages)
        self._chat = as_chat(self.fields() | {"messages": messages, "tools": self.tools}) if messages else None
        return self

    @property
    def chat(self) -> ChatCompletionRequest | None:
        """Return the chat completion that this request asks for; None for a request without messages."""
        return self._chat


class OllamaGenerateRequest(OllamaRequest):
    """The body of `POST /api/generate`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "smollm2-135m-instruct", "prompt": "Say hello.", "options": {"num_predict": 32}}]
        }
    )

    prompt: Text = Field("", description="A message of the user. Empty: the answer says that the model is loaded.")
    system: Text | None = None
    raw: bool | None = Field(None, description="True: the prompt is a text that goes on, and no message.")
    suffix: Text | None = Field(None, description="The text after the gap that the answer fills, as in completions.")
    template: Annotated[Any, Unsupported(("",))] = None
    images: Annotated[Any, Unsupported(([],))] = None
    context: Annotated[Any, Unsupported(([],))] = None

    def as_text(self) -> CompletionRequest:
        """Return the completion that a raw prompt or a gap asks for; a raw prompt is sampled as a chat is."""
        fields: Json = {"max_tokens": -1} | self.fields() | {"prompt": self.prompt, "suffix": self.suffix}
        if "n_predict" in fields:
            del fields["max_tokens"]
        if "temperature" not in fields and not self.suffix:
            fields = asdict(SUGGESTED_SAMPLING) | fields
        return CompletionRequest.model_validate(fields)

    def as_chat(self) -> ChatCompletionRequest:
        """Return the chat completion that a prompt asks for."""
        system = [ChatMessage(role="system", content=self.system)] if self.system else []
        return as_chat(self.fields() | {"messages": [*system, ChatMessage(role="user", content=self.prompt)]})


class OllamaCalled(BaseModel):
    """A tool that the assistant calls; `arguments` are empty if the reply was cut off within them."""

    name: str
    arguments: dict[str, Any]


class OllamaCallReply(BaseModel):
    """A call of a tool."""

    function: OllamaCalled


class OllamaMessageReply(BaseModel):
    """A message of the assistant, or the next part of it."""

    role: Literal["assistant"]
    content: str
    tool_calls: list[OllamaCallReply] | None = None


class OllamaReply(BaseModel):
    """The fields of every line and reply; the counts and times (ns) come with `done`, after the commit."""

    model: str
    created_at: str
    done: bool
    done_reason: Literal["stop", "length", "load"] | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None
    adaptation: Adaptation | None = None


class OllamaChatReply(OllamaReply):
    """The reply of `POST /api/chat`, or a line of its stream."""

    message: OllamaMessageReply


class OllamaGenerateReply(OllamaReply):
    """The reply of `POST /api/generate`, or a line of its stream."""

    response: str


class OllamaDetails(BaseModel):
    """The kind of a model; what Ollama tells of a file and this server does not know is empty."""

    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class OllamaModel(BaseModel):
    """A name of the served model."""

    name: str
    model: str
    modified_at: str
    size: int = Field(description="Bytes of the base's files.")
    digest: str
    details: OllamaDetails


class OllamaModels(BaseModel):
    """The reply of `GET /api/tags`."""

    models: list[OllamaModel]


class OllamaRunning(OllamaModel):
    """A name of the served model, which is always loaded."""

    expires_at: str
    size_vram: int = Field(description="Always 0: what a GPU holds of it is not told.")
    context_length: int


class OllamaRunningModels(BaseModel):
    """The reply of `GET /api/ps`."""

    models: list[OllamaRunning]


class OllamaVectorRequest(Body):
    """The fields that both of Ollama's routes of vectors share. Other fields are ignored."""

    model_config = ConfigDict(extra="ignore")

    model: str


class OllamaEmbedRequest(OllamaVectorRequest):
    """The body of `POST /api/embed`."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "smollm2-135m-instruct", "input": ["My cat is called Miso."]}]}
    )

    input: Annotated[
        Annotated[Text, Tag("<text>")]
        | Annotated[list[Text], Field(max_length=MAX_TEXTS, fail_fast=True), Tag("<list>")],
        Discriminator(
            text_or_list, custom_error_type="input_type", custom_error_message="should be a string or a list of strings"
        ),
    ] = Field([], description="Texts. None: the answer says that the model is loaded.")
    dimensions: Annotated[int, Field(ge=1, le=INT32), WHOLE] | None = Field(
        None, description="Only the encoder's own number is accepted: its vectors cannot be cut."
    )
    truncate: bool | None = Field(None, description="Ignored: a text that is too long is a 400, and none is cut.")


class OllamaEmbeddings(BaseModel):
    """The reply of `POST /api/embed`; each vector has the length 1."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OllamaEmbeddingRequest(OllamaVectorRequest):
    """The body of `POST /api/embeddings`, Ollama's older route."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "smollm2-135m-instruct", "prompt": "My cat is called Miso."}]}
    )

    prompt: Text = Field("", description="A text. Empty: the answer is an empty vector.")


class OllamaEmbedding(BaseModel):
    """The reply of `POST /api/embeddings`."""

    embedding: list[float]


class OllamaShowRequest(Body):
    """The body of `POST /api/show`. Other fields are ignored."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"examples": [{"model": "smollm2-135m-instruct"}]})

    model: str


class OllamaShown(BaseModel):
    """The reply of `POST /api/show`."""

    modelfile: str
    parameters: str = Field(description="The sampling of a request that names no temperature.")
    template: str
    modified_at: str
    details: OllamaDetails
    model_info: dict[str, str | int]
    capabilities: list[str]


class OllamaVersion(BaseModel):
    """The reply of `GET /api/version`."""

    version: str
