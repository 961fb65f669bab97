"""llama.cpp's own routes: for filling in the middle, which editors ask while someone types, and for going on."""

import math
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

from fastapi import APIRouter, Response

from model.text.infill import Cut
from model.text.tool_calls import ReplyPiece
from service.concurrency import LARGE, dump_json_pieces, run_off_loop
from service.errors import BadRequest
from service.http.dependencies import ImprintHeadersDep, LearningRequest, LearningRequestDep, PathId
from service.http.generation_schemas import MAX_BIASES, CompletionRequest
from service.http.infill_schemas import InfillReply, InfillRequest, OneTextCompletionRequest, OneTextRequest
from service.http.json_route import JsonRoute
from service.http.openapi import ERROR_RESPONSES
from service.http.openapi_examples import EXAMPLES
from service.http.response_formats import LARGE_REPLY, chat_token, timings
from service.http.routes.openai import answer, latency_recorder, text_job
from service.http.sse import EventStream
from service.http.text_formats import TextFormatter, TurnEvent, compact
from service.turns.completion import Delta, TokenLogprob, TurnEnd
from service.turns.completion_job import CompletionJob
from service.turns.prompts import text_of
from service.turns.run import TurnRestarted

Json = dict[str, Any]

router = APIRouter(route_class=JsonRoute, responses=ERROR_RESPONSES, tags=["Infill"])
_EVENTS = [
    {"index": 0, "content": "a + b", "tokens": [64, 488, 293], "stop": False},
    EXAMPLES["InfillReply"][0] | {"content": ""},
]
_EVENT: Json = {"type": "object", "required": ["index", "content", "tokens", "stop"]}
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
    completion = await _biased(body, learning)
    job = _with_chances(body, await text_job(completion, learning, headers, body.snippets))
    formatter = InfillFormatter(learning, job, body)
    if job.adapt == "predict" and body.asks_nothing:
        end = TurnEnd(["length"], 0, 0, None)
        return _chosen_alone(await formatter.whole([], end), body, learning)
    return _chosen_alone(await answer(learning, completion, job, formatter, InfillStream), body, learning)


