"""OpenAI's routes: models, completions and chat completions, streamed or not."""

import json
import time
from collections.abc import Sequence
from contextlib import aclosing
from typing import Annotated, cast

from fastapi import APIRouter, Header, Path, Request, Response

from model.text.sampling import SamplingParams
from service.errors import BadRequest, NotFound
from service.http.openapi_examples import EXAMPLES
from service.http.replies import ChatCompletion, Completion, Model, ModelList, PolicyShape
from service.http.response_formats import ChatFormatter, CompletionFormatter, Json, LatencyRecorder, ResponseFormatter
from service.http.routes.common import (
    ERRORS,
    EventStream,
    LearningRequest,
    LearningRequestDep,
    SessionsDep,
    V1Route,
    get_metrics,
    idempotency_headers,
)
from service.http.schemas import ChatCompletionRequest, CompletionRequest, GenerationRequest, SessionId, session_id
from service.turns.sessions import (
    ChatPrompt,
    CompletionJob,
    Delta,
    GenerationOptions,
    RequestContext,
    Sessions,
    TextPrompt,
    TokenPrompt,
    TurnEnd,
    TurnRestarted,
)

DEFAULT_MAX_TOKENS = 16  # OpenAI's, for completions only
STARTED = int(time.time())

router = APIRouter(prefix="/v1", route_class=V1Route, responses=ERRORS, tags=["OpenAI"])

SessionHeader = Annotated[
    SessionId | None,
    Header(alias="X-Imprint-Session", description="Names the session if the body's `session` doesn't."),
]


ModelId = Annotated[str, Path(description="The model's id.", examples=["smollm2-135m-instruct"])]


def _streamed(chunk: str) -> dict[int | str, Json]:
    """The documentation of an answer that may be a stream of such chunks."""
    events = [json.dumps(example, separators=(",", ":")) for example in EXAMPLES[chunk]]
    return {
        200: {
            "description": "The completion; or its chunks, `adaptation` on those with a `finish_reason`.",
            "content": {
                "text/event-stream": {
                    "schema": {"type": "string"},
                    "example": "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]),
                }
            },
        }
    }


@router.get("/models", summary="List the served model")
async def list_models(sessions: SessionsDep) -> ModelList:
    """The served model, and the policies."""
    return ModelList(
        object="list", data=[_model(sessions), *(_policy(name, sessions) for name in sessions.loaded_model.policies)]
    )


@router.get("/models/{id:path}", summary="Describe the served model")
async def get_model(id: ModelId, sessions: SessionsDep) -> Model:
    """The served model or a policy, by its id."""
    if id in sessions.loaded_model.policies:
        return _policy(id, sessions)
    _require_model(id, sessions)
    return _model(sessions)


@router.post(
    "/completions", summary="Continue a text", response_model=Completion, responses=_streamed("CompletionChunk")
)
async def create_completion(
    body: CompletionRequest,
    sessions: SessionsDep,
    learning: LearningRequestDep,
    session: SessionHeader = None,
) -> Json | Response:
    """Continues each prompt; with a session, from its memory and teaching it."""
    _require_model(body.model, sessions)
    generation = GenerationOptions(
        max_tokens=_tokens("max_tokens", DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens, sessions),
        sampling=_sampling(body, sessions),
        stop=body.stops,
        n=body.n or 1,
        echo=bool(body.echo),
        logprobs=body.logprobs,
    )
    completion_job = _completion_job(body, _prompts(body, sessions), generation, session, learning.if_match)
    formatter = CompletionFormatter(sessions, body, completion_job, learning.ctx, _latency_recorder(learning.request))
    return await _answer(learning, sessions, completion_job, formatter, body.on_disconnect)


