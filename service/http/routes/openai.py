"""OpenAI's routes: models, completions and chat completions, streamed or not."""

import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict, replace
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Path, Response

from model.text.infill import Cut, Snippet
from model.text.sampling import SamplingParams
from service.errors import BadRequest
from service.http.dependencies import (
    ClientRules,
    ImprintHeaders,
    ImprintHeadersDep,
    LargeReply,
    LearningRequest,
    LearningRequestDep,
    RulesDep,
    SessionsDep,
    idempotency_headers,
)
from service.http.generation_schemas import MAX_NAME_CHARS, ChatCompletionRequest, CompletionRequest, GenerationRequest
from service.http.json_route import JsonRoute
from service.http.openapi import ERROR_RESPONSES, streamed_responses
from service.http.replies import (
    ChatCompletion,
    Completion,
    LearnerShape,
    Model,
    ModelList,
    ModelMeta,
    PolicyList,
    PolicyShape,
)
from service.http.response_formats import ChatFormatter, CompletionFormatter, Json, LatencyRecorder, ToolChatFormatter
from service.http.schemas import session_of_user
from service.http.sse import EventStream, until_disconnect
from service.http.text_formats import Formatter
from service.turns.completion_job import CompletionJob, GenerationOptions
from service.turns.infill import fill_in
from service.turns.prompts import ChatPrompt, PartsPrompt, Prompt, TextPrompt, TokenPrompt
from service.turns.sessions import Sessions
from service.types import OPENAI_SAMPLING, SUGGESTED_SAMPLING

DEFAULT_MAX_TOKENS = 16  # OpenAI's default for completions; chat completions have none
REPEAT_LAST_N = 64  # llama.cpp's default for `repeat_penalty`
MAX_IGNORED = 16  # names of ignored fields that an answer has
STARTED = int(time.time())

router = APIRouter(prefix="/v1", route_class=JsonRoute, responses=ERROR_RESPONSES, tags=["OpenAI"])

ModelId = Annotated[str, Path(description="The model's id.", examples=["smollm2-135m-instruct"])]


@router.get("/models", summary="List the names of the served model")
async def list_models(sessions: SessionsDep, rules: RulesDep) -> ModelList:
    """List the names of the language model, which completions take; `GET /v1/policies` lists the policies."""
    return ModelList(object="list", data=[_model(name, sessions) for name in rules.model_names])


@router.get("/policies", summary="List the served policies")
async def list_policies(sessions: SessionsDep) -> PolicyList:
    """List the policies, which `act`, `predict` and `observe` take."""
    return PolicyList(object="list", data=[_policy(name, sessions) for name in _policies(sessions)])


@router.get("/models/{id:path}", summary="Describe a served model")
async def get_model(id: ModelId, sessions: SessionsDep, rules: RulesDep) -> Model:
    """Describe the language model or a policy, by its id."""
    if id in _policies(sessions):
        return _policy(id, sessions)
    rules.resolve_model(id)
    return _model(id, sessions)


@router.post(
    "/completions",
    summary="Continue a text",
    response_model=Completion,
    responses=streamed_responses("CompletionChunk"),
)
async def create_completion(
    body: CompletionRequest, learning: LearningRequestDep, headers: ImprintHeadersDep
) -> Json | Response:
    """Continue each prompt; with a session, use the session's memory and update the memory."""
    completion_job = await text_job(body, learning, headers)
    formatter = CompletionFormatter(learning.sessions, body, completion_job, learning.ctx, latency_recorder(learning))
    return await answer(learning, body, completion_job, formatter)


