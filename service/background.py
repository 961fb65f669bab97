"""Background tasks that must not end: each runs again after an error."""

from __future__ import annotations

import asyncio
import ctypes
import logging
from collections.abc import Awaitable, Callable

from service.metrics import Metrics

FIRST_PAUSE_S, MAX_PAUSE_S = 0.1, 10.0
TRIM_EVERY_S = 60.0

log = logging.getLogger(__name__)


async def keep_running(name: str, task: Callable[[], Awaitable[None]], metrics: Metrics) -> None:
    """Run a task until this call is cancelled; log and count each end of the task, and run the task again."""
    loop, pause = asyncio.get_running_loop(), FIRST_PAUSE_S
    restarts = metrics.background_restarts_total.labels(name)  # at 0, so that an alert sees the first restart
    while True:
        started = loop.time()
        try:
            await task()
            log.error("the background task %s has ended; it is started again", name)
        except Exception:
            log.exception("the background task %s has failed; it is started again", name)
        restarts.inc()
        pause = FIRST_PAUSE_S if loop.time() - started > MAX_PAUSE_S else min(2 * pause, MAX_PAUSE_S)
        await asyncio.sleep(pause)


def find_malloc_trim() -> Callable[[int], int] | None:
    """Return the C library's `malloc_trim`; None where it has none, as on macOS and with musl."""
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim


async def return_free_memory(trim: Callable[[int], int]) -> None:
    """Return to the system, every minute and for ever, the memory that is free and lies between blocks in use.

    glibc keeps such memory, and large bodies and answers leave more of it again and again. trim: `malloc_trim`, which
    runs beside the event loop.
    """
    while True:
        await asyncio.sleep(TRIM_EVERY_S)
        await asyncio.to_thread(trim, 0)
