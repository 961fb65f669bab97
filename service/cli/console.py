"""What the commands that speak with a server share: where they print, and how they connect."""

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from service.client import Client, ClientError
from service.errors import CommandError

DEFAULT_URL = "http://127.0.0.1:8000"
Url = Annotated[str, typer.Option("--url", envvar="IMPRINT_URL", help="Where the server is.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def connect(url: str) -> Client:
    """A client of the server there. Raises CommandError for an address that is none."""
    # The key comes from the environment alone: other users of a machine can read a command's options.
    try:
        return Client(url, on_wait=lambda error, wait: print_note(f"{error}; trying again in {wait:.3g} s"))
    except ClientError as error:
        raise CommandError(f"--url: {error}") from None


def print_note(line: str) -> None:
    """Says something beside the result: on stderr, so that pipes get the result alone."""
    err.print(escape(line), style="dim")
