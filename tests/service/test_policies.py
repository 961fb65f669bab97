"""Policies over HTTP: sessions are deterministic, learned once and versioned, and errors name the field."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import Server
from tests.live import Client, Json, assert_error, assert_success
from tests.tiny import build_tiny_policies

OBSERVATION = [0.5, -0.5, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0]  # for the policy "chooser"
EXAMPLE = [1.0, 0.0, 0.5, 0.0, 0.25, 0.0]
OTHER = [-1.0, 1.0, -1.0, 0.0, 0.0, 1.0]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> str:
    return ",".join(map(str, build_tiny_policies(tmp_path_factory.mktemp("policies") / "tiny")))


@pytest.fixture(scope="module")
def policy_server(tiny_base: Path, paths: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(str(tiny_base), tmp_path_factory.mktemp("server") / "data", policies=paths).start()
    yield running
    assert running.stop() == 0, running.log.read_text()


@pytest.fixture
def user(policy_server: Server) -> Iterator[Client]:
    with Client(policy_server.url) as client:
        yield client


def act(user: Client, session: str, reward: float | None = None, **fields: Any) -> Json:
    body = {"model": "chooser", "observation": OBSERVATION} | ({} if reward is None else {"reward": reward}) | fields
    return assert_success(user.post(f"sessions/{session}/act", body))


def run_steps(user: Client, session: str, steps: int) -> list[Json]:
    """Take `steps` actions, each rewarded by the same rule in every session, and return the answers."""
    answers: list[Json] = []
    for step in range(steps):
        observation = [*OBSERVATION[:7], step / 8]
        reward = None if not answers else float(answers[-1]["action"] == 1)
        answers.append(act(user, session, reward, observation=observation, seed=step, temperature=1.0))
    return answers


def without_tag(answer: Json) -> Json:
    """Return an answer of an action without the part of the action's id that names the session."""
    return answer | {"action_id": answer["action_id"].rpartition("-")[0]}


def state(user: Client, session: str) -> dict[str, Any]:
    """Return the session's fields without its id and times."""
    meta = user.session(session)
    return {name: meta[name] for name in ("version", "rows", "bytes", "tokens_learned", "gain")}


def test_a_session_acts_and_learns_its_rewards(user: Client) -> None:
    first, second = run_steps(user, "ada", 2)
    assert first["action_id"].startswith("act-1-") and first["adaptation"]["tokens_learned"] == 0
    assert 0 <= first["action"] < 3 and first["probability"] == first["probabilities"][first["action"]]
    assert sum(first["probabilities"]) == pytest.approx(1)
    assert second["adaptation"] == second["adaptation"] | {"tokens_learned": 1, "version_from": 1, "version_to": 2}
    assert second["expected"] != first["expected"]
    meta = user.session("ada")
    assert meta["version"] == 2 and meta["tokens_learned"] == 1 and meta["gain"] is None  # its memory was empty
    (newest, _) = assert_success(user.http.get("/v1/sessions/ada/log"))["data"]
    assert newest["tokens"] == 1 and newest["kind"] == "learn"


def test_the_same_requests_lead_to_the_same_state_whoever_else_is_served(user: Client) -> None:
    alone = [without_tag(answer) for answer in run_steps(user, "alone", 8)]
    with ThreadPoolExecutor(6) as pool:
        answers_by_session = list(pool.map(lambda name: run_steps(user, name, 8), [f"crowd-{n}" for n in range(6)]))
    for answers in answers_by_session:
        assert [without_tag(answer) for answer in answers] == alone
    assert b"memory_own" in user.http.get("/v1/sessions/alone/export").content  # the counters of the guard
    assert {json.dumps(state(user, f"crowd-{n}")) for n in range(6)} == {json.dumps(state(user, "alone"))}


def test_a_request_sent_again_is_answered_again_and_learned_once(user: Client) -> None:
    run_steps(user, "once", 2)
    body = {"observation": OBSERVATION, "reward": 1.0}
    key = {"Idempotency-Key": "the-third"}
    first, again = (user.post("sessions/once/act", body, **key) for _ in range(2))
    assert assert_success(first) == assert_success(again) and again.headers["idempotent-replayed"] == "true"
    assert user.version("once") == 3
    assert_error(user.post("sessions/once/act", body | {"reward": 0.0}, **key), 422, "idempotency_key_reused")
    assert_error(user.post("sessions/once/act", body, if_match='"v1"'), 412, "precondition_failed")


def test_an_acknowledged_turn_survives_a_kill(make_server: Callable[..., Server], paths: str) -> None:
    server = make_server(policies=paths).start()
    with Client(server.url) as user:
        answers = run_steps(user, "ada", 5)
        before = state(user, "ada")
    server.kill()
    server.start()
    with Client(server.url) as user:
        assert state(user, "ada") == before
        run_steps(user, "bo", 5)
        next_actions = [act(user, name, 1.0, seed=0) for name in ("ada", "bo")]
        assert answers[-1]["action_id"].startswith("act-5-")
        assert next_actions[0].pop("action_id") != next_actions[1].pop("action_id")
        assert next_actions[0] == next_actions[1]


