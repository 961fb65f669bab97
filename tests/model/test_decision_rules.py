"""The rules of decisions: floor, budget, holdout; and that propensities are the frequencies of what is drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from model.tabular.decision_rules import NO_RULES, DecisionRules, draw, limit

ALL = np.ones(4, np.bool_)
PROBS = np.array([0.1, 0.4, 0.3, 0.2])


@pytest.mark.parametrize(
    ("rules", "allowed", "expected"),
    [
        (NO_RULES, [1, 1, 1, 1], [0.1, 0.4, 0.3, 0.2]),
        (NO_RULES, [1, 0, 1, 0], [0.25, 0, 0.75, 0]),
        (DecisionRules(floor=0.1), [1, 1, 1, 1], [0.16, 0.34, 0.28, 0.22]),
        (DecisionRules(floor=0.9), [1, 0, 1, 0], [0.5, 0, 0.5, 0]),
        (DecisionRules(explore=0.3), [1, 1, 1, 1], [0.05, 0.7, 0.15, 0.1]),
        (DecisionRules(explore=0.0), [1, 0, 1, 1], [0, 0, 1, 0]),
        (DecisionRules(explore=0.0, floor=0.05), [1, 1, 1, 1], [0.05, 0.85, 0.05, 0.05]),
    ],
)
def test_the_rules_bound_the_probabilities(rules: DecisionRules, allowed: Any, expected: Any) -> None:
    found = limit(PROBS, np.array(allowed, np.bool_), rules)
    assert found == pytest.approx(expected) and found.sum() == pytest.approx(1)


def test_a_policy_that_wants_only_what_is_forbidden_takes_the_rest_equally() -> None:
    assert limit(np.array([1.0, 0.0, 0.0]), np.array([False, True, True]), NO_RULES).tolist() == [0, 0.5, 0.5]


@pytest.mark.parametrize("control", ["uniform", "first"])
def test_a_propensity_is_the_frequency_with_which_an_arm_is_drawn(control: Any) -> None:
    rules = DecisionRules(holdout=0.25, control=control)
    allowed = np.array([False, True, True, True])
    probs, random = limit(PROBS, allowed, rules), np.random.default_rng(0)
    drawn = [draw(probs, allowed, rules, random) for _ in range(4000)]
    for arm in range(4):
        own = [one for one in drawn if one.arm == arm]
        assert not own or own[0].propensity == pytest.approx(len(own) / 4000, abs=0.03)
    assert np.mean([one.held_out for one in drawn]) == pytest.approx(0.25, abs=0.03)
    assert {one.arm for one in drawn if one.held_out} == ({1} if control == "first" else {1, 2, 3})


def test_equal_seeds_draw_equal_arms() -> None:
    rules = DecisionRules(holdout=0.5)
    twice = [[draw(PROBS, ALL, rules, np.random.default_rng(seed)) for seed in range(20)] for _ in range(2)]
    assert twice[0] == twice[1] and len({one.arm for one in twice[0]}) > 1
