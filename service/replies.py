"""The bodies of answers: OpenAI's and Imprint's own. The chunks of streams are made in `routes/shapes.py`."""

from typing import Literal

from pydantic import BaseModel, Field

from service.sessions import Adaptation


class ErrorDetail(BaseModel):
    """What went wrong, for a person and for a program."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """The body of every error."""

    error: ErrorDetail


class Usage(BaseModel):
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """Log probabilities of a completion, parallel lists over its tokens; null for the first token of all."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One completion of one prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """Reply of `POST /v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage
    adaptation: Adaptation | None


class TopLogprob(BaseModel):
    """A token that could have stood here; `bytes` are exact where `token` shows an unfinished character."""

    token: str
    bytes: list[int]
    logprob: float


class ChatLogprob(TopLogprob):
    """A token of the reply and its alternatives."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log probabilities of a reply's tokens."""

    content: list[ChatLogprob]
    refusal: None


class ChatReply(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One reply to the chat."""

    index: int
    message: ChatReply
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """Reply of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    adaptation: Adaptation | None


class PolicyShape(BaseModel):
    """What a policy takes and gives."""

    task: Literal["act", "label"]
    observation: int = Field(description="Numbers of an observation, or of an example's features.")
    context: int = Field(description="How many of them all actions share; they come first.")
    features: int = Field(description="Numbers of each action's own; they follow, action by action.")
    actions: int = Field(description="Actions, or labels.")
    lowest: float
    highest: float


class Model(BaseModel):
    """A served model: that of text, or a policy."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    fingerprints: dict[str, str]
    policy: PolicyShape | None = None


class ModelList(BaseModel):
    """Reply of `GET /v1/models`."""

    object: Literal["list"]
    data: list[Model]


class Session(BaseModel):
    """A session as its owner sees it."""

    id: str
    object: Literal["session"]
    version: int = Field(description="Grows by 1 with each commit; 0 = nothing learned yet.")
    model: str = Field(description="Fingerprint of the slow weights that the memory belongs to.")
    tokens_learned: int
    rows: int
    bytes: int
    gain: float | None = Field(
        description="Nats per token by which the memory beats the frozen model; null = not measured."
    )
    created: int = Field(description="Unix time in seconds.")
    updated: int = Field(description="Unix time in seconds.")
    options: dict[str, str | int | bool]


class SessionList(BaseModel):
    """Reply of `GET /v1/sessions`; `next` is the `after` of the next page."""

    object: Literal["list"]
    data: list[Session]
    has_more: bool
    next: str | None


class LogEntry(BaseModel):
    """One commit of a session."""

    version: int
    kind: Literal["learn", "rollback", "unlearn", "fork", "import"]
    of: int | str | None = Field(None, description="The version gone back to or unlearned, or where it came from.")
    time: float = Field(description="Unix time in seconds.")
    digest: str = Field(description="Of the tokens that were learned and of those before them.")
    tokens: int
    rows: int
    loss: float | None = Field(description="Nats per token, before they were learned.")
    request_id: str
    text: str | None = Field(description="What was learned, where the session keeps that and it can still be undone.")


class SessionLog(BaseModel):
    """Reply of `GET /v1/sessions/{id}/log`, newest first; `next` is the `before` of the next page."""

    object: Literal["list"]
    data: list[LogEntry]
    has_more: bool
    next: int | None


class SessionDeleted(BaseModel):
    """Reply of `DELETE /v1/sessions/{id}`."""

    id: str
    object: Literal["session"]
    deleted: Literal[True]


class Observed(BaseModel):
    """Reply of `POST /v1/sessions/{id}/observe`; `loss` in nats per token, null when nothing was learned."""

    tokens_learned: int
    rows_written: int
    loss: float | None
    version: int


class Acted(BaseModel):
    """Reply of `POST /v1/sessions/{id}/act`; `adaptation` counts rewards where that of text counts tokens."""

    object: Literal["action"]
    action: int
    action_id: str | None = Field(description="Names the action for its reward; null if the session only predicts.")
    probability: float = Field(description="With which it was chosen: 1 for the best one, at temperature 0.")
    probabilities: list[float]
    expected: list[float] = Field(description="What each action is expected to bring.")
    adaptation: Adaptation


class Labelled(BaseModel):
    """Reply of `POST /v1/sessions/{id}/predict`."""

    object: Literal["label"]
    label: int
    probabilities: list[float]
    version: int


class Scored(BaseModel):
    """Reply of `POST /v1/sessions/{id}/score`: nats per token, losses are means; null for an empty text."""

    tokens: list[str]
    logprobs: list[float]
    frozen_logprobs: list[float]
    loss: float | None
    frozen_loss: float | None
    version: int
