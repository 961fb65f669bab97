"""Recall through the HTTP interface: a reply reads what the session was taught, and nothing that it may not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from safetensors.numpy import load

from model.episodes import MEANINGS, SITE
from service.store.memory import MemoryStore
from service.tenants import new_key
from tests.live import NO_EOS, Client, Json, assert_success
from tests.model.tiny_encoder import save_encoder
from tests.service.in_process import InProcessServer

HARBOUR = "The harbour of Vorlund is red."
MILL = "Nine wheels turn Tessadon mill."
ROWS = 200_000  # for which a server has room
ASKS_HARBOUR = "Which colour has the harbour of Vorlund?"
ASKS_MILL = "How many wheels turn Tessadon mill?"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of an encoder that knows the words of the texts."""
    words = sorted({word for text in (HARBOUR, MILL, ASKS_HARBOUR, ASKS_MILL) for word in re.findall(r"\w+", text)})
    return str(save_encoder(tmp_path_factory.mktemp("recall") / "encoder", words))


@pytest.fixture(scope="module")
def memory_server(tiny_base: Path, encoder: str) -> Iterator[InProcessServer]:
    """Yield a server that recalls, with an encoder, for `client`."""
    server = InProcessServer(tiny_base, recall_tokens=64, recall_encoder=encoder)
    yield server
    server.stop()


@pytest.fixture
def session() -> str:
    return uuid4().hex


def ask(client: Client, session: str, question: str, **fields: Any) -> Json:
    """Ask in a new chat without learning; return what the reply's last event tells."""
    reply = client.chat([{"role": "user", "content": question}], session=session, adapt="predict", **fields)
    adaptation: Json = reply["adaptation"]
    return adaptation


def recalled(client: Client, session: str, question: str = ASKS_HARBOUR, **fields: Any) -> list[str]:
    return [episode["text"] for episode in ask(client, session, question, **fields)["recalled"]]


def times(client: Client, session: str) -> dict[int, float]:
    """Return when each version of a session was made, from its log."""
    return {entry["version"]: entry["time"] for entry in client.http.get(f"/v1/sessions/{session}/log").json()["data"]}


def listed(client: Client, session: str, **query: Any) -> Json:
    return assert_success(client.http.get(f"/v1/sessions/{session}/episodes", params=query))


def texts(page: Json) -> list[str]:
    return [episode["text"] for episode in page["data"]]


def arrays(client: Client, session: str) -> dict[str, bytes]:
    """Return the stored rows of a session by name, from its export."""
    exported = client.http.get(f"/v1/sessions/{session}/export")
    assert exported.status_code == 200
    return {name: array.tobytes() for name, array in load(exported.content).items()}


def test_a_reply_reads_what_was_taught_and_says_where_it_is_from(client: Client, session: str) -> None:
    client.observe(session, MILL)
    client.observe(session, HARBOUR)
    assert ask(client, session, ASKS_HARBOUR)["recalled"] == [
        {
            "version": 2,
            "offset": 1,
            "score": pytest.approx(0, abs=1000),
            "text": HARBOUR,
            "time": times(client, session)[2],
        }
    ]
    assert recalled(client, session, ASKS_MILL) == [MILL]
    assert recalled(client, session, "Zzz?") == []
    assert recalled(client, uuid4().hex) == []


def test_a_streamed_reply_and_a_completion_recall_too(client: Client, session: str) -> None:
    client.observe(session, HARBOUR)
    chat = {"session": session, "messages": [{"role": "user", "content": ASKS_HARBOUR}], "max_tokens": 4}
    with client.stream("chat/completions", **chat) as events:
        last = [event for event in events if event.get("adaptation")][-1]
    assert [episode["text"] for episode in last["adaptation"]["recalled"]] == [HARBOUR]
    completion = client.complete("The colour of the harbour of Vorlund", session=session, max_tokens=4)
    assert HARBOUR in [episode["text"] for episode in completion["adaptation"]["recalled"]]


@pytest.mark.parametrize("limit", [None, 100_000])
def test_a_reply_without_a_limit_of_its_own_leaves_room_for_what_it_recalls(
    client: Client, session: str, limit: int | None
) -> None:
    client.observe(session, HARBOUR)
    assert recalled(client, session, max_completion_tokens=limit) == [HARBOUR]


