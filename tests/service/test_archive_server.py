"""The archive as clients and operators meet it: a server that archives by itself, and `imprint store`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from typer.testing import CliRunner

from service.cli.main import app
from service.errors import CommandError
from service.store.objects import Objects, ObjectsError
from tests.conftest import Server
from tests.live import VOLATILE_FIELDS, Client, assert_error, assert_success, state, stored, wait_until
from tests.service.archives import files
from tests.service.valkeys import free_ports, valkey
from tests.tiny import TEXT

OF_FILES = {b"brought", b"file"}
USES = ("export", "fork", "rollback", "unlearn", "log", "score", "delete")
CHAT = [{"role": "user", "content": TEXT[:80]}]


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    (port,) = free_ports(1)
    with valkey(tmp_path_factory.mktemp("redis"), port):
        yield f"redis://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("archive")


@pytest.fixture(scope="module")
def server(tiny_base: Path, redis: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield a server that archives what has been idle for a second, and forgets what is hot at once."""
    settings: dict[str, Any] = {"redis_url": redis, "archive_url": folder, "archive_after_s": 1, "hot_sessions": 1}
    running = Server(str(tiny_base), tmp_path_factory.mktemp("server") / "data", **settings).start()
    yield running
    assert running.stop() == 0, running.log.read_text()


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


def is_archived(redis: str, session: str) -> bool:
    return b"archived" in stored(redis, session).get("meta", {})


def states(redis: str, *sessions: str) -> list[dict[str, dict[bytes, bytes]]]:
    """Return the stored rows and meta of sessions without what differs between equal sessions."""
    found = [state(redis, session) for session in sessions]
    for each in found:
        each["meta"] = {name: value for name, value in each["meta"].items() if name not in OF_FILES | VOLATILE_FIELDS}
    return found


def test_a_session_that_was_archived_is_as_one_that_never_was(client: Client, redis: str, folder: Path) -> None:
    client.http.put("/v1/sessions/one", json={"keep_text": True}).raise_for_status()
    first = client.observe("one", TEXT[:150])
    assert first["version"] == 1
    key = {"Idempotency-Key": "k"}
    answer = client.post("sessions/one/observe", {"text": TEXT[150:300]}, **key).json()
    wait_until(lambda: is_archived(redis, "one"))
    assert {key.partition(":")[0] for key in stored(redis, "one")} == {"meta", "fence", "onces", "once"}
    assert client.session("one")["version"] == 2 and client.session("one")["options"]["keep_text"]
    assert [x["id"] for x in client.http.get("/v1/sessions").json()["data"]] == ["one"]
    assert client.post("sessions/one/observe", {"text": TEXT[150:300]}, **key).json() == answer
    assert is_archived(redis, "one"), "a remembered answer brings nothing back"
    client.http.put("/v1/sessions/two", json={"keep_text": True}).raise_for_status()
    client.observe("two", TEXT[:150])
    client.observe("two", TEXT[150:300])
    replies = [client.chat(CHAT, session=session) for session in ("one", "two")]
    assert replies[0]["choices"] == replies[1]["choices"]
    one, two = states(redis, "one", "two")
    assert one == two
    assert client.metric("archived_total") >= 1 and client.metric("archive_returns_total") >= 1


@pytest.fixture(scope="module")
def expected(server: Server, redis: str) -> list[float]:
    """Archive a session for each of `USES`, all equal, and return what they score."""
    with Client(server.url) as client:
        for use in USES:
            client.http.put(f"/v1/sessions/s-{use}", json={"keep_text": True}).raise_for_status()
            client.observe(f"s-{use}", TEXT[:150])
            client.observe(f"s-{use}", TEXT[150:])
        client.observe("twin", TEXT[:150])
        scored: list[float] = client.score(f"s-{USES[0]}", TEXT[:100])["logprobs"]
    wait_until(lambda: all(is_archived(redis, f"s-{use}") for use in USES))
    return scored


