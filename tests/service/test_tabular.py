"""Learners of tables over HTTP: any columns, names of labels and arms, versions, batches, and errors that say what."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import Server
from tests.live import Client, Json, assert_error, assert_success

ULM, BONN = {"age": 41, "city": "Ulm"}, {"age": 20, "city": "Bonn"}


@pytest.fixture(scope="module")
def user(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    server = Server(str(tiny_base), tmp_path_factory.mktemp("server") / "data").start()
    with Client(server.url) as client:
        yield client
    assert server.stop() == 0, server.log.read_text()


def observe(user: Client, session: str, model: str = "labels", **body: Any) -> Json:
    return assert_success(user.post(f"sessions/{session}/observe", {"model": model} | body))


def predict(user: Client, session: str, features: Any) -> Json:
    return assert_success(user.post(f"sessions/{session}/predict", {"features": features}))


def act(user: Client, session: str, actions: Any, **body: Any) -> Json:
    return assert_success(user.post(f"sessions/{session}/act", {"model": "bandit", "actions": actions} | body))


def people(number: int) -> list[Json]:
    """Examples of two kinds of people, who have two labels."""
    kinds = (("Ulm", 41, "churn"), ("Bonn", 20, "stay"))
    rows = [(kinds[i % 2], i) for i in range(number)]
    return [{"features": {"age": age + i % 5, "city": city}, "label": label} for (city, age, label), i in rows]


def test_labels_are_learned_by_name_and_a_prediction_says_why(user: Client) -> None:
    assert_success(user.http.put("/v1/sessions/names", json={"model": "labels"}))
    empty = predict(user, "names", ULM)
    assert (empty["label"], empty["probabilities"], empty["unknown"], empty["version"]) == (None, {}, 1, 0)
    for example in people(12):
        observe(user, "names", **example)
    found = predict(user, "names", ULM)
    assert found["label"] == "churn" and found["version"] == 12
    assert sum(found["probabilities"].values()) + found["unknown"] == pytest.approx(1, abs=1e-5)
    assert found["why"][0]["version"] == found["why"][0]["example"] and found["why"][0]["version"] % 2 == 1
    assert predict(user, "names", BONN)["label"] == "stay"


def test_new_columns_and_labels_come_at_any_time_and_a_prediction_adds_none(user: Client) -> None:
    for example in people(6):
        observe(user, "growing", **example)
    assert predict(user, "growing", {"age": 41, "city": "Paris", "new": "x", "other": 1})["label"] in ("churn", "stay")
    rows = user.session("growing")["rows"]
    predict(user, "growing", {"never": 1})
    assert user.session("growing")["rows"] == rows
    for _ in range(6):
        observe(user, "growing", features=ULM | {"vip": True}, label="upgrade")
    assert predict(user, "growing", ULM | {"vip": True})["label"] == "upgrade"


def test_a_batch_is_one_version_and_learns_what_one_by_one_would(user: Client) -> None:
    examples = people(10)
    done = observe(user, "batch", examples=examples, predict=True)
    assert (done["version"], done["tokens_learned"]) == (1, 10)
    singles = [observe(user, "single", **example, predict=True)["predictions"][0] for example in examples]
    for one, other in zip(done["predictions"], singles, strict=True):
        assert {**one, "why": None} == {**other, "why": None}
    assert done["predictions"][0]["label"] is None and done["predictions"][-1]["label"] == examples[-1]["label"]
    body = {"examples": [{"features": row["features"]} for row in examples]}
    batch = assert_success(user.post("sessions/batch/predict", body))
    one_by_one = [predict(user, "single", row["features"]) for row in examples]
    assert [each["probabilities"] for each in batch["data"]] == [each["probabilities"] for each in one_by_one]
    assert {vote["version"] for vote in batch["data"][0]["why"]} == {1}


def test_equal_requests_lead_to_equal_states_beside_others(user: Client) -> None:
    """Each session gets the same batches, longer than what the engine learns at once, while others learn."""

    def learn(session: str) -> Json:
        for start in range(0, 60, 20):
            observe(user, session, examples=people(60)[start : start + 20])
        meta = user.session(session)
        state = {name: meta[name] for name in ("version", "rows", "bytes", "tokens_learned", "gain")}
        return predict(user, session, ULM) | state

    only = learn("only")
    with ThreadPoolExecutor(4) as pool:
        assert all(found == only for found in pool.map(learn, [f"beside-{n}" for n in range(4)]))


def test_a_bad_example_fails_its_whole_batch_and_is_named(user: Client) -> None:
    examples = [*people(2), {"features": {"age": "old"}, "label": "stay"}]
    error = assert_error(user.post("sessions/atomic/observe", {"model": "labels", "examples": examples}), 400, None)
    assert error["param"] == "examples.2.features.age"
    assert "is a numeric column, which takes numbers, true, false and null, got the string 'old'" in error["message"]
    assert user.version("atomic") == 0


def test_numbers_are_learned_with_intervals(user: Client) -> None:
    assert predict_new(user, "numbers") == (None, None)
    examples = [{"features": [i, None if i % 5 == 0 else i * i], "target": 2 * i} for i in range(60)]
    observe(user, "numbers", "regression", examples=examples)
    found = predict(user, "numbers", [31, 961])
    assert found["object"] == "value" and found["interval"][0] < found["value"] < found["interval"][1]
    assert abs(found["value"] - 62) < 20 and found["why"][0]["version"] == 1


def predict_new(user: Client, session: str) -> tuple[Any, Any]:
    body = {"model": "regression", "features": [1]}
    found = assert_success(user.post(f"sessions/{session}/predict", body))
    return found["value"], found["interval"]


def test_a_bandit_learns_which_arm_is_best_and_arms_may_come(user: Client) -> None:
    chosen, last = [], None
    for step in range(60):
        context = {"hour": step % 24, "device": "phone"}
        body: Json = {} if last is None else {"reward": float(last == "good"), "regret": float(last != "good")}
        answer = act(user, "arms", ["bad", "good"] + ["late"] * (step > 30), context=context, seed=step, **body)
        assert answer["propensity"] == answer["probability"] == answer["probabilities"][answer["action"]]
        assert answer["holdout"] is False
        last = answer["action"]
        chosen.append(last)
    assert chosen[-20:].count("good") > 12
    assert answer["expected"]["good"] > answer["expected"]["bad"]


def test_arms_have_features_and_rewards_come_late_or_never(user: Client) -> None:
    actions = [{"id": "cheap", "features": {"price": 1, "color": "red"}}, {"id": "dear", "features": {"price": 9}}]
    first, second = (act(user, "late", actions, context={"hour": 3})["action_id"] for _ in range(2))
    act(user, "late", ["plain", actions[0]], reward=1.0, action_id=first)
    done = assert_success(user.post("sessions/late/feedback", {"action_id": second, "reward": 0.0}))
    assert done["tokens_learned"] == 1
    assert_error(user.post("sessions/late/feedback", {"action_id": second, "reward": 1.0}), 409, "action_closed")
    batch = assert_success(user.post("sessions/late/act", {"examples": [{"actions": ["a", "b"]}] * 12}))
    assert len({each["action_id"] for each in batch["data"]}) == 12
    assert batch["adaptation"]["version_to"] == 5
    for each in batch["data"]:
        assert_success(user.post("sessions/late/feedback", {"action_id": each["action_id"], "reward": 0.5}))


def test_rewards_of_a_batch_are_one_version_all_or_none(user: Client) -> None:
    choices = [{"actions": ["a", "b"], "context": {"hour": hour}, "seed": hour} for hour in range(12)]
    ids: dict[str, list[str]] = {}
    for session in ("rewarded", "one-by-one"):
        body = {"model": "bandit", "examples": choices}
        batch = assert_success(user.post(f"sessions/{session}/act", body))["data"]
        ids[session] = [each["action_id"] for each in batch]
    rewards = [{"action_id": each, "reward": i % 3, "regret": 0.5} for i, each in enumerate(ids["rewarded"])]
    twice = [*rewards[:3], rewards[0]]
    error = assert_error(user.post("sessions/rewarded/feedback", {"examples": twice}), 409, "action_closed")
    assert error["param"] == "examples.3.action_id" and user.version("rewarded") == 1
    done = assert_success(user.post("sessions/rewarded/feedback", {"examples": rewards}))
    assert (done["version"], done["tokens_learned"]) == (2, 12)
    for i, each in enumerate(ids["one-by-one"]):
        assert_success(user.post("sessions/one-by-one/feedback", {"action_id": each, "reward": i % 3}))
    query = {"context": {"hour": 5}, "seed": 3}
    one, other = (act(user, session, ["a", "b"], **query) for session in ids)
    assert one["expected"] == other["expected"] and one["probabilities"] == other["probabilities"]
    assert {vote["version"] for vote in one["why"]} == {2}
    unknown = [{"action_id": "act-99-0123456789ab", "reward": 1}]
    error = assert_error(user.post("sessions/rewarded/feedback", {"examples": unknown}), 400, "unknown_action")
    assert error["param"] == "examples.0.action_id"
    old = assert_success(user.post("sessions/fixed/act", {"model": "bandit-10", "observation": [0.0]}))
    body = {"examples": [{"action_id": old["action_id"], "reward": 1}]}
    assert assert_error(user.post("sessions/fixed/feedback", body), 400, None)["param"] == "examples"


def test_a_session_of_the_other_kind_says_what_it_takes(user: Client) -> None:
    """The client named no model, so the error names none: it says which routes the session takes."""
    act(user, "acts", ["a", "b"])
    for path, body in (("predict", {"features": ULM}), ("observe", {"features": ULM, "label": "x"})):
        error = assert_error(user.post(f"sessions/acts/{path}", body), 400, None)
        assert error["param"] == "id"
        assert error["message"] == "Session 'acts' is one of 'bandit', which takes 'act' and 'feedback'."
    observe(user, "names-2", features=ULM, label="x")
    error = assert_error(user.post("sessions/names-2/act", {"actions": ["a"]}), 400, None)
    assert error["message"] == "Session 'names-2' is one of 'labels', which takes 'observe' and 'predict'."


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**63 - 1])
def test_every_seed_draws_the_same_each_time(user: Client, seed: int) -> None:
    actions = list("abcdefgh")
    first, second = (act(user, f"seed-{seed}-{i}", actions, seed=seed) for i in range(2))
    assert first["action"] == second["action"]


def test_allowed_and_forced_arms(user: Client) -> None:
    for seed in range(8):
        answer = act(user, "allowed", ["a", "b", "c"], allowed=["b"], seed=seed)
        assert answer["action"] == "b" and answer["propensity"] == 1 and answer["probabilities"]["a"] == 0
    forced = act(user, "allowed", ["a", "b", "c"], forced="c", propensity=0.2)
    assert (forced["action"], forced["propensity"]) == ("c", 0.2)
    assert sum(forced["probabilities"].values()) == pytest.approx(1)


def test_the_rules_of_a_session_bound_its_decisions(user: Client) -> None:
    for session, options in (
        ("floored", {"floor": 0.2}),
        ("budget", {"explore": 0.1}),
        ("held", {"holdout": 0.5, "control": "first"}),
    ):
        assert_success(user.http.put(f"/v1/sessions/{session}", json={"model": "bandit", **options}))
        assert user.session(session)["options"] == options
        reward: Json = {}
        for step in range(12):
            answer = act(user, session, ["a", "b", "c"], seed=step, **reward)
            reward = {"reward": float(answer["action"] == "b")}
            if session == "floored":
                assert min(answer["probabilities"].values()) >= 0.2 - 1e-9
            elif session == "budget":
                assert max(answer["probabilities"].values()) >= 0.9 - 1e-9
            else:
                first = 0.5 if answer["action"] == "a" else 0.0
                share = 0.5 * answer["probabilities"][answer["action"]]
                assert answer["propensity"] == pytest.approx(share + first)
                assert not answer["holdout"] or answer["action"] == "a"
    metrics = user.http.get("/metrics").text
    assert 'imprint_decision_rewards_total{decided_by="control",policy="bandit"}' in metrics
    assert 'imprint_decision_rewards_total{decided_by="policy",policy="bandit"}' in metrics


def test_a_request_sent_again_is_learned_once_and_versions_cover_the_schema(user: Client) -> None:
    observe(user, "versions", examples=people(4))
    key = {"Idempotency-Key": "third"}
    body = {"features": {"color": "red"}, "label": "third", "predict": True}
    first, again = (user.post("sessions/versions/observe", body, **key) for _ in range(2))
    assert assert_success(first) == assert_success(again) and user.version("versions") == 2
    assert "third" in predict(user, "versions", {"color": "red"})["probabilities"]
    assert_success(user.post("sessions/versions/fork", {"id": "forked"}))
    exported = user.http.get("/v1/sessions/versions/export").content
    assert_success(user.post("sessions/versions/rollback", {"version": 1}))
    assert set(predict(user, "versions", {"color": "red"})["probabilities"]) == {"churn", "stay"}
    assert_success(user.http.put("/v1/sessions/copied/import", content=exported))
    assert predict(user, "copied", ULM)["probabilities"] == predict(user, "forked", ULM)["probabilities"]
    newest = observe(user, "versions", features=ULM, label="other")["version"]
    assert set(predict(user, "versions", {})["probabilities"]) == {"churn", "stay", "other"}
    assert_success(user.post("sessions/versions/unlearn", {"version": newest}))
    assert set(predict(user, "versions", {})["probabilities"]) == {"churn", "stay"}


def test_an_old_policy_has_a_new_name_and_still_takes_observations_by_the_old_one(user: Client) -> None:
    names = {policy["id"]: policy for policy in assert_success(user.http.get("/v1/policies"))["data"]}
    assert names["bandit"]["learner"]["task"] == "bandit" and names["bandit-10"]["policy"]["actions"] == 10
    old = assert_success(user.post("sessions/old/act", {"model": "bandit", "observation": [0.0]}))
    assert len(old["probabilities"]) == 10 and old["propensity"] is None
    assert_success(user.post("sessions/old/act", {"model": "bandit", "observation": [0.0], "reward": 1.0}))
    error = assert_error(user.post("sessions/old/act", {"actions": ["a"]}), 400, None)
    assert "'observation' is required for 'bandit-10'" in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("act", {"model": "bandit", "actions": ["a", "a"]}, "actions", "must be distinct, got 'a' twice"),
        ("act", {"model": "bandit", "actions": ["a"], "allowed": ["b"]}, "allowed", "must name actions"),
        ("act", {"model": "bandit", "actions": ["a", "b"], "allowed": ["a"], "forced": "b"}, "forced", "an allowed"),
        ("act", {"model": "bandit", "actions": ["a"], "propensity": 0.5}, "propensity", "only allowed with 'forced'"),
        ("act", {"model": "bandit", "actions": []}, "actions", "at least 1 item"),
        ("act", {"model": "bandit", "actions": [str(i) for i in range(257)]}, "actions", "at most 256 items"),
        ("act", {"model": "bandit", "actions": [3]}, "actions.0", "should be a name, or an object"),
        ("act", {"model": "bandit", "actions": ["x" * 65]}, "actions.0", "at most 64 char"),
        ("act", {"model": "bandit", "actions": ["ü" * 33]}, "actions.0", "a name of 1 to 64 bytes in UTF-8, got 66"),
        ("act", {"model": "bandit", "actions": ["a"], "reward": 1e16}, "reward", "less than or equal to"),
        ("act", {"model": "bandit", "observation": [1.0], "context": {}}, "context", "does not go with"),
        ("act", {"model": "labels", "actions": ["a"]}, "model", "must be a policy that acts"),
        ("act", {"model": "bandit", "examples": [{"actions": ["a"]}] * 129}, "examples", "at most 128 items"),
        ("act", {"model": "bandit", "actions": ["a"], "context": {"a": {"b": 1}}}, "context.a", "a number, a string"),
        ("observe", {"model": "labels", "features": ULM}, "label", "need a 'label' or a 'target'"),
        ("observe", {"model": "labels", "features": ULM, "target": 3}, "target", "is not for 'labels'"),
        ("observe", {"model": "regression", "features": ULM, "label": "x"}, "label", "is not for 'regression'"),
        ("observe", {"model": "labels", "features": ULM, "label": ""}, "label", "a name of 1 to 64 bytes"),
        ("observe", {"model": "labels", "features": ULM, "label": True}, "label", "a name of 1 to 64 bytes"),
        ("observe", {"model": "labels", "features": [1e16], "label": "x"}, "features.0", "should be in"),
        ("observe", {"model": "labels", "features": "x", "label": "x"}, "features", "an object or a list of values"),
        (
            "observe",
            {"model": "labels", "features": {str(i): 1 for i in range(257)}, "label": 1},
            "features",
            "at most 256",
        ),
        ("observe", {"model": "labels", "examples": []}, "examples", "at least 1 item"),
        ("observe", {"model": "labels", "examples": [{"features": [1]}]}, "examples.0", "give 'label' or 'target'"),
        ("observe", {"text": "x", "predict": True}, "predict", "only allowed with 'features'"),
        ("observe", {"model": "no", "features": ULM, "label": "x"}, "model", "no policy 'no'"),
        ("feedback", {"examples": []}, "examples", "at least 1 item"),
        ("feedback", {"examples": [{"reward": 1}]}, "examples.0.action_id", "required"),
        ("feedback", {"examples": [{"action_id": "act-1", "reward": 1}] * 129}, "examples", "at most 128 items"),
        ("feedback", {"examples": [{"action_id": "act-1", "reward": 1}], "reward": 1}, "reward", "does not go with"),
        ("predict", {"model": "labels"}, "features", "Give 'features' or 'examples'"),
    ],
)
def test_a_bad_request_names_the_field(user: Client, path: str, body: Json, param: str, words: str) -> None:
    response = user.post(f"sessions/bad/{path}", body)
    error = response.json()["error"]
    assert response.status_code in (400, 404) and error["param"] == param, response.text
    assert words in error["message"]
    assert user.version("bad") == 0


def test_limits_that_grow_with_the_session_are_told(user: Client) -> None:
    wide = [{"features": [0.5] * 256, "label": "a"}]
    observe(user, "wide", examples=wide)
    error = assert_error(user.post("sessions/wide/observe", {"features": {"x": 1}, "label": "a"}), 400, None)
    assert error["param"] == "features.x" and "column 257 of the session, which may have 256" in error["message"]
    observe(user, "many", examples=[{"features": [1], "label": f"label {i}"} for i in range(100)])
    error = assert_error(user.post("sessions/many/observe", {"features": [1], "label": "more"}), 400, None)
    assert error["param"] == "label" and "one more than the 100 labels" in error["message"]
    act(user, "crowd", [f"arm {i}" for i in range(256)])
    error = assert_error(user.post("sessions/crowd/act", {"actions": ["more"]}), 400, None)
    assert error["param"] == "actions.0" and "one more than the 256 actions" in error["message"]


def test_rules_of_decisions_are_refused_where_nothing_decides(user: Client) -> None:
    for body in ({"model": "labels", "floor": 0.1}, {"holdout": 0.5}):
        error = assert_error(user.http.put("/v1/sessions/none", json=body), 400, None)
        assert "is an option of sessions of 'bandit'" in error["message"]
    assert_error(user.http.put("/v1/sessions/none", json={"model": "bandit", "floor": 2}), 400, None)


def test_a_session_that_only_predicts_decides_and_keeps_nothing(user: Client) -> None:
    assert_success(user.http.put("/v1/sessions/still", json={"model": "bandit", "adapt": "predict"}))
    assert act(user, "still", ["a", "b"], context=ULM)["action_id"] is None
    assert user.version("still") == 0
    assert_error(user.post("sessions/still/act", {"actions": ["a"], "reward": 1.0}), 409, "conflict")


def test_what_was_learned_survives_a_kill_and_moves_on(tiny_base: Path, tmp_path: Path) -> None:
    server = Server(str(tiny_base), tmp_path / "data").start()
    with Client(server.url) as user:
        observe(user, "ada", examples=people(20))
        before = predict(user, "ada", ULM)
        acted = act(user, "bo", ["a", "b"], context=ULM)
    server.kill()
    server.start()
    with Client(server.url) as user:
        assert predict(user, "ada", ULM) == before
        assert_success(user.post("sessions/bo/feedback", {"action_id": acted["action_id"], "reward": 1.0}))
        observe(user, "ada", features=ULM, label="churn")
        assert user.version("ada") == 2
        assert httpx.delete(f"{server.url}/v1/sessions/ada").status_code == 200
        assert predict_empty(user) == {}
    server.stop()


def predict_empty(user: Client) -> Any:
    return assert_success(user.post("sessions/ada/predict", {"model": "labels", "features": ULM}))["probabilities"]
