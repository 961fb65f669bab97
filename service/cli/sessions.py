"""`imprint sessions`: the commands that list, inspect, undo, copy and erase sessions."""

import json
import sys
from collections.abc import Iterable
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from service.cli.console import connect, out
from service.cli.options import AsJson, Url
from service.client.transport import DEFAULT_URL
from service.errors import CommandError
from service.http.replies import Session

sessions_app = typer.Typer(no_args_is_help=True, help="List, inspect, undo, copy and erase sessions.")

SessionId = Annotated[str, typer.Argument(metavar="ID", help="The session's id.")]
Version = Annotated[int, typer.Argument(min=0, help="A version that the server keeps; `log` lists them.")]
MAX_TEXT_CHARS = 60  # of a text in a table


@sessions_app.command("ls")
def list_sessions(as_json: AsJson = False, url: Url = DEFAULT_URL) -> None:
    """List all sessions."""
    with connect(url) as client:
        sessions = list(client.sessions())
    _print_records(sessions, as_json, "id", "version", "tokens_learned", "rows", "bytes", "gain", "updated")


@sessions_app.command("show")
def show_session(session: SessionId, as_json: AsJson = False, url: Url = DEFAULT_URL) -> None:
    """Show everything that the server reports about one session."""
    with connect(url) as client:
        answer = client.get(session).model_dump()
    if as_json:
        print(json.dumps(answer))
        return
    table = Table(show_header=False)
    for field, value in answer.items():
        table.add_row(_label(field), _cell(field, value))
    out.print(table)


@sessions_app.command("log")
def show_log(
    session: SessionId,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Number of versions, at most.")] = 20,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
) -> None:
    """List what a session learned and when, the newest version first."""
    with connect(url) as client:
        entries = list(islice(client.log(session, page_size=min(limit, 1000)), limit))
    _print_records(entries, as_json, "version", "kind", "of", "tokens", "rows", "loss", "time", "text")


@sessions_app.command("diff")
def show_diff(
    session: SessionId,
    start: Annotated[int, typer.Argument(metavar="FROM", min=0, help="A version; 0 = nothing learned.")],
    end: Annotated[int | None, typer.Argument(metavar="TO", min=0, help="A version; default: the newest.")] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Compare two versions: what each has that the other does not."""
    with connect(url) as client:
        diff = client.diff(session, start, client.get(session).version if end is None else end)
    if as_json:
        print(diff.model_dump_json())
        return
    out.print(f"from {diff.start} to {diff.end}: {diff.tokens_learned:+,} tokens learned")
    for site, rows in diff.rows.items():
        out.print(f"{escape(site)}: +{rows.added:,} rows, −{rows.removed:,}, {rows.changed:,} changed")
    for sign, entries in (("+", diff.learned), ("−", diff.forgotten)):
        for entry in entries:
            text = "" if entry.text is None else f": {_cell('text', entry.text)}"
            out.print(f"{sign} version {entry.version}, {entry.kind}, {entry.tokens:,} tokens{text}")


@sessions_app.command("rollback")
def roll_back(session: SessionId, version: Version, url: Url = DEFAULT_URL) -> None:
    """Make a new version equal to an earlier one; 0 = nothing learned."""
    with connect(url) as client:
        _print_result(client.rollback(session, version), f"is what version {version} was")


@sessions_app.command("unlearn")
def unlearn(
    session: SessionId,
    version: Version,
    erase: Annotated[bool, typer.Option("--erase", help="For good: no earlier version can be gone back to.")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Make a new version as if an earlier one had never been learned; exact where the session keeps its texts."""
    with connect(url) as client:
        result = client.unlearn(session, version, erase=erase)
        _print_result(result, f"is as if version {version} had never been learned")


@sessions_app.command("fork")
def fork(
    session: SessionId,
    copy: Annotated[str, typer.Argument(metavar="NEW", help="The copy's id.")],
    url: Url = DEFAULT_URL,
) -> None:
    """Copy a session under a new id; later changes to either do not affect the other."""
    with connect(url) as client:
        _print_result(client.fork(session, copy), f"has learned what {session} has")


@sessions_app.command("export")
def export(
    session: SessionId,
    file: Annotated[Path, typer.Argument(dir_okay=False, help="The file to write; - is standard output.")],
    url: Url = DEFAULT_URL,
) -> None:
    """Write a session to a safetensors file, for `import` here or elsewhere."""
    with connect(url) as client:
        data = client.export(session)
    try:
        sys.stdout.buffer.write(data) if str(file) == "-" else file.write_bytes(data)
    except OSError as error:
        raise CommandError(f"{file}: {error.strerror}") from None


@sessions_app.command("import")
def import_(
    session: SessionId,
    file: Annotated[Path, typer.Argument(dir_okay=False, help="A file that `export` wrote; - is standard input.")],
    url: Url = DEFAULT_URL,
) -> None:
    """Replace what a session has learned with the content of an exported file."""
    try:
        data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        raise CommandError(f"{file}: {error.strerror}") from None
    with connect(url) as client:
        _print_result(client.import_(session, data), f"has learned what {file} holds")


@sessions_app.command("rm")
def remove_sessions(
    sessions: Annotated[list[str], typer.Argument(metavar="ID...", help="The sessions' ids.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Erase sessions and all that they have learned."""
    with connect(url) as client:
        for session in sessions:
            if yes or typer.confirm(f"Erase session {session} and all it learned?", err=True):
                client.delete(session)
                out.print(f"erased {escape(session)}")


def _print_result(session: Session, description: str) -> None:
    out.print(
        escape(f"{session.id} version {session.version} {description}: {session.tokens_learned:,} tokens learned")
    )


def _print_records(records: Iterable[BaseModel], as_json: bool, *columns: str) -> None:
    """Print the records as a table of `columns`, or with all fields as JSON."""
    lines = [record.model_dump() for record in records]
    if as_json:
        print(json.dumps(lines))
        return
    table = Table(*map(_label, columns))
    table.columns[0].overflow = "fold"
    for line in lines:
        table.add_row(*(_cell(column, line[column]) for column in columns))
    out.print(table)


def _label(field: str) -> str:
    return "gain, nats/token" if field == "gain" else field.replace("_", " ")


def _cell(field: str, value: Any) -> str:
    """Format the value of a field for a table."""
    if value is None:
        return "–"
    match field:
        case "created" | "updated" | "time":
            return f"{datetime.fromtimestamp(value):%Y-%m-%d %H:%M}"
        case "bytes":
            return decimal(value)
        case "gain":
            return f"{value:+.4f}"
        case "loss":
            return f"{value:.3f}"
        case "text":
            line = " ".join(value.split())
            return escape(line if len(line) <= MAX_TEXT_CHARS else f"{line[: MAX_TEXT_CHARS - 1]}…")
    if isinstance(value, dict):
        return escape(", ".join(f"{name} = {option}" for name, option in value.items()))
    return f"{value:,}" if isinstance(value, int) else escape(str(value))