@pytest.mark.parametrize("use", USES)
def test_an_archived_session_does_what_another_does(
    client: Client, redis: str, folder: Path, expected: list[float], use: str
) -> None:
    session, path = f"s-{use}", f"/v1/sessions/s-{use}"
    if use == "delete":
        client.http.delete(path).raise_for_status()
        assert not [file for file in files(folder) if f"s.{session}." in file.name]
        assert {key.partition(":")[0] for key in stored(redis, session)} <= {"fence", "erased"}
        assert_error(client.http.get(path), 404, "session_not_found")
    elif use == "export":
        data = client.http.get(f"{path}/export").content
        client.http.put("/v1/sessions/imported/import", content=data).raise_for_status()
        assert client.score("imported", TEXT[:100])["logprobs"] == expected
    elif use == "fork":
        client.http.post(f"{path}/fork", json={"id": "fork"}).raise_for_status()
        assert client.score("fork", TEXT[:100])["logprobs"] == expected
    elif use == "log":
        assert [entry["text"] for entry in client.http.get(f"{path}/log?text=true").json()["data"]][-1]
    elif use == "score":
        assert client.score(session, TEXT[:100])["logprobs"] == expected
    else:
        body: dict[str, Any] = {"version": 1} if use == "rollback" else {"version": 2, "erase": True}
        client.http.post(f"{path}/{use}", json=body).raise_for_status()
        assert client.score(session, TEXT[:100])["logprobs"] == client.score("twin", TEXT[:100])["logprobs"]


def test_an_archive_that_is_away_is_a_503(client: Client, redis: str, folder: Path) -> None:
    client.observe("away", TEXT[:200])
    wait_until(lambda: is_archived(redis, "away"))
    moved = folder.rename(folder.with_name("moved"))
    try:
        error = assert_error(client.post("sessions/away/observe", {"text": TEXT[:50]}), 503, "archive_unavailable")
        assert "IMPRINT_ARCHIVE_URL" in error["message"]
        assert client.session("away")["version"] == 1
        client.complete(session="another")
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # what was archived meanwhile
        moved.rename(folder)
    assert client.observe("away", TEXT[200:300])["version"] == 2


def test_two_servers_bring_back_what_either_has_archived(
    client: Client, redis: str, folder: Path, make_server: Callable[..., Server]
) -> None:
    client.observe("shared", TEXT[:200])
    wait_until(lambda: is_archived(redis, "shared"))
    other = make_server("other", redis_url=redis, archive_url=folder).start()
    with Client(other.url) as second:
        assert second.observe("shared", TEXT[200:300])["version"] == 2
        assert client.observe("shared", TEXT[:90])["version"] == 3


# --- imprint store ----------------------------------------------------------------------------------------------------


