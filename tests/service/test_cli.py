"""The command line, run as a process, against a real server and against one with prepared answers."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.cli import main
from service.client import Client, text_files
from service.client.transport import SSEDecoder
from service.errors import CommandError
from tests.forked import ForkedImprint
from tests.live import WAIT_TIMEOUT_S
from tests.service.scripted_server import (
    MODEL,
    MODELS,
    OBSERVED,
    Answer,
    ScriptedServer,
    error_answer,
    ok,
    stream,
    text_chunk,
)

ROOT = Path(__file__).resolve().parents[2]
STORY = "The cat sat on the mat. The cat sat on the hat.\n\n" * 20


class Server(Protocol):
    url: str


def command(*arguments: str, url: str) -> dict[str, Any]:
    """Return the arguments with which `subprocess` runs `imprint`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("IMPRINT_")}
    environment = {**inherited, "IMPRINT_URL": url, "COLUMNS": "200"}
    return {"args": [sys.executable, "-m", "service", *arguments], "cwd": ROOT, "env": environment}


def imprint(*arguments: str, url: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        given, stdout, stderr = (Path(folder) / name for name in ("stdin", "stdout", "stderr"))
        given.write_text(stdin)
        environment = command(url=url)["env"]
        process = ForkedImprint(arguments, environment, stdin=given, stdout=stdout, stderr=stderr)
        code = process.wait(WAIT_TIMEOUT_S)
        return subprocess.CompletedProcess(arguments, code, stdout.read_text(), stderr.read_text())


def error_line(result: subprocess.CompletedProcess[str]) -> str:
    """Check that the command failed with one line on stderr, and return the line."""
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1
    return result.stderr


def session(server: Server, name: str) -> httpx.Response:
    return httpx.get(f"{server.url}/v1/sessions/{name}")


# Against a real server.


def test_observe_learns_a_file(server: Server, tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text(STORY)
    result = imprint("observe", str(tmp_path / "story.txt"), "--session", "cli-observe", url=server.url)
    assert result.returncode == 0, result.stderr
    learned = session(server, "cli-observe").json()
    assert learned["version"] == 1
    assert f"learned {learned['tokens_learned']:,} tokens" in result.stdout
    assert "loss" in result.stdout


def test_observe_reads_standard_input(server: Server) -> None:
    result = imprint("observe", "-", "--session", "cli-stdin", url=server.url, stdin=STORY)
    assert result.returncode == 0, result.stderr
    assert session(server, "cli-stdin").json()["tokens_learned"] > 0


def test_observe_learns_nothing_if_a_file_is_not_text(server: Server, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text(STORY)
    bad.write_bytes("é".encode() * 40_000 + b"\xff")
    line = error_line(imprint("observe", str(good), str(bad), "--session", "cli-bad", url=server.url))
    assert str(bad) in line
    assert "at byte 80000" in line
    assert session(server, "cli-bad").status_code == 404


def test_score_compares_with_the_frozen_base_and_learns_only_if_asked(server: Server, tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text(STORY)
    arguments = ("score", str(tmp_path / "story.txt"), "--session", "cli-score")
    imprint("observe", str(tmp_path / "story.txt"), "--session", "cli-score", url=server.url)
    score = json.loads(imprint(*arguments, "--json", url=server.url).stdout)
    assert score["gain"] == pytest.approx(score["frozen_loss"] - score["loss"])
    assert score["perplexity_ratio"] == pytest.approx(score["perplexity"] / score["frozen_perplexity"])
    assert score["version"] == 1
    assert session(server, "cli-score").json()["version"] == 1
    table = imprint(*arguments, "--learn", url=server.url).stdout
    assert f"{score['frozen_perplexity']:.3f}" in table
    assert session(server, "cli-score").json()["version"] == 2


def test_chat_prints_the_reply_alone_and_says_what_was_learned(server: Server) -> None:
    arguments = ("chat", "--session", "cli-chat", "--max-tokens", "8", "--temperature", "0")
    result = imprint(*arguments, "--once", "My cat is called Miso.", url=server.url)
    assert result.returncode == 0, result.stderr
    learned = session(server, "cli-chat").json()
    note = rf"learned {learned['tokens_learned']:,} tokens · loss [\d.]+ · version 0 → {learned['version']}\n"
    assert re.fullmatch(note, result.stderr)
    assert "learned" not in result.stdout


def test_chat_without_a_session_talks_to_the_frozen_base(server: Server) -> None:
    result = imprint("chat", "--max-tokens", "4", url=server.url, stdin="Hello!\n")
    assert (result.returncode, result.stderr) == (0, "")


def test_sessions_are_listed_shown_and_erased(server: Server) -> None:
    imprint("observe", "-", "--session", "cli-ls", url=server.url, stdin=STORY)
    listed = json.loads(imprint("sessions", "ls", "--json", url=server.url).stdout)
    assert "cli-ls" in [listing["id"] for listing in listed]
    assert "cli-ls" in imprint("sessions", "ls", url=server.url).stdout
    shown = json.loads(imprint("sessions", "show", "cli-ls", "--json", url=server.url).stdout)
    assert shown == session(server, "cli-ls").json()
    assert "tokens learned" in imprint("sessions", "show", "cli-ls", url=server.url).stdout

    assert imprint("sessions", "rm", "cli-ls", url=server.url, stdin="n\n").returncode == 0
    assert session(server, "cli-ls").status_code == 200
    assert imprint("sessions", "rm", "cli-ls", "--yes", url=server.url).returncode == 0
    assert session(server, "cli-ls").status_code == 404
    assert "cli-ls" in error_line(imprint("sessions", "show", "cli-ls", url=server.url))


def test_versions_are_listed_compared_undone_and_copied(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: object) -> str:
        """Run `imprint sessions …` and return its output."""
        main.app(["sessions", *map(str, words)], standalone_mode=False)
        return capsys.readouterr().out

    monkeypatch.setenv("IMPRINT_URL", server.url)
    with Client(server.url) as client:
        client.create("cli-log", keep_text=True)
        for start in (0, 40):
            client.observe("cli-log", STORY[start:])
        assert [entry["version"] for entry in json.loads(run("log", "cli-log", "--json"))] == [2, 1]
        assert [entry["version"] for entry in json.loads(run("log", "cli-log", "-n", 1, "--json"))] == [2]
        assert "The cat sat" in run("log", "cli-log")
        diff = client.diff("cli-log", 1, 2)
        assert json.loads(run("diff", "cli-log", 1, "--json")) == json.loads(diff.model_dump_json())
        output = run("diff", "cli-log", 2, 1)
        assert f"from 2 to 1: {-diff.tokens_learned:+,} tokens learned\n" in output and "− version 2, learn" in output
        assert "cli-log version 3 is what version 1 was" in run("rollback", "cli-log", 1)
        assert client.diff("cli-log", 1, 3).tokens_learned == 0
        assert "cli-copy version 1 has learned what cli-log has" in run("fork", "cli-log", "cli-copy")
        run("export", "cli-log", tmp_path / "file")
        assert "cli-file version 1 has learned what" in run("import", "cli-file", tmp_path / "file")
        assert len({client.get(name).rows for name in ("cli-log", "cli-copy", "cli-file")}) == 1
        assert "is as if version 1 had never been learned: 0 tokens" in run("unlearn", "cli-log", 1)
        with pytest.raises(CommandError, match="No such file"):
            run("import", "cli-file", tmp_path / "nothing")


def test_an_error_is_shown_in_the_servers_words(server: Server) -> None:
    assert "session" in error_line(imprint("chat", "--session", "no/such id", "--once", "hi", url=server.url))


# Without a server.


def test_a_missing_server_is_named_with_the_way_to_start_one() -> None:
    line = error_line(imprint("sessions", "ls", url="http://127.0.0.1:9"))
    assert "http://127.0.0.1:9" in line
    assert "imprint serve" in line


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://localhost"])
def test_an_address_that_is_not_http_is_refused(url: str) -> None:
    assert "--url" in error_line(imprint("sessions", "ls", url=url))


def test_prepare_loads_the_base_and_compiles(tiny_base: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "IMPRINT_MODEL": str(tiny_base), "IMPRINT_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "service", "prepare"]
    ran = subprocess.run(command, env=environment | {"IMPRINT_POLICIES": "none"}, capture_output=True, text=True)
    assert ran.returncode == 0 and "prepared" in ran.stdout, ran.stderr
    missing = subprocess.run(command, env=environment | {"IMPRINT_MODEL": "/no/base"}, capture_output=True, text=True)
    assert missing.returncode == 1 and "/no/base" in missing.stderr and "Traceback" not in missing.stderr


def test_serve_refuses_bad_settings_before_it_loads_anything() -> None:
    assert "65535" in error_line(imprint("serve", "--port", "65536", url=""))


@given(st.integers(1, 9).flatmap(lambda size: st.tuples(st.just(size), st.text("ab é\n", max_size=200))))
def test_pieces_join_to_the_file_and_none_is_too_long(tmp_path_factory: Any, case: tuple[int, str]) -> None:
    size, text = case
    file = tmp_path_factory.getbasetemp() / "pieces.txt"
    file.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "READ_BYTES", 3)
        pieces = list(text_files.pieces(str(file), size))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= size for piece in pieces)


def test_pieces_end_where_a_paragraph_ends(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("one two\n\nthree\nfour five\n\nsix")
    assert list(text_files.pieces(tmp_path / "text", 12)) == ["one two\n\n", "three\nfour ", "five\n\nsix"]


@given(st.lists(st.text()), st.integers(1, 50))
def test_a_stream_is_read_the_same_however_it_is_cut(texts: list[str], size: int) -> None:
    data = [json.dumps(text, ensure_ascii=False) for text in texts]
    stream = "".join(f": ping\n\ndata: {event}\n\n" for event in data).encode()
    cuts = [stream[start : start + size] for start in range(0, len(stream), size)]
    decoder = SSEDecoder()
    assert [event for cut in cuts for event in decoder.feed(cut)] == data


# Against a server with prepared answers.


@pytest.fixture
def scripted_server() -> Iterator[Callable[..., ScriptedServer]]:
    started: list[ScriptedServer] = []

    def start(*answers: Answer) -> ScriptedServer:
        started.append(ScriptedServer(*answers))
        return started[-1]

    yield start
    for server in started:
        server.close()


def test_a_request_to_a_busy_server_is_retried(scripted_server: Callable[..., ScriptedServer]) -> None:
    busy = error_answer(429, "queue_full", **{"Retry-After": "0"})
    server = scripted_server(busy, busy, ok(OBSERVED))
    result = imprint("observe", "-", "--session", "me", url=server.url, stdin="text")
    assert result.returncode == 0
    assert result.stderr.count("It is queue_full.") == 2
    assert [body for _, _, body in server.requests] == [{"text": "text"}] * 3


def test_a_server_that_stays_busy_is_given_up_on(scripted_server: Callable[..., ScriptedServer]) -> None:
    server = scripted_server(*[error_answer(503, "loading", **{"Retry-After": "0"})] * 50)
    result = imprint("sessions", "ls", url=server.url)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "imprint: It is loading."
    assert len(server.requests) < 10


def test_a_request_that_learns_has_one_key_however_often_it_is_sent(
    scripted_server: Callable[..., ScriptedServer],
) -> None:
    unknown = error_answer(503, "store_unavailable", **{"Retry-After": "0"})
    server = scripted_server(unknown, unknown, ok(OBSERVED), ok(OBSERVED))
    for _ in range(2):
        assert imprint("observe", "-", "--session", "me", url=server.url, stdin="text").returncode == 0
    first, *again, other = (headers["Idempotency-Key"] for _, headers, _ in server.requests)
    assert again == [first, first] and other != first


def test_a_failure_reports_what_was_learned_before(
    scripted_server: Callable[..., ScriptedServer], tmp_path: Path
) -> None:
    for name in "ab":
        (tmp_path / name).write_text(STORY)
    server = scripted_server(ok(OBSERVED), error_answer(500, "engine_error"))
    files = [str(tmp_path / name) for name in "ab"]
    line = error_line(imprint("observe", *files, "--session", "me", url=server.url))
    assert "It is engine_error." in line
    assert "learned 3 tokens" in line


@pytest.mark.parametrize(
    ("chunks", "line"),
    [
        ([text_chunk("Hel"), {"error": {"message": "It broke.", "code": "engine_error"}}], "It broke."),
        ([text_chunk("Hel")], "before the answer was complete"),
        ([{"other": 1}], "not as an Imprint server does"),
    ],
)
def test_a_broken_stream_is_an_error(
    scripted_server: Callable[..., ScriptedServer], chunks: list[object], line: str
) -> None:
    server = scripted_server(MODELS, stream(*chunks))
    assert line in error_line(imprint("chat", "--once", "hi", url=server.url))


def test_an_answer_of_another_kind_of_server_is_an_error(scripted_server: Callable[..., ScriptedServer]) -> None:
    for answer in ((200, {}, b"<html>"), ok([]), ok({}), (404, {}, b"Not Found")):
        server = scripted_server(answer)
        assert server.url in error_line(imprint("sessions", "ls", url=server.url))


def test_the_reply_reaches_a_pipe_unchanged(scripted_server: Callable[..., ScriptedServer]) -> None:
    reply = "a\u2028b\x85 [bold]c[/] :smile: \x1b[31m é"
    server = scripted_server(MODELS, stream(text_chunk(reply), "[DONE]"))
    assert imprint("chat", "--once", "hi", url=server.url).stdout == reply + "\n"


@pytest.mark.parametrize(("given", "temperature"), [((), 0.7), (("--temperature", "0"), 0)])
def test_a_chat_samples_as_the_server_suggests(
    scripted_server: Callable[..., ScriptedServer], given: tuple[str, ...], temperature: float
) -> None:
    suggested = {"temperature": 0.7, "top_p": 0.8, "frequency_penalty": 0.5}
    models = ok({"object": "list", "data": [MODEL | {"sampling": suggested}]})
    server = scripted_server(models, stream(text_chunk("Hello."), "[DONE]"))
    assert imprint("chat", "--once", "hi", *given, url=server.url).returncode == 0
    path, _, body = server.requests[-1]
    assert path == "/v1/chat/completions" and body == body | suggested | {"temperature": temperature}


def test_ctrl_c_ends_the_command_quietly(scripted_server: Callable[..., ScriptedServer]) -> None:
    server = scripted_server(MODELS)
    run = command("chat", "--once", "hi", url=server.url)
    process = subprocess.Popen(**run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert server.hanging.wait(WAIT_TIMEOUT_S)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=WAIT_TIMEOUT_S)
    assert process.returncode == 130
    assert errors == ""


def test_a_chat_resends_its_history(scripted_server: Callable[..., ScriptedServer]) -> None:
    """On a terminal, each turn contains the turns before it but no failed turn, and Ctrl-D ends the chat."""
    reply = "Hello.\x1b]0;owned\x07"
    server = scripted_server(
        MODELS,
        stream(text_chunk(reply), "[DONE]"),
        error_answer(400, "too_long"),
        stream(text_chunk("Bye."), "[DONE]"),
    )
    terminal, terminal_of_child = pty.openpty()
    process = subprocess.Popen(
        **command("chat", url=server.url),
        stdin=terminal_of_child,
        stdout=terminal_of_child,
        stderr=terminal_of_child,
        start_new_session=True,
    )
    os.close(terminal_of_child)
    screen = b""
    for turn, typed in enumerate((b"hi\n", b"more\n", b"bye\n", b"\x04"), start=1):
        while screen.count("›".encode()) < turn:
            screen += os.read(terminal, 1024)
        os.write(terminal, typed)
    assert process.wait(WAIT_TIMEOUT_S) == 0
    os.close(terminal)
    bodies = [body["messages"] for _, _, body in server.requests[1:]]
    hi, bye = {"role": "user", "content": "hi"}, {"role": "user", "content": "bye"}
    assert bodies[0] == [hi]
    assert bodies[2] == [hi, {"role": "assistant", "content": reply}, bye]
    assert b"It is too_long." in screen
    assert b"Hello." in screen
    assert b"\x1b]0" not in screen, "control characters of the model's text do not reach the terminal"
