"""`imprint learn`."""

from typing import Annotated, Literal, cast

import typer
from rich.markup import escape

from model.tabular.limits import MAX_BATCH
from service.cli.console import connect, err, out
from service.cli.observe import progress_bar
from service.cli.options import SessionOption, Url, split_commas
from service.client.tables import BATCH, TableProgress
from service.client.transport import DEFAULT_URL
from service.errors import CommandError, ImprintError


def learn(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A CSV file with a head, or a Parquet file.")],
    target: Annotated[str, typer.Option("--target", "-t", help="The column to learn.")],
    session: SessionOption,
    task: Annotated[
        str | None,
        typer.Option(
            help="labels or regression; default: by the target's values, if all or none are numbers.", metavar="TASK"
        ),
    ] = None,
    ignore: Annotated[str, typer.Option(help="Columns to leave out, separated by commas.")] = "",
    batch: Annotated[int, typer.Option(min=1, max=MAX_BATCH, help="Rows of a version.")] = BATCH,
    key: Annotated[
        str | None,
        typer.Option(help="The same key learns no row twice; default: a hash of the file and the options."),
    ] = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Learn a table row by row; each row is predicted before it is learned, and the score says how well."""
    if task not in (None, "labels", "regression"):
        raise typer.BadParameter(f"--task must be labels or regression, got {task!r}")
    done: TableProgress | None = None
    with connect(url) as client, progress_bar() as bar:
        row_task = bar.add_task(escape(file), total=None, learned="")

        def on_progress(progress: TableProgress) -> None:
            nonlocal done
            if done is None:
                for line in progress.notes:
                    err.print(line, markup=False, highlight=False)
            done = progress
            rows = progress.rows + progress.skipped
            bar.update(row_task, completed=rows, total=progress.total, learned=escape(str(progress)))

        try:
            done = client.learn_table(
                session,
                file,
                target,
                task=cast(Literal["labels", "regression"] | None, task),
                ignore=split_commas(ignore),
                batch=batch,
                progress=on_progress,
                idempotency_key=key,
            )
        except ImprintError as error:
            raise CommandError(f"{error} (before that: {done})" if done else str(error)) from None
    out.print(str(done), markup=False)
