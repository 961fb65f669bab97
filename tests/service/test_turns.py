"""Turns on a running server: each changes its session by what it should learn, and by nothing else."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from model.text.tokenizer import Tokenizer
from tests.live import (
    NO_EOS,
    Client,
    Json,
    assert_error,
    background_load,
    in_background,
    state,
    stored,
    text_of,
    wait_until,
)
from tests.tiny import TEXT, build_tiny_base

PROMPT = TEXT[:60]
SHORT = TEXT[:150]  # fewer tokens than a block
LONG = TEXT * 60  # many times the context


@pytest.fixture
def session() -> str:
    """Return a new session id."""
    return uuid4().hex


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Tokenizer:
    return Tokenizer.load(tiny_base)


@pytest.fixture(scope="module")
def bos(tokenizer: Tokenizer) -> int:
    assert tokenizer.bos_token_id is not None
    return tokenizer.bos_token_id


def count(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text))


# --- sessions and versions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {"prompt": PROMPT, "adapt": "predict"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "Hi."}], "adapt": "predict"}),
        ("sessions/{}/score", {"text": PROMPT}),
    ],
)
def test_a_request_that_reads_creates_no_session(client: Client, session: str, path: str, body: Json) -> None:
    if "{}" not in path:
        body = body | {"model": client.model, "session": session}
    assert client.post(path.format(session), body).status_code == 200
    assert_error(client.http.get(f"/v1/sessions/{session}"), 404, "session_not_found")
    assert session not in [meta["id"] for meta in client.http.get("/v1/sessions?limit=100").json()["data"]]


def test_a_request_that_may_learn_and_learns_nothing_creates_its_session_at_version_0(
    client: Client, session: str
) -> None:
    client.observe(session, "")
    created = client.session(session)
    assert (created["version"], created["tokens_learned"], created["rows"]) == (0, 0, 0)


def test_every_learning_request_is_one_version(client: Client, session: str) -> None:
    message = [{"role": "user", "content": "My cat is called Miso."}]
    learning: list[Callable[[], Json]] = [
        lambda: client.complete(session=session),
        lambda: client.complete(session=session, learn="completion", logit_bias=NO_EOS),
        lambda: client.complete(session=session, learn="all"),
        lambda: client.complete([PROMPT, SHORT], session=session),
        lambda: client.complete(session=session, n=3),
        lambda: client.complete(session=session, adapt="observe"),
        lambda: client.chat(message, session=session),
        lambda: client.observe(session, LONG),
        lambda: client.score(session, SHORT, learn=True),
    ]
    for version, learn in enumerate(learning, 1):
        answer = learn()
        adaptation = answer.get("adaptation") or {"version_from": version - 1, "version_to": answer.get("version")}
        assert (adaptation["version_from"], adaptation["version_to"]) == (version - 1, version)
        assert client.version(session) == version


def test_predicting_and_scoring_write_not_one_byte(client: Client, server: Any, session: str) -> None:
    client.observe(session, TEXT)
    before = stored(server.data_dir, session)
    assert before.keys() > {"meta"}
    message = [{"role": "user", "content": "My cat is called Miso."}]
    for fields in ({}, {"learn": "all"}, {"learn": "completion", "max_tokens": 100}, {"n": 2}, {"echo": True}):
        adaptation = client.complete(SHORT, session=session, adapt="predict", **fields)["adaptation"]
        nothing: Json = {"tokens_learned": 0, "rows_written": 0, "loss": None}
        assert adaptation == nothing | {"version_from": 1, "version_to": 1, "recalled": adaptation["recalled"]}
    assert client.chat(message, session=session, adapt="predict")["adaptation"]["tokens_learned"] == 0
    with client.stream(prompt=SHORT, session=session, adapt="predict", learn="all", max_tokens=100) as chunks:
        assert list(chunks)[-1]["adaptation"]["version_to"] == 1
    assert client.score(session, LONG)["version"] == 1
    assert stored(server.data_dir, session) == before


def test_observing_generates_nothing_and_learns_the_prompt(client: Client, server: Any, session: str) -> None:
    answer = client.complete(SHORT, session=session, adapt="observe", max_tokens=100)
    assert answer["choices"][0]["text"] == "" and answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 0
    assert client.complete(SHORT, session=f"{session}-both")["adaptation"] == answer["adaptation"]
    assert state(server.data_dir, session) == state(server.data_dir, f"{session}-both")


@pytest.mark.parametrize("learn", ["prompt", "completion", "all"])
def test_the_option_learn_chooses_the_learned_tokens(
    client: Client, tokenizer: Tokenizer, session: str, learn: str
) -> None:
    answer = client.complete(SHORT, session=session, learn=learn, max_tokens=150, logit_bias=NO_EOS)
    parts = {"prompt": count(tokenizer, SHORT) - 1, "completion": answer["usage"]["completion_tokens"]}
    assert parts["completion"] == 150
    expected = sum(parts.values()) if learn == "all" else parts[learn]
    assert answer["adaptation"]["tokens_learned"] == expected == client.session(session)["tokens_learned"]
    assert answer["adaptation"]["rows_written"] >= client.session(session)["rows"] > 0
    scored = client.score(session, SHORT)
    assert (scored["loss"] < scored["frozen_loss"]) or learn == "completion"


def test_a_completion_that_was_learned_is_predicted_better(client: Client, bos: int, session: str) -> None:
    """Generate the same greedy completion again, with a memory that has learned it once."""
    prompt = [bos, *range(100, 120)]
    first, second = (
        client.complete(prompt, session=session, learn="completion", max_tokens=100, logit_bias=NO_EOS, logprobs=0)
        for _ in range(2)
    )
    probs = [sum(answer["choices"][0]["logprobs"]["token_logprobs"]) for answer in (first, second)]
    assert probs[1] > probs[0]


def test_a_request_overrides_the_options_of_its_session(client: Client, tokenizer: Tokenizer, session: str) -> None:
    prompt = count(tokenizer, PROMPT) - 1

    def learned(**fields: Any) -> int:
        adaptation: Json = client.complete(session=session, logit_bias=NO_EOS, **fields)["adaptation"]
        return int(adaptation["tokens_learned"])

    def put(options: Json) -> Json:
        return dict(client.http.put(f"/v1/sessions/{session}", json=options).json())

    assert put({"adapt": "predict"})["options"] == {"adapt": "predict"}
    assert learned() == 0 == client.version(session)
    assert learned(adapt="both") == prompt
    assert put({"learn": "all"})["version"] == 1
    assert learned() == prompt + 8
    assert learned(learn="completion") == 8
    assert learned(adapt="predict") == 0
    assert put({"adapt": "observe"})["options"] == {"adapt": "observe"}
    assert client.complete(session=session)["usage"]["completion_tokens"] == 0
    assert put({})["options"] == {}
    assert learned() == prompt


def test_the_session_of_the_body_goes_before_the_headers_and_this_before_the_models_and_user_names_none(
    client: Client, session: str
) -> None:
    body, header, model, user = names = [f"{session}-{source}" for source in ("body", "header", "model", "user")]
    own = {"model": f"{client.model}@{model}", "user": user}

    def versions(fields: Json, **headers: str) -> list[int]:
        assert client.post("completions", client.completion(**fields), **headers).status_code == 200
        return [client.version(name) for name in names]

    assert versions({"session": body} | own, **{"X-Imprint-Session": header}) == [1, 0, 0, 0]
    assert versions(own, **{"X-Imprint-Session": header}) == [1, 1, 0, 0]
    assert versions(own) == [1, 1, 1, 0]
    assert versions({"user": user}) == [1, 1, 1, 0]
    assert client.complete()["adaptation"] is None


def test_housekeeping_is_told_by_header_or_by_the_models_name(client: Client, session: str) -> None:
    def version(fields: Json, **headers: str) -> int:
        response = client.post("completions", client.completion(**fields), **headers)
        assert response.status_code == 200 and response.json()["model"] == client.model, response.text
        return client.version(session)

    assert version({"session": session}) == 1
    predict, observe = {"X-Imprint-Adapt": "predict"}, {"X-Imprint-Adapt": "observe"}
    assert version({"session": session}, **predict) == 1
    assert version({"session": session, "model": f"{client.model}:predict"}) == 1
    assert version({"model": f"{client.model}:predict@{session}"}) == 1
    assert version({"session": session, "adapt": "both"}, **predict) == 2  # the body goes first
    assert version({"session": session, "model": f"{client.model}:predict"}, **observe) == 3  # then the header
    assert version({}, **predict) == 3  # without a session there is nothing to learn


# --- observe and score ------------------------------------------------------------------------------------------------


def test_a_text_of_any_length_is_one_turn(client: Client, tokenizer: Tokenizer, session: str) -> None:
    tokens = count(tokenizer, LONG)
    assert client.observe(session, LONG)["tokens_learned"] == tokens
    scored = client.score(session, LONG, learn=True)
    assert "".join(scored["tokens"]) == LONG
    assert len(scored["tokens"]) == len(scored["logprobs"]) == len(scored["frozen_logprobs"]) == tokens
    assert scored["loss"] == pytest.approx(-sum(scored["logprobs"]) / tokens)
    assert scored["version"] == 2
    assert client.session(session)["tokens_learned"] == 2 * tokens


def test_scoring_comes_before_learning(client: Client, session: str) -> None:
    unlearned = client.score(session, SHORT)
    learned = client.score(session, SHORT, learn=True)
    assert learned["logprobs"] == unlearned["logprobs"]
    assert (unlearned["version"], learned["version"]) == (0, 1)
    assert client.score(session, SHORT)["loss"] < unlearned["loss"]


def test_an_empty_session_is_the_base_bit_for_bit(client: Client, bos: int, tokenizer: Tokenizer, session: str) -> None:
    text = TEXT + "None of this has been seen: 猫は美曽といいます。"
    scored = client.score(session, text)
    assert scored["logprobs"] == scored["frozen_logprobs"]
    echoed = client.complete([bos, *tokenizer.encode(text)], echo=True, logprobs=0, max_tokens=0)
    assert echoed["choices"][0]["logprobs"]["token_logprobs"][1:] == scored["frozen_logprobs"]
    prompt: Json = {"prompt": PROMPT, "logprobs": 5, "max_tokens": 100}
    base, empty = client.complete(**prompt), client.complete(**prompt, session=session, adapt="predict")
    assert empty["choices"] == base["choices"]


def test_the_frozen_score_does_not_depend_on_the_memory(client: Client, session: str) -> None:
    before = client.score(session, TEXT)
    client.observe(session, LONG)
    after = client.score(session, TEXT)
    assert after["frozen_logprobs"] == before["frozen_logprobs"] == before["logprobs"]


def test_a_text_learned_once_is_predicted_better(client: Client, session: str) -> None:
    first, second = (client.score(session, TEXT, learn=True) for _ in range(2))
    assert second["loss"] < first["loss"] and second["loss"] < second["frozen_loss"]
    assert client.score(f"{session}-other", TEXT)["loss"] == first["loss"]


# --- one stream, one state --------------------------------------------------------------------------------------------


def run_turns(
    client: Client, session: str, *, stream: bool = False, between: Callable[[int], None] = lambda n: None
) -> Json:
    """Run a few turns of every kind in a session; return the generated texts and the version.

    Args:
        client: a client of the server.
        session: id of the session.
        stream: whether completions are streamed.
        between: called after each turn with its number.
    """
    outputs: list[str] = []
    message = [{"role": "user", "content": SHORT}]

    def complete(prompt: str, **fields: Any) -> None:
        fields |= {"session": session, "logit_bias": NO_EOS}
        if stream:
            with client.stream(prompt=prompt, **fields) as chunks:
                outputs.append(text_of(list(chunks)))
        else:
            outputs.append(client.complete(prompt, **fields)["choices"][0]["text"])

    turns: list[Callable[[], Any]] = [
        lambda: client.observe(session, TEXT * 4),
        lambda: complete(PROMPT, learn="all", max_tokens=200),
        lambda: complete(SHORT, learn="completion", max_tokens=150, temperature=1, seed=7, stop=["lazy dog", "?"]),
        lambda: client.score(session, TEXT * 3, learn=True),
        lambda: complete(SHORT[30:], max_tokens=30, adapt="predict"),
        lambda: complete(TEXT, learn="all", max_tokens=100, temperature=1, seed=8, top_p=0.9),
        lambda: outputs.append(client.chat(message, session=session)["choices"][0]["message"]["content"]),
    ]
    for number, turn in enumerate(turns):
        turn()
        between(number)
    return {"outputs": outputs, "version": client.version(session)}


@pytest.fixture(scope="module")
def reference(server: Any) -> tuple[Json, Json]:
    """Return the result of `run_turns` and the session's stored state, on an idle server."""
    with Client(server.url, server.model) as client:
        return run_turns(client, "reference"), state(server.data_dir, "reference")


