"""The cost of an idle session in the store and in the archive, and what compression would save of either.

    python -m benchmarks.archive unix:///…/valkey.sock --sessions 300

takes the sessions of the store at that address as samples, and copies each many times into a Redis of its own
(`redis-server` must be installed). Nothing else should run beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import subprocess
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import zstandard
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from rich.console import Console
from rich.table import Table

from service.store.objects import Objects
from service.store.redis.record import SessionRecord
from service.store.redis.store import RedisStore

PORT = 7399
REPEATS = 5
PAGES_OF_A_COMMIT = 100  # that one turn rewrites, as a rule
console = Console()


async def main() -> None:
    """Print the two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="address of a store whose sessions are the samples")
    parser.add_argument("--sessions", type=int, default=300, help="number of copies")
    parser.add_argument(
        "--stubs", type=int, default=100_000, help="number of stubs among which idle sessions are sought"
    )
    arguments = parser.parse_args()
    source, samples = RedisStore.from_url(arguments.url), list[SessionRecord]()
    async for page in source.archive.scan("version"):
        samples += [record for tenant, sid, _ in page if (record := await source.archive.record(tenant, sid))]
    await source.close()
    samples = [record for record in samples if record.hashes]  # others are empty
    console.print(compression(samples))
    console.print(await costs(samples, arguments.sessions, arguments.stubs))


def compression(samples: list[SessionRecord]) -> Table:
    """Return what compressing the pages one by one, as the store would, and whole records saves."""
    table = Table("sample", "how", "bytes", "of that", "pack, ms/MB", "unpack, ms/MB")
    pages = [
        page for record in samples for name, site in record.hashes.items() if name != "undo" for page in site.values()
    ]
    trained = zstandard.train_dictionary(16_384, [*pages[::2]])
    whole = [
        b"".join(part for fields in record.hashes.values() for pair in fields.items() for part in pair)
        for record in samples
    ]
    codecs: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
        f"zstd {level}": (zstandard.ZstdCompressor(level).compress, zstandard.ZstdDecompressor().decompress)
        for level in (1, 3, 9)
    }
    with_dictionary = zstandard.ZstdDecompressor(dict_data=trained).decompress
    codecs["zstd 3, dictionary"] = (zstandard.ZstdCompressor(3, dict_data=trained).compress, with_dictionary)
    codecs["deflate 1"] = (lambda data: zlib.compress(data, 1), zlib.decompress)
    for title, parts in {f"{len(pages):,} pages": pages[1::2], f"{len(samples)} records": whole}.items():
        size = sum(map(len, parts))
        for name, (pack, unpack) in codecs.items():
            packed, packing = timed(pack, parts)
            _, unpacking = timed(unpack, packed)
            share, mega = sum(map(len, packed)) / size, size / 1e6
            table.add_row(
                title, name, f"{size:,}", f"{share:.1%}", f"{1e3 * packing / mega:.1f}", f"{1e3 * unpacking / mega:.1f}"
            )
    return table


def timed(work: Callable[[bytes], bytes], parts: list[bytes]) -> tuple[list[bytes], float]:
    """Return the results, and the seconds that the fastest of a few repetitions took."""
    times, results = [], list[bytes]()
    for _ in range(REPEATS):
        started = time.perf_counter()
        results = [work(part) for part in parts]
        times.append(time.perf_counter() - started)
    return results, min(times)


async def costs(samples: list[SessionRecord], number: int, stubs: int) -> Table:
    """Return what a session costs in Redis and in the archive, and the times of the way there and back."""
    table, times = Table("what", ""), defaultdict[str, list[float]](list)
    with redis_server() as (client, folder):
        store = RedisStore.from_url(f"redis://127.0.0.1:{PORT}", objects=Objects(str(folder / "archive")))
        for work in (store.archive.archive, store.archive.bring_back, store.delete):
            if work == store.archive.archive:
                await store.archive.store(samples[0], replace=False)
            await work(samples[0].tenant, samples[0].sid)  # scripts, buffers and tables, which are no session's
        empty = used(client)
        rows = 0
        for index in range(number):
            sample = samples[index % len(samples)]
            meta = {**sample.meta, b"id": json.dumps(f"s{index}").encode()}
            rows += int(meta[b"bytes"])
            await store.archive.store(replace(sample, sid=f"s{index}", meta=meta), replace=False)
        table.add_row("sessions; bytes of rows, mean", f"{number}; {rows // number:,}")
        table.add_row("bytes of Redis, in the store", f"{(used(client) - empty) // number:,}")
        for index in range(number):
            started = time.perf_counter()
            assert await store.archive.archive(samples[index % len(samples)].tenant, f"s{index}") == "done"
            times["to the archive"].append(time.perf_counter() - started)
        table.add_row("bytes of Redis, archived", f"{(used(client) - empty) // number:,}")
        sizes = [file.stat().st_size for file in (folder / "archive").rglob("*.session")]
        table.add_row("bytes of the file, mean", f"{sum(sizes) // number:,}")
        table.add_row(f"a look among {stubs:,} stubs, s", f"{await look(store, client, samples[0].tenant, stubs):.1f}")
        for index in range(number):
            tenant = samples[index % len(samples)].tenant
            started = time.perf_counter()
            await store.archive.bring_back(tenant, f"s{index}")
            times["back"].append(time.perf_counter() - started)
            started = time.perf_counter()
            await store.load(tenant, f"s{index}")
            times["a load from Redis, to compare"].append(time.perf_counter() - started)
        await store.close()
    for name, values in times.items():
        table.add_row(
            f"{name}, ms: p50; p95",
            f"{1e3 * statistics.median(values):.1f}; {1e3 * sorted(values)[int(0.95 * len(values))]:.1f}",
        )
    return table


async def look(store: RedisStore, client: Any, tenant: str, number: int) -> float:
    """Return the seconds that a look for idle sessions takes among copies of one stub, which are removed then."""
    stub, names = client.hgetall(f"imprint:{{{tenant}/s0}}:meta"), [f"imprint:{{x/s{n}}}:meta" for n in range(number)]
    for start in range(0, number, 1000):
        pipeline = client.pipeline(transaction=False)
        for name in names[start : start + 1000]:
            pipeline.hset(name, mapping=stub)
        pipeline.execute()
    started = time.perf_counter()
    async for _ in store.archive.archive_idle(1.0):
        pass
    seconds = time.perf_counter() - started
    for start in range(0, number, 1000):
        client.unlink(*names[start : start + 1000])
    return seconds


def used(client: Any) -> int:
    time.sleep(1.0)  # what is unlinked is freed by another thread
    return int(client.info("memory")["used_memory"])


@contextmanager
def redis_server() -> Iterator[tuple[Any, Path]]:
    """Run a Redis with an empty store; yield a client and a folder."""
    binary = shutil.which("redis-server")
    assert binary is not None, "redis-server is not installed"
    with tempfile.TemporaryDirectory() as name:
        command = [binary, "--port", str(PORT), "--bind", "127.0.0.1", "--save", "", "--dir", name]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            with Redis(port=PORT) as client:
                for _ in range(100):
                    try:
                        client.ping()
                        break
                    except RedisConnectionError:
                        time.sleep(0.05)
                yield client, Path(name)
        finally:
            process.kill()
            process.wait()


if __name__ == "__main__":
    asyncio.run(main())