def test_an_earlier_action_is_rewarded_later_and_once(user: Client) -> None:
    first, second, third = (act(user, "late")["action_id"] for _ in range(3))
    answer = assert_success(user.post("sessions/late/feedback", {"action_id": second, "reward": 1.0, "regret": 0.25}))
    assert answer["tokens_learned"] == 1 and answer["version"] == 4
    error = assert_error(
        user.post("sessions/late/feedback", {"action_id": second, "reward": 1.0}), 409, "action_closed"
    )
    assert "rewarded before" in error["message"]
    act(user, "late", 0.0, action_id=first)
    act(user, "late", 0.0, action_id=third)
    metrics = user.http.get("/metrics").text
    assert 'imprint_policy_regret_total{learned="0-9",policy="chooser"} 0.25' in metrics
    assert 'imprint_policy_rewards_total{learned="0-9",policy="chooser"}' in metrics


def reward(user: Client, session: str, action_id: str) -> Any:
    return user.post(f"sessions/{session}/feedback", {"action_id": action_id, "reward": 1.0})


def test_an_action_that_a_rollback_undid_is_never_rewarded(user: Client) -> None:
    kept = act(user, "rewound")["action_id"]
    undone = [act(user, "rewound")["action_id"] for _ in range(2)]
    assert_success(user.post("sessions/rewound/rollback", {"version": 1}))
    for action_id in undone:
        assert_error(reward(user, "rewound", action_id), 409, "action_closed")
    later = act(user, "rewound")["action_id"]
    assert later not in undone
    for action_id in undone:
        assert_error(reward(user, "rewound", action_id), 409, "action_closed")
    for action_id in (kept, later):
        assert_success(reward(user, "rewound", action_id))


def test_forks_give_no_id_twice_and_reward_what_they_began_with(user: Client) -> None:
    common = act(user, "trunk")["action_id"]
    for fork in ("twig", "leaf"):
        assert_success(user.post("sessions/trunk/fork", {"id": fork}))
    file = user.http.get("/v1/sessions/trunk/export").content
    assert user.http.put("/v1/sessions/graft/import", content=file).status_code == 201
    names = ("trunk", "twig", "leaf", "graft")
    own = {name: act(user, name)["action_id"] for name in names}
    assert len({common, *own.values()}) == 5
    for name in names:
        for other in set(names) - {name}:
            assert_error(reward(user, name, own[other]), 409, "action_closed")
        assert_success(reward(user, name, own[name]))
        assert_success(reward(user, name, common))


def test_versions_of_a_policys_session_can_be_rolled_back_forked_and_exported(user: Client) -> None:
    run_steps(user, "lineage", 4)
    fourth = state(user, "lineage")
    fifth = act(user, "lineage", 1.0)
    assert_success(user.post("sessions/lineage/fork", {"id": "branch"}))
    assert_success(user.post("sessions/lineage/rollback", {"version": 4}))
    assert {**state(user, "lineage"), "version": 4} == fourth
    assert act(user, "lineage", 1.0)["expected"] == fifth["expected"]
    file = user.http.get("/v1/sessions/branch/export").content
    assert user.http.put("/v1/sessions/moved/import", content=file).status_code == 201
    assert act(user, "moved", 0.0)["expected"] == act(user, "branch", 0.0)["expected"]
    assert_success(user.post("sessions/branch/unlearn", {"version": user.version("branch")}))


def test_labels_are_learned_and_predicting_changes_nothing(user: Client) -> None:
    for step in range(4):
        features = EXAMPLE if step % 2 else OTHER
        body = {"model": "namer", "features": features, "label": 3 * (step % 2)}
        assert assert_success(user.post("sessions/labels/observe", body))["tokens_learned"] == 1
    before = state(user, "labels")
    for label in (0, 3):
        answer = assert_success(user.post("sessions/labels/predict", {"features": EXAMPLE if label else OTHER}))
        assert answer["label"] == label and answer["version"] == 4
        assert sum(answer["probabilities"]) == pytest.approx(1, abs=1e-5)
    assert state(user, "labels") == before


def test_a_label_policy_that_has_learned_nothing_says_so_and_creates_no_session(user: Client) -> None:
    answer = assert_success(user.post("sessions/blank/predict", {"model": "namer", "features": EXAMPLE}))
    labels = len(answer["probabilities"])
    assert answer["version"] == 0 and answer["probabilities"] == [1 / labels] * labels
    assert_error(user.http.get("/v1/sessions/blank"), 404, "session_not_found")