def test_streaming_changes_no_bit(client: Client, server: Any, session: str, reference: tuple[Json, Json]) -> None:
    assert reference[0]["version"] == 6
    assert (run_turns(client, session, stream=True), state(server.data_dir, session)) == reference


def test_company_changes_no_bit_of_a_state(
    client: Client, server: Any, session: str, reference: tuple[Json, Json]
) -> None:
    with background_load(server.url):
        assert (run_turns(client, session), state(server.data_dir, session)) == reference


def test_a_restart_changes_no_bit(make_server: Callable[..., Any], reference: tuple[Json, Json]) -> None:
    server = make_server().start()

    def restart(turn: int) -> None:
        if turn == 2:
            assert server.stop() == 0
            server.start()

    with Client(server.url, server.model) as client:
        assert (run_turns(client, "alice", between=restart), state(server.data_dir, "alice")) == reference


@pytest.mark.parametrize("limits", [{"hot_sessions": 1, "max_batch": 1, "max_queue": 1}, {"hot_rows": 36_000}])
def test_eviction_changes_no_bit(
    make_server: Callable[..., Any], reference: tuple[Json, Json], limits: dict[str, int]
) -> None:
    server = make_server(**limits).start()
    with Client(server.url, server.model) as client:

        def evict(turn: int) -> None:
            for name in ("bob", "carol"):
                client.observe(name, LONG[turn : turn + 600])

        assert (run_turns(client, "alice", between=evict), state(server.data_dir, "alice")) == reference
        assert client.metric("session_evictions_total") >= 6


