"""Off-policy evaluation: what another policy would have earned, estimated from the log of the policy that acted.

Each line of the log is a decision: the context, the action, its reward, and the propensity p, the probability with
which the action was taken. With w = π(action) / p, the weight of a decision under the policy π, over n decisions:

    IPS    Σ w r / n                          inverse propensity score (Horvitz & Thompson 1952); unbiased
    SNIPS  Σ w r / Σ w                        self-normalised; never outside the range of the rewards
    DR     Σ [ Σ_a π(a) q(a) + w (r − q) ] / n    doubly robust (Dudík, Langford & Li 2011); unbiased, whatever q is

q is the reward that a model expects: one ridge regression for each action, fitted to the lines before, so that no
reward is part of the expectation that it is compared with. The intervals are normal approximations of 95%: too narrow
where few decisions carry most of the weight, which the effective sample size (Σ w)² / Σ w² shows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from model.tabular.schema import Features, Schema, SchemaError

Z95 = 1.959963984540054
RIDGE = 1.0
MAX_LINE_BYTES = 2**20
MAX_ACTIONS = 256
MAX_CONSTANTS = 10  # policies of one action that are compared unless others are named
Array = NDArray[np.float64]


class LogError(ValueError):
    """A log that cannot be evaluated; the message names the line, the field, the limit and the value."""


@dataclass(frozen=True)
class Decision:
    """One line of a log. target: the probabilities of the policy to evaluate, where the line has them."""

    context: Features
    action: str
    reward: float
    propensity: float
    actions: tuple[str, ...] = ()
    target: Mapping[str, float] | None = None


# The probabilities of the actions under a policy.
TargetPolicy = Callable[[Decision, Sequence[str]], Mapping[str, float]]


@dataclass(frozen=True)
class Estimate:
    """An estimated mean reward with its 95% interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, mean: float, variance: float) -> Estimate:
        """Return the normal interval of a mean that has this variance."""
        half = Z95 * math.sqrt(max(variance, 0.0))
        return cls(mean, mean - half, mean + half)


class Moments:
    """The running mean and variance of a series (Welford 1962)."""

    def __init__(self) -> None:
        self.number, self.mean, self._squares = 0, 0.0, 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.number += 1
        delta = value - self.mean
        self.mean += delta / self.number
        self._squares += delta * (value - self.mean)

    @property
    def estimate(self) -> Estimate:
        """The mean of the series with its interval; one value has no interval."""
        if self.number < 2:
            return Estimate(self.mean, -math.inf, math.inf)
        return Estimate.of(self.mean, self._squares / (self.number - 1) / self.number)


class Evaluation:
    """The sums over a log for one policy, and the estimates that follow from them."""

    def __init__(self) -> None:
        self._ips, self._dr = Moments(), Moments()
        self._weights = 0.0
        self._squares = np.zeros(3)  # Σ w² r², Σ w² r, Σ w²

    def add(self, weight: float, reward: float, expected: float, expected_of_policy: float) -> None:
        """Count a decision: its weight and reward, and the model's rewards of the action and of the policy."""
        self._ips.add(weight * reward)
        self._dr.add(expected_of_policy + weight * (reward - expected))
        self._weights += weight
        self._squares += weight * weight * np.array([reward * reward, reward, 1.0])

    @property
    def effective_size(self) -> float:
        """The number of decisions of equal weight that would say as much."""
        return float(self._weights**2 / self._squares[2]) if self._weights else 0.0

    @property
    def ips(self) -> Estimate:
        """The inverse propensity score."""
        return self._ips.estimate

    @property
    def snips(self) -> Estimate | None:
        """The self-normalised score, by the delta method; None where the policy takes no logged action."""
        if not self._weights:
            return None
        mean = self._ips.mean * self._ips.number / self._weights
        return Estimate.of(mean, float(self._squares @ [1.0, -2 * mean, mean * mean]) / self._weights**2)

    @property
    def dr(self) -> Estimate:
        """The doubly robust estimate."""
        return self._dr.estimate

    def as_json(self) -> dict[str, Any]:
        """Return the estimates as JSON."""
        named = {"ips": self.ips, "snips": self.snips, "dr": self.dr}
        estimates = {name: None if one is None else vars(one) for name, one in named.items()}
        return {"decisions": self._ips.number, "effective_size": self.effective_size, **estimates}


