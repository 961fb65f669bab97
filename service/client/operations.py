"""The operations of the API, one function each: they say what to send and how to parse the answer, and send nothing.

`Client` and `AsyncClient` turn each function into a method of the same name, with its docstring and parameters (see
`transport.copy_signature`); so the docstrings here are those of the methods.

Parameters that many operations have:
    session: id of the session.
    on_disconnect: what becomes of the turn if the connection breaks; the server's default is "rollback".
    idempotency_key: a key under which the server applies the operation at most once; by default a new one.
    if_match: the version that the session must have; raises PreconditionFailed if it has another.
"""

import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypedDict, TypeVar, Unpack
from urllib.parse import quote, unquote, urlencode

from service.client.errors import ClientError
from service.http.policy_replies import Acted, ActedList, Labelled, PredictedList, Valued
from service.http.replies import (
    ChatChunk,
    ChatCompletion,
    Completion,
    CompletionChunk,
    Model,
    ModelList,
    Observed,
    Scored,
    Session,
    SessionDiff,
    SessionList,
    SessionLog,
)
from service.http.schemas import SESSION_ID
from service.types import AdaptMode, LearnMode

T = TypeVar("T")
Json = dict[str, Any]
Message = Mapping[str, Any]  # {"role": "user", "content": "…"}
Features = Mapping[str, float | str | bool | None] | Sequence[float | str | bool | None]  # columns; None = missing
OnDisconnect = Literal["rollback", "commit"]
IDEMPOTENCY_HEADER, SESSION_HEADER = "Idempotency-Key", "X-Imprint-Session"
_SESSION_IN_PATH = re.compile(r"/v1/sessions/([^/?]+)")


@dataclass(frozen=True)
class Operation(Generic[T]):
    """One call of the API. A retry sends the same operation with the same `Idempotency-Key`, so it is learned once.

    Attributes:
        method: the HTTP method.
        path: path and query, behind the server's address.
        parse: function that makes the result from the answer's body, or from each chunk of a stream.
        body: the JSON body, or raw bytes.
        headers: headers of this operation, in addition to those of every request.
    """

    method: str
    path: str
    parse: Callable[[bytes], T]
    body: Json | bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def session_header(self) -> dict[str, str]:
        """Return the header that names the session, by which a gateway finds the replica that has the session hot."""
        in_path = _SESSION_IN_PATH.match(self.path)
        in_body = self.body.get("session") if isinstance(self.body, dict) else None
        session = unquote(in_path[1]) if in_path else str(in_body or "")
        return {SESSION_HEADER: session} if re.fullmatch(SESSION_ID, session) else {}


class Options(TypedDict, total=False):
    """Options that both kinds of completion take. None means the same as leaving the option out."""

    session: str | None  # the session whose memory is read and taught; none = the frozen base
    adapt: AdaptMode | None
    learn: LearnMode | None
    recall: bool | None  # False: read and keep no episodes
    model: str | None  # default: the served model
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    n: int | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[str, float] | None
    on_disconnect: OnDisconnect | None
    idempotency_key: str | None
    if_match: int | None


class CompletionOptions(Options, total=False):
    """Options of a text completion."""

    echo: bool | None
    logprobs: int | None


class ChatOptions(Options, total=False):
    """Options of a chat completion."""

    logprobs: bool | None
    top_logprobs: int | None


def model() -> Operation[Model]:
    """Return the served model."""
    return Operation("GET", "/v1/models", lambda content: ModelList.model_validate_json(content).data[0])


# Sessions.


def create(
    session: str,
    *,
    adapt: AdaptMode | None = None,
    learn: LearnMode | None = None,
    recall: bool | None = None,
    keep_text: bool | None = None,
    ttl_s: int | None = None,
    model: str | None = None,
    floor: float | None = None,
    explore: float | None = None,
    holdout: float | None = None,
    control: Literal["uniform", "first"] | None = None,
    if_match: int | None = None,
) -> Operation[Session]:
    """Create the session, or replace the options of an existing one.

    Args:
        session: id of the session.
        adapt: the session's default for the option `adapt` of a request.
        learn: the session's default for the option `learn` of a request.
        recall: False: the session keeps no episodes, and its replies read none.
        keep_text: keep the learned texts, so that they can be unlearned.
        ttl_s: seconds after its last use at which the session is erased; 0 = never.
        model: the policy that the session belongs to; none = the language model.
        floor: of "bandit": least probability of each allowed action.
        explore: of "bandit": largest probability of all actions together but the likeliest one.
        holdout: of "bandit": share of the decisions that `control` takes, to measure the lift.
        control: of "bandit": who decides in the holdout, any allowed action equally often or the first one.
        if_match: the version that the session must have.
    """
    body = _drop_none(adapt=adapt, learn=learn, recall=recall, keep_text=keep_text, ttl_s=ttl_s, model=model)
    body |= _drop_none(floor=floor, explore=explore, holdout=holdout, control=control)
    return Operation("PUT", _path(session), Session.model_validate_json, body, _if_match_header(if_match))


