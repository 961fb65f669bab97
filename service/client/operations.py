"""Every call of the client, written once: what is sent, and how the answer is read. Both clients send them."""

import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypedDict, TypeVar, Unpack
from urllib.parse import quote, urlencode

from service.client.errors import ClientError
from service.http.replies import (
    Acted,
    ChatChunk,
    ChatCompletion,
    Completion,
    CompletionChunk,
    Labelled,
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
OnDisconnect = Literal["rollback", "commit"]
IDEMPOTENCY_HEADER = "Idempotency-Key"


@dataclass(frozen=True)
class Operation(Generic[T]):
    """One request. read: makes the result of the answer's body, or of each of a stream's chunks.

    It is made once a call, and so is its `Idempotency-Key`: however often it is sent, it is learned once.
    """

    method: str
    path: str
    read: Callable[[bytes], T]
    body: Json | bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


class Options(TypedDict, total=False):
    """What a completion can be told. None is as good as left out."""

    session: str | None  # whose memory to use and to teach; none = the frozen base
    adapt: AdaptMode | None
    learn: LearnMode | None
    model: str | None  # the served one, if left out
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
    """What a completion can be told besides its prompt."""

    echo: bool | None
    logprobs: int | None


class ChatOptions(Options, total=False):
    """What a chat completion can be told besides its messages."""

    logprobs: bool | None
    top_logprobs: int | None


def model() -> Operation[Model]:
    """The served model."""
    return Operation("GET", "/v1/models", lambda content: ModelList.model_validate_json(content).data[0])


# Sessions.


def create(
    session: str,
    *,
    adapt: AdaptMode | None = None,
    learn: LearnMode | None = None,
    keep_text: bool | None = None,
    ttl_s: int | None = None,
    model: str | None = None,
    if_match: int | None = None,
) -> Operation[Session]:
    """Creates the session, or replaces the options of the one there is.

    adapt, learn: what requests do that don't say otherwise. keep_text: keep the texts, so that they can be unlearned.
    ttl_s: seconds after its last use at which it is erased, 0 = never. model: the policy that it is of; none = text.
    """
    body = _drop_none(adapt=adapt, learn=learn, keep_text=keep_text, ttl_s=ttl_s, model=model)
    return Operation("PUT", _path(session), Session.model_validate_json, body, _if_match_header(if_match))


def get(session: str) -> Operation[Session]:
    """What the session holds and what it is worth. Raises NotFound."""
    return Operation("GET", _path(session), Session.model_validate_json)


def delete(session: str, *, if_match: int | None = None) -> Operation[None]:
    """Erases the session and all it has learned. Raises NotFound."""
    return Operation("DELETE", _path(session), _parse_nothing, headers=_if_match_header(if_match))


def sessions_page(after: str | None, size: int) -> Operation[SessionList]:
    """The sessions after that id, in the order of ids."""
    return Operation("GET", f"/v1/sessions?{_query(after=after, limit=size)}", SessionList.model_validate_json)


# Learning and scoring.


def observe(
    session: str,
    text: str | None = None,
    *,
    messages: Sequence[Message] | None = None,
    features: Sequence[float] | None = None,
    label: int | None = None,
    model: str | None = None,
    on_disconnect: OnDisconnect | None = None,
    idempotency_key: str | None = None,
    if_match: int | None = None,
) -> Operation[Observed]:
    """Learns a text or a chat of any length as one version, without answering; with a policy, an example's label."""
    body = _drop_none(text=text, messages=messages, features=features, label=label, model=model)
    body |= _drop_none(on_disconnect=on_disconnect)
    headers = _learning_headers(idempotency_key, if_match)
    return Operation("POST", f"{_path(session)}/observe", Observed.model_validate_json, body, headers)


def score(
    session: str,
    text: str,
    *,
    learn: bool = False,
    on_disconnect: OnDisconnect | None = None,
    idempotency_key: str | None = None,
    if_match: int | None = None,
) -> Operation[Scored]:
    """Nats of each token with the session's memory and without; learns the text only if asked, after that."""
    body = _drop_none(text=text, learn=learn, on_disconnect=on_disconnect)
    headers = _learning_headers(idempotency_key, if_match)
    return Operation("POST", f"{_path(session)}/score", Scored.model_validate_json, body, headers)


# Generating.


def complete(prompt: str | Sequence[str], **options: Unpack[CompletionOptions]) -> Operation[Completion]:
    """Continues the prompt; with a `session`, from its memory and teaching it."""
    return _completion_operation("completions", Completion.model_validate_json, {"prompt": prompt}, options)


def chat(messages: Sequence[Message], **options: Unpack[ChatOptions]) -> Operation[ChatCompletion]:
    """Replies to a chat; with a `session`, from its memory and teaching it what the chat adds."""
    return _completion_operation(
        "chat/completions", ChatCompletion.model_validate_json, {"messages": messages}, options
    )


def stream(prompt: str | Sequence[str], **options: Unpack[CompletionOptions]) -> Operation[CompletionChunk]:
    """The same as `complete`, piece by piece."""
    body = {"prompt": prompt, "stream": True}
    return _completion_operation("completions", CompletionChunk.model_validate_json, body, options)


def stream_chat(messages: Sequence[Message], **options: Unpack[ChatOptions]) -> Operation[ChatChunk]:
    """The same as `chat`, piece by piece."""
    body = {"messages": messages, "stream": True}
    return _completion_operation("chat/completions", ChatChunk.model_validate_json, body, options)


# Policies.


def act(
    session: str,
    observation: Sequence[float],
    *,
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
    """Learns the reward of the last action, or of `action_id`, and takes the next one.

    model: the policy of a session that is new.
    """
    body = _drop_none(
        reward=reward, action_id=action_id, regret=regret, model=model, temperature=temperature, seed=seed
    )
    body |= {"observation": observation} | _drop_none(on_disconnect=on_disconnect)
    headers = _learning_headers(idempotency_key, if_match)
    return Operation("POST", f"{_path(session)}/act", Acted.model_validate_json, body, headers)


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
    """Learns the reward of an earlier action, without taking another."""
    body = _drop_none(action_id=action_id, reward=reward, regret=regret, on_disconnect=on_disconnect)
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
    """Learns the text that a user kept of an earlier completion, behind its prompt if the session keeps texts."""
    body = _drop_none(completion_id=completion_id, text=text, on_disconnect=on_disconnect)
    headers = _learning_headers(idempotency_key, if_match)
    return Operation("POST", f"{_path(session)}/feedback", Observed.model_validate_json, body, headers)


def predict(session: str, features: Sequence[float], *, model: str | None = None) -> Operation[Labelled]:
    """Labels an example with what the session has learned; learns nothing."""
    body = _drop_none(features=features, model=model)
    return Operation("POST", f"{_path(session)}/predict", Labelled.model_validate_json, body)


# Versions.


def log_page(session: str, before: int | None, size: int) -> Operation[SessionLog]:
    """The commits before that version, newest first."""
    return Operation("GET", f"{_path(session)}/log?{_query(before=before, limit=size)}", SessionLog.model_validate_json)


def diff(session: str, start: int, end: int) -> Operation[SessionDiff]:
    """What lies between two versions that are kept: what was learned, what was forgotten, which rows changed."""
    path = f"{_path(session)}/diff?{urlencode({'from': start, 'to': end})}"
    return Operation("GET", path, SessionDiff.model_validate_json)


def rollback(
    session: str, version: int, *, idempotency_key: str | None = None, if_match: int | None = None
) -> Operation[Session]:
    """Makes a new version that is what `version` was, bit for bit."""
    return _version_operation(session, "rollback", {"version": version}, idempotency_key, if_match)


def unlearn(
    session: str, version: int, *, idempotency_key: str | None = None, if_match: int | None = None
) -> Operation[Session]:
    """Makes a new version as if `version` had never been learned; needs the option `keep_text`."""
    return _version_operation(session, "unlearn", {"version": version}, idempotency_key, if_match)


def fork(
    session: str, id: str, *, idempotency_key: str | None = None, if_match: int | None = None
) -> Operation[Session]:
    """Makes a new session `id` that has learned the same; from then on they go their own ways."""
    return _version_operation(session, "fork", {"id": id}, idempotency_key, if_match)


def export(session: str) -> Operation[bytes]:
    """The session as a safetensors file, for `import_` here or elsewhere."""
    return Operation("GET", f"{_path(session)}/export", bytes)


def import_(
    session: str, data: bytes, *, idempotency_key: str | None = None, if_match: int | None = None
) -> Operation[Session]:
    """Gives the session what an export holds, in place of what it had."""
    headers = {"Content-Type": "application/octet-stream"} | _learning_headers(idempotency_key, if_match)
    return Operation("PUT", f"{_path(session)}/import", Session.model_validate_json, data, headers)


def _completion_operation(
    route: str, read: Callable[[bytes], T], body: Json, options: Mapping[str, Any]
) -> Operation[T]:
    """`model` is filled in before it is sent."""
    remaining = dict(options)
    headers = _learning_headers(remaining.pop("idempotency_key", None), remaining.pop("if_match", None))
    return Operation("POST", f"/v1/{route}", read, {"model": None} | body | _drop_none(**remaining), headers)


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
