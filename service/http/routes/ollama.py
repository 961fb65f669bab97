"""Ollama's routes: chats, texts and the list of models, as streams of JSON lines or as whole replies."""

import re
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from service.http.dependencies import (
    ImprintHeadersDep,
    LearningRequest,
    LearningRequestDep,
    RulesDep,
    SessionsDep,
)
from service.http.generation_schemas import (
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    RepetitionPenalty,
    Stop,
)
from service.http.json_route import JsonRoute
from service.http.openapi import SCHEMAS, error_responses
from service.http.openapi_examples import EXAMPLES
from service.http.response_formats import LatencyRecorder
from service.http.routes.openai import STARTED, answer, chat_job, latency_recorder, text_job
from service.http.schemas import (
    INT32,
    MAX_MESSAGES,
    ON_DISCONNECT,
    RECALL,
    WHOLE,
    Body,
    OnDisconnect,
    Seed,
    SessionId,
    Text,
    Unsupported,
)
from service.http.sse import EventStream
from service.http.text_formats import TextFormatter, as_chat, compact, require_foreign
from service.turns.completion import TurnEnd
from service.turns.idempotency import RequestContext
from service.turns.sessions import Sessions
from service.types import SUGGESTED_SAMPLING, Adaptation, AdaptMode, LearnMode

OLLAMA_VERSION = "0.6.4"  # of the interface: the first with all that these routes have, schemas and capabilities
LINES = "application/x-ndjson"

Json = dict[str, Any]


class OllamaError(BaseModel):
    """The body of an error of Ollama's routes."""

    error: str


router = APIRouter(
    prefix="/api",
    route_class=JsonRoute,
    tags=["Ollama"],
    responses=error_responses(OllamaError),
)


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
    session: SessionId | None = Field(
        None, description="The session whose memory is used and updated; none = the frozen base."
    )
    adapt: AdaptMode | None = Field(None, description="Read and write the memory, only write, or only read.")
    learn: LearnMode | None = Field(None, description="The part that is learned.")
    recall: bool | None = RECALL
    on_disconnect: OnDisconnect | None = ON_DISCONNECT

    @property
    def streams(self) -> bool:
        return self.stream is not False

    def fields(self) -> Json:
        """Return the fields of a completion, without the prompt."""
        require_foreign(self.model_extra)
        own = {name: getattr(self, name) for name in ("session", "adapt", "learn", "recall", "on_disconnect")}
        fields: Json = {"model": _without_tag(self.model), "stream": self.streams, "think": self.think}
        fields |= (self.model_extra or {}) | own | {"keep_alive": self.keep_alive}
        if self.options is not None:
            fields |= self.options.fields()
        if self.format == "json":
            fields["response_format"] = {"type": "json_object"}
        elif self.format:
            fields["json_schema"] = self.format
        return fields


class OllamaMessage(Body):
    """A message of a chat. Unknown fields, such as `thinking`, are ignored."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "user", "assistant", "tool"]
    content: Text | None = None
    images: Annotated[Any, Unsupported(([],))] = None
    tool_calls: Annotated[Any, Unsupported(([],))] = None


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
    tools: Annotated[Any, Unsupported(([],))] = None
    _chat: ChatCompletionRequest | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _as_chat(self) -> "OllamaChatRequest":
        messages = [ChatMessage(role=each.role, content=each.content or "") for each in self.messages]
        self._chat = as_chat(self.fields() | {"messages": messages}) if messages else None
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
    suffix: Annotated[Any, Unsupported(("",))] = None
    template: Annotated[Any, Unsupported(("",))] = None
    images: Annotated[Any, Unsupported(([],))] = None
    context: Annotated[Any, Unsupported(([],))] = None

    def as_text(self) -> CompletionRequest:
        """Return the completion that a raw prompt asks for, sampled as a chat is."""
        fields: Json = {"max_tokens": -1} | self.fields() | {"prompt": self.prompt}
        if "n_predict" in fields:
            del fields["max_tokens"]
        if "temperature" not in fields:
            fields = asdict(SUGGESTED_SAMPLING) | fields
        return CompletionRequest.model_validate(fields)

    def as_chat(self) -> ChatCompletionRequest:
        """Return the chat completion that a prompt asks for."""
        system = [ChatMessage(role="system", content=self.system)] if self.system else []
        return as_chat(self.fields() | {"messages": [*system, ChatMessage(role="user", content=self.prompt)]})


class OllamaMessageReply(BaseModel):
    """A message of the assistant, or the next part of it."""

    role: Literal["assistant"]
    content: str


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


def _lines(reply: type[BaseModel]) -> dict[int | str, Json]:
    """Return the description of an answer that may be a stream of JSON lines."""
    (example,) = EXAMPLES[reply.__name__]
    content: Json = {LINES: {"itemSchema": {"$ref": SCHEMAS + reply.__name__}, "example": f"{compact(example)}\n"}}
    return {200: {"description": "The reply, or a stream of its parts as JSON lines.", "content": content}}


@router.post(
    "/chat",
    summary="Reply to a chat, for clients of Ollama",
    response_model=OllamaChatReply,
    response_model_exclude_unset=True,
    responses=_lines(OllamaChatReply),
)
async def ollama_chat(
    body: OllamaChatRequest, learning: LearningRequestDep, headers: ImprintHeadersDep
) -> Json | Response:
    """Reply to a chat; with a session, use the session's memory and update the memory with what is new in the chat."""
    formatter = ChatLines(learning.sessions, learning.ctx, latency_recorder(learning))
    if body.chat is None:
        return _loaded(body, learning, formatter)
    return await answer(learning, body.chat, chat_job(body.chat, learning, headers), formatter, LineStream)


