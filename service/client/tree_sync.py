"""A session that has learned the present state of a working tree: each file once, no old version of any.

What a session has learned of a tree stands in the session's own log: `source` names the file, a digest of its text and
the piece. The log of another machine's work is the same log, so two machines with equal trees agree. Each step is sent
for the version of the session that it was planned for (`If-Match`): whatever else the session learned meanwhile, also a
step of a process that was killed, makes the step fail, and it is planned anew. So nothing is learned twice.

A log has the newest 512 versions. A small file of this machine's says what older ones learned, so that it is not
learned again.
"""

import json
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from service.client.errors import FileError
from service.client.sync_client import Client
from service.client.working_tree import TreeFile
from service.errors import Conflict, NotFound, PreconditionFailed, VersionConflict
from service.http.replies import LogEntry, Session

NOT_KEPT = ("version_not_kept", "text_not_kept")  # codes of versions that can be unlearned no more
MAX_VERSIONS = 512  # that one request may unlearn
SOURCE = re.compile(r"(?P<path>.+)@(?P<digest>[0-9a-f]{16}) (?P<piece>\d+)/(?P<pieces>\d+)", re.DOTALL)


class Source(NamedTuple):
    """The piece of a file's text that a version learned, by its number from 1, and the number of pieces."""

    path: str
    digest: str
    piece: int
    pieces: int

    def __str__(self) -> str:
        return f"{self.path}@{self.digest} {self.piece}/{self.pieces}"

    @classmethod
    def parse(cls, text: str | None) -> "Source | None":
        """Return the piece that a log entry's `source` names; None for another source."""
        match = SOURCE.fullmatch(text or "")
        return match and cls(match["path"], match["digest"], int(match["piece"]), int(match["pieces"]))


