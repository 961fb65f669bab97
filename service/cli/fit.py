"""`imprint fit`."""

from pathlib import Path
from typing import Annotated

import typer

from service.settings import Settings


def fit(
    base: Annotated[str, typer.Argument(help="What IMPRINT_MODEL names: a folder, a .gguf file or owner/name.")],
    text: Annotated[
        Path | None,
        typer.Option(exists=True, help="A text file or a folder of them; default: the texts that Python brings along."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The checkpoint to write; default: where the server looks for it.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1024, max=1_000_000, help="Tokens to read, at most.")] = 24_000,
) -> None:
    """Make a usable memory for a base within minutes; needs no server. `imprint train` makes a better one in hours."""
    from research.training.fit import FitOptions, fit_base

    fit_base(Settings.load(model=base), FitOptions(text, out, tokens))
