"""The background work on the archive of idle sessions: one server of a store looks for them, every few minutes."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

from service.errors import Unavailable
from service.metrics import Metrics
from service.store.redis.archive import LINGER_S, ORPHAN_AGE_S, SessionArchive

LOOK_S, MAX_LOOK_S = 1.0, 3600.0  # least and most time between two looks for idle sessions
LOOKS = 10  # in the time after which a session is idle
REST = 9  # times as long as a look took, at least, until the next one
DIES_S = 600.0  # time after which another server looks if the one that did has stopped
SWEEP_S = ORPHAN_AGE_S

log = logging.getLogger(__name__)


async def archive_idle(archive: SessionArchive, idle_s: float, metrics: Metrics, owner: str) -> None:
    """Archive idle sessions, and remove files that no session has, for ever; rest while another server does so.

    idle_s: seconds without use after which a session is idle; 0 = none ever is.
    owner: this server's name; the same after a failure of this task, or the server would wait for itself.
    """
    swept = -math.inf
    pause = min(max(LOOK_S, idle_s / LOOKS), MAX_LOOK_S) if idle_s else MAX_LOOK_S
    while True:
        started = time.monotonic()
        with suppress(Unavailable):
            was_done = await _look(archive, idle_s, metrics, partial(archive.take_turn, owner, pause + DIES_S))
            if was_done and started - swept > SWEEP_S:
                metrics.archive_orphans_total.inc(await archive.sweep())
                swept = started
        await asyncio.sleep(max(pause, REST * (time.monotonic() - started)))


async def _look(
    archive: SessionArchive, idle_s: float, metrics: Metrics, is_my_turn: Callable[[], Awaitable[bool]]
) -> bool:
    """Archive what is idle while it is this server's turn; return whether it was to the end."""
    if not await is_my_turn():
        return False
    if not idle_s:
        return True
    num_archived = 0
    async for counts in archive.archive_idle(idle_s):
        num_archived = counts["archived"] + counts["done"]
        if not await is_my_turn():
            return False
    metrics.sessions_archived.set(num_archived)
    return True


async def remove_lingering(archive: SessionArchive) -> None:
    """Remove the files of sessions that this server has brought back, a minute later, for ever."""
    while True:
        await archive.remove_lingering()
        await asyncio.sleep(LINGER_S / LOOKS)
