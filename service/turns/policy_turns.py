"""The turns of sessions that decide: act, learn a reward, predict, learn examples.

A session belongs to a policy of fixed shapes, or to a learner of tables, which takes whatever columns come.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, TypeVar, cast

from model.policies.network import Policy
from service.engine import ActionReward, Event, PolicyDecision, PolicyRequest, TabularAnswer, TabularRequest
from service.errors import BadRequest, Conflict, NotFound
from service.store.base import SessionMeta, WriteMode
from service.turns.action_ids import format_action_id, parse_action_id
from service.turns.commit import TurnOutcome, TurnPlan
from service.turns.idempotency import RequestContext
from service.turns.loaded_model import LoadedModel
from service.turns.run import Json, Turn
from service.turns.session_gate import SessionHandle, SessionTarget
from service.turns.sessions import Sessions
from service.turns.tabular_requests import Batch, ExampleInput, action_reply, choice_request, example_request
from service.turns.text_turns import LearningTurn, ObserveResult

Task = Literal["act", "label"]
R = TypeVar("R")
TASK_VERBS: dict[Task, str] = {"act": "acts", "label": "labels"}
TASKS: dict[str, Task] = {"bandit": "act", "labels": "label", "regression": "label"}  # of the learners' tasks


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

    def _find(self, handle: SessionHandle, model: LoadedModel) -> tuple[SessionMeta, str]:
        """Return the session's meta, new if the session does not exist, and the name of its policy or learner."""
        meta, name = handle.meta, self._model
        if meta is None:
            if name is None:
                names = ", ".join(sorted([*model.policies, *model.tabular])) or "none is served"
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
        try:
            _require_task(model, name, self.task)
        except BadRequest:
            if self._model is not None:
                raise
            other = "'act' and 'feedback'" if self.task == "label" else "'observe' and 'predict'"
            raise BadRequest(f"Session {meta.id!r} is one of {name!r}, which takes {other}.", param="id") from None
        return meta, name


class ActTurn(PolicyTurn[Json]):
    """Learns a reward, if one came along, then chooses an action, or several.

    observation: for a policy of fixed shapes. choices: for a learner.
    """

    task: Task = "act"

    def __init__(
        self,
        session: str,
        model: str | None,
        observation: list[float] | None,
        choices: Batch | None,
        reward: RewardInput | None,
        sampling: ActionSampling,
        if_match: str | None,
    ) -> None:
        super().__init__(session, model, "unless predict", if_match)
        self._observation, self._choices, self._reward, self._sampling = observation, choices, reward, sampling

    def require_task(self, model: LoadedModel) -> None:
        if self._model is not None and self._observation is not None:
            self._model = model.of_fixed_shapes(self._model)
        super().require_task(model)

    def replayed(self, record: Json) -> Iterable[Json]:
        return [record]

    async def plan(self, handle: SessionHandle, model: LoadedModel) -> TurnPlan:
        self._answers = list[TabularAnswer]()
        meta, name = self._find(handle, model)
        writes = meta.options.get("adapt") != "predict"
        if self._reward is not None and not writes:
            raise Conflict("The session's option 'adapt' is 'predict': it learns no reward.", param="reward")
        if name in model.tabular:
            if self._choices is None:
                raise BadRequest(f"{name!r} takes 'actions', with or without a 'context'.", param="actions")
            reward = None if self._reward is None else _action_reward(self._reward, meta)
            regret = 0.0 if self._reward is None else self._reward.regret
            request = choice_request(model.tabular[name].config, self._choices, reward, meta, regret)
            return TurnPlan(meta, policy_request=request, writes=writes)
        policy = model.policies[name]
        if self._observation is None:
            raise BadRequest(f"'observation' is required for {name!r}, which has fixed sizes.", param="observation")
        _require_numbers(policy, self._observation, "observation")
        fixed = PolicyRequest(name, tuple(self._observation), **asdict(self._sampling))
        return TurnPlan(meta, policy_request=_with_reward(fixed, policy, self._reward, meta), writes=writes)

    def outputs(self, segment: int, event: Event) -> Iterator[Json]:
        if isinstance(event, PolicyDecision):
            self._decision = event
        elif isinstance(event, TabularAnswer):
            self._answers.append(event)
        return iter(())

    def last_event(self, outcome: TurnOutcome) -> Json:
        adaptation = {"adaptation": vars(outcome.adaptation)}
        if self._choices is not None:
            replies = [action_reply(each.answer, each.action, outcome.meta) for each in self._answers]
            return ({"object": "list", "data": replies} if self._choices.is_list else replies[0]) | adaptation
        decision = self._decision
        action_id = None
        if decision.number is not None and outcome.meta is not None:
            action_id = format_action_id(decision.number, outcome.meta)
        return {
            "object": "action",
            "action": decision.choice,
            "action_id": action_id,
            "probability": decision.probs[decision.choice],
            "probabilities": decision.probs,
            "expected": decision.expected or [],
        } | adaptation

    def record(self, last: Json) -> Json:
        return last


