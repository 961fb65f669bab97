"""What is handed to the engine and what it hands back: plain values, no threads, no device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from model.memory import SiteRows
from model.text.sampling import SamplingParams

SessionKey = tuple[str, str]  # tenant, session id
StateId = tuple[float, float, int]  # a session's creation, last commit and version: what tells its contents apart
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class GenerationParams:
    """What to generate after a segment. logprobs: None, or the number of alternatives to each token.

    learn: also learn what was generated, block by block (only with n = 1).
    """

    max_tokens: int
    sampling: SamplingParams
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: int | None = None
    learn: bool = False


@dataclass(frozen=True)
class Segment:
    """One request of the model: tokens with attention of their own, then perhaps a generation.

    score, learn: by position, which tokens to score or to learn (None: no token); where both are given, what is learned
    is scored. top: how many alternatives to score too.
    """

    token_ids: Sequence[int]
    learn: Sequence[bool] | None = None
    score: Sequence[bool] | None = None
    top: int = 0
    generate: GenerationParams | None = None


@dataclass(frozen=True)
class PolicyRequest:
    """One request of a policy: first it learns, if there is something to learn, then it decides, if it is asked.

    policy: its name. reward: of the action of number `action_id` (None: of the last one); label: of the observation.
    regret: what that action missed, as far as the client knows. decide: whether an action or a label is wanted.
    temperature: None = the policy's own; seed: of what is drawn.
    """

    policy: str
    observation: tuple[float, ...] = ()
    decide: bool = True
    reward: float | None = None
    action_id: int | None = None
    label: int | None = None
    temperature: float | None = None
    seed: int | None = None
    regret: float = 0.0


@dataclass(frozen=True)
class MemoryAccess:
    """Which session's memory a job uses, as of when; write: whether it may learn.

    stored: its rows, unless the engine has pinned them hot (`Engine.pin`). policy: whose memory it is; "" = text's.
    """

    key: SessionKey
    state_id: StateId
    write: bool
    stored: dict[str, SiteRows] | None = None
    policy: str = ""


@dataclass(eq=False)
class Job:
    """A turn as the engine sees it. `emit` is called with the job and each of its events, in order, on the event loop.

    frozen: score without memory as well. proof_from, proof_rate: of the learned segments, counted from proof_from,
    this share is scored without memory too, for the record. deed: what a policy is to do, instead of segments.
    """

    segments: Sequence[Segment]
    emit: Callable[[Job, Event], None]
    memory: MemoryAccess | None = None
    frozen: bool = False
    proof_from: int = 0
    proof_rate: float = 0.0
    policy_request: PolicyRequest | None = None

    def in_proof_sample(self, segment: int) -> bool:
        """Whether a segment is in the sampled share; the first of a session always is, unless the rate is 0."""
        n = self.proof_from + segment
        return -(-(n + 1) * self.proof_rate // 1) > -(-n * self.proof_rate // 1)


@dataclass
class JobStats:
    """What a job did. Losses are nats, summed: over the learned tokens, and over those of them that were proved. Of a
    policy, a reward or label is a token; rewards: their sum, a label's being 1 if it would have been said."""

    prompt_tokens: int = 0
    tokens_learned: int = 0
    segments_learned: int = 0
    loss_sum: float = 0.0
    proof_tokens: int = 0
    proof_loss_sum: float = 0.0
    proof_frozen_loss_sum: float = 0.0
    completion_tokens: int = 0
    rewards: float = 0.0


@dataclass(frozen=True, slots=True)
class Alternatives:
    """One token's log-probability (None: nothing predicts it) and the most probable tokens in its place."""

    token_id: int
    logprob: float | None
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class TokenScores:
    """Scores of a block's targets, in order: log-probabilities with and (if asked for) without memory; alternatives to
    each, if the segment asks for some."""

    segment: int
    token_ids: list[int]
    adapted: list[float]
    frozen: list[float] | None
    alternatives: list[Alternatives]


@dataclass(frozen=True)
class TokenOutput:
    """Text of a choice that may be shown, and the tokens that are complete with it.

    finish: the reason, on the last one of a choice.
    """

    segment: int
    choice: int
    text: str
    tokens: list[Alternatives]
    finish: FinishReason | None = None


@dataclass(frozen=True)
class PolicyDecision:
    """What a policy chose: an action or a label, the chances of all of them, and what each action is expected to bring,
    in the reward's own units. number: of the action in its session; None where it is not remembered."""

    choice: int
    probs: list[float]
    expected: list[float] | None
    number: int | None
    segment: int = 0


@dataclass(frozen=True)
class JobFinished:
    """The job is done; `rows` are what it wrote, to be stored before `Engine.settle`.

    rows_written counts them; rows_held, bytes_held: of the session with them; guards: read gates that the turn shut,
    less those it opened. said: the generated tokens that were learned, by segment.
    """

    stats: JobStats
    rows: dict[str, SiteRows]
    rows_written: int = 0
    rows_held: int = 0
    bytes_held: int = 0
    guards: int = 0
    learned_completions: dict[int, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class JobFailed:
    """The job ended early and holds nothing any more."""

    error: Exception


Event = TokenScores | TokenOutput | PolicyDecision | JobFinished | JobFailed
