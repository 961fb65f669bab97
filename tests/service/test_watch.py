"""`imprint watch`: a session that has learned the present state of a working tree, each file once."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from imprint import Client, Conflict
from service.cli import watch as watch_command
from service.client.errors import FileError
from service.client.tree_sync import Learned, Source, TreeSync
from service.client.working_tree import WorkingTree
from service.errors import Overloaded, PreconditionFailed, RateLimited, VersionConflict
from service.http.replies import LogEntry
from service.http.schemas import Unlearn
from service.store.base import RetentionConfig
from service.store.memory import MemoryStore
from tests.conftest import Server
from tests.forked import ForkedImprint
from tests.live import wait_until
from tests.service.in_process import InProcessServer
from tests.tiny import TEXT

FILES = {"a.py": TEXT[:60], "lib/b.py": TEXT[60:120], "lib/c.py": TEXT[120:]}


@pytest.fixture
def imprint(memory_server: InProcessServer) -> Iterator[Client]:
    with Client(memory_server.url, retries=0) as client:
        yield client


@pytest.fixture
def session() -> str:
    return uuid.uuid4().hex


@pytest.fixture
def tree(tmp_path: Path) -> WorkingTree:
    root = tmp_path / "tree"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return WorkingTree(root)


@pytest.fixture
def sync(imprint: Client, session: str, tmp_path: Path) -> Callable[[WorkingTree], TreeSync]:
    """Return a function that synchronises with a tree as a new process would."""

    def run(tree: WorkingTree, folder: str = "state") -> TreeSync:
        once = TreeSync(imprint, session, tmp_path / folder)
        once.report = once.run(tree.files())  # type: ignore[attr-defined]
        return once

    return run


def learned(imprint: Client, session: str) -> list[str]:
    """Return the texts of which the session consists, by its log."""
    state = Learned({})
    texts = dict[int, str | None]()
    for entry in reversed([*imprint.log(session)]):
        state.add(entry)
        texts[entry.version] = entry.text
    return [texts[version] or "" for version in state.now]


# --- which files ------------------------------------------------------------------------------------------------------


def test_what_git_ignores_and_what_is_no_text_is_left_out(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        ".gitignore": "build/\n*.log\n!keep.log\n/top.txt\n",
        "build/out.py": "x",
        "a.log": "x",
        "keep.log": "x",
        "top.txt": "x",
        "lib/.gitignore": "*.tmp\n!*.log\n",
        "lib/top.txt": "x",
        "lib/a.tmp": "x",
        "lib/a.log": "x",
        ".git/config": "x",
        "binary": b"\xff\xfe\x00",
        "zero": "a\0b",
        "empty": " \n",
        "large": "x" * 101,
        "größe.py": "\ufeffx",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / "link").symlink_to("/etc/hostname")
    tree = WorkingTree(tmp_path, max_bytes=100)
    taken = [file.path for file in tree.files()]
    assert taken == [".gitignore", "größe.py", "keep.log", "lib/.gitignore", "lib/a.log", "lib/top.txt"]
    assert tree.left_out == {
        "a.log": "ignored",
        "binary": "not a text",
        "build": "ignored",
        "large": "too large",
        "lib/a.tmp": "ignored",
        "link": "not a file",
        "top.txt": "ignored",
        "zero": "not a text",
    }


def test_patterns_that_git_takes_for_none_and_names_that_cannot_be_sent_stop_nothing(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("!\n\\\na\\\n[z-a]\n*.log\n!keep.log\n")
    for name in (b"a.log", b"keep.log", b"caf\xe9.py", b"\xe9/inner.py", b"\xe9.pem"):
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    tree = WorkingTree(tmp_path)
    assert [file.path for file in tree.files()] == [".gitignore", "keep.log"]
    assert sorted(tree.left_out.values()) == ["ignored", *["path not UTF-8"] * 3]


def test_rules_that_cannot_be_read_end_the_look_before_a_file_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / ".gitignore").write_text("secret.txt\n")
    (tmp_path / "secret.txt").write_text("x")
    monkeypatch.setattr("service.client.working_tree._read_rules", refuse)
    with pytest.raises(FileError, match=r"\.gitignore can't be read: Permission denied"):
        list(WorkingTree(tmp_path).files())


@pytest.mark.parametrize(
    "name",
    [
        ".env",
        ".env.local",
        "prod.env",
        "server.pem",
        "deep/tls.key",
        "id_rsa",
        "id_ed25519.pub",
        ".ssh/config",
    ],
)
def test_files_of_secrets_are_left_out_whatever_git_says(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("x")
    (tmp_path / ".gitignore").write_text(f"!{name}\n")
    tree = WorkingTree(tmp_path)
    assert [file.path for file in tree.files()] == [".gitignore"]
    assert list(tree.left_out.values()) == ["secret"]


@pytest.mark.parametrize(
    ("text", "is_secret"),
    [
        ("-----BEGIN RSA " + "PRIVATE KEY-----\nMIIE", True),
        ("-----BEGIN " + "PRIVATE KEY-----", True),
        ("aws = 'AKIA" + "IOSFODNN7EXAMPLE'", True),
        ("token: ghp_" + "a1B2" * 9, True),
        ("sk-proj-" + "Ab1_" * 10, True),
        ("-----BEGIN CERTIFICATE-----", False),
        ("task-force-of-many-words-and-more-words-still", False),
        ("AKIA is a prefix", False),
    ],
)
def test_a_file_with_a_key_in_it_is_left_out(tmp_path: Path, text: str, is_secret: bool) -> None:
    (tmp_path / "settings.py").write_text(f"x = 1\n{text}\n")
    tree = WorkingTree(tmp_path)
    assert (not [*tree.files()]) == is_secret == (tree.left_out == {"settings.py": "secret"})


def test_a_file_is_read_again_only_if_it_changed(tree: WorkingTree, monkeypatch: pytest.MonkeyPatch) -> None:
    first = [*tree.files()]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda _: pytest.fail("read again"))
        assert [*tree.files()] == first
    (tree.root / "a.py").write_text("changed")
    assert next(tree.files()).digest != first[0].digest


# --- each file once ---------------------------------------------------------------------------------------------------


def test_the_session_follows_the_tree(
    imprint: Client, session: str, tree: WorkingTree, sync: Callable[..., TreeSync]
) -> None:
    assert str(sync(tree).report).startswith("files learned: 3 (") and imprint.get(session).version == 3  # type: ignore[attr-defined]
    assert (next(imprint.log(session)).source or "").startswith("lib/c.py@")
    sync(tree)
    assert imprint.get(session).version == 3, "nothing changed"
    (tree.root / "a.py").write_text("x = 1")
    (tree.root / "lib/b.py").unlink()
    sync(tree)
    newest = imprint.log(session, page_size=10)
    assert [(entry.kind, entry.of) for entry in newest][:2] == [("learn", None), ("unlearn", [1, 2])]
    assert learned(imprint, session) == [FILES["lib/c.py"], "x = 1"]
    (tree.root / "a.py").write_text(FILES["a.py"])
    sync(tree)
    assert learned(imprint, session) == [FILES["lib/c.py"], FILES["a.py"]], (
        "the old text comes back: it is learned anew"
    )


@pytest.mark.parametrize("error", [PreconditionFailed("moved"), VersionConflict("moved")])
def test_a_session_that_others_change_meanwhile_is_read_again(
    imprint: Client,
    session: str,
    tree: WorkingTree,
    sync: Callable[..., TreeSync],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def refuse_once(*args: object, **kwargs: object) -> None:
        monkeypatch.undo()
        raise error

    monkeypatch.setattr(imprint, "observe", refuse_once)
    sync(tree)
    assert sorted(learned(imprint, session)) == sorted(FILES.values())


def test_a_changed_tree_leaves_the_state_of_one_that_always_was_so(
    imprint: Client, tree: WorkingTree, tmp_path: Path
) -> None:
    """No row stays of a text that is unlearned."""
    for name in ("changed", "plain"):
        imprint.create(name, keep_text=True)
    (tree.root / "a.py").write_text("other = 2")
    TreeSync(imprint, "changed", tmp_path / "one").run(tree.files())
    (tree.root / "a.py").unlink()
    TreeSync(imprint, "changed", tmp_path / "one").run(tree.files())
    TreeSync(imprint, "plain", tmp_path / "two").run(tree.files())
    probe = "".join(FILES.values())
    assert imprint.score("changed", probe).logprobs == imprint.score("plain", probe).logprobs


def test_two_machines_agree(imprint: Client, session: str, tree: WorkingTree, sync: Callable[..., TreeSync]) -> None:
    """The second one has no file about the session; both at once learn each file once."""
    sync(tree)
    sync(tree, "other machine")
    assert imprint.get(session).version == 3
    (tree.root / "a.py").write_text("x = 1")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda folder: sync(WorkingTree(tree.root), folder), ("state", "other machine")))
    assert sorted(learned(imprint, session)) == sorted([FILES["lib/b.py"], FILES["lib/c.py"], "x = 1"])


def test_what_others_teach_stays(
    imprint: Client, session: str, tree: WorkingTree, sync: Callable[..., TreeSync]
) -> None:
    sync(tree)
    imprint.observe(session, "by hand")
    (tree.root / "a.py").unlink()
    sync(tree)
    assert [entry.kind for entry in imprint.log(session)] == ["unlearn", "learn", "learn", "learn", "learn"]
    assert len(learned(imprint, session)) == 2


def test_a_version_that_is_kept_no_more_is_unlearned_row_by_row_or_told(
    tree: WorkingTree, tiny_base: Path, tmp_path: Path
) -> None:
    """Rows can only be found by the episodes of their version."""
    server = InProcessServer(tiny_base, MemoryStore(RetentionConfig(versions=2)))
    try:
        with Client(server.url) as client:
            client.create("without", keep_text=True, recall=False)
            for session in ("with", "without"):
                TreeSync(client, session, tmp_path).run(tree.files())
            for name in FILES:
                (tree.root / name).write_text("new = " + repr(name))
            report = TreeSync(client, "with", tmp_path).run(tree.files())
            assert not report.stuck and report.unlearned == report.learned == 3
            report = TreeSync(client, "without", tmp_path).run(tree.files())
            assert report.stuck == {"a.py"} and report.unlearned == 2 and report.learned == 3
            with pytest.raises(Conflict):
                client.unlearn("without", 1)
            again = TreeSync(client, "without", tmp_path).run(tree.files())
            assert again.stuck == {"a.py"} and again.learned == 0, "told again, learned once"
            assert client.get("without").version == 7
    finally:
        server.stop()


def test_what_the_log_has_no_more_is_not_learned_again(
    imprint: Client, session: str, tree: WorkingTree, sync: Callable[..., TreeSync], monkeypatch: pytest.MonkeyPatch
) -> None:
    sync(tree)
    whole = [*imprint.log(session)]
    monkeypatch.setattr(Client, "log", lambda *_, **__: iter(whole[:1]))
    assert sync(tree).report.learned == 0 and imprint.get(session).version == 3  # type: ignore[attr-defined]


def test_two_processes_save_what_they_know_side_by_side(
    imprint: Client, session: str, tree: WorkingTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A watcher and a commit hook, say: one of them saves between the other's writing and renaming."""
    watcher, hook = (TreeSync(imprint, session, tmp_path / "state") for _ in range(2))
    watcher.run(tree.files())
    hook.run(tree.files())
    write = Path.write_text

    def write_and_let_the_other_save(path: Path, text: str) -> int:
        monkeypatch.setattr(Path, "write_text", write)
        written = write(path, text)
        hook._save()
        return written

    monkeypatch.setattr(Path, "write_text", write_and_let_the_other_save)
    watcher._save()
    assert [path.suffix for path in (tmp_path / "state").iterdir()] == [".json"]
    assert len(watcher._load()) == 3