async def text_job(
    body: CompletionRequest, learning: LearningRequest, headers: ImprintHeaders, extra: Sequence[Snippet] | None = None
) -> CompletionJob:
    """Return the job of a completion, which fills a gap where the request has a suffix or `extra`, other texts.

    A job that fills a gap only predicts, unless body or header say otherwise: pauses in typing would teach beginnings
    of words.

    Raises NotFound and BadRequest.
    """
    sessions = learning.sessions
    fills = bool(body.suffix) or extra is not None
    if fills and body.temperature is None:
        body = body.model_copy(update={"temperature": 0.0})
    time_limit = body.t_max_predict_ms or 0
    generation = GenerationOptions(
        max_tokens=_max_tokens(body, DEFAULT_MAX_TOKENS),
        sampling=_sampling(body, sessions),
        stop=body.stops,
        n=body.n or 1,
        echo=bool(body.echo),
        logprobs=body.logprobs if body.logprobs is not None else body.n_probs or None,
        best_of=body.best_of,
        prompt_logprobs=body.prompt_logprobs,
        grammar=body.form,
        max_ms=time_limit if time_limit > 0 else None,
        min_indent=body.n_indent or 0,
    )
    if not fills:
        return _completion_job(body, _prompts(body, sessions), generation, learning, headers)
    assert isinstance(body.prompt, str)
    prompt, cut, ends = await fill_in(
        body.prompt, body.suffix or "", extra or (), sessions.loaded_model, generation.max_tokens
    )
    sampling = generation.sampling
    sampling = replace(sampling, stop_token_ids=sampling.stop_token_ids | ends)
    job = _completion_job(body, [prompt], replace(generation, sampling=sampling), learning, headers)
    return replace(job, adapt=body.adapt or headers.adapt or "predict", cut=cut)


@router.post(
    "/chat/completions",
    summary="Reply to a chat",
    response_model=ChatCompletion,
    responses=streamed_responses("ChatChunk"),
)
async def create_chat_completion(
    body: ChatCompletionRequest, learning: LearningRequestDep, headers: ImprintHeadersDep
) -> Json | Response:
    """Reply to a chat; with a session, use the session's memory and update the memory with what is new in the chat."""
    completion_job = chat_job(body, learning, headers)
    kind = ToolChatFormatter if body.offered_tools else ChatFormatter
    formatter = kind(learning.sessions, body, completion_job, learning.ctx, latency_recorder(learning))
    return await answer(learning, body, completion_job, formatter)


def chat_job(body: ChatCompletionRequest, learning: LearningRequest, headers: ImprintHeaders) -> CompletionJob:
    """Return the job of a chat completion, which every shape of a chat asks for. Raises NotFound and BadRequest."""
    sessions = learning.sessions
    generation = GenerationOptions(
        max_tokens=_max_tokens(body, None),
        sampling=_sampling(body, sessions),
        stop=body.stops,
        n=body.n or 1,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
        grammar=body.form,
    )
    return _completion_job(body, [chat_prompt(body)], generation, learning, headers)


def chat_prompt(body: ChatCompletionRequest) -> ChatPrompt:
    """Return the prompt of a chat completion. Raises BadRequest."""
    messages = [message.plain() for message in body.messages]
    tools = "" if body.offered_tools is None else body.offered_tools.listed
    return ChatPrompt(messages, body.ending, tools, bool(body.learn_tool_results))


async def answer(
    learning: LearningRequest,
    body: GenerationRequest,
    completion_job: CompletionJob,
    formatter: Formatter,
    stream_type: type[EventStream] = EventStream,
) -> Json | Response:
    """Run the turn, and answer with a stream or with one reply.

    The first event of a stream is awaited here: an error before that event has a status of its own.
    """
    receive, on_disconnect = learning.request.receive, body.on_disconnect
    notes = _ignored_header(body, learning.rules) | _cut_header(completion_job.cut)
    if completion_job.stream:
        work = learning.sessions.generate(learning.ctx, completion_job)
        events = await until_disconnect(receive, work, on_disconnect)
        headers = notes | idempotency_headers(learning.ctx)
        return stream_type(learning.request, formatter.stream(events), headers=headers, on_disconnect=on_disconnect)
    reply = await until_disconnect(receive, _whole_reply(learning, completion_job, formatter), on_disconnect)
    learning.response.headers.update(notes | idempotency_headers(learning.ctx))
    if isinstance(reply, list):
        return LargeReply(reply, learning.response)
    return reply


async def _whole_reply(
    learning: LearningRequest, completion_job: CompletionJob, formatter: Formatter
) -> Json | list[bytes]:
    async with aclosing(await learning.sessions.generate(learning.ctx, completion_job)) as events:
        return await formatter.reply(events)