@dataclass
class Learned:
    """The pieces that the present content of a session consists of, by the versions that learned them.

    older: those of versions that the session's log has no more, as far as this machine knows.
    """

    older: Mapping[int, Source]
    now: dict[int, Source] = field(init=False)
    _at: dict[int, dict[int, Source]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.now = dict(self.older)

    def add(self, entry: LogEntry) -> None:
        """Take the next entry of the log."""
        source = Source.parse(entry.source)
        match entry.kind, entry.of:
            case "learn", _:
                if source is not None:
                    self.now = self.now | {entry.version: source}
            case "unlearn", int() | list() as of:
                gone = {of} if isinstance(of, int) else set(of)
                self.now = {version: source for version, source in self.now.items() if version not in gone}
            case "rollback", int(of):
                older = {version: source for version, source in self.older.items() if version <= of}
                self.now = self._at.get(of, older)
            case _:
                self.now = {}
        self._at[entry.version] = self.now


@dataclass
class SyncReport:
    """The outcome of a synchronisation, so far.

    Attributes:
        learned, unlearned: numbers of files.
        tokens: number of tokens learned.
        characters, total: characters learned so far, and to be learned.
        file: the file that is being learned.
        stuck: files of which a version stays that can be unlearned no more.
    """

    learned: int = 0
    unlearned: int = 0
    tokens: int = 0
    characters: int = 0
    total: int = 0
    file: str = ""
    stuck: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        return f"files learned: {self.learned} ({self.tokens:,} tokens), unlearned: {self.unlearned}"


class TreeSync:
    """Brings a session to the state of a tree, step by step.

    state: the folder of the small file about what the session's log has no more. on_progress: called after each step.
    """

    def __init__(
        self, client: Client, session: str, state: Path, on_progress: Callable[[SyncReport], None] = lambda _: None
    ) -> None:
        self._client, self._session, self._on_progress = client, session, on_progress
        self._stuck: set[int] = set()
        self.meta = self._ready_session()
        name = re.sub(r"[^A-Za-z0-9]+", "-", f"{client.url}-{session}-{self.meta.created}").strip("-")
        self._file = state / f"{name}.json"
        self._learned = Learned(self._load())

    def run(self, files: Iterable[TreeFile]) -> SyncReport:
        """Unlearn what the tree has no more, and learn what is new in it. Call it again after each change.

        Raises ImprintError; the session keeps the steps before that, and the next call goes on.
        """
        tree, report = {file.path: file for file in files}, SyncReport()
        self._refresh()
        while (stale := self._stale(tree)) or (missing := self._missing(tree)):
            try:
                if stale:
                    self._unlearn(stale, report)
                else:
                    report.total = report.characters + sum(file.characters for file in missing)
                    report.file = missing[0].path
                    self._on_progress(report)
                    self._learn(missing[0], tree, report)
            except (PreconditionFailed, VersionConflict):  # somebody else has taught the session
                self._refresh()
            self._on_progress(report)
        report.stuck = {self._learned.now[version].path for version in self._stuck if version in self._learned.now}
        return report

    def _stale(self, tree: Mapping[str, TreeFile]) -> list[int]:
        """Return the versions that learned what the tree does not have, the newest first, at most `MAX_VERSIONS`."""
        kept, stale = set[Source](), list[int]()
        for version, source in sorted(self._learned.now.items()):
            file = tree.get(source.path)
            if file is None or source.digest != file.digest or source in kept or source not in _sources(file):
                stale.append(version)
            kept.add(source)
        return [version for version in reversed(stale) if version not in self._stuck][:MAX_VERSIONS]

    def _missing(self, tree: Mapping[str, TreeFile]) -> list[TreeFile]:
        """Return the files of which a piece is to be learned."""
        known = set(self._learned.now.values())
        return [file for file in tree.values() if not known.issuperset(_sources(file))]

    def _unlearn(self, versions: Sequence[int], report: SyncReport) -> None:
        """Unlearn versions in one turn; without the oldest if that can be unlearned no more."""
        paths = {self._learned.now[version].path for version in versions}
        try:
            self.meta = self._client.unlearn(self._session, versions, if_match=self.meta.version)
        except Conflict as error:
            if error.code not in NOT_KEPT:
                raise
            self._stuck.add(min(versions))
            return
        self._refresh()
        report.unlearned += len(paths)

    def _learn(self, file: TreeFile, tree: dict[str, TreeFile], report: SyncReport) -> None:
        """Learn the pieces of a file that are missing; leave the file for the next call if it has just changed."""
        texts = file.read()
        if texts is None:
            del tree[file.path]
            return
        for source, text in zip(_sources(file), texts, strict=True):
            if source not in self._learned.now.values():
                observed = self._client.observe(self._session, text, source=str(source), if_match=self.meta.version)
                self._refresh()
                report.tokens += observed.tokens_learned
        report.characters += file.characters
        report.learned += 1

    def _refresh(self) -> None:
        """Read what the session has learned from its log."""
        self.meta = self._client.get(self._session)
        log = [*self._client.log(self._session, page_size=1000, text=False)]
        entries = [entry for entry in reversed(log) if entry.version <= self.meta.version]
        first = entries[0].version if entries else self.meta.version + 1
        known = {version: source for version, source in self._learned.now.items() if version < first}
        self._learned = Learned(known)
        for entry in entries:
            self._learned.add(entry)
        self._save()

    def _ready_session(self) -> Session:
        """Return the session, which keeps its texts from now on: unlearning needs them."""
        try:
            meta = self._client.get(self._session)
        except NotFound:
            return self._client.create(self._session, keep_text=True)
        if meta.options.get("keep_text"):
            return meta
        options: dict[str, Any] = {**meta.options, "keep_text": True}
        return self._client.create(self._session, **options)

    def _load(self) -> dict[int, Source]:
        try:
            stored = json.loads(self._file.read_text())
            return {int(version): Source(*source) for version, source in stored.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def _save(self) -> None:
        new = self._file.with_suffix(f".{uuid.uuid4().hex}")  # another process may save at the same time
        try:
            new.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(json.dumps(self._learned.now))
            new.replace(self._file)
        except OSError as error:
            raise FileError(f"cannot write {self._file}: {error.strerror}") from None


def _sources(file: TreeFile) -> list[Source]:
    """Return the pieces of a file, in order."""
    return [Source(file.path, file.digest, number, file.pieces) for number in range(1, file.pieces + 1)]
