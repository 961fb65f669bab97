"""Who goes first, and what must not be torn: asyncio pieces that turns are made of."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass
class _LockEntry:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


class KeyedLocks:
    """A lock for each name, first come, first served; a name is forgotten with its last user."""

    def __init__(self) -> None:
        self._entries: dict[Hashable, _LockEntry] = {}

    @asynccontextmanager
    async def acquire(self, name: Hashable) -> AsyncIterator[None]:
        """Waits for the name's lock and holds it."""
        entry = self._entries.setdefault(name, _LockEntry())
        entry.users += 1
        try:
            async with entry.lock:
                yield
        finally:
            entry.users -= 1
            if not entry.users:
                del self._entries[name]


async def shielded(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which goes on to its end even if the caller is cancelled meanwhile.

    A caller that was cancelled still gets the result if there is one, so that it can be acted on: the cancellation is
    spent then, and the caller must be about to end. If `work` fails, the cancellation is raised.
    """
    task = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None and task.exception() is not None:
        raise cancelled
    return task.result()