def get(session: str) -> Operation[Session]:
    """Return the session: its version, size, gain and options. Raises NotFound."""
    return Operation("GET", _path(session), Session.model_validate_json)


def delete(session: str, *, if_match: int | None = None) -> Operation[None]:
    """Erase the session and all that it has learned. Raises NotFound."""
    return Operation("DELETE", _path(session), _parse_nothing, headers=_if_match_header(if_match))


def sessions_page(after: str | None, size: int) -> Operation[SessionList]:
    """Return a page of at most `size` sessions, in the order of their ids, starting after the id `after`."""
    return Operation("GET", f"/v1/sessions?{_query(after=after, limit=size)}", SessionList.model_validate_json)


# Learning and scoring.


def observe(
    session: str,
    text: str | None = None,
    *,
    messages: Sequence[Message] | None = None,
    features: Features | None = None,
    label: str | int | None = None,
    target: float | None = None,
    examples: Sequence[Mapping[str, Any]] | None = None,
    predict: bool | None = None,
    model: str | None = None,
    source: str | None = None,
    recall: bool | None = None,
    on_disconnect: OnDisconnect | None = None,
    idempotency_key: str | None = None,
    if_match: int | None = None,
) -> Operation[Observed]:
    """Learn without generating: a text or a chat of any length, an example or several, as one version.

    Args:
        session: id of the session.
        text: the text to learn, instead of `messages`.
        messages: the chat to learn, instead of `text`.
        features: the columns of an example, by name or in a list, with its `label` or its `target`.
        label: the example's label: a name, or a number for a policy of fixed shapes.
        target: the example's number, for "regression".
        examples: several examples, each with `features` and a `label` or a `target`; at most 128.
        predict: True: the result has what was predicted for each example before it was learned.
        model: the policy of a new session.
        source: where the text comes from, such as the path of a file; the session's log keeps it.
        recall: False: the text is not kept as episodes.
        on_disconnect: what becomes of the turn if the connection breaks.
        idempotency_key: a key under which the server applies the operation at most once.
        if_match: the version that the session must have.
    """
    body = _drop_none(text=text, messages=messages, features=features, label=label, target=target, model=model)
    body |= _drop_none(examples=examples, predict=predict)
    body |= _drop_none(source=source, recall=recall, on_disconnect=on_disconnect)
    headers = _learning_headers(idempotency_key, if_match)
    return Operation("POST", f"{_path(session)}/observe", Observed.model_validate_json, body, headers)


def score(
    session: str,
    text: str,
    *,
    learn: bool = False,
    recall: bool | None = None,
    on_disconnect: OnDisconnect | None = None,
    idempotency_key: str | None = None,
    if_match: int | None = None,
) -> Operation[Scored]:
    """Return each token's log-probability with and without the session's memory, in nats; with `learn`, learn the text.

    The text is scored before it is learned. recall: False: the text is not kept as episodes.
    """
    body = _drop_none(text=text, learn=learn, recall=recall, on_disconnect=on_disconnect)
    headers = _learning_headers(idempotency_key, if_match)
    return Operation("POST", f"{_path(session)}/score", Scored.model_validate_json, body, headers)


# Generating.


def complete(prompt: str | Sequence[str], **options: Unpack[CompletionOptions]) -> Operation[Completion]:
    """Continue the prompt; with a `session`, read its memory and teach it."""
    return _completion_operation("completions", Completion.model_validate_json, {"prompt": prompt}, options)


def chat(messages: Sequence[Message], **options: Unpack[ChatOptions]) -> Operation[ChatCompletion]:
    """Reply to a chat; with a `session`, read its memory and teach it the new part of the chat."""
    return _completion_operation(
        "chat/completions", ChatCompletion.model_validate_json, {"messages": messages}, options
    )


def stream(prompt: str | Sequence[str], **options: Unpack[CompletionOptions]) -> Operation[CompletionChunk]:
    """Continue the prompt as `complete` does, as a stream of chunks."""
    body = {"prompt": prompt, "stream": True}
    return _completion_operation("completions", CompletionChunk.model_validate_json, body, options)


def stream_chat(messages: Sequence[Message], **options: Unpack[ChatOptions]) -> Operation[ChatChunk]:
    """Reply as `chat` does, as a stream of chunks."""
    body = {"messages": messages, "stream": True}
    return _completion_operation("chat/completions", ChatChunk.model_validate_json, body, options)


# Policies.


