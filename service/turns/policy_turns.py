"""What sessions of policies do: act, take rewards, label, learn labels. Each is one turn, as those of text are."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from model.policies.network import Policy
from service.engine import Decided, Deed
from service.errors import BadRequest, Conflict, NotFound
from service.store.base import SessionMeta
from service.turns.session_gate import Held, Write, known
from service.turns.sessions import Call, ObserveResult, Sessions
from service.turns.types import Turn
from service.types import Adaptation

ACTION = "act-"
Task = Literal["act", "label"]
TASKS: dict[Task, str] = {"act": "acts", "label": "labels"}


@dataclass(frozen=True)
class Told:
    """What a client knows of an action's outcome. action_id: None = the last action's; regret: what it missed."""

    reward: float
    action_id: str | None = None
    regret: float = 0.0


@dataclass(frozen=True)
class Wish:
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

    def told(self) -> dict[str, Any]:
        """As JSON; `asdict` would copy each number by itself."""
        return vars(self) | {"adaptation": vars(self.adaptation)}


@dataclass(frozen=True)
class LabelResult:
    """The likeliest label and the chances of all."""

    label: int
    probabilities: list[float]
    version: int


class Policies:
    """What can be asked of the policies that are served. Every method raises NotFound for a policy that is not, and
    Conflict for a session that is of something else; `model` may be None where the session is there."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    async def act(
        self,
        call: Call,
        session: str,
        model: str | None,
        observation: list[float],
        told: Told | None,
        wish: Wish,
        *,
        if_match: str | None = None,
    ) -> ActResult:
        """Learns the reward that came along, if one did, then takes an action, which is remembered until its reward."""

        async def turn_once() -> ActResult:
            async with self._held(call, session, model, "act", "unless predict", if_match) as (held, name):
                if held.replay is not None:
                    return ActResult(**held.replay | {"adaptation": Adaptation(**held.replay["adaptation"])})
                policy = self._policy(name)
                _require_numbers(policy, observation, "observation")
                deed = self._told(name, told, Deed(name, tuple(observation), **asdict(wish)))
                decided: list[Decided] = []

                def acted(adaptation: Adaptation) -> ActResult:
                    (one,) = decided
                    number = None if one.number is None else f"{ACTION}{one.number}"
                    chance = one.chances[one.choice]
                    return ActResult(one.choice, number, chance, one.chances, one.expected or [], adaptation)

                write = known(held).options.get("adapt") != "predict"
                if told is not None and not write:
                    raise Conflict("The session's option 'adapt' is 'predict': it learns no reward.", param="reward")
                turn = Turn(held, deed=deed)
                turn.result = lambda new: acted(turn.adaptation(new.version)).told()
                await self._run(turn, decided, write=write)
                return acted(turn.adaptation())

        return await self._sessions.gate.turn(turn_once)

    async def feedback(self, call: Call, session: str, told: Told, *, if_match: str | None = None) -> ObserveResult:
        """Learns the reward of an earlier action."""
        return await self._learn(
            call, session, None, "act", lambda name: self._told(name, told, Deed(name, decide=False)), if_match
        )

    async def observe(
        self,
        call: Call,
        session: str,
        model: str | None,
        features: list[float],
        label: int,
        *,
        if_match: str | None = None,
    ) -> ObserveResult:
        """Learns the label of an example."""

        def deed(name: str) -> Deed:
            policy = self._policy(name)
            _require_numbers(policy, features, "features")
            if not 0 <= label < policy.config.actions:
                raise BadRequest(f"'label' must be in 0..{policy.config.actions - 1}, got {label}.", param="label")
            return Deed(name, tuple(features), decide=False, label=label)

        return await self._learn(call, session, model, "label", deed, if_match)

    async def predict(self, call: Call, session: str, model: str | None, features: list[float]) -> LabelResult:
        """Labels an example, and learns nothing."""

        async def turn_once() -> LabelResult:
            async with self._held(call, session, model, "label", "never", None) as (held, name):
                policy = self._policy(name)
                _require_numbers(policy, features, "features")
                decided: list[Decided] = []
                turn = Turn(held, deed=Deed(name, tuple(features)))
                await self._run(turn, decided, write=False)
                (one,) = decided
                return LabelResult(one.choice, one.chances, turn.adaptation().version_to)

        return await self._sessions.gate.turn(turn_once)

    async def _learn(
        self,
        call: Call,
        session: str,
        model: str | None,
        task: Task,
        deed: Callable[[str], Deed],
        if_match: str | None,
    ) -> ObserveResult:
        """A turn that learns and decides nothing."""

        async def turn_once() -> ObserveResult:
            async with self._held(call, session, model, task, "always", if_match) as (held, name):
                if held.replay is not None:
                    return ObserveResult(**held.replay)
                turn = Turn(held, deed=deed(name))
                turn.result = lambda new: asdict(ObserveResult.of(turn.adaptation(new.version)))
                await self._run(turn, [], write=True)
                return ObserveResult.of(turn.adaptation())

        return await self._sessions.gate.turn(turn_once)

    async def _run(self, turn: Turn, decided: list[Decided], *, write: bool) -> None:
        async for _, event in self._sessions.run([], turn, write=write):
            if isinstance(event, Decided):
                decided.append(event)

    @asynccontextmanager
    async def _held(
        self, call: Call, session: str, model: str | None, task: Task, write: Write, if_match: str | None
    ) -> AsyncIterator[tuple[Held, str]]:
        """A session for one turn, and the policy that it is of; a new one is at version 0 and not yet stored."""
        served = self._sessions.served
        if model is not None:
            self._require_task(model, task)
        async with self._sessions.gate.hold(call, session, write=write, if_match=if_match) as held:
            if held.replay is not None:
                yield held, ""
                return
            if held.meta is None:
                if model is None:
                    names = ", ".join(sorted(served.policies)) or "none is served"
                    raise BadRequest(f"'model' is required to begin a session with: a policy ({names}).", param="model")
                held.meta = served.new_meta(session, {}, model)
            name = self._name(held.meta, model)
            self._require_task(name, task)
            yield held, name

    def _name(self, meta: SessionMeta, model: str | None) -> str:
        served = self._sessions.served
        if model is not None:
            served.require_own(meta, model)
            return model
        name = served.require_any(meta)
        if not name:
            raise Conflict(f"Session {meta.id!r} is one of text, not of a policy.", code="model_mismatch")
        return name

    def _policy(self, name: str) -> Policy:
        return self._sessions.served.policies[name]

    def _require_task(self, name: str, task: Task) -> None:
        policies = self._sessions.served.policies
        if name not in policies:
            raise NotFound(f"There is no policy {name[:80]!r}.", param="model", code="model_not_found")
        if policies[name].config.task != task:
            fit = ", ".join(sorted(one for one, policy in policies.items() if policy.config.task == task)) or "none"
            raise BadRequest(f"'model' must be a policy that {TASKS[task]} ({fit}), got {name!r}.", param="model")

    def _told(self, name: str, told: Told | None, deed: Deed) -> Deed:
        """The deed with what is told of an action's outcome. Raises BadRequest for a reward out of range."""
        if told is None:
            return deed
        config = self._policy(name).config
        if not config.lowest <= told.reward <= config.highest:
            raise BadRequest(
                f"'reward' must be in {config.lowest:g}..{config.highest:g}, got {told.reward:g}.", param="reward"
            )
        number = None if told.action_id is None else int(told.action_id.removeprefix(ACTION))
        return replace(deed, reward=told.reward, action_id=number, regret=told.regret)


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
