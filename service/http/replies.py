"""The bodies of replies, OpenAI's and Imprint's own: the server makes them, and the Python client reads them.

The client imports this file, so nothing here may import torch.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from model.site_kind import SiteKind
from service.http.policy_replies import LabelPrediction, ValuePrediction
from service.http.tool_replies import ToolCall, ToolCallDelta
from service.types import Adaptation, Sampling, StoreStatus


class ErrorDetail(BaseModel):
    """An error, described for a person (`message`) and for a program (`type`, `param`, `code`)."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """The body of every error."""

    error: ErrorDetail


class PromptTokensDetails(BaseModel):
    """The parts of a prompt."""

    cached_tokens: int = Field(description="Always 0: no prompt is cached.")


class Usage(BaseModel):
    """The numbers of tokens of one request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class Timings(BaseModel):
    """The times of the work on one request, by llama.cpp's names; rates are null where no time was taken."""

    cache_n: int
    prompt_n: int
    prompt_ms: float = Field(description="From the start of the work to the first text.")
    prompt_per_token_ms: float | None
    prompt_per_second: float | None
    predicted_n: int
    predicted_ms: float = Field(description="From the first text to the last.")
    predicted_per_token_ms: float | None
    predicted_per_second: float | None


class PromptLogprob(BaseModel):
    """A token in the place of a token of the prompt; `frozen_logprob` is the token's own, without memory."""

    logprob: float
    rank: int | None = Field(description="1 = the likeliest token; null = not among those that are shown.")
    decoded_token: str
    frozen_logprob: float | None = None


# For each token of a prompt, tokens by their ids: the likeliest, and the token itself.
PromptTokens = list[dict[str, PromptLogprob] | None]


class CompletionLogprobs(BaseModel):
    """The log-probabilities (nats) of a completion, as parallel lists over its tokens; null for the first token."""

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
    prompt_logprobs: PromptTokens | None = None


class Completion(BaseModel):
    """The reply of `POST /v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage
    timings: Timings | None = None
    adaptation: Adaptation | None

    @property
    def text(self) -> str:
        """Return the text of the first choice."""
        return self.choices[0].text


class CompletionPiece(BaseModel):
    """The next part of one completion; the last part has a `finish_reason` and no text."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionChunk(BaseModel):
    """An event of a streamed `POST /v1/completions`; `adaptation` comes with the `finish_reason`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionPiece]
    usage: Usage | None = None
    timings: Timings | None = None
    adaptation: Adaptation | None = None

    @property
    def text(self) -> str:
        """Return the text that the chunk adds to the first choice."""
        return "".join(choice.text for choice in self.choices if choice.index == 0)


class TopLogprob(BaseModel):
    """An alternative to a token; `bytes` are exact, `token` may show only a part of a character."""

    token: str
    bytes: list[int]
    logprob: float


class ChatLogprob(TopLogprob):
    """A token of the reply, and its alternatives."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """The log-probabilities (nats) of a reply's tokens."""

    content: list[ChatLogprob]
    refusal: None


class ChatReply(BaseModel):
    """The assistant's message; `content` is null in a message of calls only."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    """One reply to the chat."""

    index: int
    message: ChatReply
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    """The reply of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings | None = None
    prompt_logprobs: PromptTokens | None = None
    adaptation: Adaptation | None

    @property
    def text(self) -> str:
        """Return the text of the first choice."""
        return self.choices[0].message.content or ""


