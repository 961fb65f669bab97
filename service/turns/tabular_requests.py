"""Requests to learners of tables: checked against the learner's task, and turned into the engine's steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from model.tabular.config import TabularConfig
from model.tabular.decision_rules import RULES, DecisionRules
from model.tabular.schema import Features
from service.engine import ActionReward, Example, TabularRequest
from service.engine import ArmChoice as ArmChoice  # the edge makes them
from service.errors import BadRequest
from service.store.base import Option, SessionMeta
from service.turns.action_ids import format_action_id


@dataclass(frozen=True)
class ExampleInput:
    """An example of a request. label: a name, or the number of a label."""

    features: Features
    label: str | int | None = None
    target: float | None = None


@dataclass(frozen=True)
class Batch:
    """The examples or decisions of a request. is_list: whether the request sent them as a list, `examples`."""

    items: Sequence[ExampleInput] | Sequence[ArmChoice]
    is_list: bool

    @property
    def fields(self) -> tuple[str, ...]:
        """The part of the request that each one comes from, as errors name it."""
        return tuple(f"examples.{i}." for i in range(len(self.items))) if self.is_list else ("",)


def example_request(config: TabularConfig, batch: Batch, *, learn: bool, predict: bool) -> TabularRequest:
    """Return the request to learn or to predict examples. Raises BadRequest for a label where a number is learned."""
    wanted, other = ("label", "target") if config.task == "labels" else ("target", "label")
    steps = []
    for example, field in zip(cast("Sequence[ExampleInput]", batch.items), batch.fields, strict=True):
        if learn and getattr(example, other) is not None:
            raise BadRequest(
                f"'{field}{other}' is not for {config.name!r}, which learns a '{wanted}'.", param=f"{field}{other}"
            )
        label = None if example.label is None else str(example.label)
        steps.append(Example(example.features, label, example.target, predict))
    return TabularRequest(config.name, tuple(steps), batch.fields)


def choice_request(
    config: TabularConfig, batch: Batch, reward: ActionReward | None, meta: SessionMeta, regret: float
) -> TabularRequest:
    """Return the request to learn a reward, if there is one, and to decide. Raises BadRequest for arms that do not
    agree."""
    choices = cast("Sequence[ArmChoice]", batch.items)
    for choice, field in zip(choices, batch.fields, strict=True):
        _check_arms(choice, field)
    steps: list[Example | ActionReward | ArmChoice] = list(choices)
    fields = batch.fields
    if reward is not None:
        steps, fields = [reward, *steps], ("", *fields)
    rules = rules_of(meta.options)
    return TabularRequest(config.name, tuple(steps), fields, rules, regret, meta.actions)


def rules_of(options: dict[str, Option]) -> DecisionRules:
    """Return the rules of a session for its decisions."""
    found: dict[str, Any] = {name: options[name] for name in RULES if name in options}
    return DecisionRules(**found)


def action_reply(answer: dict[str, Any], number: int, meta: SessionMeta | None) -> dict[str, Any]:
    """Return a decision as JSON."""
    action_id = format_action_id(number, meta) if number and meta is not None else None
    return {"object": "action", "action_id": action_id, "probability": answer["propensity"], **answer}


def _check_arms(choice: ArmChoice, field: str) -> None:
    if len(set(choice.arms)) < len(choice.arms):
        twice = next(arm for i, arm in enumerate(choice.arms) if arm in choice.arms[:i])
        raise BadRequest(f"'{field}actions' must be distinct, got {twice[:80]!r} twice.", param=f"{field}actions")
    known = set(choice.arms)
    if choice.allowed is not None and not choice.allowed <= known:
        unknown = sorted(choice.allowed - known)[0]
        raise BadRequest(
            f"'{field}allowed' must name actions of the request, got {unknown[:80]!r}.", param=f"{field}allowed"
        )
    if choice.forced is not None and choice.forced not in (known if choice.allowed is None else choice.allowed):
        raise BadRequest(
            f"'{field}forced' must name an allowed action of the request, got {choice.forced[:80]!r}.",
            param=f"{field}forced",
        )
