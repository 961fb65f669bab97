"""The background work on the archive of idle sessions: one server of a store looks for them, every few minutes."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from contextlib import suppress

from service.errors import Unavailable
from service.metrics import Metrics
from service.store.redis.archive import LINGER_S, ORPHAN_AGE_S, SessionArchive

LOOK_S, MAX_LOOK_S = 1.0, 600.0  # least and most time between two looks for idle sessions
LOOKS = 10  # in the time after which a session is idle
SWEEP_S = ORPHAN_AGE_S

log = logging.getLogger(__name__)


async def archive_idle(archive: SessionArchive, idle_s: float, metrics: Metrics) -> None:
    """Archive idle sessions, and remove files that no session has, for ever; rest while another server does so."""
    owner, pause, swept = secrets.token_hex(8), min(max(LOOK_S, idle_s / LOOKS), MAX_LOOK_S), 0.0
    while True:
        with suppress(Unavailable):
            if await archive.take_turn(owner, 3 * pause):
                counts = Counter[str]()
                await archive.archive_idle(idle_s, counts)
                metrics.sessions_archived.set(counts["archived"] + counts["done"])
                if time.monotonic() - swept > SWEEP_S or not swept:
                    metrics.archive_orphans_total.inc(await archive.sweep())
                    swept = time.monotonic()
        await asyncio.sleep(pause)


async def remove_lingering(archive: SessionArchive) -> None:
    """Remove the files of sessions that this server has brought back, a minute later, for ever."""
    while True:
        await archive.remove_lingering()
        await asyncio.sleep(LINGER_S / LOOKS)
