"""`imprint serve`."""

from pathlib import Path
from typing import Annotated

import typer

from service.settings import Settings
from service.stopping import exit_at_signals


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="TCP port to listen on.")] = None,
    model: Annotated[
        str | None, typer.Option(help="The base: a name, a folder, a .gguf file, or owner/name[@revision].")
    ] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="A name by which requests call the model; may be given several times.")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="The memory checkpoint.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the sessions.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
) -> None:
    """Serve until stopped. An option overrides its IMPRINT_* environment variable (docs/settings.md)."""
    settings = Settings.load(
        host=host,
        port=port,
        model=model,
        served_model_name=",".join(served_model_name) if served_model_name else None,
        memory=memory,
        data_dir=data_dir,
        device=device,
        log_level=log_level,
    )
    exit_at_signals()  # importing torch takes seconds
    from service.app import run

    raise typer.Exit(run(settings))