def test_a_state_folder_that_cannot_be_written_is_named(imprint: Client, session: str, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    with pytest.raises(FileError, match=r"cannot write .*state"):
        TreeSync(imprint, session, tmp_path / "state").run([])


def test_one_request_unlearns_as_many_versions_as_the_server_takes(
    imprint: Client, session: str, tmp_path: Path
) -> None:
    sync = TreeSync(imprint, session, tmp_path)
    sync._learned = Learned({version: Source("gone", "0" * 16, version, 600) for version in range(1, 601)})
    stale = sync._stale({})
    assert Unlearn(versions=stale).all_versions == set(range(89, 601)), "the newest first"


def test_a_busy_server_is_waited_for(tree: WorkingTree, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Exception | None] = [RateLimited("Too many requests."), Overloaded("The queue is full."), None]

    def synchronise(*_: object) -> None:
        if (answer := answers.pop(0)) is not None:
            raise answer

    monkeypatch.setattr(watch_command, "_synchronise", synchronise)
    monkeypatch.setattr(watch_command, "RETRY_S", 0.0)
    monkeypatch.setattr("watchfiles.watch", lambda *_, **__: iter([set[object]()] * 4))
    with Client("http://127.0.0.1:9", retries=0) as client:
        watch_command._follow(client, "s", tree)
    assert answers == []


def test_the_log_is_followed_through_rollbacks_and_imports() -> None:
    def entry(version: int, kind: str, of: object = None, path: str | None = None) -> LogEntry:
        source = None if path is None else str(Source(path, "0" * 16, 1, 1))
        fields: Any = {
            "kind": kind,
            "of": of,
            "time": 0.0,
            "digest": "",
            "tokens": 1,
            "rows": 1,
            "loss": None,
            "request_id": "",
            "text": None,
        }
        return LogEntry(version=version, source=source, **fields)

    def paths(*entries: LogEntry, older: dict[int, Source] | None = None) -> list[str]:
        found = Learned(older or {})
        for each in entries:
            found.add(each)
        return [source.path for source in found.now.values()]

    first = [entry(3, "learn", path="a"), entry(4, "learn"), entry(5, "learn", path="b@1 2/3.py")]
    older = {1: Source("old", "0" * 16, 1, 1), 2: Source("older", "0" * 16, 1, 1)}
    assert paths(*first, older=older) == ["old", "older", "a", "b@1 2/3.py"]
    assert paths(*first, entry(6, "rollback", 4)) == ["a"]
    assert paths(*first, entry(6, "rollback", 1), older=older) == ["old"]
    assert paths(*first, entry(6, "unlearn", [3, 5]), entry(7, "rollback", 5)) == ["a", "b@1 2/3.py"]
    assert paths(*first, entry(6, "import", "x v1"), entry(7, "learn", path="c"), older=older) == ["c"]


# --- kill -9 ----------------------------------------------------------------------------------------------------------


def watch(server: Server, session: str, tree: WorkingTree, tmp_path: Path, *options: str) -> ForkedImprint:
    """Start `imprint watch`, which prints to files beside the tree."""
    arguments = ["watch", str(tree.root), "--session", session, "--url", server.url, *options]
    environment = os.environ | {"XDG_STATE_HOME": str(tmp_path / "state")}
    return ForkedImprint(arguments, environment, stdout=tmp_path / "out", stderr=tmp_path / "notes")


def test_kills_of_the_watcher_and_of_the_server_teach_nothing_twice(
    make_server: Callable[..., Server], tree: WorkingTree, tmp_path: Path
) -> None:
    for number in range(6):
        (tree.root / f"f{number}.py").write_text(f"n = {number}\n{TEXT * 10}")
    printed, notes = tmp_path / "out", tmp_path / "notes"
    server = make_server(keep_versions=200, keep_bytes=2**28).start()
    with Client(server.url, retries=10) as client:
        client.create("repo", keep_text=True)
        first = watch(server, "repo", tree, tmp_path)
        wait_until(lambda: client.get("repo").version >= 2)
        first.kill()
        first.wait()
        second = watch(server, "repo", tree, tmp_path)
        wait_until(lambda: client.get("repo").version >= 4)
        server.kill()
        server.start()
        wait_until(lambda: "version 9" in printed.read_text())
        (tree.root / "f3.py").write_text("changed = True")
        wait_until(lambda: "version 11" in printed.read_text())
        second.send_signal(signal.SIGINT)
        assert second.wait(60) in (0, 130) and "Traceback" not in notes.read_text(), notes.read_text()
        assert printed.read_text().splitlines()[-1].startswith("files learned: 1 (")
        printed.write_text("")
        once = watch(server, "repo", tree, tmp_path, "--once")
        assert once.wait(120) == 0 and printed.read_text() == "", "there is nothing left to do"
        texts = learned(client, "repo")
        assert sorted(texts) == sorted(path.read_text() for path in tree.root.rglob("*.py"))
        for text in texts:
            client.observe("always-so", text)
        probe = "".join(FILES.values())
        assert client.score("repo", probe).logprobs == client.score("always-so", probe).logprobs
