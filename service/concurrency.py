"""asyncio building blocks: locks by name, work that a cancellation does not interrupt, work off the event loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

LARGE = 32_768  # bytes, characters or tokens; handing smaller work to a thread costs more than the work itself
STEP = 64  # elements of a list that `dump_json` writes in one step
# Each busy thread may keep the interpreter's lock from the event loop for its switch interval, 5 ms.
_THREADS = ThreadPoolExecutor(2, thread_name_prefix="imprint-large")

P = ParamSpec("P")
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


async def run_off_loop(size: int, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Return what `work` returns; run `work` on a thread if `size`, which its cost grows with, is at least `LARGE`."""
    if size < LARGE:
        return work(*args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(_THREADS, lambda: work(*args, **kwargs))


def dump_json(value: Any) -> str:
    """Return `value` as compact JSON; NaN and infinity become `NaN` and `Infinity`, as `json.loads` reads them.

    An iterator becomes a list; `value` need not be in memory as a whole.
    """
    return "".join(_parts(value))


def dump_json_pieces(value: Any) -> list[bytes]:
    """Return `value` as `dump_json` does, in UTF-8 and in pieces of at least `LARGE` bytes, the last one first.

    A client of the list can thus free each piece once it is sent.
    """
    pieces, buffer = list[bytes](), bytearray()
    for part in _parts(value):
        buffer += part.encode()
        if len(buffer) >= LARGE:
            pieces.append(bytes(buffer))
            buffer.clear()
    return [*pieces, bytes(buffer)][::-1]


def _parts(value: Any) -> Iterator[str]:
    """Yield the text of a value in parts.

    An object and an iterator are taken apart; so is a short list, which may hold long lists.
    """
    match value:
        case Iterator():
            separator = "["
            for elements in _elements(value):
                yield separator + elements
                separator = ","
            yield "]" if separator == "," else "[]"
        case Mapping():
            separator = "{"
            for key, item in value.items():
                yield f"{separator}{_dump(str(key))}:"
                yield from _parts(item)
                separator = ","
            yield "}" if value else "{}"
        case list() | tuple() if len(value) > STEP:
            yield "["
            for start in range(0, len(value), STEP):
                yield ("," if start else "") + _dump(value[start : start + STEP])[1:-1]
            yield "]"
        case list() | tuple() if any(isinstance(item, Sequence | Mapping) for item in value):
            separator = "["
            for item in value:
                yield separator
                yield from _parts(item)
                separator = ","
            yield "]"
        case _:
            yield _dump(value)


def _elements(values: Iterator[Any]) -> Iterator[str]:
    """Yield the text of the elements of a list: each object by itself, other elements in steps."""
    waiting = list[Any]()
    for value in values:
        if isinstance(value, Mapping):
            yield "".join(_parts(value))
            continue
        waiting.append(value)
        if len(waiting) == STEP:
            yield _dump(waiting)[1:-1]
            waiting.clear()
    if waiting:
        yield _dump(waiting)[1:-1]


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
