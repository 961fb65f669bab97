"""Unlearning out of the middle of a learner's session: what came later is learned again from the stored examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Server
from tests.live import Client, Json, assert_error, assert_success
from tests.service.test_tabular import ULM, act, observe, people, predict

ADDS = [{"features": {"color": "red", "age": 3, "city": "Paris"}, "label": "third"}]  # a column, a value and a label


@pytest.fixture(scope="module")
def user(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    server = Server(str(tiny_base), tmp_path_factory.mktemp("server") / "data").start()
    with Client(server.url) as client:
        yield client
    assert server.stop() == 0, server.log.read_text()


def learn(user: Client, session: str, batches: Sequence[Sequence[Json]], model: str = "labels") -> None:
    for batch in batches:
        observe(user, session, model, examples=batch)


def unlearn(user: Client, session: str, **body: Any) -> Json:
    return assert_success(user.post(f"sessions/{session}/unlearn", body))


def content(user: Client, session: str) -> Json:
    meta = user.session(session)
    return {name: meta[name] for name in ("rows", "bytes", "tokens_learned", "gain")}


def test_labels_are_as_if_the_version_had_never_been_learned(user: Client) -> None:
    rows = people(40)
    learn(user, "middle", [rows[:10], ADDS, rows[10:20], rows[20:]])
    learn(user, "never", [rows[:10], rows[10:20], rows[20:]])
    unlearn(user, "middle", version=2)
    found, other = (predict(user, session, ULM | {"color": "red"}) for session in ("middle", "never"))
    assert found["probabilities"] == other["probabilities"] and set(found["probabilities"]) == {"churn", "stay"}
    assert content(user, "middle") == content(user, "never")
    # The versions that voted keep their numbers, which the log has.
    assert {vote["version"] for vote in found["why"]} <= {1, 3, 4}
    observe(user, "middle", examples=ADDS)
    observe(user, "never", examples=ADDS)
    assert predict(user, "middle", ULM)["probabilities"] == predict(user, "never", ULM)["probabilities"]


def test_several_versions_are_unlearned_for_good_one_after_the_other(user: Client) -> None:
    rows = people(50)
    learn(user, "several", [rows[:10], ADDS, rows[10:20], ADDS, rows[20:40], rows[40:]])
    learn(user, "without", [rows[:10], rows[10:20], rows[40:]])
    unlearn(user, "several", versions=[2, 4])
    unlearn(user, "several", version=5, erase=True)
    assert predict(user, "several", ULM)["probabilities"] == predict(user, "without", ULM)["probabilities"]
    assert content(user, "several") == content(user, "without")
    assert_error(user.post("sessions/several/rollback", {"version": 4}), 409, "version_not_kept")
    assert_error(user.post("sessions/several/unlearn", {"version": 2}), 409, "version_not_kept")


def test_numbers_are_relearned_to_the_bit(user: Client) -> None:
    rows = [{"features": [i / 7, None if i % 5 == 0 else i * i], "target": 0.1 * i} for i in range(60)]
    wrong = [{"features": {"0": 1e6, "new": 4}, "target": -1e6}]
    learn(user, "numbers", [rows[:20], wrong, rows[20:40], rows[40:]], "regression")
    learn(user, "right", [rows[:20], rows[20:40], rows[40:]], "regression")
    unlearn(user, "numbers", version=2)
    found, other = (predict(user, session, [3, 9]) for session in ("numbers", "right"))
    assert (found["value"], found["interval"]) == (other["value"], other["interval"])
    assert content(user, "numbers") == content(user, "right")


def test_a_text_that_shares_a_bucket_stays_there(user: Client) -> None:
    def rows(first: int) -> list[Json]:
        texts = ["a", "b", "x" * 70]
        return [{"features": {"t": texts[(first + i) % 3], "n": i}, "label": "abc"[(first + i) % 3]} for i in range(9)]

    learn(user, "bucket", [rows(0), [{"features": {"t": "a", "n": 3}, "label": "c"}], rows(1)])
    learn(user, "clean", [rows(0), rows(1)])
    unlearn(user, "bucket", version=2)
    query = {"t": "y" * 70, "n": 4}
    assert predict(user, "bucket", query)["probabilities"] == predict(user, "clean", query)["probabilities"]


def test_rewards_are_unlearned_and_what_waits_for_its_reward_still_waits(user: Client) -> None:
    actions = [{"id": "cheap", "features": {"price": 1, "color": "red"}}, {"id": "dear", "features": {"price": 9}}]

    def decide(session: str, seed: int, **more: Any) -> str:
        arm = "cheap" if seed % 2 else "dear"
        body = {"context": {"hour": seed % 24, "device": "phone"}, "forced": arm, "propensity": 0.5}
        action_id: str = act(user, session, actions, **(body | more))["action_id"]
        return action_id

    def reward(session: str, action_id: str, value: float) -> int:
        done = assert_success(user.post(f"sessions/{session}/feedback", {"action_id": action_id, "reward": value}))
        return int(done["version"])

    ids: dict[str, list[str]] = {"decided": [], "spared": []}
    for session, taken in ids.items():
        taken += [decide(session, seed) for seed in range(12)]
        for number in range(8):
            reward(session, taken[number], number % 2 + 0.1)
            if session == "decided" and number == 3:
                wrong = reward(session, taken[8], -1000)
                other = decide(session, 30, context={"secret": 1})
                taken_by = user.version(session)
    unlearn(user, "decided", versions=[wrong, taken_by])
    query = {"hour": 5, "device": "phone", "secret": 1}
    expected = [act(user, session, actions, context=query, seed=1)["expected"] for session in ids]
    assert expected[0] == pytest.approx(expected[1], abs=1e-5)
    assert_error(user.post("sessions/decided/feedback", {"action_id": other, "reward": 1}), 409, "action_closed")
    assert_error(
        user.post("sessions/decided/feedback", {"action_id": ids["decided"][3], "reward": 1}), 409, "action_closed"
    )
    for session, taken in ids.items():
        for number in (8, 9, 11):  # the reward of the eighth was unlearned: it can be sent again
            reward(session, taken[number], number % 2)
    expected = [act(user, session, actions, context=query, seed=2)["expected"] for session in ids]
    assert expected[0] == pytest.approx(expected[1], abs=1e-5)
    assert_error(
        user.post("sessions/decided/feedback", {"action_id": ids["decided"][9], "reward": 1}), 409, "action_closed"
    )


def test_what_is_older_than_the_stored_examples_stays(user: Client) -> None:
    rows = people(128)
    learn(user, "long", [rows[:2], rows[:2]] + [rows] * 8)
    message = assert_error(user.post("sessions/long/unlearn", {"version": 1}), 409, "text_not_kept")["message"]
    assert "has learned 1,026 examples since, and remembers the last 1,024" in message
    unlearn(user, "long", version=4)


def test_a_policy_of_fixed_shapes_can_only_take_back_its_newest_versions(user: Client) -> None:
    """Such a session keeps no rewards, `keep_text` or not: later ones are not lost with the unlearned one."""
    assert_success(user.http.put("/v1/sessions/fixed", json={"model": "bandit-10", "keep_text": True}))
    body: Json = {"observation": [0.0]}
    for _ in range(4):
        assert_success(user.post("sessions/fixed/act", body))
        body["reward"] = 1.0
    error = assert_error(user.post("sessions/fixed/unlearn", {"version": 2}), 409, "text_not_kept")
    assert "'bandit-10' keeps no rewards" in error["message"] and user.session("fixed")["tokens_learned"] == 3
    unlearn(user, "fixed", version=4)
    assert user.session("fixed")["tokens_learned"] == 2