class ChatDelta(BaseModel):
    """The addition of a chunk to the message; empty in the last chunk, unless tools made the server keep text back."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatPiece(BaseModel):
    """The next part of one reply; the last part has a `finish_reason` and no text."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class ChatChunk(BaseModel):
    """An event of a streamed `POST /v1/chat/completions`; `adaptation` comes with the `finish_reason`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatPiece]
    usage: Usage | None = None
    timings: Timings | None = None
    adaptation: Adaptation | None = None

    @property
    def text(self) -> str:
        """Return the text that the chunk adds to the first choice."""
        return "".join(choice.delta.content or "" for choice in self.choices if choice.index == 0)


class PolicyShape(BaseModel):
    """The sizes of a policy's inputs and outputs."""

    task: Literal["act", "label"]
    observation: int = Field(description="Length of an observation, or of the features of an example.")
    context: int = Field(description="Numbers of an observation that all actions share; they come first.")
    features: int = Field(description="Numbers of each single action; they follow, action by action.")
    actions: int = Field(description="Number of actions, or of labels.")
    lowest: float
    highest: float


class LearnerShape(BaseModel):
    """The task of a learner of tables, and its limits."""

    task: Literal["labels", "regression", "bandit"]
    columns: int = Field(description="Columns of a session, each value of a text column counted.")
    labels: int
    actions: int


class ModelMeta(BaseModel):
    """The sizes of the language model, by llama.cpp's names."""

    n_ctx: int = Field(description="Tokens that one request may hold, prompt and reply together.")
    n_vocab: int
    n_params: int = Field(description="Parameters of the base.")


class Model(BaseModel):
    """A served model: the language model, or a policy."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    fingerprints: dict[str, str] = Field(
        description="Of the weights; `session` or `policy` is the `model` of the sessions that this model can read."
    )
    sampling: Sampling | None = Field(
        None, description="Options suggested for completions; Imprint's own clients send them. Null for a policy."
    )
    policy: PolicyShape | None = None
    learner: LearnerShape | None = Field(None, description="Of a learner of tables, which takes any columns.")
    root: str | None = Field(None, description="The name in replies; null for a policy.")
    max_model_len: int | None = Field(None, description="vLLM's name of `meta.n_ctx`; null for a policy.")
    meta: ModelMeta | None = Field(None, description="Null for a policy.")


class ModelList(BaseModel):
    """The reply of `GET /v1/models`."""

    object: Literal["list"]
    data: list[Model] = Field(min_length=1)


class PolicyList(BaseModel):
    """The reply of `GET /v1/policies`."""

    object: Literal["list"]
    data: list[Model]


class Session(BaseModel):
    """A session."""

    id: str
    object: Literal["session"]
    version: int = Field(description="Grows by 1 with each commit; 0 = nothing learned yet.")
    model: str = Field(description="Fingerprint of the slow weights that the memory belongs to.")
    tokens_learned: int
    rows: int
    bytes: int
    gain: float | None = Field(
        description="Nats per token by which the memory lowers the loss of the frozen base; null = not measured: so far"
        " nothing was learned, or the memory was empty when it was."
    )
    created: int = Field(description="Unix time in seconds.")
    updated: int = Field(description="Unix time in seconds.")
    options: dict[str, str | int | float | bool]


class SessionList(BaseModel):
    """The reply of `GET /v1/sessions`; `next` is the `after` of the next page."""

    object: Literal["list"]
    data: list[Session]
    has_more: bool
    next: str | None


class LogEntry(BaseModel):
    """One commit of a session."""

    version: int
    kind: Literal["learn", "rollback", "unlearn", "fork", "import"]
    of: int | list[int] | str | None = Field(
        None, description="The version gone back to, the one or several unlearned, or the origin of a fork or import."
    )
    source: str | None = Field(None, description="Where the learned text comes from, as its request said.")
    time: float = Field(description="Unix time in seconds.")
    digest: str = Field(description="Digest of the learned tokens and of all tokens before them.")
    tokens: int
    rows: int
    loss: float | None = Field(description="Nats per token, measured before the tokens were learned.")
    request_id: str
    text: str | None = Field(description="The learned text, if it is kept and the commit can be undone.")


class SessionLog(BaseModel):
    """The reply of `GET /v1/sessions/{id}/log`, newest first; `next` is the `before` of the next page."""

    object: Literal["list"]
    data: list[LogEntry]
    has_more: bool
    next: int | None


class SessionEpisode(BaseModel):
    """A text that a session keeps, so that replies can read it."""

    ordinal: int = Field(description="Number of the episode in the session; later ones have higher numbers.")
    version: int = Field(description="The version that taught it; `unlearn` takes it back with the whole version.")
    offset: int = Field(description="Number of tokens of its request before it.")
    time: float | None = Field(
        description="Unix time in seconds at which it was taught; null if the session's log has its version no longer."
    )
    text: str
    asks: bool = Field(description="Whether it only asks, so that no reply reads it.")


class SessionEpisodes(BaseModel):
    """The reply of `GET /v1/sessions/{id}/episodes`, newest first; `next` is the `before` of the next page."""

    object: Literal["list"]
    data: list[SessionEpisode]
    has_more: bool
    next: int | None


class SiteCells(BaseModel):
    """The occupancy of one site of a session's memory."""

    name: str
    kind: SiteKind
    rows: int
    cells: int = Field(description="Addresses of the site, each with room for the same number of rows.")
    bin_cells: int = Field(description="Neighbouring cells that are counted together; 1 = each cell by itself.")
    bin_rows: int = Field(description="Rows that a bin has room for.")
    counts: list[int] = Field(description="Rows held in each bin, in the order of the cells; at most 1,024 bins.")