def test_company_changes_nothing_that_is_said(client: Client, server: Any, session: str) -> None:
    client.observe(session, TEXT * 4)
    body: Json = {"prompt": PROMPT, "max_tokens": 200, "logit_bias": NO_EOS, "logprobs": 2}

    def answers() -> tuple[Json, Json, Json]:
        base = client.complete(**body)["choices"][0]
        own = client.complete(**body, session=session, adapt="predict")["choices"][0]
        return base, own, client.score(session, TEXT)

    base, own, scored = answers()
    assert own["text"] != base["text"]
    with background_load(server.url):
        for _ in range(2):
            assert answers() == (base, own, scored)


# --- nothing learned twice --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn", ["prompt", "all"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_resends_its_history_teaches_only_what_is_new(
    client: Client, tokenizer: Tokenizer, session: str, learn: str, stream: bool
) -> None:
    def send(messages: list[dict[str, str]], new: int) -> dict[str, str]:
        """Send a chat, check that its last `new` messages are learned, and return the reply."""
        body: Json = {"session": session, "learn": learn, "max_completion_tokens": 20}
        if stream:
            with client.stream("chat/completions", messages=messages, **body) as chunks:
                answer = list(chunks)
            reply = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in answer)
            adaptation, num_generated = answer[-1]["adaptation"], None
        else:
            whole = client.chat(messages, **body)
            reply, adaptation = whole["choices"][0]["message"]["content"], whole["adaptation"]
            num_generated = whole["usage"]["completion_tokens"]
        spans = tokenizer.encode_chat(messages).spans
        contents = sum(end - start for start, end in spans[len(spans) - new :])
        learned_of_reply = adaptation["tokens_learned"] - contents
        if learn == "prompt":
            assert learned_of_reply == 0
        else:
            assert num_generated is None or learned_of_reply == num_generated
        assert new == 0 or adaptation["version_to"] == adaptation["version_from"] + 1
        return {"role": "assistant", "content": reply}

    def user(text: str) -> dict[str, str]:
        return {"role": "user", "content": text}

    system = {"role": "system", "content": "You know all about the quick brown fox."}
    chat = [system, user("My cat is called Miso.")]
    chat.append(send(chat, new=2))
    chat.append(user("What is my cat called?"))
    chat.append(send(chat, new=1))
    chat = [system, *chat[3:], user("Yes.")]
    send(chat, new=1)
    chat[-1] = user("No, not that one.")
    chat.append(send(chat, new=1))
    chat.append(user("No, not that one."))
    send(chat, new=1)
    send([system, user("The dog learns to sleep.")], new=1)
    send([system, user("The dog learns to sleep.")], new=0)