def act(
    session: str,
    observation: Sequence[float] | None = None,
    *,
    actions: Sequence[str | Mapping[str, Any]] | None = None,
    context: Features | None = None,
    allowed: Sequence[str] | None = None,
    forced: str | None = None,
    propensity: float | None = None,
    reward: float | None = None,
    action_id: str | None = None,
    regret: float | None = None,
    model: str | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    on_disconnect: OnDisconnect | None = None,
    idempotency_key: str | None = None,
    if_match: int | None = None,
) -> Operation[Acted]:
    """Learn the reward of an earlier action, and choose the next action.

    Args:
        session: id of the session.
        observation: what a policy of fixed shapes sees before it acts.
        actions: the actions that "bandit" chooses from: names, or objects with an `id` and `features`.
        context: the columns of what "bandit" sees before it acts, by name or in a list.
        allowed: the actions that may be taken; default: all.
        forced: the action that is taken, whatever the policy says.
        propensity: with `forced`: the probability with which you took the action; default: 1.
        reward: reward of the action `action_id`; none if it is not known.
        action_id: id of the rewarded action; default: the last one.
        regret: reward missed by the action, if the client knows it; counted in the server's metrics.
        model: the policy of a new session.
        temperature: 0 = the best action, 1 = an action as often as it is thought to be the best; default: the policy's.
        seed: seed for drawing the action.
        on_disconnect: what becomes of the turn if the connection breaks.
        idempotency_key: a key under which the server applies the operation at most once.
        if_match: the version that the session must have.
    """
    body = _drop_none(observation=observation, actions=actions, context=context, allowed=allowed, forced=forced)
    body |= _drop_none(propensity=propensity, reward=reward, action_id=action_id, regret=regret, model=model)
    body |= _drop_none(temperature=temperature, seed=seed, on_disconnect=on_disconnect)
    headers = _learning_headers(idempotency_key, if_match)
    return Operation("POST", f"{_path(session)}/act", Acted.model_validate_json, body, headers)


def act_batch(
    session: str,
    examples: Sequence[Mapping[str, Any]],
    *,
    model: str | None = None,
    on_disconnect: OnDisconnect | None = None,
    idempotency_key: str | None = None,
    if_match: int | None = None,
) -> Operation[ActedList]:
    """Choose an action in each of several situations, as one version.

    examples: objects with `actions` and the other arguments of a decision, as `act` has them; at most 128.
    """
    body = {"examples": examples} | _drop_none(model=model, on_disconnect=on_disconnect)
    headers = _learning_headers(idempotency_key, if_match)
    return Operation("POST", f"{_path(session)}/act", ActedList.model_validate_json, body, headers)


def feedback(
    session: str,
    action_id: str,
    reward: float,
    *,
    regret: float | None = None,
    on_disconnect: OnDisconnect | None = None,
    idempotency_key: str | None = None,
    if_match: int | None = None,
) -> Operation[Observed]:
    """Learn the reward of an earlier action, without choosing another."""
    body = _drop_none(action_id=action_id, reward=reward, regret=regret, on_disconnect=on_disconnect)
    headers = _learning_headers(idempotency_key, if_match)
    return Operation("POST", f"{_path(session)}/feedback", Observed.model_validate_json, body, headers)


def feedback_batch(
    session: str,
    examples: Sequence[Mapping[str, Any]],
    *,
    on_disconnect: OnDisconnect | None = None,
    idempotency_key: str | None = None,
    if_match: int | None = None,
) -> Operation[Observed]:
    """Learn the rewards of at most 128 actions: objects with `action_id`, `reward` and perhaps `regret`."""
    body = {"examples": examples} | _drop_none(on_disconnect=on_disconnect)
    headers = _learning_headers(idempotency_key, if_match)
    return Operation("POST", f"{_path(session)}/feedback", Observed.model_validate_json, body, headers)


def keep(
    session: str,
    completion_id: str,
    text: str,
    *,
    on_disconnect: OnDisconnect | None = None,
    idempotency_key: str | None = None,
    if_match: int | None = None,
) -> Operation[Observed]:
    """Learn the text that a user kept of an earlier completion, after its prompt if the session keeps texts."""
    body = _drop_none(completion_id=completion_id, text=text, on_disconnect=on_disconnect)
    headers = _learning_headers(idempotency_key, if_match)
    return Operation("POST", f"{_path(session)}/feedback", Observed.model_validate_json, body, headers)


def predict(session: str, features: Features, *, model: str | None = None) -> Operation[Labelled]:
    """Predict the label of an example; learn nothing."""
    body = _drop_none(features=features, model=model)
    return Operation("POST", f"{_path(session)}/predict", Labelled.model_validate_json, body)