@router.post(
    "/completion", summary="Continue a text, as llama.cpp does", response_model=InfillReply, responses=STREAMED
)
async def complete_one_text(
    body: OneTextCompletionRequest, learning: LearningRequestDep, headers: ImprintHeadersDep
) -> Json | Response:
    """Continue one prompt as `/v1/completions` does, to the end of the text unless it has `n_predict`."""
    completion = await _biased(body, learning)
    job = _with_chances(body, await text_job(completion, learning, headers))
    formatter = InfillFormatter(learning, job, body)
    return _chosen_alone(await answer(learning, completion, job, formatter, InfillStream), body, learning)


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
    """The format of llama.cpp's own routes."""

    def __init__(self, learning: LearningRequest, job: CompletionJob, body: OneTextRequest) -> None:
        super().__init__(latency_recorder(learning))
        self._model, self._id, self._cut = learning.sessions.model_id, learning.ctx.id, job.cut or Cut()
        self._job, self._body, self._tokenizer = job, body, learning.sessions.loaded_model.tokenizer
        self._has_new_line = False
        self._forget()

    async def reply(self, events: AsyncIterator[TurnEvent]) -> Json | list[bytes]:
        reply = await super().reply(events)
        assert isinstance(reply, dict)
        if len(reply.get("completion_probabilities") or ()) < LARGE_REPLY:
            return reply
        return await run_off_loop(LARGE, dump_json_pieces, reply)

    async def whole(self, parts: Sequence[ReplyPiece], end: TurnEnd) -> Json:
        content = "".join(part.text for part in parts)
        stop = end.stops[0] if end.stops else None
        prompt = self._job.prompts[0]
        reply: Json = {
            "id": f"infill-{self._id}",
            "index": 0,
            "content": content,
            "tokens": self._token_ids if self._body.return_tokens else [],
            "completion_probabilities": await run_off_loop(self.work, self._written),
            "prompt": await run_off_loop(end.prompt_tokens, text_of, prompt, self._tokenizer),
            "generation_settings": _settings(self._job),
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
        fields = self._body.response_fields
        return _chosen(reply, fields) if fields else reply

    @property
    def work(self) -> int:
        return LARGE if len(self._chances) >= LARGE_REPLY else 0

    def take(self, event: Delta | TurnRestarted) -> None:
        super().take(event)
        if isinstance(event, TurnRestarted):
            self._forget()
        else:
            self._token_ids += event.token_ids
            self._chances += event.logprobs

    def _forget(self) -> None:
        self._token_ids, self._chances = list[int](), list[TokenLogprob]()

    def piece(self, piece: ReplyPiece) -> Iterable[str]:
        self._has_new_line = self._has_new_line or "\n" in piece.text
        part = {"index": 0, "content": piece.text, "tokens": self._token_ids, "stop": False}
        chances = self._written()
        yield compact(part if chances is None else part | {"completion_probabilities": chances})
        self._forget()

    async def closing(self, end: TurnEnd) -> Iterable[str]:
        self._forget()
        return [compact(await self.whole([], end))]

    def _written(self) -> list[Json] | None:
        """Return the tokens with their alternatives; None if they are not asked for."""
        if self._job.generation.logprobs is None:
            return None
        chance, top = (_drawn, "top_probs") if self._job.generation.as_drawn else (_chance, "top_logprobs")
        return [
            chance(one.token_id, one.token, one.logprob or 0.0) | {top: [chance(*each) for each in one.top]}
            for one in self._chances
        ]


async def _biased(body: OneTextRequest, learning: LearningRequest) -> CompletionRequest:
    """Return the completion with the biases by token ids. Raises BadRequest."""
    encode, biases = learning.sessions.loaded_model.tokenizer.encode_inside, body.biases
    work = sum(len(key) for key, _ in biases if isinstance(key, str))
    by_token = await run_off_loop(work, _by_token, biases, encode)
    if len(by_token) > MAX_BIASES:
        message = f"'logit_bias' may be of {MAX_BIASES} tokens, got texts of {len(by_token)} tokens."
        raise BadRequest(message, param="logit_bias")
    return body.completion.model_copy(update={"logit_bias": by_token or None})


def _with_chances(body: OneTextRequest, job: CompletionJob) -> CompletionJob:
    """Return the job with the kind of probabilities that the request asks for."""
    as_drawn = bool(body.post_sampling_probs) and job.generation.logprobs is not None
    return replace(job, generation=replace(job.generation, as_drawn=as_drawn))


def _by_token(biases: Sequence[tuple[str | int, float]], encode: Callable[[str], list[int]]) -> dict[str, float]:
    by_token = dict[str, float]()
    for key, bias in biases:
        token_ids = [key] if isinstance(key, int) else encode(key)
        by_token |= dict.fromkeys(map(str, token_ids), bias)
    return by_token


def _chance(token_id: int, token: bytes, logprob: float) -> Json:
    return {"id": token_id} | chat_token(token, logprob)


def _drawn(token_id: int, token: bytes, logprob: float) -> Json:
    shown = _chance(token_id, token, logprob)
    return {name: shown[name] for name in ("id", "token", "bytes")} | {"prob": math.exp(logprob)}


def _settings(job: CompletionJob) -> Json:
    """Return the options of a job by llama.cpp's names."""
    options, sampling = job.generation, job.generation.sampling
    same = ("seed", "temperature", "top_k", "top_p", "min_p", "typical_p", "presence_penalty", "frequency_penalty")
    return {
        "n_predict": -1 if options.max_tokens is None else options.max_tokens,
        **{name: getattr(sampling, name) for name in same},
        "repeat_penalty": sampling.repetition_penalty,
        "repeat_last_n": -1 if sampling.repetition_window is None else sampling.repetition_window,
        "ignore_eos": sampling.ignore_eos,
        "stop": list(options.stop),
        "n_probs": options.logprobs or 0,
        "post_sampling_probs": options.as_drawn,
        "stream": job.stream,
    }


def _chosen_alone(reply: Json | Response, body: OneTextRequest, learning: LearningRequest) -> Json | Response:
    """Return the reply; where the request chose its fields, past the model of the reply, which has more of them."""
    if not body.response_fields or isinstance(reply, Response):
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