def test_observed_messages_are_learned_once(client: Client, tokenizer: Tokenizer, session: str) -> None:
    messages = [{"role": "user", "content": SHORT}, {"role": "assistant", "content": PROMPT}]
    contents = sum(end - start for start, end in tokenizer.encode_chat(messages).spans)
    learned = [
        client.post(f"sessions/{session}/observe", {"messages": messages}).json()["tokens_learned"] for _ in range(2)
    ]
    assert learned == [contents, 0]


# --- other slow weights -----------------------------------------------------------------------------------------------


def test_a_session_of_other_slow_weights_is_refused_and_can_still_be_seen_and_erased(
    make_server: Callable[..., Any], tmp_path: Path
) -> None:
    other_base = build_tiny_base(tmp_path / "other", seed=1)
    server = make_server().start()
    with Client(server.url, server.model) as client:
        client.observe("alice", TEXT)
    learned = state(server.data_dir, "alice")
    assert server.stop() == 0

    server = make_server(model=str(other_base)).start()
    with Client(server.url, server.model) as client:
        for path, body in (
            ("completions", client.completion(session="alice")),
            ("completions", client.completion(session="alice", adapt="predict", stream=True)),
            ("sessions/alice/observe", {"text": TEXT}),
            ("sessions/alice/score", {"text": TEXT}),
        ):
            assert "other slow weights" in assert_error(client.post(path, body), 409, "model_mismatch")["message"]
        assert state(server.data_dir, "alice") == learned
        assert client.session("alice")["version"] == 1
        assert [listing["id"] for listing in client.http.get("/v1/sessions").json()["data"]] == ["alice"]
        assert client.http.delete("/v1/sessions/alice").status_code == 200
        assert client.observe("alice", TEXT)["version"] == 1


