"""`imprint observe`."""

from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

from service.cli.console import connect, err, out, text_source
from service.cli.options import SessionOption, Url
from service.client import ObserveProgress
from service.client.transport import DEFAULT_URL
from service.errors import CommandError, ImprintError


def observe(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="UTF-8 text; - is standard input.")],
    session: SessionOption,
    url: Url = DEFAULT_URL,
) -> None:
    """Learn from files, in order, without generating anything."""
    done: ObserveProgress | None = None
    with connect(url) as client, progress_bar() as bar:
        task = bar.add_task("", total=None, learned="")

        def on_progress(progress: ObserveProgress) -> None:
            nonlocal done
            done = progress
            bar.update(
                task,
                description=escape(progress.file),
                completed=progress.characters,
                total=progress.total,
                learned=str(progress),
            )

        try:
            done = client.observe_files(session, map(text_source, files), progress=on_progress)
        except ImprintError as error:
            raise CommandError(f"{error} (before that: {done})" if done else str(error)) from None
    out.print(str(done))


def progress_bar() -> Progress:
    """Return the bar that shows how far a file or a tree is learned, and the time that the rest will take."""
    columns = (
        "{task.description}",
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        "{task.fields[learned]}",
    )
    return Progress(*columns, console=err, transient=True, disable=not err.is_terminal)