def estimate(session: str, features: Features, *, model: str | None = None) -> Operation[Valued]:
    """Predict the number of an example of a session of "regression"; learn nothing."""
    body = _drop_none(features=features, model=model)
    return Operation("POST", f"{_path(session)}/predict", Valued.model_validate_json, body)


def predict_batch(session: str, examples: Sequence[Features], *, model: str | None = None) -> Operation[PredictedList]:
    """Predict the labels or the numbers of at most 128 examples; learn nothing."""
    body = {"examples": [{"features": features} for features in examples]} | _drop_none(model=model)
    return Operation("POST", f"{_path(session)}/predict", PredictedList.model_validate_json, body)


# Versions.


def log_page(session: str, before: int | None, size: int, text: bool = True) -> Operation[SessionLog]:
    """Return a page of at most `size` log entries, newest first, starting before the version `before`.

    text: whether the entries have the learned texts, as far as they are kept.
    """
    query = _query(before=before, limit=size, text=None if text else "false")
    return Operation("GET", f"{_path(session)}/log?{query}", SessionLog.model_validate_json)


def diff(session: str, start: int, end: int) -> Operation[SessionDiff]:
    """Compare two versions that the server keeps: entries learned, entries forgotten, number of rows that differ."""
    path = f"{_path(session)}/diff?{urlencode({'from': start, 'to': end})}"
    return Operation("GET", path, SessionDiff.model_validate_json)


def rollback(
    session: str, version: int, *, idempotency_key: str | None = None, if_match: int | None = None
) -> Operation[Session]:
    """Make a new version that equals `version` bit for bit."""
    return _version_operation(session, "rollback", {"version": version}, idempotency_key, if_match)


def unlearn(
    session: str,
    version: int | Sequence[int],
    *,
    erase: bool = False,
    idempotency_key: str | None = None,
    if_match: int | None = None,
) -> Operation[Session]:
    """Make a new version as if a version, or several, had never been learned; exact for a session with the option
    `keep_text`.

    Several versions are unlearned in one turn, which learns the later texts again only once.

    erase: make it final: the session can't be rolled back to any version before.
    """
    named = {"version": version} if isinstance(version, int) else {"versions": list(version)}
    body = named | {"erase": erase}
    return _version_operation(session, "unlearn", body, idempotency_key, if_match)


def fork(
    session: str, id: str, *, idempotency_key: str | None = None, if_match: int | None = None
) -> Operation[Session]:
    """Copy the session under the new id `id`; later changes to either do not affect the other."""
    return _version_operation(session, "fork", {"id": id}, idempotency_key, if_match)


def export(session: str) -> Operation[bytes]:
    """Return the session as the bytes of a safetensors file, for `import_` on this server or another."""
    return Operation("GET", f"{_path(session)}/export", bytes)


def import_(
    session: str, data: bytes, *, idempotency_key: str | None = None, if_match: int | None = None
) -> Operation[Session]:
    """Replace what the session has learned with the content of an export."""
    headers = {"Content-Type": "application/octet-stream"} | _learning_headers(idempotency_key, if_match)
    return Operation("PUT", f"{_path(session)}/import", Session.model_validate_json, data, headers)


def _completion_operation(
    route: str, parse: Callable[[bytes], T], body: Json, options: Mapping[str, Any]
) -> Operation[T]:
    """Return a completion. A `model` of None is replaced by the served model's id before the request is sent."""
    remaining = dict(options)
    headers = _learning_headers(remaining.pop("idempotency_key", None), remaining.pop("if_match", None))
    return Operation("POST", f"/v1/{route}", parse, {"model": None} | body | _drop_none(**remaining), headers)


def _version_operation(
    session: str, action: str, body: Json, key: str | None, if_match: int | None
) -> Operation[Session]:
    return Operation(
        "POST", f"{_path(session)}/{action}", Session.model_validate_json, body, _learning_headers(key, if_match)
    )


def _path(session: str) -> str:
    if re.fullmatch(SESSION_ID, session) is None:
        raise ClientError(
            "a session id starts with a letter or a digit and has up to 128 of them and of ._~:@+=-,"
            f" got {session[:80]!r}"
        )
    return f"/v1/sessions/{quote(session, safe='')}"


def _query(**fields: Any) -> str:
    return urlencode(_drop_none(**fields))


def _drop_none(**fields: Any) -> Json:
    return {name: value for name, value in fields.items() if value is not None}


def _if_match_header(version: int | None) -> dict[str, str]:
    return {} if version is None else {"If-Match": f'"v{version}"'}


def _learning_headers(key: str | None, if_match: int | None) -> dict[str, str]:
    return {IDEMPOTENCY_HEADER: key or uuid.uuid4().hex} | _if_match_header(if_match)


def _parse_nothing(content: bytes) -> None:
    pass