def test_recall_changes_the_reply_and_nothing_that_is_learned(client: Client, session: str) -> None:
    other, chats = uuid4().hex, [ASKS_HARBOUR, "Is the harbour of Vorlund large? " * 12, HARBOUR * 5, MILL]
    replies = {}
    for name, recall in ((session, True), (other, False)):
        client.observe(name, HARBOUR * 3)
        fields: Json = {"session": name, "learn": "all", "recall": recall, "seed": 1, "logit_bias": {"1": -100}}
        replies[name] = [client.chat([{"role": "user", "content": text}], **fields) for text in chats]
    assert any(reply["adaptation"]["recalled"] for reply in replies[session])
    assert not any(reply["adaptation"]["recalled"] for reply in replies[other])

    # The replies differ, so both learn the same replies here.
    same = uuid4().hex
    for name, recall in ((session + "-2", True), (same, False)):
        client.observe(name, HARBOUR * 3)
        for text in chats:
            client.chat([{"role": "user", "content": text}], session=name, learn="prompt", recall=recall)
    learned, without = arrays(client, session + "-2"), arrays(client, same)
    for name in without:
        if not name.startswith((SITE, MEANINGS)):
            assert learned[name] == without[name], name


def test_scores_read_the_newest_episodes_and_learning_does_not(client: Client, session: str) -> None:
    """A text teaches the same whether its scores recall or not, and no score depends on a later token."""
    text, other = f"{HARBOUR} {MILL} " * 3, uuid4().hex
    for name in (session, other):
        client.observe(name, f"{MILL} {HARBOUR} " * 8)
    score = {recall: client.score(session, text, recall=recall) for recall in (True, False)}
    assert score[True]["frozen_logprobs"] == score[False]["frozen_logprobs"]
    assert score[True]["logprobs"][0] == score[False]["logprobs"][0]  # predicted from the first token, which reads none
    assert all(a != b for a, b in zip(score[True]["logprobs"][1:], score[False]["logprobs"][1:], strict=True))
    assert client.score(session, f"{text} wheels", recall=True)["logprobs"][:100] == score[True]["logprobs"][:100]

    learned = client.score(session, text, learn=True)
    assert learned["logprobs"][:60] == score[True]["logprobs"][:60]
    client.observe(other, text)
    assert arrays(client, session) == arrays(client, other)


@pytest.fixture(scope="module")
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture(scope="module")
def key() -> tuple[str, str]:
    """Return a key, and its line for a file of keys."""
    return new_key("acme")


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory, key: tuple[str, str]) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(key[1])
    return file


@pytest.fixture(scope="module")
def tenants_server(tiny_base: Path, store: MemoryStore, key_file: Path) -> Iterator[InProcessServer]:
    server = InProcessServer(tiny_base, store, recall_tokens=64, hot_rows=ROWS, api_keys_file=key_file)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def forgetful_server(tiny_base: Path, store: MemoryStore, key_file: Path) -> Iterator[InProcessServer]:
    server = InProcessServer(tiny_base, store, recall_tokens=0, hot_rows=ROWS, api_keys_file=key_file)
    yield server
    server.stop()


def episodes_of(client: Client, session: str) -> dict[str, bytes]:
    return {name: array for name, array in arrays(client, session).items() if name.startswith((SITE, MEANINGS))}


