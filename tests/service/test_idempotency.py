"""Idempotency: a request that is sent again gets the same answer and is not learned again."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import httpx
import openai
import pytest

from tests.live import (
    NO_EOS,
    Client,
    Json,
    assert_error,
    assert_success,
    in_background,
    state,
    stored,
    text_of,
    wait_until,
)
from tests.service.breaking_proxy import BreakingProxy
from tests.tiny import TEXT

CHAT = [{"role": "user", "content": TEXT[:80]}]
REPLAYED = "idempotent-replayed"


@pytest.fixture
def session() -> str:
    return uuid4().hex


def learning(model: str, session: str) -> dict[str, tuple[str, Json]]:
    """Return the path and body of one learning request of each kind."""
    common = {"model": model, "session": session, "temperature": 1}
    return {
        "completion": (
            "completions",
            {**common, "prompt": [TEXT[:60], TEXT[9:50]], "max_tokens": 9, "n": 2, "logprobs": 2, "echo": True},
        ),
        "chat": (
            "chat/completions",
            {**common, "messages": CHAT, "max_tokens": 9, "logprobs": True, "top_logprobs": 1, "learn": "all"},
        ),
        "observe": (f"sessions/{session}/observe", {"text": TEXT}),
        "score": (f"sessions/{session}/score", {"text": TEXT, "learn": True}),
    }


# --- with a key -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["completion", "chat", "observe", "score"])
def test_a_key_is_learned_once_and_answered_the_same(client: Client, server: Any, session: str, kind: str) -> None:
    path, body = learning(client.model, session)[kind]
    first = client.post(path, body, **{"Idempotency-Key": "k-1"})
    assert assert_success(first) and REPLAYED not in first.headers
    assert first.headers["x-should-retry"] == "false"
    before = stored(server.data_dir, session)
    for _ in range(2):
        again = client.post(path, body, **{"Idempotency-Key": "k-1"})
        assert again.json() == first.json()
        assert (again.headers[REPLAYED], again.headers["x-should-retry"]) == ("true", "false")
    assert stored(server.data_dir, session) == before
    error = assert_error(
        client.post(path, body | {"on_disconnect": "commit"}, **{"Idempotency-Key": "k-1"}), 422, REUSED
    )
    assert error["param"] == "Idempotency-Key"
    assert stored(server.data_dir, session) == before
    other = client.post(path, body, **{"Idempotency-Key": "k-2"})
    assert assert_success(other) and REPLAYED not in other.headers
    assert client.version(session) == (1 if kind == "chat" and not other.json()["adaptation"]["tokens_learned"] else 2)


REUSED = "idempotency_key_reused"


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_a_stream_with_a_key_streams_the_same_text_again(client: Client, session: str, kind: str) -> None:
    path, body = learning(client.model, session)[kind]
    body |= {"stream": True, "stream_options": {"include_usage": True}}

    def streamed() -> tuple[httpx.Response, list[Json]]:
        response = client.post(path, body, **{"Idempotency-Key": "k"})
        events = [part.removeprefix("data: ") for part in response.text.split("\n\n") if part]
        assert events.pop() == "[DONE]"
        return response, [json.loads(event) for event in events]

    def merged(chunks: list[Json]) -> Json:
        """Return the answer that the chunks make together, independent of how the text is split."""
        choices: dict[int, list[Any]] = {}
        for part in (choice for chunk in chunks for choice in chunk["choices"]):
            text = part["text"] if "text" in part else part["delta"].get("content", "")
            choice = choices.setdefault(part["index"], ["", [], None])
            choice[0] += text
            if part["logprobs"]:
                choice[1] += part["logprobs"].get("tokens") or part["logprobs"]["content"]
            choice[2] = part["finish_reason"] or choice[2]
        ends = [chunk["adaptation"] for chunk in chunks if "adaptation" in chunk]
        head = [{key: chunk[key] for key in ("id", "created", "model", "object")} for chunk in chunks]
        return {
            "choices": choices,
            "ends": ends,
            "usage": chunks[-1]["usage"],
            "head": head[-1],
            "same_head": head[0] == head[-1],
        }

    (first, chunks), (second, again) = streamed(), streamed()
    assert REPLAYED not in first.headers and second.headers[REPLAYED] == "true"
    assert merged(again) == merged(chunks)
    assert merged(chunks)["ends"][-1]["version_to"] == 1 == client.version(session)


def test_simultaneous_requests_with_one_key_are_learned_once(client: Client, session: str) -> None:
    body = {"text": TEXT * 100}
    with ThreadPoolExecutor(3) as pool:
        posts = [
            in_background(
                pool,
                client,
                lambda: client.post(f"sessions/{session}/observe", body, **{"Idempotency-Key": "k"}),
            )
            for _ in range(3)
        ]
        answers = [post.result() for post in posts]
    assert [assert_success(answer) for answer in answers] == [assert_success(answers[0])] * 3
    assert sorted(REPLAYED in answer.headers for answer in answers) == [False, True, True]
    assert client.version(session) == 1


def test_a_replay_comes_before_if_match(client: Client, session: str) -> None:
    path, body = f"sessions/{session}/observe", {"text": TEXT}
    for _ in range(2):
        assert assert_success(client.post(path, body, '"v0"', **{"Idempotency-Key": "k"}))["version"] == 1


def test_what_taught_nothing_is_not_remembered_and_a_key_goes_with_its_session(client: Client, session: str) -> None:
    def observe(text: str) -> httpx.Response:
        return client.post(f"sessions/{session}/observe", {"text": text}, **{"Idempotency-Key": "k"})

    assert assert_success(observe(""))["version"] == 0
    assert REPLAYED not in observe("").headers
    assert assert_success(observe(TEXT))["version"] == 1
    assert_error(observe(""), 422, REUSED)
    assert client.http.delete(f"/v1/sessions/{session}").status_code == 200
    answer = observe(TEXT[5:])
    assert assert_success(answer)["version"] == 1 and REPLAYED not in answer.headers


def test_every_operation_that_makes_a_version_takes_a_key(client: Client, server: Any, session: str) -> None:
    assert_success(client.http.put(f"/v1/sessions/{session}", json={"keep_text": True}))
    for text in (TEXT, TEXT[9:], TEXT[30:]):
        client.observe(session, text)
    data = client.http.get(f"/v1/sessions/{session}/export").content
    key = {"Idempotency-Key": "k"}
    requests: list[tuple[str, Callable[[], httpx.Response]]] = [
        (session, lambda: client.post(f"sessions/{session}/rollback", {"version": 2}, **key)),
        (session, lambda: client.post(f"sessions/{session}/unlearn", {"version": 1}, **key | {"Idempotency-Key": "u"})),
        (f"{session}-f", lambda: client.post(f"sessions/{session}/fork", {"id": f"{session}-f"}, **key)),
        (f"{session}-i", lambda: client.http.put(f"/v1/sessions/{session}-i/import", content=data, headers=key)),
    ]
    for changed_session, send in requests:
        first = send()
        assert first.is_success and REPLAYED not in first.headers, first.text
        before = stored(server.data_dir, changed_session)
        again = send()
        assert (again.status_code, again.json()) == (first.status_code, first.json())
        assert again.headers[REPLAYED] == "true" and again.headers["etag"] == first.headers["etag"]
        assert stored(server.data_dir, changed_session) == before


def test_an_answer_is_forgotten_after_its_time(make_server: Callable[..., Any]) -> None:
    server = make_server(idempotency_ttl_s=1).start()
    with Client(server.url) as client:

        def version() -> int:
            answer = client.post("sessions/alice/observe", {"text": TEXT}, **{"Idempotency-Key": "k"})
            return int(assert_success(answer)["version"])

        assert version() == 1
        wait_until(lambda: version() == 2)


# --- without a key ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["completion", "observe", "score"])
def test_only_a_retry_that_says_so_is_taken_for_one(client: Client, session: str, kind: str) -> None:
    path, body = learning(client.model, session)[kind]
    answers = [client.post(path, body, **{"x-stainless-retry-count": count}) for count in ("0", "1", "2", "0")]
    assert [REPLAYED in answer.headers for answer in answers] == [False, True, True, False]
    assert answers[0].json() == answers[1].json() == answers[2].json()
    assert client.version(session) == 2
    assert_success(client.post(path, body))
    assert client.version(session) == 3, "sent twice on purpose, learned twice"
    other = client.post(path, body | {"on_disconnect": "commit"}, **{"x-stainless-retry-count": "1"})
    assert REPLAYED not in other.headers and client.version(session) == 4


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_the_openai_client_retries_after_a_cut_and_has_taught_once(
    client: Client, server: Any, session: str, kind: str
) -> None:
    proxy = BreakingProxy(server.url)
    proxy.num_breaks = 2
    path, body = learning(client.model, session)[kind]
    extra = {name: body.pop(name) for name in ("session", "learn") if name in body}
    with proxy.open(), openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="none", max_retries=3) as openai_client:
        create: Any = (
            openai_client.completions.create if kind == "completion" else openai_client.chat.completions.create
        )
        answer = create(**body, extra_body=extra)
    assert [head["x-stainless-retry-count"] for head in proxy.request_headers] == ["0", "1", "2"]
    assert answer.model_extra["adaptation"]["version_to"] == 1 == client.version(session)
    alone, own = f"{session}-alone", client.session(session)["tokens_learned"]
    create_alone = client.post(path, body | extra | {"session": alone})
    assert assert_success(create_alone)["adaptation"]["tokens_learned"] >= 1
    assert kind == "chat" or own == client.session(alone)["tokens_learned"]


# --- clients that disconnect ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_disconnect", ["rollback", "commit"])
def test_what_becomes_of_a_turn_whose_client_goes(client: Client, session: str, on_disconnect: str) -> None:
    body: Json = {"prompt": TEXT, "session": session, "max_tokens": 300, "logit_bias": NO_EOS, "learn": "all"}
    with client.stream(**body, on_disconnect=on_disconnect) as chunks:
        next(chunks)
    wait_until(client.idle)
    assert client.version(session) == (1 if on_disconnect == "commit" else 0)

    learner, text = f"{session}-2", {"text": TEXT * 60, "on_disconnect": on_disconnect}
    with client.request_in_flight(f"sessions/{learner}/observe", text):
        pass
    wait_until(client.idle)
    assert client.version(learner) == (1 if on_disconnect == "commit" else 0)


def test_a_turn_that_commits_after_a_disconnect_has_the_same_state(client: Client, server: Any, session: str) -> None:
    body: Json = {"prompt": TEXT, "max_tokens": 200, "logit_bias": NO_EOS, "learn": "all", "on_disconnect": "commit"}
    with client.stream(**body, session=session) as chunks:
        next(chunks)
    with client.stream(**body, session=f"{session}-whole") as chunks:
        assert text_of(list(chunks))
    wait_until(client.idle)
    assert state(server.data_dir, session) == state(server.data_dir, f"{session}-whole")


def test_a_request_whose_answer_was_erased_is_not_run_again(client: Client, session: str) -> None:
    """The answer may tell what was unlearned for good; the request was learned, and is not learned anew."""
    key, asks = {"Idempotency-Key": session}, {"model": client.model, "session": session, "prompt": TEXT[80:160]}
    client.observe(session, TEXT[:80])
    assert_success(client.post("completions", asks, **key))
    assert_success(client.post(f"sessions/{session}/unlearn", {"version": 1, "erase": True}))
    assert_error(client.post("completions", asks, **key), 409, "answer_erased")
    assert client.version(session) == 3
    assert REPLAYED not in client.post("completions", asks).headers
