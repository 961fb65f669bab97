"""The list of a tenant's sessions and its account, where the tenant has millions of sessions.

    python -m benchmarks.accounts --sessions 10000000

fills a Redis of its own (`redis-server` must be installed; 200 bytes a session): the name of each session in the list
and in the account, and the stored values of those sessions that are read. Nothing else should run beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.archive import PORT, redis_server
from service.store.base import SessionMeta
from service.store.redis.codec import DEFAULT_PREFIX, Keys
from service.store.redis.ledger import PAGE_SIZE
from service.store.redis.store import RedisStore

TENANT = "large"
AT_ONCE = 10_000  # names that are written at a time
REPEATS = 50
READ = 1000  # sessions with stored values, at the beginning of the list and in its middle
console = Console()


async def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=10_000_000, help="number of sessions of the tenant")
    num_sessions = parser.parse_args().sessions
    with redis_server() as (redis, _):
        fill(redis, num_sessions)
        store = RedisStore.from_url(f"redis://127.0.0.1:{PORT}")
        for start in (0, num_sessions // 2):
            for number in range(start, start + READ):
                await store.create(TENANT, session(number))
        console.print(await measure(store, num_sessions))
        await store.close()


def name(number: int) -> str:
    return f"user-{number:09}"


def session(number: int) -> SessionMeta:
    return SessionMeta(name(number), 0, "m", 0, 0, 1000, 0.0, 0.0, 0, 0.0, 0.0, 0, {}, ())


def fill(redis: Any, num_sessions: int) -> None:
    """Name so many sessions in the list and in the account, with 1,000 bytes each."""
    keys = Keys(DEFAULT_PREFIX)
    account = keys.account(TENANT)[0]
    for start in track(range(0, num_sessions, AT_ONCE), "naming sessions", console=console):
        names = [name(number) for number in range(start, min(start + AT_ONCE, num_sessions))]
        pipeline = redis.pipeline(transaction=False)
        pipeline.zadd(keys.index(TENANT), dict.fromkeys(names, 0))
        pipeline.hset(account, mapping=dict.fromkeys(names, 1000))
        pipeline.execute()
    redis.hset(account, "*", 1000 * num_sessions)
    console.print(f"{redis.info('memory')['used_memory'] / num_sessions:.0f} bytes a session")


async def measure(store: RedisStore, num_sessions: int) -> Table:
    """Return the time of each call."""
    sizes, gone = {name(number): 1000 for number in range(PAGE_SIZE)}, [f"gone-{number}" for number in range(PAGE_SIZE)]
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "count": lambda: store.count(TENANT),
        "a page of 100 of the list, at its beginning": lambda: store.list(TENANT, after="", limit=100),
        "the same, in its middle": lambda: store.list(TENANT, after=name(num_sessions // 2), limit=100),
        f"a page of {PAGE_SIZE} of the comparison: the list": lambda: store.list(TENANT, after="", limit=PAGE_SIZE),
        "its bytes": lambda: store.ledger.set_bytes(TENANT, sizes),
        "its page of the account": lambda: store.ledger.gone(TENANT, 0),
        "its removal of sessions that have gone": lambda: store.ledger.drop(TENANT, gone),
        "what a request asks of an account": lambda: store.ledger.usage(TENANT, 0),
    }
    table = Table("call", "p50, ms", "longest, ms", title=f"{num_sessions:,} sessions")
    for label, call in calls.items():
        times = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            await call()
            times.append(1000 * (time.perf_counter() - started))
        table.add_row(label, f"{statistics.median(times):.1f}", f"{max(times):.1f}")
    return table


if __name__ == "__main__":
    asyncio.run(main())
