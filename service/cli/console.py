"""Input and output that the commands have in common: the two consoles, the connection, the file that `-` stands for."""

import sys

from rich.console import Console
from rich.markup import escape

from service.client import Client, ClientError
from service.client.text_files import File
from service.errors import CommandError

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def connect(url: str) -> Client:
    """Return a client of the server at `url`. Raises CommandError if `url` is not a valid address."""
    # The key comes from the environment alone: other users of a machine can read a command's options.
    try:
        return Client(url, on_wait=lambda error, wait: print_note(f"{error}; trying again in {wait:.3g} s"))
    except ClientError as error:
        raise CommandError(f"--url: {error}") from None


def print_note(line: str) -> None:
    """Print a remark on stderr, so that a pipe gets the result alone."""
    err.print(escape(line), style="dim")


def text_source(name: str) -> File:
    """Return standard input for the name `-`, and the name itself otherwise."""
    return sys.stdin.buffer if name == "-" else name
