"""Off-policy evaluation gives the known answers: by hand, in expectation, and with intervals that cover the truth."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from research.off_policy import Decision, Evaluation, LogError, always, evaluate, read_log, summarise, targets, uniform


def decisions_of(*rows: tuple[str, float, float]) -> list[Decision]:
    return [Decision({"x": 1.0}, action, reward, propensity, ("a", "b")) for action, reward, propensity in rows]


def test_the_estimates_are_those_of_the_formulas_by_hand() -> None:
    """Weights of "always a": 2, 0, 4; so IPS = (2·1 + 4·0) / 3, SNIPS = 2 / 6, and the effective size 36 / 20."""
    log = decisions_of(("a", 1.0, 0.5), ("b", 1.0, 0.5), ("a", 0.0, 0.25))
    found = evaluate(iter(log), summarise(iter(log)), {"a": always("a"), "uniform": uniform})
    assert found["a"].ips.mean == pytest.approx(2 / 3)
    assert found["a"].snips is not None and found["a"].snips.mean == pytest.approx(1 / 3)
    assert found["a"].effective_size == pytest.approx(36 / 20)
    assert found["uniform"].ips.mean == pytest.approx((1 + 1 + 0) / 3)
    half = 1.959964 * np.std([2.0, 0.0, 0.0], ddof=1) / np.sqrt(3)
    assert found["a"].ips.high - found["a"].ips.mean == pytest.approx(half, rel=1e-5)


def test_a_perfect_log_of_all_outcomes_gives_the_true_value_exactly() -> None:
    """Each pair of context and action stands in the log as often as the logging policy takes it: IPS is exact."""
    reward = {("x", "a"): 0.2, ("x", "b"): 0.7, ("y", "a"): 0.9, ("y", "b"): 0.1}
    log = [
        Decision({"c": context}, action, reward[context, action], {"a": 0.75, "b": 0.25}[action], ("a", "b"), target)
        for context, target in (("x", {"b": 1.0}), ("y", {"a": 1.0}))
        for action in ("a", "a", "a", "b")
    ]
    found = evaluate(iter(log), summarise(iter(log)), {"best": targets, "uniform": uniform})
    assert found["best"].ips.mean == pytest.approx((0.7 + 0.9) / 2)
    assert found["uniform"].ips.mean == pytest.approx(sum(reward.values()) / 4)
    assert found["uniform"].snips is not None and found["uniform"].snips.mean == pytest.approx(sum(reward.values()) / 4)


def test_doubly_robust_is_more_exact_where_the_context_explains_the_reward() -> None:
    """The reward is linear in the context: once the regression knows it, the weights add no variance."""
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(10):
        xs = rng.normal(size=400)
        actions = ["ab"[int(rng.random() < 0.2)] for _ in xs]
        log = [
            Decision([float(x)], action, 5 + float(2 * x if action == "a" else -x), 0.2 if action == "b" else 0.8)
            for x, action in zip(xs, actions, strict=True)
        ]
        found = evaluate(iter(log), summarise(iter(log)), {"b": always("b")})["b"]
        errors.append([one.mean - (5 - xs.mean()) for one in (found.ips, found.dr)])
        assert found.dr.high - found.dr.low < 0.7 * (found.ips.high - found.ips.low)
    ips, dr = np.sqrt((np.array(errors) ** 2).mean(0))
    assert dr < 0.5 * ips


def test_the_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    covered = np.zeros(3)
    for _ in range(200):
        found = Evaluation()
        for _ in range(300):
            taken = rng.random() < 0.3
            reward = float(rng.random() < (0.6 if taken else 0.2))
            found.add(1 / 0.3 if taken else 0.0, reward, 0.5, 0.5)
        assert found.snips is not None
        covered += [one.low <= 0.6 <= one.high for one in (found.ips, found.snips, found.dr)]
    assert (covered >= 0.9 * 200).all()


def test_a_policy_that_takes_no_logged_action_is_told_apart() -> None:
    log = [Decision({}, "a", 1.0, 1.0, ("a", "b"))]
    found = evaluate(iter(log), summarise(iter(log)), {"b": always("b")})["b"]
    assert found.snips is None and found.effective_size == 0 and found.as_json()["snips"] is None


LINE = {"context": {"age": 3}, "action": "a", "reward": 1, "propensity": 0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": 3}, "'action' must be a name, got 3"),
        ({"reward": None}, "'reward' must be a number, got None"),
        ({"propensity": 0}, "'propensity' must be in 0..1 and above 0, got 0"),
        ({"propensity": 1.5}, "got 1.5"),
        ({"actions": ["b"]}, "'actions' must contain the action 'a'"),
        ({"context": 3}, "'context' must be an object or a list"),
        ({"target": [1]}, "'target' must be an object"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text(json.dumps(LINE) + "\n\n" + json.dumps(LINE | change) + "\n")
    with pytest.raises(LogError, match=r"log.jsonl, line 3: ") as error:
        list(read_log(file))
    assert message in str(error.value)


def test_what_no_policy_may_answer_is_named() -> None:
    def of(**target: float) -> Iterator[Decision]:
        return iter([Decision({}, "a", 1.0, 0.5, ("a", "b"), target)])

    with pytest.raises(LogError, match="sum to 1"):
        evaluate(of(a=0.5), summarise(of()), {"target": targets})
    with pytest.raises(LogError, match="'c' is none of the line's actions"):
        evaluate(of(c=1.0), summarise(of()), {"target": targets})
    with pytest.raises(LogError, match="no decisions"):
        summarise(iter([]))
