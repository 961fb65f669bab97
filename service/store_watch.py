"""The watch over the store: its rights at the start, its size and its answers later."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from service.errors import StoreRefused, Unavailable
from service.metrics import Metrics
from service.model_loading import StartError
from service.settings import Settings
from service.store.base import SessionStore
from service.tenants import ApiKeys
from service.turns.sessions import Sessions
from service.types import StoreStatus

WATCH_EVERY_S = 10.0
RESTORE_EVERY_S = 300.0

log = logging.getLogger(__name__)


def store_reporter(sessions: Sessions, metrics: Metrics) -> Callable[[StoreStatus], None]:
    """Return a function that shows the status of the store to the probes and in the metrics."""

    def report(status: StoreStatus) -> None:
        sessions.store_status = status
        metrics.store_writable.set(status == "ok")

    return report


async def watch_store(
    store: SessionStore,
    sessions: Sessions,
    metrics: Metrics,
    keys: ApiKeys,
    report: Callable[[StoreStatus], None] | None,
) -> None:
    """Measure the store every few seconds, for ever; report its status unless somebody else does."""
    while True:
        try:
            used, limit = await store.memory()
            metrics.store_used_bytes.set(used)
            metrics.store_limit_bytes.set(limit)
            if sessions.state == "ready":
                metrics.sessions_cold.set(await sessions.count_cold(keys.tenants))
            answers = True
        except Unavailable:
            answers = False
        metrics.store_up.set(answers)
        if report is not None:
            report("ok" if answers else "away")
        await asyncio.sleep(WATCH_EVERY_S)


async def check_store(store: SessionStore, settings: Settings, metrics: Metrics) -> None:
    """Check the store as soon as the store answers. Raises StartError for a store that cannot keep sessions."""
    while True:
        try:
            await store.check_rights()
            evicts = await store.may_evict()
            metrics.store_evicts.set(evicts)
            if evicts and not settings.allow_eviction:
                raise StartError(
                    "the Redis of IMPRINT_REDIS_URL may evict sessions when its memory is full: set its "
                    "maxmemory-policy to noeviction (or IMPRINT_ALLOW_EVICTION=true, which risks sessions)"
                )
            if evicts:
                log.warning("the session store may evict keys of sessions when its memory is full")
            return
        except StoreRefused as error:
            raise StartError(
                f"the Redis of IMPRINT_REDIS_URL refuses what the server needs: {error.__cause__}"
            ) from error
        except Unavailable:
            await asyncio.sleep(1.0)


async def restore_list(store: SessionStore, metrics: Metrics) -> None:
    """Make the list of sessions right, every few minutes, for ever: some may be lost from it, others have expired."""
    while True:
        with suppress(Unavailable):
            if restored := await store.restore_list():
                log.error("%d sessions had been lost from the list and are listed again", restored)
                metrics.sessions_relisted_total.inc(restored)
        await asyncio.sleep(RESTORE_EVERY_S)