class RewardModel:
    """One ridge regression for each action on the standardised context, updated line by line.

    mean, scale [d]: of the columns, over the whole log; they contain no reward.
    """

    def __init__(self, mean: Array, scale: Array) -> None:
        self._mean, self._scale = mean, scale
        self._inverse: dict[str, Array] = {}
        self._weights: dict[str, Array] = {}

    def inputs(self, row: NDArray[np.float32]) -> Array:
        """Return the inputs of a context: 1, then the standardised columns, 0 where missing."""
        standard = (np.pad(row, (0, len(self._mean) - len(row)), constant_values=np.nan) - self._mean) / self._scale
        return np.concatenate([[1.0], np.nan_to_num(standard)])

    def predict(self, action: str, inputs: Array) -> float:
        """Return the expected reward of an action; 0 before its first reward."""
        return float(self._weights[action] @ inputs) if action in self._weights else 0.0

    def learn(self, action: str, inputs: Array, reward: float) -> None:
        """Update the action's regression by one reward (Sherman & Morrison 1950)."""
        inverse = self._inverse.setdefault(action, np.eye(len(inputs)) / RIDGE)
        weights = self._weights.setdefault(action, np.zeros(len(inputs)))
        direction = inverse @ inputs
        gain = direction / (1.0 + inputs @ direction)
        weights += gain * (reward - weights @ inputs)
        inverse -= np.outer(gain, direction)


@dataclass(frozen=True)
class LogSummary:
    """The actions of a log, how often each was taken, its rewards, and the scale of the columns of its contexts."""

    counts: dict[str, int]
    rewards: Estimate
    has_targets: bool
    schema: Schema
    mean: Array
    scale: Array


def read_log(path: Path) -> Iterator[Decision]:
    """Yield the decisions of a file of JSON lines. Raises LogError."""
    try:
        with path.open("rb") as lines:
            number = 0
            while line := lines.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise LogError(f"{path.name}, line {number}: a line may have {MAX_LINE_BYTES} bytes")
                if line.strip():
                    yield _decision(line, f"{path.name}, line {number}")
    except OSError as error:
        raise LogError(f"cannot read {path.name}: {error.strerror}") from None


def summarise(decisions: Iterator[Decision]) -> LogSummary:
    """Return what one pass over a log tells. Raises LogError for a log without decisions, or of too many actions."""
    schema, counts, rewards, has_targets = Schema(), dict[str, int](), Moments(), True
    sums = np.zeros((3, 0))  # number, sum and sum of squares of each column
    for number, decision in enumerate(decisions, 1):
        row = _encode(schema, decision, number).astype(np.float64)
        sums = np.pad(sums, ((0, 0), (0, len(row) - sums.shape[1])))
        known = ~np.isnan(row)
        sums[:, known] += np.stack([np.ones(known.sum()), row[known], row[known] ** 2])
        for action in {decision.action, *decision.actions}:
            counts[action] = counts.get(action, 0) + (action == decision.action)
        rewards.add(decision.reward)
        has_targets &= decision.target is not None
        if len(counts) > MAX_ACTIONS:
            raise LogError(f"a log may have {MAX_ACTIONS} actions, line {number} names one more")
    if not counts:
        raise LogError("the log has no decisions")
    size = np.maximum(sums[0], 1)
    mean = sums[1] / size
    scale = np.sqrt(np.maximum(sums[2] / size - mean**2, 0))
    return LogSummary(counts, rewards.estimate, has_targets, schema, mean, np.where(scale > 0, scale, 1.0))


def evaluate(
    decisions: Iterator[Decision], summary: LogSummary, policies: Mapping[str, TargetPolicy]
) -> dict[str, Evaluation]:
    """Return the evaluation of each policy, in one pass. Raises LogError for probabilities that are none."""
    evaluations = {name: Evaluation() for name in policies}
    model = RewardModel(summary.mean, summary.scale)
    for number, decision in enumerate(decisions, 1):
        actions = decision.actions or tuple(summary.counts)
        inputs = model.inputs(_encode(summary.schema, decision, number))
        expected = {action: model.predict(action, inputs) for action in actions}
        for name, policy in policies.items():
            probs = policy(decision, actions)
            _check_probabilities(probs, actions, f"line {number}, policy {name!r}")
            of_policy = sum(prob * expected[action] for action, prob in probs.items())
            weight = probs.get(decision.action, 0.0) / decision.propensity
            evaluations[name].add(weight, decision.reward, expected[decision.action], of_policy)
        model.learn(decision.action, inputs, decision.reward)
    return evaluations