class SessionCells(BaseModel):
    """The reply of `GET /v1/sessions/{id}/cells`."""

    object: Literal["session.cells"]
    version: int
    sites: list[SiteCells]


class RowChange(BaseModel):
    """The numbers of rows of a site that only `to` has, that only `from` has, and that both have with other content."""

    added: int
    removed: int
    changed: int


class SessionDiff(BaseModel):
    """The reply of `GET /v1/sessions/{id}/diff`: the difference between the version `from` and the version `to`."""

    model_config = ConfigDict(serialize_by_alias=True)

    object: Literal["session.diff"]
    start: int = Field(alias="from")
    end: int = Field(alias="to")
    tokens_learned: int = Field(description="Tokens learned by `to` minus those by `from`; may be negative.")
    rows: dict[str, RowChange] = Field(description="Changes of the memory, by site.")
    learned: list[LogEntry] = Field(description="Commits that `to` contains and `from` does not, the oldest first.")
    forgotten: list[LogEntry] = Field(description="Commits that `from` contains and `to` does not, the oldest first.")


class SessionDeleted(BaseModel):
    """The reply of `DELETE /v1/sessions/{id}`."""

    id: str
    object: Literal["session"]
    deleted: Literal[True]


class Observed(BaseModel):
    """The reply of `POST /v1/sessions/{id}/observe` and `/feedback`; `loss` is in nats per token, null if nothing was
    learned."""

    tokens_learned: int
    rows_written: int
    loss: float | None
    version: int
    predictions: list[LabelPrediction | ValuePrediction] | None = Field(
        None, description="Of the examples, each before it was learned, if the request wants them (`predict`)."
    )


class Scored(BaseModel):
    """The reply of `POST /v1/sessions/{id}/score`: in nats; the losses are means per token, null for an empty text."""

    tokens: list[str]
    logprobs: list[float]
    frozen_logprobs: list[float]
    loss: float | None
    frozen_loss: float | None
    version: int


class Live(BaseModel):
    """The reply of `GET /livez`."""

    status: Literal["ok"]


class Ready(BaseModel):
    """The reply of `GET /readyz`."""

    status: Literal["loading", "ready", "draining"]
    store: StoreStatus = Field(
        "ok",
        description="`read_only`: the store takes no writes (its disk is full), so sessions can be used and not"
        " taught. `away`: the store does not answer, so only requests without a session are answered.",
    )


class Health(BaseModel):
    """The reply of `GET /health` and `GET /ping`."""

    status: Literal["ok", "loading", "draining"]


class Version(BaseModel):
    """The reply of `GET /version`."""

    version: str