class Store:
    """`imprint store` on one Redis, in this process."""

    def __init__(self, redis: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("IMPRINT_REDIS_URL", redis)
        monkeypatch.setenv("IMPRINT_ARCHIVE_URL", str(folder))

    def __call__(self, *arguments: object, code: int = 0) -> dict[str, Any]:
        result = CliRunner().invoke(app, ["store", *map(str, arguments), "--json"])
        if isinstance(result.exception, Exception):
            raise result.exception
        assert result.exit_code == code, result.output
        report: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
        return report


@pytest.fixture
def taught(tiny_base: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Yield a Redis with three sessions of two versions, taught by a server that has ended, and a folder."""
    (port,) = free_ports(1)
    with valkey(tmp_path / "redis", port):
        url = f"redis://127.0.0.1:{port}"
        server = Server(str(tiny_base), tmp_path / "data", redis_url=url).start()
        with Client(server.url) as client:
            for session in ("a", "b", "c"):
                key = {"Idempotency-Key": f"first of {session}"}
                assert_success(client.post(f"sessions/{session}/observe", {"text": TEXT[:200]}, **key))
                client.observe(session, session + TEXT[200:300])
        assert server.stop() == 0
        yield url, tmp_path / "archive"


def test_the_commands_on_a_store(taught: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    redis, folder = taught
    store, place = Store(redis, folder, monkeypatch), tmp_path / "backup"
    assert store("stat")["sessions"] == {"stored": 3}
    assert store("archive", "default/a", "b", "nobody") == {"done": 2, "gone": 1}
    report = store("stat")
    assert report["sessions"] == {"stored": 1, "archived": 2} and len(report["largest"]) == 3
    assert report["idle"]["up to an hour"] == 3 and report["bytes"]["archive"] > 0
    assert store("verify") == {"whole, archived": 2, "whole": 1, "files without a session": 0}
    assert store("backup", place) == {"copied": 3}
    assert store("backup", place) == {"unchanged": 3}
    assert store("archive", "--idle", 0) == {"archived": 2, "done": 1}


def test_a_backup_is_restored(
    taught: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_server: Callable[..., Server]
) -> None:
    redis, folder = taught
    store, place = Store(redis, folder, monkeypatch), tmp_path / "backup"
    before = states(redis, "a", "b", "c")
    store("archive", "a")
    store("backup", place)
    earlier = datetime.now(UTC)
    server = make_server("data", redis_url=redis, archive_url=folder).start()
    with Client(server.url) as client:
        assert client.observe("a", TEXT[:80])["version"] == 3
        client.observe("new", TEXT[:80])
        assert store("backup", place) == {"copied": 2, "unchanged": 2}
        assert store("restore", place, "--at", earlier.isoformat()) == {"kept": 3}
        assert store("restore", place, "-s", "a", "--at", earlier.isoformat(), "--replace") == {"restored": 1}
        assert client.session("a")["version"] == 2
        assert states(redis, "a", "b", "c") == before
        assert client.http.get("/v1/sessions/a/log").json()["data"][0]["version"] == 2
        with Redis.from_url(redis) as raw:
            raw.flushall()
        assert store("restore", place) == {"restored": 4}
        assert states(redis, "b", "c") == before[1:]
        assert [x["id"] for x in client.http.get("/v1/sessions").json()["data"]] == ["a", "b", "c", "new"]
        later = client.post("sessions/a/observe", {"text": TEXT[80:160]}, **{"Idempotency-Key": "later"})
        assert assert_success(later)["version"] == 4, "no remembered answer is missing"
    assert store("verify")["whole"] == 4


def test_what_the_commands_refuse(taught: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    redis, folder = taught
    store, place = Store(redis, folder, monkeypatch), tmp_path / "backup"
    for arguments, message in (
        (("restore", place), f"{place} has no complete backup"),
        (("restore", place, "--at", "soon"), "'soon'"),
        (("archive",), "--idle"),
        (("backup", "nothing://x"), "DIR|URL"),
    ):
        with pytest.raises(CommandError, match=message.replace("|", r"\|")):
            store(*arguments)
    store("archive", "a")
    (file,) = files(folder)
    file.write_bytes(b"x" + file.read_bytes()[1:])
    assert store("verify", code=1) == {"whole": 2, "damaged": 1, "files without a session": 0}
    assert store("backup", place, code=1) == {"copied": 2, "damaged": 1}
    with pytest.raises(CommandError, match="the backup has no session 'nobody'"):
        store("restore", place, "--session", "nobody")
    with Redis.from_url(redis) as raw:
        raw.flushall()
    next((place / "sessions").rglob("*.copy")).write_bytes(b"broken")
    assert store("restore", place, code=1) == {"restored": 1, "damaged": 1}


def test_the_embedded_store_beside_its_server_and_alone(
    make_server: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, place = tmp_path / "archive", tmp_path / "backup"
    server = make_server("data", archive_url=folder).start()
    for name, value in {"DATA_DIR": server.data_dir, "ARCHIVE_URL": folder}.items():
        monkeypatch.setenv(f"IMPRINT_{name}", str(value))
    store = Store.__new__(Store)
    with Client(server.url) as client:
        client.observe("s", TEXT[:200])
        expected = client.score("s", TEXT[:100])["logprobs"]
        assert store("archive", "s") == {"done": 1} and store("backup", place) == {"copied": 1}
        assert client.score("s", TEXT[:100])["logprobs"] == expected
    assert server.stop() == 0
    assert store("stat")["sessions"] == {"stored": 1}
    assert store("archive", "s") == {"done": 1}
    assert store("verify") == {"whole, archived": 1, "files without a session": 0}
    monkeypatch.setenv("IMPRINT_DATA_DIR", str(tmp_path / "new"))
    with pytest.raises(CommandError, match="IMPRINT_DATA_DIR"):
        store("stat")
    assert store("restore", place) == {"restored": 1}
    assert store("stat")["sessions"] == {"stored": 1}


def test_an_address_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for wrong in (str(tmp_path / "file" / "x"), "nothing://x"):
        with pytest.raises(ObjectsError):
            Objects(wrong)
