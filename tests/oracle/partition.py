"""Faults of the line between a replica and the store."""

from __future__ import annotations

import asyncio
from abc import abstractmethod

from tests.oracle.deployment import LEASE_S, Fault, Run
from tests.service.stalling_proxy import StallingProxy


class Partition(Fault):
    """A fault of one replica's line for up to two leases."""

    def __init__(self, proxies: list[StallingProxy]) -> None:
        self._proxies = proxies

    async def inject(self, run: Run) -> None:
        await run.pause(0, 0.8)
        proxy = run.random.choice(self._proxies)
        self._break(proxy, run)
        try:
            await run.pause(0.05, 2 * LEASE_S)
        finally:
            await asyncio.to_thread(proxy.restore)

    @abstractmethod
    def _break(self, proxy: StallingProxy, run: Run) -> None: ...


class Dropped(Partition):
    """Every connection is closed, and new ones are too; or what is sent, or the replies alone, are dropped."""

    kind = "line dropped"

    def _break(self, proxy: StallingProxy, run: Run) -> None:
        how = run.random.choice(("cut", "all", "replies"))
        proxy.cut() if how == "cut" else proxy.lose(replies_only=how == "replies")


class Delayed(Partition):
    """Bytes arrive late, in either direction."""

    kind = "line delayed"

    def _break(self, proxy: StallingProxy, run: Run) -> None:
        proxy.stall()


class HalfClosed(Partition):
    """One end of every connection hears that the other one sends nothing more."""

    kind = "line half-closed"

    def _break(self, proxy: StallingProxy, run: Run) -> None:
        proxy.half_close("server" if run.random.random() < 0.5 else "store")