def _model(name: str, sessions: Sessions) -> Model:
    return Model(
        id=name,
        object="model",
        created=STARTED,
        owned_by="imprint",
        fingerprints=sessions.fingerprints | {"session": sessions.loaded_model.text_fingerprint},
        sampling=SUGGESTED_SAMPLING,
        root=sessions.model_id,
        max_model_len=sessions.context,
        meta=ModelMeta(n_ctx=sessions.context, n_vocab=sessions.vocab_size, n_params=sessions.num_parameters),
    )


def _policies(sessions: Sessions) -> list[str]:
    """Return the names of the learners of tables and of the policies of fixed shapes."""
    return [*sessions.loaded_model.tabular, *sessions.loaded_model.policies]


def _policy(name: str, sessions: Sessions) -> Model:
    loaded = sessions.loaded_model
    model = Model(
        id=name,
        object="model",
        created=STARTED,
        owned_by="imprint",
        fingerprints={"policy": loaded.policy_fingerprints[name]},
    )
    if name in loaded.tabular:
        limits = loaded.tabular[name].config
        model.learner = LearnerShape(
            task=limits.task, columns=limits.columns, labels=limits.labels, actions=limits.arms
        )
        return model
    config = loaded.policies[name].config
    model.policy = PolicyShape(
        task=config.task,
        observation=config.observation_size,
        context=config.context,
        features=config.features,
        actions=config.actions,
        lowest=config.lowest,
        highest=config.highest,
    )
    return model


def _require_token(param: str, token_id: int, sessions: Sessions) -> None:
    """Raise BadRequest unless the vocabulary has the token."""
    if token_id >= sessions.vocab_size:
        raise BadRequest(
            f"'{param}' must be a token id of the vocabulary, below {sessions.vocab_size}, got {token_id}.",
            param=param,
        )


def _sampling(body: GenerationRequest, sessions: Sessions) -> SamplingParams:
    bias = {int(key): value for key, value in (body.logit_bias or {}).items()}
    for token_id in bias:
        _require_token(f"logit_bias.{token_id}", token_id, sessions)
    for position, token_id in enumerate(body.stop_token_ids or ()):
        _require_token(f"stop_token_ids.{position}", token_id, sessions)
    # A chat that names no temperature gets what suits the base: at temperature 1 a small one writes nonsense.
    suggested = isinstance(body, ChatCompletionRequest) and body.temperature is None
    default = SUGGESTED_SAMPLING if suggested else OPENAI_SAMPLING
    penalty, window = body.repetition_penalty or body.repeat_penalty or 1.0, body.repeat_last_n
    if window is None:
        window = -1 if body.repeat_penalty is None else REPEAT_LAST_N
    return SamplingParams(
        temperature=default.temperature if body.temperature is None else body.temperature,
        top_p=default.top_p if body.top_p is None else body.top_p,
        seed=body.seed,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=default.frequency_penalty if body.frequency_penalty is None else body.frequency_penalty,
        logit_bias=bias,
        top_k=max(0, body.top_k or 0),
        min_p=body.min_p or 0.0,
        typical_p=body.typical_p or 1.0,
        repetition_penalty=penalty,
        repetition_window=None if window < 0 else window,
        min_tokens=body.min_tokens or 0,
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=frozenset(body.stop_token_ids or ()),
    )


def _max_tokens(body: CompletionRequest | ChatCompletionRequest, default: int | None) -> int | None:
    """Return the largest number of tokens to generate; None = as many as fit. Raises BadRequest."""
    newer = body.max_completion_tokens if isinstance(body, ChatCompletionRequest) else None
    given = next((value for value in (newer, body.max_tokens, body.n_predict) if value is not None), default)
    max_tokens = None if given == -1 else given
    if max_tokens is not None and (body.min_tokens or 0) > max_tokens:
        raise BadRequest(
            f"'min_tokens' may be {max_tokens} (the most tokens), got {body.min_tokens}.", param="min_tokens"
        )
    return max_tokens


def _prompts(body: CompletionRequest, sessions: Sessions) -> list[Prompt]:
    """Return the prompts: a list of numbers, or of numbers and texts, is one prompt."""
    prompt = body.prompt
    if isinstance(prompt, str) or any(isinstance(part, int) for part in prompt):
        return [_prompt("prompt", prompt, sessions)]
    return [_prompt(f"prompt.{index}", one, sessions) for index, one in enumerate(prompt)]


