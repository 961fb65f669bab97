"""`imprint store`: what a store holds, its archive, and its backups. Each command works beside running servers."""

import json
from collections import Counter
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from service.cli.console import err, out
from service.cli.options import AsJson
from service.errors import CommandError

store_app = typer.Typer(no_args_is_help=True, help="Inspect, archive, verify, back up and restore a store of sessions.")

Place = Annotated[str, typer.Argument(metavar="DIR|URL", help="A folder, or s3://bucket/prefix, gs://…, az://….")]
Named = Annotated[list[str] | None, typer.Argument(metavar="[TENANT/]ID...", help="Default: those that are idle.")]
Idle = Annotated[int | None, typer.Option("--idle", min=0, help="Seconds; default: IMPRINT_ARCHIVE_AFTER_S.")]
Repair = Annotated[bool, typer.Option("--repair", help="Remove files that no session needs.")]
Keep = Annotated[int, typer.Option("--keep", min=0, help="Remove all backups but the newest so many; 0 = none.")]
Tenant = Annotated[str | None, typer.Option("--tenant", help="Only sessions of this tenant.")]
Session = Annotated[str | None, typer.Option("--session", "-s", help="Only sessions of this id.")]
At = Annotated[str | None, typer.Option("--at", help="ISO time, UTC unless it says otherwise; default: now.")]
Replace = Annotated[bool, typer.Option("--replace", help="Also sessions that the store has; theirs are lost.")]


@store_app.command("stat")
def stat(as_json: AsJson = False) -> None:
    """Count the sessions in the store and in the archive, their bytes, and how long they have been idle."""
    from service.cli.store_tools import measure_store

    report = measure_store()
    if as_json:
        print(json.dumps(vars(report)))
        return
    table = Table("", "", "", show_header=False)
    for title, values in {"sessions": report.sessions, "bytes": report.bytes, "idle for": report.idle}.items():
        for name, value in values.items():
            table.add_row(title, name, decimal(value) if title == "bytes" else f"{value:,}")
    for size, name in report.largest:
        table.add_row("largest", escape(name), decimal(size))
    out.print(table)


@store_app.command("archive")
def archive(sessions: Named = None, idle: Idle = None, as_json: AsJson = False) -> None:
    """Move sessions to the archive now: those that are named, or those that have been idle for so long."""
    from service.cli.store_tools import archive_sessions

    _print_counts(archive_sessions(sessions or [], idle), as_json)


@store_app.command("verify")
def verify(repair: Repair = False, as_json: AsJson = False) -> None:
    """Read every session, here and in the archive, and check that it is whole. Exits with 1 if one is not."""
    from service.cli.store_tools import verify_store

    counts, damaged = verify_store(repair=repair)
    for line in damaged:
        err.print(escape(line), style="red")
    _print_counts(counts, as_json)


@store_app.command("backup")
def backup(target: Place, keep: Keep = 0, as_json: AsJson = False) -> None:
    """Copy every session that no earlier backup has as it is now. Can be interrupted and run again."""
    from service.cli.store_tools import back_up

    _print_counts(back_up(target, keep), as_json)


@store_app.command("restore")
def restore(
    source: Place,
    tenant: Tenant = None,
    session: Session = None,
    at: At = None,
    replace: Replace = False,
    as_json: AsJson = False,
) -> None:
    """Store the sessions of the newest backup that began at --at or before, unless the store has them.

    A version between two backups comes back by `imprint sessions rollback`, as far as the restored session keeps it.
    """
    from service.cli import store_tools

    counts = store_tools.restore(source, tenant=tenant, session=session, at=_time(at), replace=replace)
    _print_counts(counts, as_json)


def _time(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise CommandError(f"--at must be a time such as 2026-12-01T08:00, got {text!r}") from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _print_counts(counts: Counter[str], as_json: bool) -> None:
    """Print the counts, and exit with 1 if a session is damaged."""
    from service.cli.store_tools import counts_line

    print(json.dumps(counts)) if as_json else out.print(counts_line(counts))
    raise typer.Exit(bool(counts["damaged"]))
