"""The turns of policy sessions: act, learn a reward, predict a label, learn a label."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

from model.policies.network import Policy
from service.engine import Event, PolicyDecision, PolicyRequest
from service.errors import BadRequest, Conflict, NotFound
from service.store.base import SessionMeta, WriteMode
from service.turns.action_ids import format_action_id, parse_action_id
from service.turns.commit import TurnOutcome, TurnPlan
from service.turns.idempotency import RequestContext
from service.turns.loaded_model import LoadedModel
from service.turns.run import Json, Turn
from service.turns.session_gate import SessionHandle, SessionTarget
from service.turns.sessions import Sessions
from service.turns.text_turns import LearningTurn, ObserveResult
from service.types import Adaptation

Task = Literal["act", "label"]
R = TypeVar("R")
TASK_VERBS: dict[Task, str] = {"act": "acts", "label": "labels"}


@dataclass(frozen=True)
class RewardInput:
    """The outcome of an action. action_id: None = the last action; regret: what the action missed, if known."""

    reward: float
    action_id: str | None = None
    regret: float = 0.0


@dataclass(frozen=True)
class ActionSampling:
    """Options of the choice of an action. temperature: None = the policy's own; seed: of the random draw."""

    temperature: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class ActResult:
    """A chosen action.

    Attributes:
        action_id: the id under which the client reports the reward; None if the session only predicts.
        probability: the probability of the chosen action; `probabilities` has those of all actions.
        expected: the mean reward that each action is expected to bring.
    """

    action: int
    action_id: str | None
    probability: float
    probabilities: list[float]
    expected: list[float]
    adaptation: Adaptation

    def as_json(self) -> dict[str, Any]:
        """Return the result as JSON; `asdict` would copy each number by itself."""
        return vars(self) | {"adaptation": vars(self.adaptation)}


@dataclass(frozen=True)
class LabelResult:
    """The likeliest label and the probabilities of all labels."""

    label: int
    probabilities: list[float]
    version: int


class PolicyTurn(Turn[R]):
    """A turn of a policy session; a subclass says what the policy is asked."""

    task: Task

    def __init__(self, session: str, model: str | None, write: WriteMode, if_match: str | None) -> None:
        self.target = SessionTarget(session, write, if_match)
        self._session, self._model = session, model

    def require_task(self, model: LoadedModel) -> None:
        """Raise NotFound or BadRequest unless the named policy, if one is named, is loaded for this task."""
        if self._model is not None:
            _require_task(model, self._model, self.task)

    def _find_policy(self, handle: SessionHandle, model: LoadedModel) -> tuple[SessionMeta, Policy]:
        """Return the session's meta, new if the session does not exist, and its policy."""
        meta, name = handle.meta, self._model
        if meta is None:
            if name is None:
                names = ", ".join(sorted(model.policies)) or "none is served"
                raise BadRequest(f"'model' is required to begin a session with: a policy ({names}).", param="model")
            meta = model.new_meta(self._session, {}, name)
        if name is None:
            name = model.require_loaded_model(meta)
            if not name:
                raise Conflict(
                    f"Session {meta.id!r} belongs to the language model, not to a policy.", code="model_mismatch"
                )
        else:
            model.require_model(meta, name)
        _require_task(model, name, self.task)
        return meta, model.policies[name]


class ActTurn(PolicyTurn[ActResult]):
    """Learns a reward, if one came along, then chooses an action."""

    task: Task = "act"

    def __init__(
        self,
        session: str,
        model: str | None,
        observation: list[float],
        reward: RewardInput | None,
        sampling: ActionSampling,
        if_match: str | None,
    ) -> None:
        super().__init__(session, model, "unless predict", if_match)
        self._observation, self._reward, self._sampling = observation, reward, sampling

    def replayed(self, record: Json) -> Iterable[ActResult]:
        return [ActResult(**record | {"adaptation": Adaptation.from_record(record["adaptation"])})]

    async def plan(self, handle: SessionHandle, model: LoadedModel) -> TurnPlan:
        meta, policy = self._find_policy(handle, model)
        _require_numbers(policy, self._observation, "observation")
        request = PolicyRequest(policy.config.name, tuple(self._observation), **asdict(self._sampling))
        request = _with_reward(request, policy, self._reward, meta)
        writes = meta.options.get("adapt") != "predict"
        if self._reward is not None and not writes:
            raise Conflict("The session's option 'adapt' is 'predict': it learns no reward.", param="reward")
        return TurnPlan(meta, policy_request=request, writes=writes)

    def outputs(self, segment: int, event: Event) -> Iterator[ActResult]:
        if isinstance(event, PolicyDecision):
            self._decision = event
        return iter(())

    def last_event(self, outcome: TurnOutcome) -> ActResult:
        decision = self._decision
        action_id = None
        if decision.number is not None and outcome.meta is not None:
            action_id = format_action_id(decision.number, outcome.meta)
        prob, expected = decision.probs[decision.choice], decision.expected or []
        return ActResult(decision.choice, action_id, prob, decision.probs, expected, outcome.adaptation)

    def record(self, last: ActResult) -> Json:
        return last.as_json()


