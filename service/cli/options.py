"""Options and arguments that several commands have in common."""

from typing import Annotated

import typer

Url = Annotated[str, typer.Option("--url", envvar="IMPRINT_URL", help="Address of the server.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SessionOption = Annotated[str, typer.Option("--session", "-s", help="The session's id.")]


def split_commas(text: str) -> list[str]:
    """Return the names in a comma-separated list, without blanks."""
    return [name.strip() for name in text.split(",") if name.strip()]