class PredictTurn(PolicyTurn[Json]):
    """Predicts labels or numbers of examples."""

    task: Task = "label"

    def __init__(self, session: str, model: str | None, examples: Batch) -> None:
        super().__init__(session, model, "never", None)
        self._examples = examples

    def replayed(self, record: Json) -> Iterable[Json]:
        return [record]

    async def plan(self, handle: SessionHandle, model: LoadedModel) -> TurnPlan:
        self._answers = list[TabularAnswer]()
        meta, name = self._find(handle, model)
        if name in model.tabular:
            config = model.tabular[name].config
            self._kind = "label" if config.task == "labels" else "value"
            request = example_request(config, self._examples, learn=False, predict=True)
            return TurnPlan(meta, policy_request=request, writes=False)
        features = _fixed_features(model.policies[name], self._examples)
        # At temperature 0 the policy would give its choice the probability 1.
        return TurnPlan(meta, policy_request=PolicyRequest(name, tuple(features), temperature=1.0), writes=False)

    def outputs(self, segment: int, event: Event) -> Iterator[Json]:
        if isinstance(event, PolicyDecision):
            self._decision = event
        elif isinstance(event, TabularAnswer):
            self._answers.append(event)
        return iter(())

    def last_event(self, outcome: TurnOutcome) -> Json:
        version = {"version": outcome.adaptation.version_to}
        if self._answers:
            replies = [{"object": self._kind, **each.answer} for each in self._answers]
            if self._examples.is_list:
                return {"object": "list", "data": replies} | version
            return replies[0] | version
        probs = self._decision.probs
        if outcome.meta is None or not outcome.meta.tokens_learned:
            probs = [1 / len(probs)] * len(probs)  # a session without a label knows none
        return {"object": "label", "label": probs.index(max(probs)), "probabilities": probs} | version

    def record(self, last: Json) -> Json:
        return last


class RewardTurn(PolicyTurn[ObserveResult], LearningTurn):
    """Learns the rewards of earlier actions, as one version. is_list: whether the request sent them as a list."""

    task: Task = "act"

    def __init__(self, session: str, rewards: Sequence[RewardInput], is_list: bool, if_match: str | None) -> None:
        super().__init__(session, None, "always", if_match)
        self._rewards, self._is_list = rewards, is_list

    async def plan(self, handle: SessionHandle, model: LoadedModel) -> TurnPlan:
        meta, name = self._find(handle, model)
        if name in model.tabular:
            fields = tuple(f"examples.{i}." if self._is_list else "" for i in range(len(self._rewards)))
            steps = tuple(_action_reward(each, meta, field) for each, field in zip(self._rewards, fields, strict=True))
            regret = sum(each.regret for each in self._rewards)
            request = TabularRequest(name, steps, fields, regret=regret, highest_action=meta.actions)
            return TurnPlan(meta, policy_request=request)
        if self._is_list:
            raise BadRequest(f"'examples' is not for {name!r}, which learns one reward at a time.", param="examples")
        fixed = PolicyRequest(name, decide=False)
        return TurnPlan(meta, policy_request=_with_reward(fixed, model.policies[name], self._rewards[0], meta))


