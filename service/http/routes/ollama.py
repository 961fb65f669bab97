"""Ollama's routes: chats and texts, as streams of JSON lines or as whole replies; vectors, and the list of models."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from model.text.tool_calls import ReplyPiece
from service.concurrency import LARGE, dump_json_pieces, run_off_loop
from service.http.dependencies import (
    ImprintHeadersDep,
    LargeReply,
    LearningRequest,
    LearningRequestDep,
    RulesDep,
    SessionsDep,
)
from service.http.json_route import UndeclaredJsonRoute
from service.http.ollama_schemas import (
    OllamaChatReply,
    OllamaChatRequest,
    OllamaDetails,
    OllamaEmbedding,
    OllamaEmbeddingRequest,
    OllamaEmbeddings,
    OllamaEmbedRequest,
    OllamaError,
    OllamaGenerateReply,
    OllamaGenerateRequest,
    OllamaModel,
    OllamaModels,
    OllamaRequest,
    OllamaRunning,
    OllamaRunningModels,
    OllamaShown,
    OllamaShowRequest,
    OllamaVersion,
    without_tag,
)
from service.http.openapi import SCHEMAS, error_responses
from service.http.openapi_examples import EXAMPLES
from service.http.response_formats import LatencyRecorder
from service.http.routes.openai import STARTED, answer, chat_job, chat_prompt, latency_recorder, text_job
from service.http.sse import EventStream, until_disconnect
from service.http.text_formats import TextFormatter, compact, parsed_arguments
from service.turns.completion import TurnEnd
from service.turns.embeddings import embed, require_dimensions
from service.turns.idempotency import RequestContext
from service.turns.sessions import Sessions
from service.types import SUGGESTED_SAMPLING

OLLAMA_VERSION = "0.6.4"  # of the interface: the first with all that these routes have, schemas and capabilities
LINES = "application/x-ndjson"
NEVER = "9999-12-31T23:59:59Z"  # when a model that stays loaded is unloaded

Json = dict[str, Any]


router = APIRouter(
    prefix="/api",
    route_class=UndeclaredJsonRoute,
    tags=["Ollama"],
    responses=error_responses(OllamaError),
)


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
    tools = "" if body.chat is None else chat_prompt(body.chat).tools
    formatter = ChatLines(learning.sessions, learning.ctx, latency_recorder(learning), tools)
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
    if body.raw or body.suffix or not (has_template or body.system):
        text = body.as_text()
        return await answer(learning, text, await text_job(text, learning, headers), formatter, LineStream)
    chat = body.as_chat()
    return await answer(learning, chat, chat_job(chat, learning, headers), formatter, LineStream)


@router.get("/tags", summary="List the models, for clients of Ollama")
async def ollama_tags(sessions: SessionsDep, rules: RulesDep) -> OllamaModels:
    """List the names of the language model."""
    return OllamaModels(models=[OllamaModel(**_model_fields(name, sessions)) for name in rules.model_names])


@router.get("/ps", summary="List the loaded models, for clients of Ollama")
async def ollama_ps(sessions: SessionsDep, rules: RulesDep) -> OllamaRunningModels:
    """List the names of the language model, which stays loaded."""
    model = sessions.loaded_model
    more: Json = {
        "expires_at": NEVER,
        "size_vram": 0,
        "context_length": model.context,
    }
    return OllamaRunningModels(
        models=[OllamaRunning(**_model_fields(name, sessions), **more) for name in rules.model_names]
    )


@router.post("/embed", summary="Turn texts into vectors, for clients of Ollama", response_model=OllamaEmbeddings)
async def ollama_embed(
    body: OllamaEmbedRequest, sessions: SessionsDep, rules: RulesDep, request: Request, response: Response
) -> Json | Response:
    """Return a vector of the meaning of each text, by the server's sentence encoder. No session is used."""
    rules.resolve_model(without_tag(body.model))
    require_dimensions(body.dimensions, sessions.loaded_model)
    started = time.perf_counter_ns()
    texts = [body.input] if isinstance(body.input, str) else body.input
    embeddings = await until_disconnect(request.receive, embed(sessions, texts, "input"))
    reply = {
        "model": sessions.model_id,
        "embeddings": (vector.tolist() for vector in embeddings.vectors),
        "total_duration": time.perf_counter_ns() - started,
        "load_duration": 0,
        "prompt_eval_count": embeddings.tokens,
    }
    return LargeReply(await run_off_loop(LARGE, dump_json_pieces, reply), response)


