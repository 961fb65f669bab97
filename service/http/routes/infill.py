"""llama.cpp's own routes: for filling in the middle, which editors ask while someone types, and for going on."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

from fastapi import APIRouter, Response

from model.text.infill import Cut
from model.text.tool_calls import ReplyPiece
from service.http.dependencies import ImprintHeadersDep, LearningRequest, LearningRequestDep, PathId
from service.http.infill_schemas import InfillReply, InfillRequest, OneTextCompletionRequest, OneTextRequest
from service.http.json_route import JsonRoute
from service.http.openapi import ERROR_RESPONSES
from service.http.openapi_examples import EXAMPLES
from service.http.response_formats import timings
from service.http.routes.openai import answer, latency_recorder, text_job
from service.http.sse import EventStream
from service.http.text_formats import TextFormatter, compact
from service.turns.completion import TurnEnd
from service.turns.completion_job import CompletionJob

Json = dict[str, Any]

router = APIRouter(route_class=JsonRoute, responses=ERROR_RESPONSES, tags=["Infill"])
_EVENTS = [{"index": 0, "content": "a + b", "stop": False}, EXAMPLES["InfillReply"][0] | {"content": ""}]
_EVENT: Json = {"type": "object", "required": ["index", "content", "stop"]}
_DATA: Json = {"type": "string", "contentMediaType": "application/json", "contentSchema": _EVENT}
STREAMED: dict[int | str, Json] = {
    200: {
        "description": "The text of the gap, or a stream of its parts, each with `content`; the last one is the reply.",
        "content": {
            EventStream.media_type: {
                "itemSchema": {"type": "object", "properties": {"data": _DATA}, "required": ["data"]},
                "example": "".join(f"data: {compact(event)}\n\n" for event in _EVENTS),
            }
        },
    }
}


@router.post("/infill", summary="Fill a gap in a text", response_model=InfillReply, responses=STREAMED)
async def infill(body: InfillRequest, learning: LearningRequestDep, headers: ImprintHeadersDep) -> Json | Response:
    """Return the text between two texts, with the session's memory; nothing is learned unless `adapt` says so."""
    job = await text_job(body.completion, learning, headers, body.snippets)
    formatter = InfillFormatter(learning, job, body.response_fields)
    if job.adapt == "predict" and body.asks_nothing:
        end = TurnEnd(["length"], 0, 0, None)
        return _chosen_alone(await formatter.whole([], end), body, learning)
    return _chosen_alone(await answer(learning, body.completion, job, formatter, InfillStream), body, learning)


@router.post(
    "/completion", summary="Continue a text, as llama.cpp does", response_model=InfillReply, responses=STREAMED
)
async def complete_one_text(
    body: OneTextCompletionRequest, learning: LearningRequestDep, headers: ImprintHeadersDep
) -> Json | Response:
    """Continue one prompt as `/v1/completions` does, to the end of the text unless it has `n_predict`."""
    job = await text_job(body.completion, learning, headers)
    formatter = InfillFormatter(learning, job, body.response_fields)
    return _chosen_alone(await answer(learning, body.completion, job, formatter, InfillStream), body, learning)


@router.post(
    "/v1/sessions/{id}/infill", summary="Fill a gap with a session", response_model=InfillReply, responses=STREAMED
)
async def infill_with_session(
    session: PathId, body: InfillRequest, learning: LearningRequestDep, headers: ImprintHeadersDep
) -> Json | Response:
    """Do as `/infill` does, for editors that can name a session in nothing but the address of their server."""
    return await infill(body, learning, replace(headers, session=session))


class InfillStream(EventStream):
    """A stream of server-sent events that ends with the reply, without `[DONE]`."""

    closing = ""


class InfillFormatter(TextFormatter):
    """The format of llama.cpp's own routes. fields: the paths of the fields of the reply; None = all."""

    def __init__(self, learning: LearningRequest, job: CompletionJob, fields: Sequence[str] | None) -> None:
        super().__init__(latency_recorder(learning))
        self._model, self._id, self._cut, self._fields = (
            learning.sessions.model_id,
            learning.ctx.id,
            job.cut or Cut(),
            fields,
        )
        self._has_new_line = False

    async def whole(self, parts: Sequence[ReplyPiece], end: TurnEnd) -> Json:
        content = "".join(part.text for part in parts)
        stop = end.stops[0] if end.stops else None
        reply: Json = {
            "id": f"infill-{self._id}",
            "index": 0,
            "content": content,
            "model": self._model,
            "stop": True,
            "stop_type": "limit" if end.finish_reasons[0] == "length" else "eos" if stop is None else "word",
            "stopping_word": stop or "",
            "tokens_predicted": end.completion_tokens,
            "tokens_evaluated": end.prompt_tokens,
            "tokens_cached": 0,
            "has_new_line": self._has_new_line or "\n" in content,
            "truncated": bool(self._cut),
            "tokens_cut": asdict(self._cut),
            "timings": timings(end),
            "adaptation": end.adaptation and asdict(end.adaptation),
        }
        return reply if self._fields is None else _chosen(reply, self._fields)

    def piece(self, piece: ReplyPiece) -> Iterable[str]:
        self._has_new_line = self._has_new_line or "\n" in piece.text
        yield compact({"index": 0, "content": piece.text, "stop": False})

    async def closing(self, end: TurnEnd) -> Iterable[str]:
        return [compact(await self.whole([], end))]


def _chosen_alone(reply: Json | Response, body: OneTextRequest, learning: LearningRequest) -> Json | Response:
    """Return the reply; where the request chose its fields, past the model of the reply, which has more of them."""
    if body.response_fields is None or isinstance(reply, Response):
        return reply
    return Response(compact(reply), headers=dict(learning.response.headers), media_type="application/json")


def _chosen(reply: Json, paths: Sequence[str]) -> Json:
    """Return the fields of a reply by their paths, as llama.cpp does; paths of no field are left out."""
    chosen: Json = {}
    for path in paths:
        value: Any = reply
        for name in path.split("/"):
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            chosen[path] = value
    return chosen
