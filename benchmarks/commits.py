"""The cost of a commit by the size of the session: its latency, and the bytes that the store writes.

`python -m benchmarks.commits` runs an embedded Valkey in a temporary folder, with each commit on disk before the commit
returns. With `--url` the program measures a given store, and leaves sessions of tenants t0, t1, … in the store.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from redis import Redis
from rich.console import Console
from rich.table import Table

from service.store import CommitMetadata, IdempotencyRecord, RetentionConfig, RowBatch, SessionMeta
from service.store.embedded import EmbeddedValkey
from service.store.redis.store import RedisStore

TOKENS = 64  # of a turn
ROW_BYTES, SESSION_SCALARS_BYTES, SLOTS = 78, 48, 51_200  # of the shipped memory
DIGESTS = 1024  # of a session with a long chat
ANSWER = json.dumps({"text": "x" * 300, "adaptation": {"tokens_learned": TOKENS}}).encode()


def new_meta(version: int, digests: int) -> SessionMeta:
    """Return the meta of a session, in which each version adds one digest."""
    known = tuple(f"{n:016x}" for n in range(version, version + digests)) if digests else ()
    return SessionMeta(
        "s", version, "sha256:" + "ab" * 32, 64 * version, 0, 0, 1.5, time.time(), 64 * version, 1.5 * version,
        2.5 * version, version, {}, known,
    )  # fmt: skip


def turn_rows(rng: np.random.Generator, num_rows: int) -> RowBatch:
    """Return one row for each token, half of them in new slots where there is room."""
    slots = np.unique(rng.integers(0, min(SLOTS, max(2 * num_rows, 4 * TOKENS)), TOKENS))
    return RowBatch(slots.astype(np.int32), rng.integers(0, 256, (len(slots), ROW_BYTES), np.uint8))


def bytes_written(raw: Redis) -> int:
    """Return the size of the store's append-only file."""
    info: dict[str, Any] = raw.info("persistence")
    return int(info["aof_current_size"])


async def measure(
    store: RedisStore, raw: Redis, tenant: str, num_rows: int, digests: int, turns: int
) -> dict[str, float]:
    """Measure `turns` turns of TOKENS tokens on a session of `num_rows` rows, in milliseconds and bytes."""
    rng = np.random.default_rng(0)
    slots = np.sort(rng.permutation(min(SLOTS, max(2 * num_rows, 1)))[:num_rows]).astype(np.int32)
    rows = RowBatch(slots, rng.integers(0, 256, (num_rows, ROW_BYTES), np.uint8))
    await store.commit(tenant, new_meta(1, digests), {"lexical": rows} if num_rows else {})
    begin_times, commit_times, bytes_before = [], [], bytes_written(raw)
    for version in range(2, turns + 2):
        batch = turn_rows(rng, num_rows)
        session_scalars = RowBatch(np.zeros(1, np.int32), rng.integers(0, 256, (1, SESSION_SCALARS_BYTES), np.uint8))
        log = {"kind": "learn", "time": time.time(), "digest": "ab" * 16, "tokens": TOKENS, "rows": 64, "loss": 2.5}
        commit_metadata = CommitMetadata(
            log | {"request_id": "ab" * 16}, idempotency_record=IdempotencyRecord(f"auto-{version:064x}", 600, ANSWER)
        )
        started = time.perf_counter()
        turn_start = await store.begin_turn(tenant, "s", write="always")
        begun = time.perf_counter()
        meta = replace(new_meta(version, digests), rows=num_rows)
        await store.commit(
            tenant,
            meta,
            {"lexical": batch, "lexical_own": session_scalars},
            lease=turn_start.lease,
            commit_metadata=commit_metadata,
        )
        commit_times.append(time.perf_counter() - begun)
        begin_times.append(begun - started)
    p50, p99 = np.percentile(commit_times, [50, 99]) * 1000
    return {
        "rows": num_rows,
        "digests": digests,
        "enter_p50_ms": float(np.median(begin_times) * 1000),
        "commit_p50_ms": float(p50),
        "commit_p99_ms": float(p99),
        "bytes_per_token": (bytes_written(raw) - bytes_before) / turns / TOKENS,
    }


@contextmanager
def store_url(url: str | None) -> Iterator[str]:
    """Yield the address of the given store, or of an embedded store."""
    if url is not None:
        yield url
        return
    with tempfile.TemporaryDirectory(prefix="imprint-commits-") as folder:
        embedded = EmbeddedValkey(Path(folder))
        yield embedded.start()
        embedded.stop()


async def main(turns: int, keep: int, given_url: str | None, *, leases: bool) -> None:
    """Measure sessions of several sizes, and print a table."""
    console = Console()
    table = Table(title=f"{turns} turns of {TOKENS} tokens, {keep} versions kept")
    for name in ("rows", "digests", "enter p50 ms", "commit p50 ms", "commit p99 ms", "bytes/token"):
        table.add_column(name, justify="right")
    with store_url(given_url) as url:
        store = RedisStore.from_url(url, RetentionConfig(versions=keep), exclusive=not leases)
        with Redis.from_url(url) as raw:
            raw.config_set("auto-aof-rewrite-percentage", 0)  # a rewrite would shrink the file
            for number, (num_rows, digests) in enumerate(
                [(0, 0), (1000, 0), (10_000, 0), (50_000, 0), (10_000, DIGESTS)]
            ):
                found = await measure(store, raw, f"t{number}", num_rows, digests, turns)
                table.add_row(*(f"{value:,.2f}" if value % 1 else f"{value:,.0f}" for value in found.values()))
        await store.close()
    console.print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.commits", description=__doc__)
    parser.add_argument("--turns", type=int, default=300)
    parser.add_argument("--keep", type=int, default=32, help="versions that can be rolled back to")
    parser.add_argument("--leases", action="store_true", help="take leases, as servers that share a Redis do")
    parser.add_argument("--url", help="store to measure; default: an embedded one")
    args = parser.parse_args()
    asyncio.run(main(args.turns, args.keep, args.url, leases=args.leases))