def uniform(decision: Decision, actions: Sequence[str]) -> dict[str, float]:
    """Take each action equally often."""
    return dict.fromkeys(actions, 1 / len(actions))


def always(action: str) -> TargetPolicy:
    """Return the policy that takes one action wherever it may, and else any."""

    def policy(decision: Decision, actions: Sequence[str]) -> dict[str, float]:
        return {action: 1.0} if action in actions else uniform(decision, actions)

    return policy


def targets(decision: Decision, actions: Sequence[str]) -> Mapping[str, float]:
    """Take the actions with the probabilities that the line itself has as `target`."""
    assert decision.target is not None
    return decision.target


def named_policies(names: Sequence[str], summary: LogSummary) -> dict[str, TargetPolicy]:
    """Return policies by their names: `uniform`, `always:ACTION`, or `target` for the probabilities in the lines.

    Without names: uniform, the commonest actions, and `target` where each line has it. Raises LogError.
    """
    if not names:
        commonest = sorted(summary.counts, key=lambda action: -summary.counts[action])[:MAX_CONSTANTS]
        names = [*(["target"] if summary.has_targets else []), "uniform", *(f"always:{action}" for action in commonest)]
    found: dict[str, TargetPolicy] = {}
    for name in names:
        kind, _, action = name.partition(":")
        if kind == "always" and action in summary.counts:
            found[name] = always(action)
        elif name == "uniform":
            found[name] = uniform
        elif name == "target" and summary.has_targets:
            found[name] = targets
        else:
            raise LogError(
                f"a policy must be uniform, always:ACTION of an action of the log, or target where each line has one,"
                f" got {name!r}"
            )
    return found


def _decision(line: bytes, location: str) -> Decision:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise LogError(f"{location}: not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise LogError(f"{location}: must be an object, got {type(fields).__name__}")
    action, actions, context = fields.get("action"), fields.get("actions") or [], fields.get("context", {})
    reward, propensity = fields.get("reward"), fields.get("propensity")
    if not isinstance(action, str) or not action:
        raise LogError(f"{location}: 'action' must be a name, got {action!r}")
    if not _is_number(reward):
        raise LogError(f"{location}: 'reward' must be a number, got {reward!r}")
    if not _is_number(propensity) or not 0 < propensity <= 1:
        raise LogError(f"{location}: 'propensity' must be in 0..1 and above 0, got {propensity!r}")
    if not isinstance(actions, list) or not all(isinstance(one, str) for one in actions):
        raise LogError(f"{location}: 'actions' must be a list of names")
    if actions and action not in actions:
        raise LogError(f"{location}: 'actions' must contain the action {action!r}")
    if not isinstance(context, dict | list):
        raise LogError(f"{location}: 'context' must be an object or a list, got {context!r}")
    target = fields.get("target")
    if target is not None and not isinstance(target, dict):
        raise LogError(f"{location}: 'target' must be an object of probabilities, got {target!r}")
    return Decision(context, action, float(reward), float(propensity), tuple(actions), target)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _encode(schema: Schema, decision: Decision, number: int) -> NDArray[np.float32]:
    try:
        return schema.row(schema.encode(decision.context, "context"))
    except SchemaError as error:
        raise LogError(f"line {number}: {error}") from None


def _check_probabilities(probs: Mapping[str, float], actions: Sequence[str], location: str) -> None:
    if not probs.keys() <= set(actions):
        raise LogError(f"{location}: {sorted(probs.keys() - set(actions))[0]!r} is none of the line's actions")
    if not all(_is_number(prob) and prob >= 0 for prob in probs.values()) or abs(sum(probs.values()) - 1) > 1e-3:
        raise LogError(f"{location}: the probabilities must not be negative and sum to 1")
