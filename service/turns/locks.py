"""asyncio building blocks: locks by name, and work that a cancellation does not interrupt."""

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
    """One first-come-first-served lock a name; a name without users takes no memory."""

    def __init__(self) -> None:
        self._entries: dict[Hashable, _LockEntry] = {}

    @asynccontextmanager
    async def acquire(self, name: Hashable) -> AsyncIterator[None]:
        """Wait for the lock of a name and hold the lock."""
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
    """Return the result of `work`, which runs to its end even if the caller is cancelled meanwhile.

    A cancelled caller still gets the result of work that succeeds and can act on the result; the caller must then end
    soon, because the cancellation is spent. If the work fails, the cancellation is raised.
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
