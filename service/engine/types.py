"""The values that go into the engine and come out of the engine. No thread and no device is handled here."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from model.episodes import Episode, RecallRequest
from model.memory import SiteRows
from model.tabular.decision_rules import NO_RULES, DecisionRules
from model.tabular.schema import Features
from model.text.sampling import SamplingParams

SessionKey = tuple[str, str]  # tenant, session id
StateId = tuple[float, float, int]  # a session's creation, last commit and version: identifies the session's content
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class GenerationParams:
    """The generation that follows a segment.

    Attributes:
        max_tokens: the largest number of tokens of a sequence.
        stop: strings at which a sequence ends; the text ends before the string.
        n: number of sequences.
        logprobs: number of alternatives to report for each token; None = no log-probabilities.
        as_drawn: whether the log-probabilities are those with which the tokens are drawn, after all samplers.
        learn: mark of the generated tokens where they are learned too, block by block (only with n = 1); 0 = they are
            not.
        follows: the tokens that the text follows, where they are not the last ones of the segment: those before a gap.
            The memory looks for their n-grams.
        max_ms: milliseconds from the first token after which a sequence of more than one line ends; None = no limit.
        min_indent: white space with which each line after the first begins; a sequence ends before another line.
    """

    max_tokens: int
    sampling: SamplingParams
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: int | None = None
    learn: int = 0
    follows: tuple[int, ...] = ()
    max_ms: int | None = None
    min_indent: int = 0
    as_drawn: bool = False


@dataclass(frozen=True)
class Segment:
    """A token sequence with its own attention, which a generation may follow.

    Attributes:
        learn: for each position, `LEARNED` or True where the token is learned, `REPLY` where it is part of a reply in a
            chat; None = no token is learned.
        score: for each position, 1 or True where the token is scored; None = no token is scored. Where both masks are
            given, every learned token is scored.
        top: number of alternatives to report for each scored token.
        recall: what the generation may read of the session's episodes; None = nothing.
        version: the version that first learned the tokens, if it is not the turn's.
        keep_episodes: whether the learned tokens are kept as episodes, if the job keeps episodes.
    """

    token_ids: Sequence[int]
    learn: Sequence[int] | None = None
    score: Sequence[int] | None = None
    top: int = 0
    generate: GenerationParams | None = None
    recall: RecallRequest | None = None
    version: int | None = None
    keep_episodes: bool = True


@dataclass(frozen=True)
class PolicyRequest:
    """One request of a policy. The policy first learns the reward or the label, if there is one, and then decides.

    Attributes:
        policy: the policy's name.
        observation: the observation's numbers.
        decide: whether the client wants an action or a label.
        reward: the reward of the action number `action_id`; of the last action where `action_id` is None.
        label: the label of the observation.
        temperature: of the softmax from which the choice is drawn; None = the policy's default.
        seed: of the draw; None = a random seed.
        regret: the difference to the best action's reward, as far as the client knows.
        highest_action: the highest number that an action of the session ever had.
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
    highest_action: int = 0


@dataclass(frozen=True)
class Example:
    """An example of a learner of labels or numbers.

    Attributes:
        label, target: the truth to learn, if it is known, by the learner's task.
        predict: whether the client wants a prediction, which is made before the example is learned.
        version: the version that first learned the example, if it is not the turn's.
    """

    features: Features
    label: str | None = None
    target: float | None = None
    predict: bool = True
    version: int | None = None


@dataclass(frozen=True)
class ActionReward:
    """The reward of the action number `action_id`; of the last action where `action_id` is None."""

    reward: float
    action_id: int | None = None


@dataclass(frozen=True)
class ArmChoice:
    """A decision among arms.

    Attributes:
        arms: the names of the arms.
        features: the features of each arm; None = no arm has any.
        allowed: the names of the arms that may be drawn; None = all.
        forced: the arm that is taken, whatever the policy says.
        propensity: the probability with which somebody else has taken the forced arm.
        temperature: of the policy's probabilities; 0 = the likeliest arm; None = as they are.
        seed: of the draw; None = a random seed.
    """

    context: Features
    arms: tuple[str, ...]
    features: tuple[Features, ...] | None = None
    allowed: frozenset[str] | None = None
    forced: str | None = None
    propensity: float = 1.0
    temperature: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class TakenArm:
    """An arm that a session took before, with probability `propensity`. features: the arm's own."""

    context: Features
    arm: str
    features: Features
    propensity: float


@dataclass(frozen=True)
class PastReward:
    """The reward of an arm, to be learned again. version: the version that first learned the reward."""

    taken: TakenArm
    reward: float
    version: int


@dataclass(frozen=True)
class PastActions:
    """The actions that a session keeps, oldest first, in place of those of its journal.

    Each has its row in the journal, its number as stored there, its state, whether the control policy took it, and the
    arm.
    """

    actions: tuple[tuple[int, int, float, bool, TakenArm], ...]


Step = Example | ActionReward | ArmChoice | PastReward | PastActions


@dataclass(frozen=True)
class TabularRequest:
    """One request of a learner of tables: its steps, one after the other, each of which sees what the last one learned.

    Attributes:
        policy: the learner's name.
        fields: the part of the request that each step comes from, as errors name it; "" = the request itself.
        regret, highest_action: as in `PolicyRequest`.
    """

    policy: str
    steps: tuple[Step, ...]
    fields: tuple[str, ...]
    rules: DecisionRules = NO_RULES
    regret: float = 0.0
    highest_action: int = 0


