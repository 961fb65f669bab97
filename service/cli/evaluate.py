"""`imprint eval`."""

from pathlib import Path
from typing import Annotated

import typer

from service.cli.options import split_commas
from service.settings import Settings


def evaluate(
    paths: Annotated[
        list[Path], typer.Argument(exists=True, help="Text files, a stream each, or folders of them, a kind each.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the results; a run that was killed goes on from it.")] = Path(
        "imprint-eval"
    ),
    requests: Annotated[int, typer.Option(min=2, help="Requests of a stream, at most; half of them, at least.")] = 16,
    window: Annotated[int, typer.Option(min=8, max=8191, help="Tokens of a request.")] = 512,
    streams: Annotated[int, typer.Option(min=1, help="Streams of a kind, at most.")] = 2,
    arms: Annotated[str, typer.Option(help="What to compare, separated by commas; all = the costly ones too.")] = "",
    tune: Annotated[str, typer.Option(help="Kinds to tune on, separated by commas; the others are held out.")] = "",
    probes: Annotated[str, typer.Option(help="What else to measure, separated by commas, or none.")] = (
        "facts,keystrokes,cost,poison"
    ),
    long: Annotated[int, typer.Option(min=0, help="Tokens of one long session over all texts; 0 = none.")] = 0,
    adapter: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A plain adapter to compare with.")
    ] = None,
) -> None:
    """Measure what the memory is worth on texts, compared with every alternative; needs no server.

    Writes results.json, table.md, plots and arrays. The same command continues a run that was killed.
    """
    from research.evaluation.command import evaluate_files
    from research.evaluation.trial import Options

    extra = [] if probes == "none" else split_commas(probes)
    options = Options(requests, window, streams, split_commas(arms), split_commas(tune), extra, long, adapter, out)
    evaluate_files(Settings.load(), paths, options)
