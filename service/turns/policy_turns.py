"""What sessions of policies do: act, take rewards, label, learn labels. Each is one turn, as those of text are."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from model.policies.network import Policy
from service.engine import PolicyDecision, PolicyRequest
from service.errors import BadRequest, Conflict, NotFound
from service.store.base import SessionMeta, WriteMode
from service.turns.session_gate import SessionHandle, known
from service.turns.sessions import ObserveResult, RequestContext, Sessions
from service.turns.types import Turn
from service.types import Adaptation

ACTION_ID_PREFIX = "act-"
Task = Literal["act", "label"]
TASK_VERBS: dict[Task, str] = {"act": "acts", "label": "labels"}


@dataclass(frozen=True)
class RewardInput:
    """What a client knows of an action's outcome. action_id: None = the last action's; regret: what it missed."""

    reward: float
    action_id: str | None = None
    regret: float = 0.0


@dataclass(frozen=True)
class ActionSampling:
    """How to choose. temperature: None = as the policy does by itself; seed: of what is drawn."""

    temperature: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class ActResult:
    """An action, under which id its reward can be told, how likely it was to be taken, how likely each was, and the
    mean reward that each is expected to bring."""

    action: int
    action_id: str | None
    probability: float
    probabilities: list[float]
    expected: list[float]
    adaptation: Adaptation

    def reward_input(self) -> dict[str, Any]:
        """As JSON; `asdict` would copy each number by itself."""
        return vars(self) | {"adaptation": vars(self.adaptation)}


@dataclass(frozen=True)
class LabelResult:
    """The likeliest label and the chances of all."""

    label: int
    probabilities: list[float]
    version: int


class PolicyTurns:
    """What can be asked of the policies that are served. Every method raises NotFound for a policy that is not, and
    Conflict for a session that is of something else; `model` may be None where the session is there."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    async def act(
        self,
        ctx: RequestContext,
        session: str,
        model: str | None,
        observation: list[float],
        reward_input: RewardInput | None,
        action_sampling: ActionSampling,
        *,
        if_match: str | None = None,
    ) -> ActResult:
        """Learns the reward that came along, if one did, then takes an action, which is remembered until its reward."""

        async def run_once() -> ActResult:
            async with self._acquire_session(ctx, session, model, "act", "unless predict", if_match) as (handle, name):
                if handle.replay is not None:
                    return ActResult(**handle.replay | {"adaptation": Adaptation(**handle.replay["adaptation"])})
                policy = self._policy(name)
                _require_numbers(policy, observation, "observation")
                policy_request = self._with_reward(
                    name, reward_input, PolicyRequest(name, tuple(observation), **asdict(action_sampling))
                )
                decided: list[PolicyDecision] = []

                def act_result(adaptation: Adaptation) -> ActResult:
                    (one,) = decided
                    number = None if one.number is None else f"{ACTION_ID_PREFIX}{one.number}"
                    prob = one.probs[one.choice]
                    return ActResult(one.choice, number, prob, one.probs, one.expected or [], adaptation)

                write = known(handle).options.get("adapt") != "predict"
                if reward_input is not None and not write:
                    raise Conflict("The session's option 'adapt' is 'predict': it learns no reward.", param="reward")
                turn = Turn(handle, policy_request=policy_request)
                turn.result = lambda new: act_result(turn.adaptation(new.version)).reward_input()
                await self._run(turn, decided, write=write)
                return act_result(turn.adaptation())

        return await self._sessions.gate.turn(run_once)

    async def feedback(
        self, ctx: RequestContext, session: str, reward_input: RewardInput, *, if_match: str | None = None
    ) -> ObserveResult:
        """Learns the reward of an earlier action."""
        return await self._learn(
            ctx,
            session,
            None,
            "act",
            lambda name: self._with_reward(name, reward_input, PolicyRequest(name, decide=False)),
            if_match,
        )

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
        """Learns the label of an example."""

        def policy_request(name: str) -> PolicyRequest:
            policy = self._policy(name)
            _require_numbers(policy, features, "features")
            if not 0 <= label < policy.config.actions:
                raise BadRequest(f"'label' must be in 0..{policy.config.actions - 1}, got {label}.", param="label")
            return PolicyRequest(name, tuple(features), decide=False, label=label)

        return await self._learn(ctx, session, model, "label", policy_request, if_match)

    async def predict(self, ctx: RequestContext, session: str, model: str | None, features: list[float]) -> LabelResult:
        """Labels an example, and learns nothing."""

        async def run_once() -> LabelResult:
            async with self._acquire_session(ctx, session, model, "label", "never", None) as (handle, name):
                policy = self._policy(name)
                _require_numbers(policy, features, "features")
                decided: list[PolicyDecision] = []
                turn = Turn(handle, policy_request=PolicyRequest(name, tuple(features)))
                await self._run(turn, decided, write=False)
                (one,) = decided
                return LabelResult(one.choice, one.probs, turn.adaptation().version_to)

        return await self._sessions.gate.turn(run_once)

    async def _learn(
        self,
        ctx: RequestContext,
        session: str,
        model: str | None,
        task: Task,
        policy_request: Callable[[str], PolicyRequest],
        if_match: str | None,
    ) -> ObserveResult:
        """A turn that learns and decides nothing."""

        async def run_once() -> ObserveResult:
            async with self._acquire_session(ctx, session, model, task, "always", if_match) as (handle, name):
                if handle.replay is not None:
                    return ObserveResult(**handle.replay)
                turn = Turn(handle, policy_request=policy_request(name))
                turn.result = lambda new: asdict(ObserveResult.of(turn.adaptation(new.version)))
                await self._run(turn, [], write=True)
                return ObserveResult.of(turn.adaptation())

        return await self._sessions.gate.turn(run_once)

    async def _run(self, turn: Turn, decided: list[PolicyDecision], *, write: bool) -> None:
        async for _, event in self._sessions.run([], turn, write=write):
            if isinstance(event, PolicyDecision):
                decided.append(event)

    @asynccontextmanager
    async def _acquire_session(
        self, ctx: RequestContext, session: str, model: str | None, task: Task, write: WriteMode, if_match: str | None
    ) -> AsyncIterator[tuple[SessionHandle, str]]:
        """A session for one turn, and the policy that it is of; a new one is at version 0 and not yet stored."""
        loaded_model = self._sessions.loaded_model
        if model is not None:
            self._require_task(model, task)
        async with self._sessions.gate.acquire(ctx, session, write=write, if_match=if_match) as handle:
            if handle.replay is not None:
                yield handle, ""
                return
            if handle.meta is None:
                if model is None:
                    names = ", ".join(sorted(loaded_model.policies)) or "none is served"
                    raise BadRequest(f"'model' is required to begin a session with: a policy ({names}).", param="model")
                handle.meta = loaded_model.new_meta(session, {}, model)
            name = self._name(handle.meta, model)
            self._require_task(name, task)
            yield handle, name

    def _name(self, meta: SessionMeta, model: str | None) -> str:
        loaded_model = self._sessions.loaded_model
        if model is not None:
            loaded_model.require_model(meta, model)
            return model
        name = loaded_model.require_loaded_model(meta)
        if not name:
            raise Conflict(f"Session {meta.id!r} is one of text, not of a policy.", code="model_mismatch")
        return name

    def _policy(self, name: str) -> Policy:
        return self._sessions.loaded_model.policies[name]

    def _require_task(self, name: str, task: Task) -> None:
        policies = self._sessions.loaded_model.policies
        if name not in policies:
            raise NotFound(f"There is no policy {name[:80]!r}.", param="model", code="model_not_found")
        if policies[name].config.task != task:
            fit = ", ".join(sorted(one for one, policy in policies.items() if policy.config.task == task)) or "none"
            raise BadRequest(f"'model' must be a policy that {TASK_VERBS[task]} ({fit}), got {name!r}.", param="model")

    def _with_reward(self, name: str, reward_input: RewardInput | None, policy_request: PolicyRequest) -> PolicyRequest:
        """The deed with what is told of an action's outcome. Raises BadRequest for a reward out of range."""
        if reward_input is None:
            return policy_request
        config = self._policy(name).config
        if not config.lowest <= reward_input.reward <= config.highest:
            raise BadRequest(
                f"'reward' must be in {config.lowest:g}..{config.highest:g}, got {reward_input.reward:g}.",
                param="reward",
            )
        number = None if reward_input.action_id is None else int(reward_input.action_id.removeprefix(ACTION_ID_PREFIX))
        return replace(policy_request, reward=reward_input.reward, action_id=number, regret=reward_input.regret)


def _require_numbers(policy: Policy, numbers: list[float], field: str) -> None:
    config = policy.config
    if len(numbers) == config.observation:
        return
    parts = f"{config.context} of the context" + (
        f" and {config.features} of each of {config.actions} actions" if config.features else ""
    )
    raise BadRequest(
        f"{field!r} must hold {config.observation} numbers for {config.name!r} ({parts}), got {len(numbers)}.",
        param=field,
    )