@pytest.mark.parametrize("level", ["server", "tenant", "session", "request"])
def test_where_recall_is_off_no_episode_is_written_and_none_is_read(
    level: str, request: pytest.FixtureRequest, key: tuple[str, str], key_file: Path, session: str
) -> None:
    key_file.write_text(key[1])
    server: InProcessServer = request.getfixturevalue("tenants_server")
    with Client(server.url, server.model, key[0]) as client:
        assert_success(client.http.put(f"/v1/sessions/{session}", json={"keep_text": True}))
        client.observe(session, HARBOUR)
        client.observe(session, "Nothing else happened.")
        assert recalled(client, session) == [HARBOUR]
        before, exported = episodes_of(client, session), client.http.get(f"/v1/sessions/{session}/export").content
        assert before

        if level == "server":
            client.http.base_url = request.getfixturevalue("forgetful_server").url
        elif level == "tenant":
            key_file.write_text(f"{key[1]} recall=0")
        elif level == "session":
            assert_success(client.http.put(f"/v1/sessions/{session}", json={"keep_text": True, "recall": False}))
        off: Json = {"recall": False} if level == "request" else {}
        asked: Json = {"session": session, "learn": "all", "logit_bias": NO_EOS} | off
        client.observe(session, MILL, **off)
        assert_success(client.post(f"sessions/{session}/score", {"text": MILL, "learn": True} | off))
        chat = client.chat([{"role": "user", "content": ASKS_HARBOUR}], **asked)
        completion = client.complete("The colour of the harbour of Vorlund", **asked)
        assert chat["adaptation"]["recalled"] == completion["adaptation"]["recalled"] == []
        assert chat["adaptation"]["tokens_learned"] > 0 < completion["adaptation"]["tokens_learned"]
        kept = {"completion_id": completion["id"], "text": HARBOUR}
        assert_success(client.post(f"sessions/{session}/feedback", kept))
        assert episodes_of(client, session) == before

        if level == "request":
            return  # what moves a session has no such field
        fork, imported = uuid4().hex, uuid4().hex
        assert_success(client.post(f"sessions/{session}/fork", {"id": fork}))
        assert episodes_of(client, fork) == {}
        assert client.session(fork)["bytes"] < client.session(session)["bytes"]
        assert_success(client.post(f"sessions/{session}/unlearn", {"version": 2}))
        if level == "session":
            assert_success(client.http.put(f"/v1/sessions/{imported}", json={"recall": False}))
        assert_success(client.http.put(f"/v1/sessions/{imported}/import", content=exported))
        assert episodes_of(client, imported) == {}
        assert recalled(client, imported) == recalled(client, imported, recall=True) == []


def test_one_stream_makes_one_state_with_hot_episodes_and_with_cold_ones(
    client: Client, tiny_base: Path, encoder: str
) -> None:
    """One server keeps all episodes hot. The other has room for one, and for one session besides its draft."""
    questions = [ASKS_HARBOUR, ASKS_MILL, f"{ASKS_HARBOUR} {ASKS_MILL}", ASKS_HARBOUR, f"{ASKS_MILL} {ASKS_HARBOUR}"]
    told: dict[str, list[Json]] = {"hot": [], "cold": []}
    rows = {}
    little: Json = {"hot_rows": ROWS, "recall_hot_bytes": 1, "hot_sessions": 1, "max_queue": 1, "max_batch": 1}
    server = InProcessServer(tiny_base, recall_tokens=64, recall_encoder=encoder, **little)
    with Client(server.url, server.model) as other:
        for kind, user in (("hot", client), ("cold", other)):
            session, neighbour = uuid4().hex, uuid4().hex
            for text in (HARBOUR, MILL):
                user.observe(session, text)
            for number, question in enumerate(questions):
                if number % 2:
                    user.observe(neighbour, HARBOUR)
                fields: Json = {"session": session, "learn": "all", "logit_bias": NO_EOS}
                reply = user.chat([{"role": "user", "content": question}], **fields)
                for episode in reply["adaptation"]["recalled"]:
                    del episode["time"]  # at which this session was taught
                told[kind].append({"text": reply["choices"][0]["message"]["content"], **reply["adaptation"]})
            rows[kind] = arrays(user, session)
        assert other.metric("session_evictions_total") > 0
    server.stop()
    assert told["hot"] == told["cold"] and rows["hot"] == rows["cold"]
    assert {len(entry["recalled"]) for entry in told["hot"]} == {1, 2}


def test_what_is_unlearned_or_rolled_back_is_not_recalled(client: Client, session: str) -> None:
    assert_success(client.http.put(f"/v1/sessions/{session}", json={"keep_text": True}))
    client.observe(session, HARBOUR)
    client.observe(session, MILL)
    client.observe(session, "Nothing else happened.")
    assert_success(client.post(f"sessions/{session}/unlearn", {"version": 1}))
    assert recalled(client, session) == []
    mill = ask(client, session, ASKS_MILL)["recalled"]
    assert [(episode["version"], episode["text"]) for episode in mill] == [(2, MILL)]
    assert_success(client.post(f"sessions/{session}/rollback", {"version": 1}))
    assert recalled(client, session) == [HARBOUR]
    assert recalled(client, session, ASKS_MILL) == []


