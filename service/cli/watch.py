"""`imprint watch`."""

import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import platformdirs
import typer
from rich.markup import escape
from rich.progress import TaskID

from service.cli.console import connect, out, print_note
from service.cli.observe import progress_bar
from service.cli.options import SessionOption, Url
from service.client import Client, ClientError
from service.client.transport import DEFAULT_URL
from service.client.tree_sync import SyncReport, TreeSync
from service.client.working_tree import MAX_BYTES, NO_FOLDERS, WorkingTree
from service.errors import ImprintError, Overloaded, RateLimited, Unavailable

QUIET_MS = 1600  # after a change, in which further changes are waited for
WAIT_MS = 1000
RETRY_S = 5.0
MAX_NAMED = 20  # files of a kind that notes name


def watch(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The working tree.")],
    session: SessionOption,
    only_once: Annotated[bool, typer.Option("--once", help="Learn the present state, and end.")] = False,
    max_bytes: Annotated[int, typer.Option(min=1, help="Size of the largest file that is learned.")] = MAX_BYTES,
    url: Url = DEFAULT_URL,
) -> None:
    """Teach a session the files of a working tree, and keep it up with their changes: one session for each tree.

    What `.gitignore` names, secrets, large files and files that are no text are left out.
    """
    tree = WorkingTree(folder.resolve(), max_bytes)
    with connect(url) as client:
        if only_once:
            _synchronise(client, session, tree, set())
        else:
            print_note(f"watching {tree.root}; Ctrl-C ends it")
            _follow(client, session, tree)


def _follow(client: Client, session: str, tree: WorkingTree) -> None:
    """Synchronise at the beginning and after each change, until Ctrl-C; wait for a server that is away or busy."""
    from watchfiles import DefaultFilter
    from watchfiles import watch as changes_of

    without = DefaultFilter(ignore_dirs=tuple(NO_FOLDERS), ignore_entity_patterns=(), ignore_paths=())
    is_due, told = True, set[str]()
    # An empty set comes every `WAIT_MS` without a change. The first one comes when changes are watched for already, so
    # that none is missed while the tree is learned.
    for changes in changes_of(
        tree.root, watch_filter=without, debounce=QUIET_MS, rust_timeout=WAIT_MS, yield_on_timeout=True
    ):
        if not changes and not is_due:
            continue
        try:
            _synchronise(client, session, tree, told)
            is_due = False
        except (ClientError, Unavailable, Overloaded, RateLimited) as error:
            print_note(f"{error}; trying again")
            is_due = True
            time.sleep(RETRY_S)


def _synchronise(client: Client, session: str, tree: WorkingTree, told: set[str]) -> None:
    """Bring the session to the state of the tree, with a progress bar; print what was done and what was not.

    told: the remarks that were printed before.
    """
    with progress_bar() as bar:
        task: TaskID = bar.add_task("", total=None, learned="")

        def show(report: SyncReport) -> None:
            bar.update(
                task,
                description=escape(report.file),
                completed=report.characters,
                total=report.total or None,
                learned=str(report),
            )

        sync = TreeSync(client, session, platformdirs.user_state_path("imprint") / "watch", show)
        try:
            report = sync.run(tree.files())
        except ImprintError:
            print_note("what was learned so far stays learned; the next attempt goes on from there")
            raise
    if report.learned or report.unlearned:
        out.print(escape(f"{report} · version {sync.meta.version}"))
    _tell(tree, report, told)


def _tell(tree: WorkingTree, report: SyncReport, told: set[str]) -> None:
    """Print what was left out and what stays in the memory, each once."""
    counts = Counter(reason for reason in tree.left_out.values() if reason != "ignored")
    remarks = (
        ["left out: " + ", ".join(f"{number} {reason}" for reason, number in counts.most_common())] if counts else []
    )
    secrets = [path for path, reason in tree.left_out.items() if reason == "secret"]
    remarks += [f"left out, looks like a secret: {path}" for path in secrets[:MAX_NAMED]]
    remarks += [
        f"{path}: an old text of it can't be unlearned any more and stays in the memory (its version is not kept, see"
        " IMPRINT_KEEP_VERSIONS, and has no episodes)"
        for path in sorted(report.stuck)[:MAX_NAMED]
    ]
    for remark in remarks:
        if remark not in told:
            told.add(remark)
            print_note(remark)
