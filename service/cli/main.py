"""The console script `imprint`: all commands in one application, and one line for each expected failure."""

import os
import sys

import typer
from rich.markup import escape

from service.cli.bench import bench
from service.cli.chat import chat
from service.cli.console import err
from service.cli.doctor import doctor
from service.cli.evaluate import evaluate
from service.cli.evaluate_log import evaluate_log
from service.cli.fit import fit
from service.cli.keys import keys_app
from service.cli.learn import learn
from service.cli.mcp import mcp
from service.cli.models import models
from service.cli.observe import observe
from service.cli.prepare import prepare
from service.cli.scenario import scenario
from service.cli.score import score
from service.cli.serve import serve
from service.cli.sessions import sessions_app
from service.cli.store import store_app
from service.cli.train import train
from service.cli.watch import watch
from service.errors import CommandError, ImprintError
from service.settings import SettingsError
from service.tenants import ApiKeysError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A language model server that learns while it serves.",
)
app.command()(serve)
app.command()(doctor)
app.command()(prepare)
app.command("eval")(evaluate)
app.command()(bench)
app.command()(models)
app.command()(fit)
app.command()(train)
app.command()(scenario)
app.command()(chat)
app.command()(observe)
app.command()(learn)
app.command("evaluate-log")(evaluate_log)
app.command()(watch)
app.command()(score)
app.command()(mcp)
app.add_typer(sessions_app, name="sessions")
app.add_typer(keys_app, name="keys")
app.add_typer(store_app, name="store")


def main() -> None:
    """Run `app`; print every expected failure as one line on stderr and exit with code 1."""
    # By default, an idle thread of torch's OpenMP pool spins for milliseconds on a core that the event loop, the store
    # and the numba kernels need. The variable has an effect only if it is set before torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        app(prog_name="imprint")
    except (CommandError, ImprintError, SettingsError, ApiKeysError, UnicodeError) as error:
        err.print(f"imprint: {escape(str(error))}", style="red")
        sys.exit(1)


if __name__ == "__main__":
    main()