@router.post(
    "/chat/completions", summary="Reply to a chat", response_model=ChatCompletion, responses=_streamed("ChatChunk")
)
async def create_chat_completion(
    body: ChatCompletionRequest,
    sessions: SessionsDep,
    learning: LearningRequestDep,
    session: SessionHeader = None,
) -> Json | Response:
    """Replies to a chat; with a session, from its memory and teaching it what the chat adds."""
    _require_model(body.model, sessions)
    limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    generation = GenerationOptions(
        max_tokens=_tokens(limit, getattr(body, limit), sessions),
        sampling=_sampling(body, sessions),
        stop=body.stops,
        n=body.n or 1,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    prompt = ChatPrompt([message.plain() for message in body.messages])
    completion_job = _completion_job(body, [prompt], generation, session, learning.if_match)
    formatter = ChatFormatter(sessions, body, completion_job, learning.ctx, _latency_recorder(learning.request))
    return await _answer(learning, sessions, completion_job, formatter, body.on_disconnect)


def _model(sessions: Sessions) -> Model:
    return Model(
        id=sessions.model_id,
        object="model",
        created=STARTED,
        owned_by="imprint",
        fingerprints=dict(sessions.fingerprints),
    )


def _policy(name: str, sessions: Sessions) -> Model:
    config = sessions.loaded_model.policies[name].config
    shape = PolicyShape(
        task=config.task,
        observation=config.observation_size,
        context=config.context,
        features=config.features,
        actions=config.actions,
        lowest=config.lowest,
        highest=config.highest,
    )
    policy_fingerprints = {"policy": sessions.loaded_model.policy_fingerprints[name]}
    return Model(
        id=name,
        object="model",
        created=STARTED,
        owned_by="imprint",
        fingerprints=policy_fingerprints,
        policy=shape,
    )


def _require_model(model: str, sessions: Sessions) -> None:
    if model != sessions.model_id:
        raise NotFound(
            f"The model {model[:80]!r} does not exist; this server has {sessions.model_id!r}.",
            param="model",
            code="model_not_found",
        )


def _tokens(param: str, given: int | None, sessions: Sessions) -> int | None:
    if given is not None and given > sessions.context:
        raise BadRequest(
            f"'{param}' exceeds the context of {sessions.context} tokens, got {given}.",
            param=param,
            code="context_length_exceeded",
        )
    return given


def _outside_vocabulary(param: str, token_id: int, sessions: Sessions) -> BadRequest:
    return BadRequest(
        f"'{param}' must be a token id of the vocabulary, below {sessions.vocab_size}, got {token_id}.",
        param=param,
    )


def _sampling(body: GenerationRequest, sessions: Sessions) -> SamplingParams:
    bias = {int(key): value for key, value in (body.logit_bias or {}).items()}
    for token_id in bias:
        if token_id >= sessions.vocab_size:
            raise _outside_vocabulary(f"logit_bias.{token_id}", token_id, sessions)
    return SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=body.seed,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=bias,
    )


def _prompts(body: CompletionRequest, sessions: Sessions) -> list[TextPrompt | TokenPrompt | ChatPrompt]:
    several = isinstance(body.prompt, list) and not isinstance(body.prompt[0], int)
    given = cast(list[str | list[int]], body.prompt if several else [body.prompt])
    return [
        TextPrompt(prompt)
        if isinstance(prompt, str)
        else _token_prompt(f"prompt.{index}" if several else "prompt", prompt, sessions)
        for index, prompt in enumerate(given)
    ]


def _token_prompt(param: str, token_ids: list[int], sessions: Sessions) -> TokenPrompt:
    for position, token_id in enumerate(token_ids):
        if token_id >= sessions.vocab_size:
            raise _outside_vocabulary(f"{param}.{position}", token_id, sessions)
    return TokenPrompt(token_ids)


def _completion_job(
    body: GenerationRequest,
    prompts: Sequence[TextPrompt | TokenPrompt | ChatPrompt],
    generation: GenerationOptions,
    header: str | None,
    if_match: str | None,
) -> CompletionJob:
    """The turn to run. The session is the body's, else the header's, else OpenAI's `user`."""
    session = body.session or header
    if session is None and body.user is not None:
        session = session_id(body.user, "user")
    if session is None:
        for param, given in (("adapt", body.adapt), ("learn", body.learn), ("If-Match", if_match)):
            if given is not None:
                raise BadRequest(f"'{param}' needs a session; name one in 'session'.", param=param)
    choices = len(prompts) * generation.n
    if choices > 1 and body.learn in ("completion", "all"):
        raise BadRequest(
            f"'learn': '{body.learn}' needs a single completion, this request asks for {choices}.",
            param="learn",
        )
    if generation.n > 1 and body.adapt == "observe":
        raise BadRequest(f"'adapt': 'observe' generates nothing, so 'n' must be 1, got {generation.n}.", param="adapt")
    return CompletionJob(
        session=session,
        adapt=body.adapt,
        learn=body.learn,
        prompts=list(prompts),
        generation=generation,
        if_match=if_match,
        stream=bool(body.stream),
    )


def _latency_recorder(request: Request) -> LatencyRecorder:
    return LatencyRecorder(get_metrics(request), request.state.arrived)


async def _answer(
    learning: LearningRequest,
    sessions: Sessions,
    completion_job: CompletionJob,
    formatter: ResponseFormatter,
    on_disconnect: str | None,
) -> Json | Response:
    """Runs the turn, by default for as long as its client is there."""
    if completion_job.stream:
        events = await learning.run_until_disconnect(sessions.generate(learning.ctx, completion_job), on_disconnect)
        return EventStream(learning.request, events, formatter, on_disconnect)
    reply = await learning.run_until_disconnect(
        _collect_reply(sessions, learning.ctx, completion_job, formatter), on_disconnect
    )
    learning.response.headers.update(idempotency_headers(learning.request))
    return reply


async def _collect_reply(
    sessions: Sessions, ctx: RequestContext, completion_job: CompletionJob, formatter: ResponseFormatter
) -> Json:
    """The reply in one piece."""
    deltas: list[Delta] = []
    end: TurnEnd | None = None
    async with aclosing(await sessions.generate(ctx, completion_job)) as events:
        async for event in events:
            if isinstance(event, TurnEnd):
                end = event
            elif isinstance(event, TurnRestarted):
                deltas.clear()
            else:
                formatter.record_latency(event.choice)
                deltas.append(event)
    assert end is not None, "a turn ends with a TurnEnd"
    return formatter.reply(deltas, end)