def test_a_session_is_of_one_model(user: Client) -> None:
    run_steps(user, "mine", 1)
    user.observe("text", "The fox learns the way home.")
    assert_error(user.post("sessions/mine/observe", {"text": "The fox."}), 409, "model_mismatch")
    assert_error(user.post("sessions/text/act", {"observation": OBSERVATION}), 409, "model_mismatch")
    assert_error(
        user.post("sessions/text/act", {"observation": OBSERVATION, "model": "chooser"}), 409, "model_mismatch"
    )
    assert_error(user.post("sessions/new/act", {"observation": OBSERVATION, "model": "other"}), 404, "model_not_found")
    assert assert_success(user.http.put("/v1/sessions/planned", json={"model": "namer", "ttl_s": 60}))["version"] == 0
    assert_success(user.post("sessions/planned/observe", {"features": EXAMPLE, "label": 1}))
    assert_error(user.http.put("/v1/sessions/planned", json={"model": "chooser"}), 409, "model_mismatch")
    assert [model["id"] for model in assert_success(user.http.get("/v1/models"))["data"]] == [user.model]
    policies = {policy["id"]: policy for policy in assert_success(user.http.get("/v1/policies"))["data"]}
    assert policies["chooser"]["policy"]["observation"] == len(OBSERVATION)
    assert all(assert_success(user.http.get(f"/v1/models/{name}")) == policy for name, policy in policies.items())


def test_a_session_that_only_predicts_acts_but_learns_nothing(user: Client) -> None:
    assert_success(user.http.put("/v1/sessions/still", json={"model": "chooser", "adapt": "predict"}))
    assert act(user, "still")["action_id"] is None
    assert user.version("still") == 0
    assert_error(user.post("sessions/still/act", {"observation": OBSERVATION, "reward": 1.0}), 409, "conflict")


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("act", {"observation": OBSERVATION[:3]}, "observation", "must hold 8 numbers for 'chooser'"),
        ("act", {"observation": [*OBSERVATION[:7], "1"]}, "observation.7", "valid number"),
        ("act", {"observation": [*OBSERVATION[:7], 1e7]}, "observation.7", "less than or equal to 1000000"),
        ("act", {"observation": []}, "observation", "at least 1 item"),
        ("act", {"observation": OBSERVATION, "reward": 1.5}, "reward", "must be in 0..1, got 1.5"),
        ("act", {"observation": OBSERVATION, "reward": "good"}, "reward", "valid number"),
        (
            "act",
            {"observation": OBSERVATION, "reward": 1.0, "action_id": "act-77"},
            "action_id",
            "an action never taken",
        ),
        ("act", {"observation": OBSERVATION, "reward": 1.0, "action_id": "7"}, "action_id", "match pattern"),
        ("act", {"observation": OBSERVATION, "action_id": "act-1"}, "action_id", "only allowed with 'reward'"),
        ("act", {"observation": OBSERVATION, "temperature": -1}, "temperature", "greater than or equal to 0"),
        (
            "act",
            {"observation": OBSERVATION, "model": "namer"},
            "model",
            "must be a policy that acts (bandit, chooser)",
        ),
        ("feedback", {"reward": 1.0}, "action_id", "is required"),
        ("feedback", {"action_id": "act-9999", "reward": 1.0}, "action_id", "the actions 1 to"),
    ],
)
def test_a_bad_request_names_the_field_and_changes_nothing(
    user: Client, path: str, body: Json, param: str, words: str
) -> None:
    if not user.version("strict"):
        act(user, "strict")
    before = state(user, "strict")
    response = user.post(f"sessions/strict/{path}", body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), response.text
    assert words in error["message"]
    assert state(user, "strict") == before


def test_a_reward_that_is_not_finite_is_refused(user: Client) -> None:
    for number in ("NaN", "Infinity", "1e999"):
        content = f'{{"observation": {json.dumps(OBSERVATION)}, "reward": {number}}}'
        headers = {"Content-Type": "application/json"}
        response = httpx.post(f"{user.url}/v1/sessions/ada/act", content=content, headers=headers)
        assert response.status_code == 400, response.text


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"features": EXAMPLE, "label": 5}, "label", "must be in 0..4, got 5"),
        ({"features": EXAMPLE[:2], "label": 1}, "features", "must hold 6 numbers"),
        ({"features": EXAMPLE}, "label", "need a 'label' or a 'target'"),
        ({"label": 1, "text": "x"}, "features", "go together"),
        ({"features": EXAMPLE, "label": 1, "text": "x"}, "text", "text and features"),
    ],
)
def test_a_bad_example_names_the_field(user: Client, body: Json, param: str, words: str) -> None:
    response = user.post("sessions/examples/observe", {"model": "namer"} | body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), response.text
    assert words in error["message"]
    assert user.version("examples") == 0