@router.post(
    "/generate",
    summary="Answer a prompt, for clients of Ollama",
    response_model=OllamaGenerateReply,
    response_model_exclude_unset=True,
    responses=_lines(OllamaGenerateReply),
)
async def ollama_generate(
    body: OllamaGenerateRequest, learning: LearningRequestDep, headers: ImprintHeadersDep
) -> Json | Response:
    """Answer a prompt as a chat of one message; with `raw`, or by a base without a chat template, continue the text."""
    formatter = TextLines(learning.sessions, learning.ctx, latency_recorder(learning))
    if not body.prompt:
        return _loaded(body, learning, formatter)
    has_template = learning.sessions.loaded_model.tokenizer.has_chat_template
    if body.raw or not (has_template or body.system):
        text = body.as_text()
        return await answer(learning, text, text_job(text, learning, headers), formatter, LineStream)
    chat = body.as_chat()
    return await answer(learning, chat, chat_job(chat, learning, headers), formatter, LineStream)


@router.get("/tags", summary="List the models, for clients of Ollama")
async def ollama_tags(sessions: SessionsDep, rules: RulesDep) -> OllamaModels:
    """List the names of the language model."""
    model, details = sessions.loaded_model, _details(sessions)
    digest = model.fingerprints["base"].removeprefix("sha256:")
    return OllamaModels(
        models=[
            OllamaModel(
                name=name,
                model=name,
                modified_at=_time(STARTED),
                size=model.disk_bytes,
                digest=digest,
                details=details,
            )
            for name in rules.model_names
        ]
    )


@router.post("/show", summary="Describe a model, for clients of Ollama")
async def ollama_show(body: OllamaShowRequest, sessions: SessionsDep, rules: RulesDep) -> OllamaShown:
    """Describe the language model by one of its names."""
    rules.resolve_model(_without_tag(body.model))
    info: dict[str, str | int] = {
        "general.architecture": "imprint",
        "general.basename": sessions.model_id,
        "general.parameter_count": sessions.loaded_model.parameters,
        "imprint.context_length": sessions.context,
        "imprint.vocab_size": sessions.vocab_size,
    }
    return OllamaShown(
        modelfile="",
        parameters="\n".join(f"{name} {value:g}" for name, value in asdict(SUGGESTED_SAMPLING).items()),
        template="",
        modified_at=_time(STARTED),
        details=_details(sessions),
        model_info=info,
        capabilities=["completion"],
    )


@router.get("/version", summary="Read the version of Ollama's interface")
async def ollama_version() -> OllamaVersion:
    """Return the release of Ollama whose interface these routes have; `GET /version` has that of Imprint."""
    return OllamaVersion(version=OLLAMA_VERSION)


class LineStream(EventStream):
    """A stream of JSON lines."""

    media_type = LINES
    closing = ""

    @staticmethod
    def frame(event: str) -> str:
        return f"{event}\n"


class TextLines(TextFormatter):
    """The format of `/api/generate`."""

    def __init__(self, sessions: Sessions, ctx: RequestContext, latency: LatencyRecorder) -> None:
        super().__init__(latency)
        self._model, self._ctx = sessions.model_id, ctx

    def whole(self, text: str, end: TurnEnd) -> Json:
        prompt_ns, predicted_ns = round(1e6 * end.prompt_ms), round(1e6 * end.predicted_ms)
        return self.line(
            text,
            done_reason=end.finish_reasons[0],
            total_duration=prompt_ns + predicted_ns,
            load_duration=0,
            prompt_eval_count=end.prompt_tokens,
            prompt_eval_duration=prompt_ns,
            eval_count=end.completion_tokens,
            eval_duration=predicted_ns,
            adaptation=end.adaptation and asdict(end.adaptation),
        )

    def piece(self, text: str) -> str:
        return compact(self.line(text))

    def closing(self, end: TurnEnd) -> Iterable[str]:
        return [compact(self.whole("", end))]

    def line(self, text: str, **more: Any) -> Json:
        """Return a reply or a part of it; `more` comes with the last part."""
        return (
            {"model": self._model, "created_at": _time(self._ctx.created)}
            | self.text_fields(text)
            | {"done": bool(more)}
            | more
        )

    def text_fields(self, text: str) -> Json:
        """Return the field that has the text."""
        return {"response": text}


class ChatLines(TextLines):
    """The format of `/api/chat`."""

    def text_fields(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text}}


def _loaded(body: OllamaRequest, learning: LearningRequest, formatter: TextLines) -> Json:
    """Return the answer to a request for nothing but a loaded model. Raises NotFound for an unknown model."""
    learning.rules.resolve_model(_without_tag(body.model))
    return formatter.line("", done_reason="load")


def _without_tag(model: str) -> str:
    """Return the name of a model without the tag `latest`, which Ollama's clients add."""
    return re.sub(":latest(?=@|$)", "", model, count=1)


def _details(sessions: Sessions) -> OllamaDetails:
    return OllamaDetails(
        parent_model="",
        format="",
        family="imprint",
        families=["imprint"],
        parameter_size=f"{sessions.loaded_model.parameters / 1e6:.1f}M",
        quantization_level="",
    )


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
