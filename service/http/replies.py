"""The bodies of answers: OpenAI's and Imprint's own, as the server makes them and its Python client reads them."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from service.types import Adaptation


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

    @property
    def text(self) -> str:
        """What the first choice says."""
        return self.choices[0].text


class CompletionPiece(BaseModel):
    """More of one completion; the last piece has a `finish_reason` and no text."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionChunk(BaseModel):
    """One event of a streamed `POST /v1/completions`; `adaptation` comes with the `finish_reason`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionPiece]
    usage: Usage | None = None
    adaptation: Adaptation | None = None

    @property
    def text(self) -> str:
        """What the first choice says here."""
        return "".join(choice.text for choice in self.choices if choice.index == 0)


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

    @property
    def text(self) -> str:
        """What the first choice says."""
        return self.choices[0].message.content


class ChatDelta(BaseModel):
    """What a chunk adds to the message; empty in the last one."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatPiece(BaseModel):
    """More of one reply; the last piece has a `finish_reason` and no text."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class ChatChunk(BaseModel):
    """One event of a streamed `POST /v1/chat/completions`; `adaptation` comes with the `finish_reason`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatPiece]
    usage: Usage | None = None
    adaptation: Adaptation | None = None

    @property
    def text(self) -> str:
        """What the first choice says here."""
        return "".join(choice.delta.content or "" for choice in self.choices if choice.index == 0)


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
    data: list[Model] = Field(min_length=1)


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


class SiteCells(BaseModel):
    """How full a site of a session's memory is."""

    name: str
    kind: Literal["lexical", "hidden", "journal"]
    rows: int
    cells: int = Field(description="Addresses of the site, each with room for the same number of rows.")
    bin_cells: int = Field(description="Neighbouring cells that are counted together; 1 = each by itself.")
    bin_rows: int = Field(description="Rows that a bin has room for.")
    counts: list[int] = Field(description="Rows held in each bin, in the order of the cells; at most 1,024 bins.")


class SessionCells(BaseModel):
    """Reply of `GET /v1/sessions/{id}/cells`."""

    object: Literal["session.cells"]
    version: int
    sites: list[SiteCells]


class RowChange(BaseModel):
    """Rows that one version has and the other has not, and those that both have, but not the same."""

    added: int
    removed: int
    changed: int


class SessionDiff(BaseModel):
    """Reply of `GET /v1/sessions/{id}/diff`: what the later version consists of and the earlier one does not, and the
    other way round."""

    model_config = ConfigDict(serialize_by_alias=True)

    object: Literal["session.diff"]
    start: int = Field(alias="from")
    end: int = Field(alias="to")
    tokens_learned: int = Field(description="How many more tokens `to` has learned than `from`; may be negative.")
    rows: dict[str, RowChange] = Field(description="What changed in the memory, by site.")
    learned: list[LogEntry] = Field(description="Commits that `to` has and `from` has not, the oldest first.")
    forgotten: list[LogEntry] = Field(description="Commits that `from` has and `to` has not, the oldest first.")


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
    expected: list[float] = Field(description="The mean reward that each action is expected to bring.")
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