@dataclass(frozen=True)
class MemoryAccess:
    """The session whose memory a job uses, and how.

    Attributes:
        state_id: the content of the session that the job expects.
        write: whether the job may learn.
        stored: the session's rows by site; None if the session is pinned on the device (`Engine.pin`).
        policy: the policy whose memory the job uses; "" = the language model's memory.
    """

    key: SessionKey
    state_id: StateId
    write: bool
    stored: dict[str, SiteRows] | None = None
    policy: str = ""


@dataclass(eq=False)
class JobRequest:
    """The work that one turn asks of the engine.

    Attributes:
        segments: token sequences for the language model, one after the other.
        emit: called on the event loop with the request and each of the job's events, in order.
        memory: the session to use; None = the frozen base answers.
        frozen: whether every score is also taken without memory.
        proof_from: number of segments that the session learned before.
        proof_rate: share of the learned segments, counted from `proof_from`, that are scored without memory too.
        policy_request: a request of a policy or of a learner of tables, instead of segments.
        keep_episodes: whether what the job learns is kept as episodes.
        version: the version that the turn makes.
    """

    segments: Sequence[Segment]
    emit: Callable[[JobRequest, Event], None]
    memory: MemoryAccess | None = None
    frozen: bool = False
    proof_from: int = 0
    proof_rate: float = 0.0
    policy_request: PolicyRequest | TabularRequest | None = None
    keep_episodes: bool = False
    version: int = 0

    def in_proof_sample(self, segment: int) -> bool:
        """Return whether a segment is in the sampled share.

        The first segment of a session always is, unless the rate is 0.
        """
        n = self.proof_from + segment
        return math.ceil((n + 1) * self.proof_rate) > math.ceil(n * self.proof_rate)


@dataclass
class JobStats:
    """The counts of a job. Losses are sums in nats.

    A policy's reward or label counts as one token.

    Attributes:
        loss_sum: over the learned tokens.
        proof_tokens: number of learned tokens that were also scored without memory.
        action: number of the action that the job took; 0 = none.
        proof_loss_sum, proof_frozen_loss_sum: over these tokens, with and without memory.
        rewards: sum of the rewards; a label counts as 1 if the policy would have chosen the label, else as 0.
        decided: the rewards of decisions by the rules of a session, each with whether the control policy decided.
    """

    prompt_tokens: int = 0
    tokens_learned: int = 0
    segments_learned: int = 0
    loss_sum: float = 0.0
    proof_tokens: int = 0
    action: int = 0
    proof_loss_sum: float = 0.0
    proof_frozen_loss_sum: float = 0.0
    completion_tokens: int = 0
    rewards: float = 0.0
    decided: list[tuple[bool, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Alternatives:
    """One token's log-probability (None: nothing predicts the token) and the most probable tokens in its place."""

    token_id: int
    logprob: float | None
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class TokenScores:
    """The scores of a block's targets, in order.

    Arrays take a tenth of the memory of lists: a request may have hundreds of thousands of targets.

    Attributes:
        adapted: log-probabilities with memory.
        frozen: log-probabilities without memory, if the request wants them.
        top_ids, top_logprobs: the most probable tokens in place of the targets, `Segment.top` for each target, one
            target after the other.
    """

    segment: int
    token_ids: array[int]
    adapted: array[float]
    frozen: array[float] | None
    top_ids: array[int]
    top_logprobs: array[float]


@dataclass(frozen=True)
class TokenOutput:
    """Text of a sequence that may be shown, and the tokens whose text is complete with it.

    Attributes:
        choice: number of the sequence.
        tokens: the tokens with their alternatives; empty where no log-probabilities are asked for.
        token_ids: the ids of the tokens.
        finish: why the sequence ended, on the sequence's last output.
        stop: the stop string that ended the sequence, on the sequence's last output.
    """

    segment: int
    choice: int
    text: str
    tokens: list[Alternatives]
    finish: FinishReason | None = None
    stop: str | None = None
    token_ids: Sequence[int] = ()


@dataclass(frozen=True)
class PolicyDecision:
    """A policy's choice of an action or a label.

    Attributes:
        probs: probability of each action or label.
        expected: expected reward of each action, in the reward's own units; None for labels.
        number: number of the action in its session; None if the session does not keep the action.
    """

    choice: int
    probs: list[float]
    expected: list[float] | None
    number: int | None
    segment: int = 0


class LearnedCompletion(NamedTuple):
    """Generated tokens and the marks with which they were learned; 0 marks a token that a grammar forced."""

    token_ids: list[int]
    learn: list[int]


@dataclass(frozen=True)
class TabularAnswer:
    """The answer to one step of a `TabularRequest`, as JSON; `action` numbers the action that was noted, 0 = none."""

    answer: dict[str, Any]
    action: int = 0
    segment: int = 0


@dataclass(frozen=True)
class JobFinished:
    """The job is done.

    Attributes:
        rows: the rows that the job wrote, by site, to be stored before `Engine.settle`.
        rows_written: number of these rows.
        rows_held, bytes_held: number of rows and bytes that the session holds after the job.
        num_guards_closed: number of guards that the job closed, minus the number that the job opened.
        learned_completions: the generated tokens that were learned, by segment.
        recalled: the episodes that generations read.
    """

    stats: JobStats
    rows: dict[str, SiteRows]
    rows_written: int = 0
    rows_held: int = 0
    bytes_held: int = 0
    num_guards_closed: int = 0
    learned_completions: dict[int, LearnedCompletion] = field(default_factory=dict)
    recalled: list[Episode] = field(default_factory=list)


@dataclass(frozen=True)
class JobFailed:
    """The job ended early; the job's draft is rolled back and its session is released."""

    error: Exception


Event = TokenScores | TokenOutput | PolicyDecision | TabularAnswer | JobFinished | JobFailed