@router.post("/embeddings", summary="Turn a text into a vector, for older clients of Ollama")
async def ollama_embedding(
    body: OllamaEmbeddingRequest, sessions: SessionsDep, rules: RulesDep, request: Request
) -> OllamaEmbedding:
    """Return the vector of one text as `POST /api/embed` does."""
    rules.resolve_model(without_tag(body.model))
    texts = [body.prompt] if body.prompt else []
    embeddings = await until_disconnect(request.receive, embed(sessions, texts, "prompt"))
    return OllamaEmbedding(embedding=embeddings.vectors[0].tolist() if texts else [])


@router.post("/show", summary="Describe a model, for clients of Ollama")
async def ollama_show(body: OllamaShowRequest, sessions: SessionsDep, rules: RulesDep) -> OllamaShown:
    """Describe the language model by one of its names."""
    rules.resolve_model(without_tag(body.model))
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
        capabilities=["completion", "tools"],
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

    def __init__(self, sessions: Sessions, ctx: RequestContext, latency: LatencyRecorder, tools: str = "") -> None:
        super().__init__(latency, tools)
        self._model, self._ctx = sessions.model_id, ctx

    async def whole(self, parts: Sequence[ReplyPiece], end: TurnEnd) -> Json:
        prompt_ns, predicted_ns = round(1e6 * end.prompt_ms), round(1e6 * end.predicted_ms)
        return self.line(
            parts,
            done_reason=end.finish_reasons[0],
            total_duration=prompt_ns + predicted_ns,
            load_duration=0,
            prompt_eval_count=end.prompt_tokens,
            prompt_eval_duration=prompt_ns,
            eval_count=end.completion_tokens,
            eval_duration=predicted_ns,
            adaptation=end.adaptation and asdict(end.adaptation),
        )

    def piece(self, piece: ReplyPiece) -> Iterable[str]:
        return [compact(self.line([piece]))]

    async def closing(self, end: TurnEnd) -> Iterable[str]:
        return [compact(await self.whole([], end))]

    def line(self, parts: Sequence[ReplyPiece], **more: Any) -> Json:
        """Return a reply or a part of it; `more` comes with the last part."""
        return (
            {"model": self._model, "created_at": _time(self._ctx.created)}
            | self.content_fields(parts)
            | {"done": bool(more)}
            | more
        )

    def content_fields(self, parts: Sequence[ReplyPiece]) -> Json:
        """Return the field that has the content."""
        return {"response": "".join(part.text for part in parts)}


class ChatLines(TextLines):
    """The format of `/api/chat`. A stream has each call in one piece, as Ollama's has."""

    _call: ReplyPiece | None = None  # of a stream: the last call, to which more may come

    def piece(self, piece: ReplyPiece) -> Iterable[str]:
        if piece.call is None:
            yield from super().piece(piece)
        elif piece.name is None:
            assert self._call is not None
            self._call = replace(self._call, text=self._call.text + piece.text)
        else:
            yield from self._last_call()
            self._call = piece

    async def closing(self, end: TurnEnd) -> Iterable[str]:
        return [*self._last_call(), *await super().closing(end)]

    def _last_call(self) -> Iterator[str]:
        if self._call is not None:
            yield compact(self.line([self._call]))

    def content_fields(self, parts: Sequence[ReplyPiece]) -> Json:
        content = "".join(part.text for part in parts if part.call is None)
        calls = [
            {"function": {"name": part.name, "arguments": parsed_arguments(part.text)}}
            for part in parts
            if part.call is not None
        ]
        return {"message": {"role": "assistant", "content": content} | ({"tool_calls": calls} if calls else {})}


def _loaded(body: OllamaRequest, learning: LearningRequest, formatter: TextLines) -> Json:
    """Return the answer to a request for nothing but a loaded model. Raises NotFound for an unknown model."""
    learning.rules.resolve_model(without_tag(body.model))
    return formatter.line([], done_reason="load")


def _model_fields(name: str, sessions: Sessions) -> Json:
    """Return what the lists of models say of a name of the language model."""
    model = sessions.loaded_model
    return {
        "name": name,
        "model": name,
        "modified_at": _time(STARTED),
        "size": model.disk_bytes,
        "digest": model.fingerprints["base"].removeprefix("sha256:"),
        "details": _details(sessions),
    }


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