def _prompt(param: str, prompt: Any, sessions: Sessions) -> Prompt:
    if isinstance(prompt, str):
        return TextPrompt(prompt)
    for position, part in enumerate(prompt):
        if isinstance(part, int):
            _require_token(f"{param}.{position}", part, sessions)
    return TokenPrompt(prompt) if str not in set(map(type, prompt)) else PartsPrompt(prompt)


def named_session(
    model: str | None, session: str | None, user: str | None, learning: LearningRequest, headers: ImprintHeaders
) -> str | None:
    """Return the session of a completion: the body's, else the header's, else that of the model's name, else OpenAI's
    `user` where the server's settings say so.

    Raises:
        NotFound: the server has no such model.
        BadRequest: the name of the model cannot name a session.
    """
    _, session_of_model = learning.rules.resolve_model(model)
    session = session or headers.session or session_of_model
    if session is None and user and learning.rules.user_sessions:
        session = session_of_user(user)
    return session


def _completion_job(
    body: GenerationRequest,
    prompts: list[Prompt],
    generation: GenerationOptions,
    learning: LearningRequest,
    headers: ImprintHeaders,
) -> CompletionJob:
    """Return the job of the turn.

    The mode is the body's, else the header's, else that of the model's name, else that of the API key.

    Raises:
        NotFound: the server has no such model.
        BadRequest: the fields contradict each other.
    """
    mode_of_model, _ = learning.rules.resolve_model(body.model)
    session = named_session(body.model, body.session, body.user, learning, headers)
    if session is None:
        header = None if headers.adapt == "predict" else headers.adapt
        given: dict[str, object] = {"adapt": body.adapt, "learn": body.learn, "recall": body.recall}
        given |= {"X-Imprint-Adapt": header, "If-Match": learning.if_match}
        for param, value in given.items():
            if value is not None:
                raise BadRequest(f"'{param}' needs a session; name one in 'session'.", param=param)
    adapt = body.adapt or headers.adapt or mode_of_model or learning.ctx.tenant.adapt
    choices = len(prompts) * generation.candidates
    if choices > 1 and body.learn in ("completion", "all"):
        raise BadRequest(
            f"'learn': '{body.learn}' needs a single completion, this request asks for {choices}.",
            param="learn",
        )
    if generation.candidates > 1 and adapt == "observe":
        asked = "n" if generation.best_of is None else "best_of"
        raise BadRequest(
            f"'adapt': 'observe' generates nothing, so '{asked}' must be 1, got {generation.candidates}.", param="adapt"
        )
    return CompletionJob(
        session=session,
        adapt=adapt,
        learn=body.learn,
        prompts=prompts,
        generation=generation,
        if_match=learning.if_match,
        stream=bool(body.stream),
        recall=body.recall,
    )


def _ignored_header(body: GenerationRequest, rules: ClientRules) -> dict[str, str]:
    """Return the header that names the ignored fields of a request. Raises BadRequest if none may be ignored."""
    ignored = body.ignored
    if ignored and rules.strict_fields:
        name = ignored[0]
        raise BadRequest(f"'{name}' has no effect on this server (IMPRINT_STRICT_FIELDS).", param=name)
    if body.user is not None and not rules.user_sessions:
        ignored = [*ignored, "user"]
    shown = [quote(name[:MAX_NAME_CHARS], safe=".") for name in ignored[:MAX_IGNORED]]
    return {"X-Imprint-Ignored": ", ".join(shown)} if shown else {}


def _cut_header(cut: Cut | None) -> dict[str, str]:
    """Return the header that says how many tokens of a prompt around a gap were left out."""
    return {"X-Imprint-Cut": ", ".join(f"{name}={tokens}" for name, tokens in asdict(cut).items())} if cut else {}


def latency_recorder(learning: LearningRequest) -> LatencyRecorder:
    """Return what measures the tokens' latency of a request."""
    return LatencyRecorder(learning.metrics, learning.request.state.arrived)
