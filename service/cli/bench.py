"""`imprint bench`."""

from pathlib import Path
from typing import Annotated

import typer

from service.cli.options import split_commas
from service.settings import Settings


def bench(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("imprint-bench"),
    quick: Annotated[bool, typer.Option("--quick", help="A first look, within two minutes.")] = False,
    minutes: Annotated[
        float | None, typer.Option(min=0.05, max=600, help="For all scenarios together; default 12, or 1 with --quick.")
    ] = None,
    threads: Annotated[int, typer.Option(min=0, max=1024, help="CPU threads of every arm; 0 = one per core.")] = 0,
    scenarios: Annotated[str, typer.Option(help="Which to run, separated by commas; default: all.")] = "",
    peers: Annotated[str, typer.Option(help="Servers to compare with, separated by commas, or none.")] = (
        "transformers,llama.cpp,vllm"
    ),
    llama_server: Annotated[
        Path | None, typer.Option(help="llama.cpp's server; default: the one on PATH, or of the extra `peers`.")
    ] = None,
    gguf: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="File for llama.cpp; default: what the base was made from."),
    ] = None,
    vllm: Annotated[str | None, typer.Option(metavar="URL", help="A vLLM server of the same base.")] = None,
    page: Annotated[
        Path | None, typer.Option(help="A Markdown page; the results replace the text between its two marks.")
    ] = None,
) -> None:
    """Measure how fast the server is, compared with the peers that are installed; needs no running server.

    Writes results.json, table.md and plots. The arms take turns, so a busy machine slows all of them.
    """
    from benchmarks.peers import PeerSelection
    from benchmarks.run import Options, run, sizes_for

    settings = Settings.load()
    peer_selection = PeerSelection([] if peers == "none" else split_commas(peers), llama_server, gguf, vllm)
    limit = (1.0 if quick else 12.0) if minutes is None else minutes
    sizes = sizes_for(settings, quick=quick)
    run(settings, Options(out, sizes, limit, threads, split_commas(scenarios), peer_selection, page))