class PredictTurn(PolicyTurn[LabelResult]):
    """Predicts the label of an example."""

    task: Task = "label"

    def __init__(self, session: str, model: str | None, features: list[float]) -> None:
        super().__init__(session, model, "never", None)
        self._features = features

    def replayed(self, record: Json) -> Iterable[LabelResult]:
        return [LabelResult(**record)]

    async def plan(self, handle: SessionHandle, model: LoadedModel) -> TurnPlan:
        meta, policy = self._find_policy(handle, model)
        _require_numbers(policy, self._features, "features")
        # At temperature 0 the policy would give its choice the probability 1.
        request = PolicyRequest(policy.config.name, tuple(self._features), temperature=1.0)
        return TurnPlan(meta, policy_request=request, writes=False)

    def outputs(self, segment: int, event: Event) -> Iterator[LabelResult]:
        if isinstance(event, PolicyDecision):
            self._decision = event
        return iter(())

    def last_event(self, outcome: TurnOutcome) -> LabelResult:
        probs = self._decision.probs
        if outcome.meta is None or not outcome.meta.tokens_learned:
            probs = [1 / len(probs)] * len(probs)  # a session without a label knows none
        return LabelResult(probs.index(max(probs)), probs, outcome.adaptation.version_to)

    def record(self, last: LabelResult) -> Json:
        return asdict(last)


class RewardTurn(PolicyTurn[ObserveResult], LearningTurn):
    """Learns the reward of an earlier action."""

    task: Task = "act"

    def __init__(self, session: str, reward: RewardInput, if_match: str | None) -> None:
        super().__init__(session, None, "always", if_match)
        self._reward = reward

    async def plan(self, handle: SessionHandle, model: LoadedModel) -> TurnPlan:
        meta, policy = self._find_policy(handle, model)
        request = PolicyRequest(policy.config.name, decide=False)
        return TurnPlan(meta, policy_request=_with_reward(request, policy, self._reward, meta))


class LabelTurn(PolicyTurn[ObserveResult], LearningTurn):
    """Learns the label of an example."""

    task: Task = "label"

    def __init__(
        self, session: str, model: str | None, features: list[float], label: int, if_match: str | None
    ) -> None:
        super().__init__(session, model, "always", if_match)
        self._features, self._label = features, label

    async def plan(self, handle: SessionHandle, model: LoadedModel) -> TurnPlan:
        meta, policy = self._find_policy(handle, model)
        _require_numbers(policy, self._features, "features")
        if not 0 <= self._label < policy.config.actions:
            raise BadRequest(f"'label' must be in 0..{policy.config.actions - 1}, got {self._label}.", param="label")
        request = PolicyRequest(policy.config.name, tuple(self._features), decide=False, label=self._label)
        return TurnPlan(meta, policy_request=request)


def _require_task(model: LoadedModel, name: str, task: Task) -> None:
    if name not in model.policies:
        raise NotFound(f"There is no policy {name[:80]!r}.", param="model", code="model_not_found")
    if model.policies[name].config.task != task:
        fit = ", ".join(sorted(key for key, policy in model.policies.items() if policy.config.task == task)) or "none"
        raise BadRequest(f"'model' must be a policy that {TASK_VERBS[task]} ({fit}), got {name!r}.", param="model")


def _with_reward(
    request: PolicyRequest, policy: Policy, reward: RewardInput | None, meta: SessionMeta
) -> PolicyRequest:
    """Return the request with the outcome of an action of the session.

    Raises BadRequest for a reward out of range, Conflict for an action that is not part of the session.
    """
    request = replace(request, highest_action=meta.actions)
    if reward is None:
        return request
    config = policy.config
    if not config.lowest <= reward.reward <= config.highest:
        raise BadRequest(
            f"'reward' must be in {config.lowest:g}..{config.highest:g}, got {reward.reward:g}.", param="reward"
        )
    number = None if reward.action_id is None else parse_action_id(reward.action_id, meta)
    return replace(request, reward=reward.reward, action_id=number, regret=reward.regret)


def _require_numbers(policy: Policy, numbers: list[float], field: str) -> None:
    """Raise BadRequest unless there are as many numbers as the policy observes."""
    config = policy.config
    if len(numbers) == config.observation_size:
        return
    parts = f"{config.context} of the context" + (
        f" and {config.features} of each of {config.actions} actions" if config.features else ""
    )
    raise BadRequest(
        f"{field!r} must hold {config.observation_size} numbers for {config.name!r} ({parts}), got {len(numbers)}.",
        param=field,
    )


class PolicyOperations:
    """The operations of policies that routes call.

    Every method raises NotFound for a policy that is not loaded and Conflict for a session of another model; `model`
    may be None where the session exists.
    """

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    async def act(
        self,
        ctx: RequestContext,
        session: str,
        model: str | None,
        observation: list[float],
        reward: RewardInput | None,
        sampling: ActionSampling,
        *,
        if_match: str | None = None,
    ) -> ActResult:
        """Learn the reward that came along, if one did, then choose an action and remember it until its reward."""
        return await self._run(ctx, ActTurn(session, model, observation, reward, sampling, if_match))

    async def feedback(
        self, ctx: RequestContext, session: str, reward: RewardInput, *, if_match: str | None = None
    ) -> ObserveResult:
        """Learn the reward of an earlier action."""
        return await self._run(ctx, RewardTurn(session, reward, if_match))

    async def observe(
        self,
        ctx: RequestContext,
        session: str,
        model: str | None,
        features: list[float],
        label: int,
        *,
        if_match: str | None = None,
    ) -> ObserveResult:
        """Learn the label of an example."""
        return await self._run(ctx, LabelTurn(session, model, features, label, if_match))

    async def predict(self, ctx: RequestContext, session: str, model: str | None, features: list[float]) -> LabelResult:
        """Predict the label of an example; learn nothing."""
        return await self._run(ctx, PredictTurn(session, model, features))

    async def _run(self, ctx: RequestContext, turn: PolicyTurn[R]) -> R:
        """Run a turn; a wrong model is refused before the turn waits for its session."""
        turn.require_task(self._sessions.loaded_model)
        return await self._sessions.run(ctx, turn)