def test_forks_and_imports_recall_and_erased_sessions_do_not(client: Client, session: str) -> None:
    client.observe(session, HARBOUR)
    fork, imported = uuid4().hex, uuid4().hex
    assert_success(client.post(f"sessions/{session}/fork", {"id": fork}))
    exported = client.http.get(f"/v1/sessions/{session}/export").content
    assert_success(client.http.put(f"/v1/sessions/{imported}/import", content=exported))
    assert_success(client.http.delete(f"/v1/sessions/{session}"))
    assert recalled(client, fork) == recalled(client, imported) == [HARBOUR]
    client.observe(session, MILL)
    assert recalled(client, session) == []


def test_a_correction_is_recalled_instead_of_what_it_corrects(client: Client, session: str) -> None:
    client.observe(session, HARBOUR)
    client.observe(session, "The harbour of Vorlund is blue now.")
    assert recalled(client, session) == ["The harbour of Vorlund is blue now."]


def test_what_a_session_keeps_is_listed_newest_first_and_page_by_page(client: Client, session: str) -> None:
    for text in (HARBOUR, MILL, ASKS_MILL):
        client.observe(session, text)
    before = arrays(client, session)
    whole = listed(client, session)
    assert texts(whole) == [ASKS_MILL, MILL, HARBOUR] and not whole["has_more"]
    assert whole["data"][2] == {
        "ordinal": 1, "version": 1, "offset": 1, "time": times(client, session)[1], "text": HARBOUR, "asks": False,
    }  # fmt: skip
    first = listed(client, session, limit=2)
    assert texts(first) == [ASKS_MILL, MILL] and first["has_more"]
    assert texts(listed(client, session, limit=2, before=first["next"])) == [HARBOUR]
    assert client.version(session) == 3 and arrays(client, session) == before


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ({"query": "TESSADON nine"}, [MILL]),
        ({"query": "vorl"}, [HARBOUR]),
        ({"query": "vorlund tessadon"}, []),
        ({"query": "mill"}, [ASKS_MILL, MILL]),
        ({"query": "mill", "asks": False}, [MILL]),
        ({"query": "Which red harbour"}, [HARBOUR]),  # the encoder finds it; a word is missing
        ({"query": "Which red harbour", "version": 2}, []),
        ({"version": 2}, [MILL]),
        ({"asks": True}, [ASKS_MILL]),
        ({"query": "mill", "limit": 1}, [ASKS_MILL]),
    ],
)
def test_what_a_session_keeps_is_searched(client: Client, session: str, query: Json, found: list[str]) -> None:
    for text in (HARBOUR, MILL, ASKS_MILL):
        client.observe(session, text)
    page = listed(client, session, **query)
    assert texts(page) == found and page["has_more"] == ("limit" in query)


def test_what_was_forgotten_is_not_listed(client: Client, session: str) -> None:
    assert_success(client.http.put(f"/v1/sessions/{session}", json={"keep_text": True}))
    assert texts(listed(client, session)) == []
    client.observe(session, f"{HARBOUR} {MILL * 12}")
    client.observe(session, MILL)
    assert {episode["version"] for episode in listed(client, session)["data"]} == {1, 2}
    assert_success(client.post(f"sessions/{session}/unlearn", {"version": 1}))
    assert [(episode["version"], episode["text"]) for episode in listed(client, session)["data"]] == [(2, MILL)]
    assert_success(client.http.put("/v1/sessions/gambler", json={"model": "bandit"}))
    assert texts(listed(client, "gambler")) == []


@pytest.mark.parametrize("query", [{"query": "a" * 257}, {"limit": 0}, {"limit": 1001}, {"before": 0}, {"sort": "a"}])
def test_a_query_for_episodes_is_bounded(client: Client, session: str, query: Json) -> None:
    client.observe(session, HARBOUR)
    response = client.http.get(f"/v1/sessions/{session}/episodes", params=query)
    assert response.status_code == 400 and response.json()["error"]["param"] in query


def test_recall_without_a_session_is_refused(client: Client) -> None:
    body = client.completion("The harbour", recall=True)
    response = client.post("completions", body)
    assert response.status_code == 400 and response.json()["error"]["param"] == "recall"