# --- one at a time ----------------------------------------------------------------------------------------------------


def test_turns_of_one_session_run_one_at_a_time_in_the_order_of_their_arrival(
    client: Client, tokenizer: Tokenizer, session: str
) -> None:
    texts = [LONG * 6, *(TEXT[n : 100 + n] for n in range(9))]
    with ThreadPoolExecutor(len(texts)) as pool:
        futures = [in_background(pool, client, partial(client.observe, session, text)) for text in texts]
        versions = [turn.result()["version"] for turn in futures]
    assert versions == list(range(1, 11))
    assert client.version(session) == 10
    assert client.session(session)["tokens_learned"] == sum(count(tokenizer, text) for text in texts)


def test_a_session_is_erased_between_two_turns(client: Client, tokenizer: Tokenizer, session: str) -> None:
    with ThreadPoolExecutor(3) as pool:
        first = in_background(pool, client, lambda: client.observe(session, LONG * 6))
        wait_until(lambda: first.done() or client.metric("kv_tokens_reserved") > 0)  # it has its session
        path = f"/v1/sessions/{session}"
        erased = in_background(pool, client, lambda: client.http.delete(path), gauge="requests_in_flight")
        second = in_background(pool, client, lambda: client.observe(session, SHORT))
        assert first.result()["version"] == 1
        assert erased.result().status_code == 200
        assert second.result()["version"] == 1
    assert client.session(session)["tokens_learned"] == count(tokenizer, SHORT)


def test_if_match_lets_only_the_expected_version_through(client: Client, server: Any, session: str) -> None:
    observe, score, body = f"sessions/{session}/observe", f"sessions/{session}/score", {"text": SHORT}
    completion = client.completion(session=session)
    assert_error(client.post(observe, body, '"v1"'), 412, "precondition_failed")
    assert client.version(session) == 0
    assert client.post(observe, body, '"v0"').json()["version"] == 1
    before = state(server.data_dir, session)
    for path, stale_body in ((observe, body), (score, body | {"learn": True}), ("completions", completion)):
        assert_error(client.post(path, stale_body, '"v0"'), 412, "precondition_failed")
    assert_error(
        client.http.put(f"/v1/sessions/{session}", json={}, headers={"If-Match": '"v0"'}), 412, "precondition_failed"
    )
    assert_error(
        client.http.delete(f"/v1/sessions/{session}", headers={"If-Match": '"v0"'}), 412, "precondition_failed"
    )
    assert state(server.data_dir, session) == before
    assert client.post("completions", completion, '"v1"').json()["adaptation"]["version_to"] == 2
    assert client.http.delete(f"/v1/sessions/{session}", headers={"If-Match": '"v2"'}).status_code == 200
