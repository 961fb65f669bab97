"""The rules of a session for its decisions: how much may be explored, and how often a control policy decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Control = Literal["uniform", "first"]


@dataclass(frozen=True)
class DecisionRules:
    """The rules of a session.

    floor: least probability of each allowed arm, where the policy decides; 1/n at most of n arms.
    explore: the budget of exploration, the largest probability of all arms together but the likeliest one. The floor
        holds where both cannot.
    holdout: share of the decisions that the control policy takes.
    control: "uniform" (each allowed arm equally often) or "first" (the first allowed arm of the request).
    """

    floor: float = 0.0
    explore: float = 1.0
    holdout: float = 0.0
    control: Control = "uniform"


NO_RULES = DecisionRules()
RULES = tuple(vars(NO_RULES))  # their names, which are options of sessions


class Draw(NamedTuple):
    """A drawn arm. propensity: its probability in this request, by policy and control together."""

    arm: int
    propensity: float
    held_out: bool


def limit(probs: Array, allowed: NDArray[np.bool_], rules: DecisionRules) -> Array:
    """Return the probabilities [A] of a policy under the rules, which sum to 1; at least one arm is allowed."""
    probs = np.where(allowed, probs, 0.0)
    total = probs.sum()
    probs = probs / total if total > 0 else allowed / allowed.sum()
    best = int(probs.argmax())
    others = 1.0 - probs[best]
    if others > rules.explore:
        probs *= rules.explore / others
        probs[best] = 1.0 - rules.explore
    num_allowed = int(allowed.sum())
    floor = min(rules.floor, 1.0 / num_allowed)
    return np.where(allowed, floor + (1.0 - num_allowed * floor) * probs, 0.0)


def draw(probs: Array, allowed: NDArray[np.bool_], rules: DecisionRules, random: np.random.Generator) -> Draw:
    """Draw an arm: by the control policy with probability `holdout`, else by the policy's probabilities [A]."""
    if rules.control == "uniform":
        control = allowed / allowed.sum()
    else:
        control = (np.arange(len(allowed)) == allowed.argmax()).astype(np.float64)
    held_out = bool(random.random() < rules.holdout)
    chosen = control if held_out else probs
    arm = int(random.choice(len(probs), p=chosen / chosen.sum()))
    return Draw(arm, float((1.0 - rules.holdout) * probs[arm] + rules.holdout * control[arm]), held_out)
