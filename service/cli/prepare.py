"""`imprint prepare`."""

import asyncio
import logging

from service.cli.console import out
from service.errors import CommandError
from service.metrics import Metrics
from service.settings import Settings


def prepare() -> None:
    """Fetch and convert the base, and compile the kernels for this CPU, so that `imprint serve` starts at once."""
    from service.app import STARTUP_ERRORS
    from service.model_loading import load_model

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = Settings.load()

    async def load() -> None:
        engine = load_model(settings, Metrics()).engine
        await engine.start()
        await engine.stop()

    try:
        asyncio.run(load())
    except STARTUP_ERRORS as error:
        raise CommandError(str(error)) from error
    out.print(f"prepared {settings.model} in {settings.cache_dir}")
