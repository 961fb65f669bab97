"""Work whose cost grows with a request, kept off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

LARGE = 32_768  # bytes, characters or tokens; handing smaller work to a thread costs more than the work itself
# Each busy thread may keep the interpreter's lock from the event loop for its switch interval, 5 ms.
_THREADS = ThreadPoolExecutor(2, thread_name_prefix="imprint-large")

P = ParamSpec("P")
T = TypeVar("T")


async def run_off_loop(size: int, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Return what `work` returns; run `work` on a thread if `size`, which its cost grows with, is at least `LARGE`."""
    if size < LARGE:
        return work(*args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(_THREADS, lambda: work(*args, **kwargs))
