"""Background tasks that must not end: each runs again after an error."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from service.metrics import Metrics

FIRST_PAUSE_S, MAX_PAUSE_S = 0.1, 10.0

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
