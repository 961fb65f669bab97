"""OpenAI's routes: models, completions and chat completions, streamed or not."""

import time
from collections.abc import Sequence
from contextlib import aclosing
from typing import Annotated, cast

from fastapi import APIRouter, Header, Path, Response

from model.text.sampling import SamplingParams
from service.errors import BadRequest, NotFound
from service.http.dependencies import (
    LargeReply,
    LearningRequest,
    LearningRequestDep,
    SessionsDep,
    idempotency_headers,
)
from service.http.json_route import JsonRoute
from service.http.openapi import ERROR_RESPONSES, streamed_responses
from service.http.replies import ChatCompletion, Completion, Model, ModelList, PolicyShape
from service.http.response_formats import ChatFormatter, CompletionFormatter, Json, LatencyRecorder, ResponseFormatter
from service.http.schemas import ChatCompletionRequest, CompletionRequest, GenerationRequest, SessionId, session_id
from service.http.sse import EventStream, until_disconnect
from service.turns.completion import CompletionJob, GenerationOptions
from service.turns.prompts import ChatPrompt, TextPrompt, TokenPrompt
from service.turns.sessions import Sessions
from service.types import SUGGESTED_SAMPLING

DEFAULT_MAX_TOKENS = 16  # OpenAI's default for completions; chat completions have none
STARTED = int(time.time())

router = APIRouter(prefix="/v1", route_class=JsonRoute, responses=ERROR_RESPONSES, tags=["OpenAI"])

SessionHeader = Annotated[
    SessionId | None,
    Header(alias="X-Imprint-Session", description="Names the session if the body's `session` doesn't."),
]
ModelId = Annotated[str, Path(description="The model's id.", examples=["smollm2-135m-instruct"])]


@router.get("/models", summary="List the served models")
async def list_models(sessions: SessionsDep) -> ModelList:
    """List the language model and the policies that are served."""
    policies = [_policy(name, sessions) for name in sessions.loaded_model.policies]
    return ModelList(object="list", data=[_model(sessions), *policies])


@router.get("/models/{id:path}", summary="Describe a served model")
async def get_model(id: ModelId, sessions: SessionsDep) -> Model:
    """Describe the language model or a policy, by its id."""
    if id in sessions.loaded_model.policies:
        return _policy(id, sessions)
    _require_model(id, sessions)
    return _model(sessions)


@router.post(
    "/completions",
    summary="Continue a text",
    response_model=Completion,
    responses=streamed_responses("CompletionChunk"),
)
async def create_completion(
    body: CompletionRequest, learning: LearningRequestDep, session: SessionHeader = None
) -> Json | Response:
    """Continue each prompt; with a session, use the session's memory and update the memory."""
    sessions = learning.sessions
    _require_model(body.model, sessions)
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    generation = GenerationOptions(
        max_tokens=_within_context("max_tokens", max_tokens, sessions),
        sampling=_sampling(body, sessions),
        stop=body.stops,
        n=body.n or 1,
        echo=bool(body.echo),
        logprobs=body.logprobs,
    )
    completion_job = _completion_job(body, _prompts(body, sessions), generation, session, learning.if_match)
    formatter = CompletionFormatter(sessions, body, completion_job, learning.ctx, _latency_recorder(learning))
    return await _generate(learning, completion_job, formatter, body.on_disconnect)


@router.post(
    "/chat/completions",
    summary="Reply to a chat",
    response_model=ChatCompletion,
    responses=streamed_responses("ChatChunk"),
)
async def create_chat_completion(
    body: ChatCompletionRequest, learning: LearningRequestDep, session: SessionHeader = None
) -> Json | Response:
    """Reply to a chat; with a session, use the session's memory and update the memory with what is new in the chat."""
    sessions = learning.sessions
    _require_model(body.model, sessions)
    limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    generation = GenerationOptions(
        max_tokens=_within_context(limit, getattr(body, limit), sessions),
        sampling=_sampling(body, sessions),
        stop=body.stops,
        n=body.n or 1,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    prompt = ChatPrompt([message.plain() for message in body.messages])
    completion_job = _completion_job(body, [prompt], generation, session, learning.if_match)
    formatter = ChatFormatter(sessions, body, completion_job, learning.ctx, _latency_recorder(learning))
    return await _generate(learning, completion_job, formatter, body.on_disconnect)


async def _generate(
    learning: LearningRequest,
    completion_job: CompletionJob,
    formatter: ResponseFormatter,
    on_disconnect: str | None,
) -> Json | Response:
    """Run the turn, and answer with a stream or with one reply.

    The first event of a stream is awaited here: an error before that event has a status of its own.
    """
    receive = learning.request.receive
    if completion_job.stream:
        work = learning.sessions.generate(learning.ctx, completion_job)
        events = await until_disconnect(receive, work, on_disconnect)
        headers = idempotency_headers(learning.ctx)
        return EventStream(learning.request, formatter.stream(events), headers=headers, on_disconnect=on_disconnect)
    reply = await until_disconnect(receive, _whole_reply(learning, completion_job, formatter), on_disconnect)
    learning.response.headers.update(idempotency_headers(learning.ctx))
    if isinstance(reply, list):
        return LargeReply(reply, learning.response)
    return reply


async def _whole_reply(
    learning: LearningRequest, completion_job: CompletionJob, formatter: ResponseFormatter
) -> Json | list[bytes]:
    async with aclosing(await learning.sessions.generate(learning.ctx, completion_job)) as events:
        return await formatter.reply(events)


def _model(sessions: Sessions) -> Model:
    return Model(
        id=sessions.model_id,
        object="model",
        created=STARTED,
        owned_by="imprint",
        fingerprints=sessions.fingerprints | {"session": sessions.loaded_model.text_fingerprint},
        sampling=SUGGESTED_SAMPLING,
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
    return Model(
        id=name,
        object="model",
        created=STARTED,
        owned_by="imprint",
        fingerprints={"policy": sessions.loaded_model.policy_fingerprints[name]},
        policy=shape,
    )


def _require_model(model: str, sessions: Sessions) -> None:
    if model != sessions.model_id:
        raise NotFound(
            f"The model {model[:80]!r} does not exist; this server has {sessions.model_id!r}.",
            param="model",
            code="model_not_found",
        )


def _within_context(param: str, max_tokens: int | None, sessions: Sessions) -> int | None:
    """Return `max_tokens`. Raises BadRequest if the number exceeds the model's context."""
    if max_tokens is not None and max_tokens > sessions.context:
        raise BadRequest(
            f"'{param}' exceeds the context of {sessions.context} tokens, got {max_tokens}.",
            param=param,
            code="context_length_exceeded",
        )
    return max_tokens


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
    prompts = cast(list[str | list[int]], body.prompt if several else [body.prompt])
    return [
        TextPrompt(prompt)
        if isinstance(prompt, str)
        else _token_prompt(f"prompt.{index}" if several else "prompt", prompt, sessions)
        for index, prompt in enumerate(prompts)
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
    """Return the job of the turn. The session is the body's, else the header's, else OpenAI's `user`.

    Raises:
        BadRequest: the fields contradict each other, or `user` cannot name a session.
    """
    session = body.session or header
    if session is None and body.user is not None:
        session = session_id(body.user, "user")
    if session is None:
        given = {"adapt": body.adapt, "learn": body.learn, "recall": body.recall, "If-Match": if_match}
        for param, value in given.items():
            if value is not None:
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
        recall=body.recall,
    )


def _latency_recorder(learning: LearningRequest) -> LatencyRecorder:
    return LatencyRecorder(learning.metrics, learning.request.state.arrived)
