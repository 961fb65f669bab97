"""A process that archives or brings back one session and is killed after a step of that. It runs no test itself."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

from service.store.objects import Objects
from service.store.redis.store import RedisStore

ARCHIVE_STEPS = ("folder", "_read_once", "put", "_write_checked", "_archive")
BRING_STEPS = ("_fetch", "_bring")

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["service.app", "tests.forked", "tests.service.killed_archiver"])


def run_killed(url: str, folder: str, step: str, tenant: str, sid: str) -> None:
    """Archive the session, or bring it back, in a process that is killed when `step` has happened."""
    process = _FORKS.Process(target=_run, args=(url, folder, step, tenant, sid))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL, process.exitcode


def _run(url: str, folder: str, step: str, tenant: str, sid: str) -> None:
    async def work() -> None:
        store = RedisStore.from_url(url, objects=Objects(folder))
        owner: Any = store.archive.objects if step == "put" else store.archive
        setattr(owner, step, _killing(getattr(owner, step)))
        run = store.archive.archive if step in ARCHIVE_STEPS else store.archive.bring_back
        await run(tenant, sid)

    asyncio.run(work())


def _killing(call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def wrapper(*args: Any, **keywords: Any) -> Any:
        await call(*args, **keywords)
        os.kill(os.getpid(), signal.SIGKILL)

    return wrapper
