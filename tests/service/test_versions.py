"""Versions of a session: rollback, fork, export, import and unlearning are exact to the bit."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import numpy as np
import pytest
from safetensors.numpy import load, save

from model.episodes import SPAN_TOKENS
from model.memory.episodic.layout import HEADER_BYTES, learned_at
from service.store.redis.codec import PAGE_ROWS
from tests.live import NO_EOS, Client, Json, assert_error, assert_success, state
from tests.tiny import TEXT, build_tiny_base

State = dict[str, dict[bytes, bytes]]


@pytest.fixture
def client(server: Any) -> Iterator[Client]:
    with Client(server.url, server.model) as client:
        yield client


@pytest.fixture
def session() -> str:
    return uuid4().hex


def teach(client: Client, session: str, turn: int) -> Json:
    """Run turn number `turn`, the same in every session: a text, a completion or a chat."""
    match turn % 3:
        case 0:
            return client.observe(session, TEXT[turn % 40 :] * (1 + turn % 2))
        case 1:
            return client.complete(TEXT[turn:90], session=session, learn="all", max_tokens=90, logit_bias=NO_EOS)
        case _:
            return client.chat([{"role": "user", "content": TEXT[turn : turn + 80]}], session=session)


def content(server: Any, session: str) -> State:
    """Return the stored state of a session without its options, its version and the versions of its episodes.

    A version is a number of one session: an equal session may have learned the same under other numbers.
    """
    meta = state(server.data_dir, session).get("meta", {})
    kept = {name: value for name, value in meta.items() if name not in (b"version", b"options", b"sum:episodes")}
    return rows(server, session) | ({"meta": kept} if meta else {})


def rows(server: Any, session: str) -> State:
    """Return the stored memory of a session, without its metadata and the versions of its episodes."""
    found = {key: values for key, values in state(server.data_dir, session).items() if key != "meta"}
    if episodes := found.get("rows:episodes"):
        found["rows:episodes"] = {number: without_versions(page) for number, page in episodes.items()}
    return found


def without_versions(page: bytes) -> bytes:
    rows = np.frombuffer(page[PAGE_ROWS:], np.uint8).reshape(-1, HEADER_BYTES + 4 * SPAN_TOKENS)
    return page[:PAGE_ROWS] + learned_at(rows, 0).tobytes()


def rollback(client: Client, session: str, version: int, **headers: str) -> httpx.Response:
    return client.post(f"sessions/{session}/rollback", {"version": version}, **headers)


# --- rollback ---------------------------------------------------------------------------------------------------------


def test_every_kept_version_can_be_gone_back_to_bit_for_bit(client: Client, server: Any, session: str) -> None:
    contents = [content(server, session)]
    probe = [client.score(f"{session}-empty", TEXT)["logprobs"]]
    for turn in range(6):
        teach(client, session, turn)
        contents.append(content(server, session))
        probe.append(client.score(session, TEXT)["logprobs"])
    for step, version in enumerate((3, 5, 1, 6, 0), 7):
        answer = rollback(client, session, version)
        assert assert_success(answer)["version"] == step
        assert answer.headers["etag"] == f'"v{step}"'
        if version:
            assert content(server, session) == contents[version]
        else:
            assert rows(server, session) == {}
        assert client.score(session, TEXT)["logprobs"] == probe[version], "the device and the store must agree"
    # A turn after the rollback learns what it would have learned at that version.
    rollback(client, session, 2)
    teach(client, session, 2)
    assert rows(server, session) == {key: value for key, value in contents[3].items() if key != "meta"}


def test_a_version_that_is_not_kept_is_refused(make_server: Callable[..., Any]) -> None:
    server = make_server(keep_versions=2).start()
    with Client(server.url) as client:
        for turn in range(4):
            client.observe("alice", TEXT[turn:])
        before = state(server.data_dir, "alice")
        for version in (0, 1, 5):
            error = assert_error(rollback(client, "alice", version), 409, "version_not_kept")
            assert "2..4" in error["message"] and error["param"] == "version"
        assert state(server.data_dir, "alice") == before
        assert_error(rollback(client, "nobody", 0), 404, "session_not_found")
        assert_error(rollback(client, "alice", 3, **{"If-Match": '"v3"'}), 412, "precondition_failed")
        assert assert_success(rollback(client, "alice", 2, **{"If-Match": '"v4"'}))["version"] == 5


def test_versions_are_kept_within_their_bytes(make_server: Callable[..., Any]) -> None:
    server = make_server(keep_bytes=4_000).start()
    with Client(server.url) as client:
        for turn in range(12):
            client.observe("alice", TEXT[turn:] * 4)
        assert_error(rollback(client, "alice", 1), 409, "version_not_kept")
        assert assert_success(rollback(client, "alice", 11))["version"] == 13


# --- fork -------------------------------------------------------------------------------------------------------------


def test_a_fork_starts_equal_and_changes_independently(client: Client, server: Any, session: str) -> None:
    new = f"{session}-fork"
    for turn in range(3):
        teach(client, session, turn)
    origin = state(server.data_dir, session)
    answer = client.post(f"sessions/{session}/fork", {"id": new})
    assert answer.status_code == 201 and answer.json()["version"] == 1
    assert content(server, new) == content(server, session)
    assert_error(client.post(f"sessions/{session}/fork", {"id": new}), 409, "session_exists")
    assert_error(client.post(f"sessions/{session}-none/fork", {"id": f"{new}2"}), 404, "session_not_found")
    assert_error(client.post(f"sessions/{session}/fork", {"id": f"{new}2"}, '"v1"'), 412, "precondition_failed")
    for turn in range(3, 5):
        teach(client, new, turn)
    assert state(server.data_dir, session) == origin
    for turn in range(3, 5):
        teach(client, session, turn)
    assert content(server, session) == content(server, new)


# --- export and import ------------------------------------------------------------------------------------------------


def export(client: Client, session: str) -> bytes:
    response = client.http.get(f"/v1/sessions/{session}/export")
    assert response.status_code == 200, response.text
    return response.content


def import_session(client: Client, session: str, data: bytes, **headers: str) -> httpx.Response:
    return client.http.put(f"/v1/sessions/{session}/import", content=data, headers=headers)


def test_what_is_imported_is_what_was_exported(client: Client, server: Any, session: str) -> None:
    for turn in range(4):
        teach(client, session, turn)
    data, copy = export(client, session), f"{session}-copy"
    answer = import_session(client, copy, data)
    assert answer.status_code == 201 and answer.headers["etag"] == '"v1"'
    assert content(server, copy) == content(server, session)
    teach(client, session, 5)
    answer = import_session(client, session, data)
    assert answer.status_code == 200 and answer.json()["version"] == 6
    assert content(server, copy) == content(server, session)
    assert client.score(copy, TEXT) | {"version": 0} == client.score(session, TEXT) | {"version": 0}
    assert_success(rollback(client, session, 5))
    teach(client, copy, 5)
    assert content(server, copy) == content(server, session)
    assert {name.rpartition(".")[2] for name in load(data)} == {"slots", "rows"}


def altered(data: bytes, change: Callable[[Json, dict[str, Any]], None]) -> bytes:
    """Return the file with its manifest or arrays changed."""
    size = int.from_bytes(data[:8], "little")
    manifest = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["imprint"])
    arrays = {name: array.copy() for name, array in load(data).items()}
    change(manifest, arrays)
    return save(arrays, {"imprint": json.dumps(manifest)})


def resealed(change: Callable[[Json, dict[str, Any]], None]) -> Callable[[Json, dict[str, Any]], None]:
    """Return the change followed by a correction of the checksum, as a forger would do."""
    from service.versions.export_file import _checksum

    def forge(manifest: Json, arrays: dict[str, Any]) -> None:
        change(manifest, arrays)
        del manifest["sha256"]
        manifest["sha256"] = _checksum(manifest, arrays).hex()

    return forge


def set_row(name: str, at: Any, value: Any) -> Callable[[Json, dict[str, Any]], None]:
    def change(manifest: Json, arrays: dict[str, Any]) -> None:
        array = next(array for key, array in arrays.items() if key.endswith(name))
        array[at] = value

    return change


FORGERIES: dict[str, tuple[Callable[[Json, dict[str, Any]], None], str]] = {
    "a row": (set_row("lexical.rows", (0, 20), 99), "checksum_mismatch"),
    "a slot": (set_row("lexical.slots", -1, 2**30), "checksum_mismatch"),
    "a counter": (lambda manifest, _: manifest.update(tokens_learned=1), "checksum_mismatch"),
    "another format": (lambda manifest, _: manifest.update(format=2), "unknown_export_format"),
    "a slot beyond": (resealed(set_row("lexical.slots", -1, 2**30)), "invalid_export"),
    "a token beyond": (resealed(set_row("lexical.rows", (0, slice(4, 8)), 127)), "invalid_export"),
    "not a number": (
        resealed(set_row("_own.rows", (0, slice(0, 4)), np.frombuffer(struct.pack("<f", np.nan), np.uint8))),
        "invalid_export",
    ),
    "a negative counter": (resealed(lambda manifest, _: manifest.update(requests=-1)), "invalid_export"),
    "a foreign site": (
        resealed(lambda _, arrays: arrays.update({"x.slots": np.zeros(1, np.int32), "x.rows": np.zeros((1, 4), "u1")})),
        "invalid_export",
    ),
    "other digests": (resealed(lambda manifest, _: manifest.update(digests=["zz"])), "invalid_export"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_file_that_was_changed_is_refused(client: Client, server: Any, session: str, forgery: str) -> None:
    for turn in range(2):
        teach(client, session, turn)
    before = state(server.data_dir, session)
    change, code = FORGERIES[forgery]
    assert_error(import_session(client, session, altered(export(client, session), change)), 400, code)
    assert state(server.data_dir, session) == before


def test_a_file_that_is_none_is_refused(client: Client, session: str) -> None:
    teach(client, session, 0)
    data = export(client, session)
    for invalid in (data[:-1], data[: len(data) // 2], data[:7], b"", b"\x80\x04K\x01.", data + b"x", save({})):
        assert_error(import_session(client, session, invalid), 400, "invalid_export")
    assert client.version(session) == 1


def test_a_server_with_a_key_takes_only_what_it_signed(make_server: Callable[..., Any]) -> None:
    server, other_server = (
        make_server(name, export_key=f"{name}-secret-0123456789").start() for name in ("ours", "theirs")
    )
    with Client(server.url) as client, Client(other_server.url) as other_client:
        client.observe("alice", TEXT)
        data = export(client, "alice")
        assert import_session(client, "bob", data).status_code == 201
        assert_error(import_session(other_client, "alice", data), 400, "bad_signature")
        unsigned = altered(data, lambda manifest, _: manifest.pop("hmac-sha256"))
        assert_error(import_session(client, "carol", unsigned), 400, "bad_signature")
        assert other_client.version("alice") == client.version("carol") == 0


def test_a_file_of_other_slow_weights_is_refused(
    client: Client, make_server: Callable[..., Any], tmp_path: Path, session: str
) -> None:
    teach(client, session, 0)
    other = make_server(model=str(build_tiny_base(tmp_path / "other", seed=1))).start()
    with Client(other.url, other.model) as elsewhere:
        assert_error(import_session(elsewhere, "alice", export(client, session)), 409, "model_mismatch")
        assert elsewhere.version("alice") == 0


# --- unlearn ----------------------------------------------------------------------------------------------------------


def keep_text(client: Client, session: str) -> None:
    assert_success(client.http.put(f"/v1/sessions/{session}", json={"keep_text": True}))


def test_what_is_unlearned_was_never_learned(client: Client, server: Any, session: str) -> None:
    texts = [TEXT[n:] * (1 + n % 3) for n in range(5)]
    naive = f"{session}-naive"
    keep_text(client, session)
    for text in texts:
        client.observe(session, text)
    answer = client.post(f"sessions/{session}/unlearn", {"version": 3})
    assert assert_success(answer)["version"] == 6
    assert assert_success(client.post(f"sessions/{session}/unlearn", {"version": 2}))["version"] == 7
    for text in (texts[0], texts[3], texts[4]):
        client.observe(naive, text)
    assert rows(server, session) == rows(server, naive)
    assert client.score(session, TEXT)["logprobs"] == client.score(naive, TEXT)["logprobs"]
    unlearned, alone = client.session(session), client.session(naive)
    assert {name: unlearned[name] for name in ("tokens_learned", "rows", "bytes")} == {
        name: alone[name] for name in ("tokens_learned", "rows", "bytes")
    }
    assert unlearned["gain"] == pytest.approx(alone["gain"])
    assert_error(client.post(f"sessions/{session}/unlearn", {"version": 3}), 409, "version_not_kept")
    # Unlearning the newest version learns nothing again, and a rollback brings back what was unlearned.
    assert_success(rollback(client, session, 5))
    assert_success(client.post(f"sessions/{session}/unlearn", {"version": 5}))
    assert_success(rollback(client, session, 4))
    assert client.session(session)["version"] == 10


def test_chats_and_completions_are_unlearned_too_and_stay_known(client: Client, session: str) -> None:
    keep_text(client, session)
    for turn in range(5):
        teach(client, session, turn)
    learned = client.session(session)["tokens_learned"]
    lost = client.http.get(f"/v1/sessions/{session}/log").json()["data"][2]
    assert lost["version"] == 3 and lost["text"] == TEXT[2:82]
    assert (
        assert_success(client.post(f"sessions/{session}/unlearn", {"version": 3}))["tokens_learned"]
        == learned - lost["tokens"]
    )
    again = client.chat([{"role": "user", "content": TEXT[2:82]}], session=session)
    assert again["adaptation"]["tokens_learned"] == 0


def test_without_texts_and_episodes_nothing_can_be_unlearned(client: Client, server: Any, session: str) -> None:
    assert_success(client.http.put(f"/v1/sessions/{session}", json={"recall": False}))
    for turn in range(3):
        teach(client, session, turn)
    before = state(server.data_dir, session)
    error = assert_error(client.post(f"sessions/{session}/unlearn", {"version": 1}), 409, "text_not_kept")
    assert "keep_text" in error["message"]
    assert state(server.data_dir, session) == before
    assert assert_success(client.post(f"sessions/{session}/unlearn", {"version": 3}))["version"] == 4, (
        "nothing was learned after version 3"
    )


CAT, DOG, CITY = "The cat of Ilvara is called Miso.", "A dog in Vorlund barks at noon.", "My city has nine red gates."


def episodes(client: Client, session: str) -> list[str]:
    return [entry["text"] for entry in client.http.get(f"/v1/sessions/{session}/episodes").json()["data"]]


@pytest.mark.parametrize("kept", ["no text", "no version"])
def test_a_version_that_cannot_be_learned_around_is_unlearned_by_its_rows(
    make_server: Callable[..., Any], kept: str
) -> None:
    """The rows that are left have tokens and hashes of rows of a session that never learned it, in any slot."""
    server = make_server(keep_versions=1 if kept == "no version" else 32).start()
    with Client(server.url, server.model) as client:
        if kept == "no version":
            keep_text(client, "old")
        for text in (CITY, CAT, DOG):
            client.observe("old", text)
        before = client.session("old")
        after = assert_success(client.post("sessions/old/unlearn", {"version": 2}))
        assert episodes(client, "old") == [DOG, CITY]
        for text in (CITY, DOG):
            client.observe("naive", text)
        naive = client.session("naive")
        assert names_of_rows(client, "old") <= names_of_rows(client, "naive")
        assert before["rows"] > after["rows"] and before["bytes"] > after["bytes"]
        assert naive["rows"] - 3 <= after["rows"] <= naive["rows"], "first words may go too"
        exported = load(export(client, "old"))
        assert after["bytes"] == sum(array.nbytes for name, array in exported.items() if is_rows(name))
        assert client.post("sessions/old/unlearn", {"version": 2}).status_code == 409
        assert client.observe("old", CAT)["version"] == 5, "it can be learned again"
        assert episodes(client, "old") == [CAT, DOG, CITY]


def is_rows(name: str) -> bool:
    return name.endswith(".rows") and not name.startswith("lexical_own")


def names_of_rows(client: Client, session: str) -> set[bytes]:
    """Return the token and the hashes of each lexical row of a session."""
    return {row[4:14].tobytes() for row in load(export(client, session))["lexical.rows"]}


def test_what_a_fork_brought_is_not_unlearned_as_one_version(client: Client, session: str) -> None:
    client.observe(session, CAT)
    assert_success(client.post(f"sessions/{session}/fork", {"id": f"{session}-fork"}))
    assert_error(client.post(f"sessions/{session}-fork/unlearn", {"version": 1}), 409, "version_not_kept")


@pytest.mark.parametrize("texts", [True, False])
def test_what_is_erased_cannot_be_gone_back_to(client: Client, session: str, texts: bool) -> None:
    if texts:
        keep_text(client, session)
    for text in (CITY, CAT, DOG):
        client.observe(session, text)
    assert_success(client.post(f"sessions/{session}/unlearn", {"version": 2, "erase": True}))
    for version in (1, 3):
        assert_error(rollback(client, session, version), 409, "version_not_kept")
    log = client.http.get(f"/v1/sessions/{session}/log").json()["data"]
    assert [entry["text"] for entry in log] == [None] * 4
    client.observe(session, CAT)
    assert assert_success(rollback(client, session, 4))["version"] == 6
    assert episodes(client, session) == [DOG, CITY]


# --- the log ----------------------------------------------------------------------------------------------------------


def test_the_log_lists_what_was_learned_and_when(client: Client, session: str) -> None:
    first = client.post(f"sessions/{session}/observe", {"text": TEXT}, **{"X-Request-Id": "the-first"})
    for turn in range(1, 4):
        teach(client, session, turn)
    rollback(client, session, 2)
    page = assert_success(client.http.get(f"/v1/sessions/{session}/log", params={"limit": 3}))
    assert [entry["version"] for entry in page["data"]] == [5, 4, 3]
    assert (page["data"][0]["kind"], page["data"][0]["of"]) == ("rollback", 2)
    assert page["has_more"] and page["next"] == 3
    rest = assert_success(client.http.get(f"/v1/sessions/{session}/log", params={"before": page["next"]}))
    assert [entry["version"] for entry in rest["data"]] == [2, 1] and not rest["has_more"]
    entry, answer = rest["data"][1], assert_success(first)
    assert (entry["kind"], entry["request_id"], entry["text"]) == ("learn", "the-first", None)
    assert (entry["tokens"], entry["rows"], entry["loss"]) == (
        answer["tokens_learned"],
        answer["rows_written"],
        answer["loss"],
    )
    same = client.post(f"sessions/{session}-2/observe", {"text": TEXT})
    assert assert_success(same)["version"] == 1
    (other,) = client.http.get(f"/v1/sessions/{session}-2/log").json()["data"]
    assert other["digest"] == entry["digest"] != rest["data"][0]["digest"]
    assert_error(client.http.get(f"/v1/sessions/{session}-3/log"), 404, "session_not_found")


def test_the_text_that_a_user_kept_is_learned_behind_its_prompt_once(client: Client, server: Any, session: str) -> None:
    client.http.put(f"/v1/sessions/{session}", json={"keep_text": True})
    completion = client.complete(session=session)
    body, key = {"completion_id": completion["id"], "text": " and the lamp stays lit."}, {"Idempotency-Key": "kept"}
    first, again = (client.post(f"sessions/{session}/feedback", body, **key) for _ in range(2))
    answer = assert_success(first)
    assert assert_success(again) == answer and answer["version"] == client.version(session) == 2
    (newest, _) = assert_success(client.http.get(f"/v1/sessions/{session}/log"))["data"]
    assert newest["text"] == body["text"] and newest["tokens"] == answer["tokens_learned"]
    other_session = uuid4().hex
    assert_error(client.post(f"sessions/{other_session}/feedback", body), 404, "session_not_found")
    client.observe(other_session, "x")
    assert_error(client.post(f"sessions/{other_session}/feedback", body), 404, "completion_not_found")
    fields: Json = {"model": client.model, "session": session, "max_tokens": 4}
    message = assert_success(client.post("messages", fields | {"messages": [{"role": "user", "content": TEXT[:40]}]}))
    response = assert_success(
        client.post(
            "responses", {"model": client.model, "session": session, "input": TEXT[:50], "max_output_tokens": 4}
        )
    )
    for number, reply in enumerate((message, response), 5):
        body = {"completion_id": reply["id"], "text": " and the lamp stays lit."}
        assert assert_success(client.post(f"sessions/{session}/feedback", body))["version"] == number
    for invalid in (body | {"reward": 1.0}, {"text": "x"}, {"completion_id": "cmpl-1", "text": "x"}):
        assert client.post(f"sessions/{session}/feedback", invalid).status_code == 400