class ExamplesTurn(PolicyTurn[ObserveResult], LearningTurn):
    """Learns the labels or the targets of examples, as one version; predict: and predicts each one before."""

    task: Task = "label"

    def __init__(self, session: str, model: str | None, examples: Batch, predict: bool, if_match: str | None) -> None:
        super().__init__(session, model, "always", if_match)
        self._examples, self._predict = examples, predict

    async def plan(self, handle: SessionHandle, model: LoadedModel) -> TurnPlan:
        self._predictions = list[Json]()
        meta, name = self._find(handle, model)
        if name in model.tabular:
            config = model.tabular[name].config
            request = example_request(config, self._examples, learn=True, predict=self._predict)
            return TurnPlan(meta, policy_request=request)
        policy = model.policies[name]
        features = _fixed_features(policy, self._examples)
        label = cast(ExampleInput, self._examples.items[0]).label
        if not isinstance(label, int) or not 0 <= label < policy.config.actions:
            raise BadRequest(f"'label' must be in 0..{policy.config.actions - 1}, got {label}.", param="label")
        return TurnPlan(meta, policy_request=PolicyRequest(name, tuple(features), decide=False, label=label))

    def outputs(self, segment: int, event: Event) -> Iterator[ObserveResult]:
        if isinstance(event, TabularAnswer):
            self._predictions.append(event.answer)
        return iter(())

    def last_event(self, outcome: TurnOutcome) -> ObserveResult:
        return replace(super().last_event(outcome), predictions=self._predictions or None)


def _require_task(model: LoadedModel, name: str, task: Task) -> None:
    tasks: dict[str, Task] = {key: policy.config.task for key, policy in model.policies.items()}
    tasks |= {key: TASKS[learner.config.task] for key, learner in model.tabular.items()}
    if name not in tasks:
        raise NotFound(f"There is no policy {name[:80]!r}.", param="model", code="model_not_found")
    if tasks[name] != task:
        fit = ", ".join(sorted(key for key, other in tasks.items() if other == task)) or "none"
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


def _action_reward(reward: RewardInput, meta: SessionMeta, field: str = "") -> ActionReward:
    """Return the outcome of an action of a learner's session; field: the part of the request that it comes from.

    Raises Conflict for an action of another session.
    """
    number = None if reward.action_id is None else parse_action_id(reward.action_id, meta, f"{field}action_id")
    return ActionReward(reward.reward, number)


def _fixed_features(policy: Policy, examples: Batch) -> list[float]:
    """Return the numbers of the one example that a policy of fixed shapes takes. Raises BadRequest."""
    features = cast(ExampleInput, examples.items[0]).features
    if examples.is_list or not isinstance(features, list) or any(isinstance(x, str | None) for x in features):
        raise BadRequest(
            f"{policy.config.name!r} has fixed sizes: it takes one example, a list of numbers.", param="features"
        )
    numbers = cast("list[float]", features)
    _require_numbers(policy, numbers, "features")
    return numbers


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
        observation: list[float] | None,
        choices: Batch | None,
        reward: RewardInput | None,
        sampling: ActionSampling,
        *,
        if_match: str | None = None,
    ) -> Json:
        """Learn the reward that came along, if one did, then choose an action, or several, and remember them until
        their rewards; return the reply."""
        return await self._run(ctx, ActTurn(session, model, observation, choices, reward, sampling, if_match))

    async def feedback(
        self,
        ctx: RequestContext,
        session: str,
        rewards: Sequence[RewardInput],
        *,
        is_list: bool = False,
        if_match: str | None = None,
    ) -> ObserveResult:
        """Learn the reward of an earlier action, or of several. is_list: whether the request sent them as a list."""
        return await self._run(ctx, RewardTurn(session, rewards, is_list, if_match))

    async def observe(
        self,
        ctx: RequestContext,
        session: str,
        model: str | None,
        examples: Batch,
        *,
        predict: bool = False,
        if_match: str | None = None,
    ) -> ObserveResult:
        """Learn the labels or the targets of examples."""
        return await self._run(ctx, ExamplesTurn(session, model, examples, predict, if_match))

    async def predict(self, ctx: RequestContext, session: str, model: str | None, examples: Batch) -> Json:
        """Predict labels or numbers of examples, and learn nothing; return the reply."""
        return await self._run(ctx, PredictTurn(session, model, examples))

    async def _run(self, ctx: RequestContext, turn: PolicyTurn[R]) -> R:
        """Run a turn; a wrong model is refused before the turn waits for its session."""
        turn.require_task(self._sessions.loaded_model)
        return await self._sessions.run(ctx, turn)
