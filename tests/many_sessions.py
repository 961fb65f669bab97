"""Many sessions in one embedded store, and a rewrite of its append-only file under load.

    python -m tests.many_sessions --sessions 50000

Each session has learned a text: the first and the last thousand are forks, made by requests, and the others are copied
in the store. The program prints a table of what they cost, and fails if a session or an acknowledged turn is lost.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
from redis import Redis
from rich.console import Console
from rich.table import Table

from tests.conftest import Server
from tests.endurance import append_only_bytes
from tests.live import Client, Json, connect_redis, find_valkey, wait_until
from tests.loop_gap import measured_gap
from tests.soak import WORDS
from tests.tiny import build_tiny_base

CREATED = 1000  # by requests, at first and at last
COPIED_AT_ONCE = 200
WORKERS = 4  # connections that create sessions
USERS = 8  # of the load during the rewrite
COMPARED = 200  # sessions whose every stored byte is compared before and after a kill -9
EXPIRES_S = 10
LOAD_S = 20.0  # of load before the rewrite, to compare its latencies with

console = Console(soft_wrap=True)


class ManySessions:
    """One run. `rows` are the lines of the table, `faults` what went wrong.

    Args:
        folder: where the server keeps its data.
        model: the base.
        number: number of sessions.
    """

    def __init__(self, folder: Path, model: str, number: int) -> None:
        self.server = Server(model, folder / "data", max_queue=64)
        self.number = number
        self.rows: list[tuple[str, str]] = []
        self.faults: list[str] = []
        self._acknowledged = [0] * USERS  # versions
        self._latencies: list[tuple[float, float]] = []

    def run(self) -> None:
        """Run all parts."""
        self._note("start with an empty store", seconds(self.server.start))
        self._note("a turn among no sessions", self._turns(["alone"] * 50))
        self._create()
        names = [f"s{n}" for n in random.Random(0).sample(range(self.number), COMPARED)]
        self._note("a turn of a session that was not in memory", self._turns(names))
        self._list()
        self._scrape()
        self._expire()
        before = self._stored(names)
        self._rewrite()
        names_before = self._names()
        self.server.kill()
        self._note("start after a kill -9", seconds(self.server.start))
        wait_until(lambda: self._names() == self.number + 1 + USERS)
        self._note("names in the list before, with expired ones, and after", f"{names_before:,}, {self._names():,}")
        self._compare(before, names)
        self._note("stop", seconds(self.server.stop))
        self._note("start after a stop", seconds(self.server.start))

    # --- the parts ------------------------------------------------------------------------------------------------

    def _create(self) -> None:
        """Fork a session that has learned a text, copy a fork in the store, and fork again."""
        with Client(self.server.url) as client:
            client.observe("s", " ".join(random.Random(0).choices(WORDS, k=100)))
        empty = self._store_bytes()
        numbers = list(range(self.number))
        first, copied, last = numbers[:CREATED], numbers[CREATED:-CREATED], numbers[CREATED:][-CREATED:]
        self._note(f"create a session among the first {len(first):,}", percentiles(self._fork(first)))
        self._copy("s0", copied)
        self._note(f"create a session after {self.number - len(last):,} others", percentiles(self._fork(last)))
        used = self._store_bytes()
        self._note("store", f"{used >> 20} MiB, {(used - empty) / self.number / 1024:.1f} KiB a session")
        self._note("append-only file", f"{append_only_bytes(self.server.data_dir) >> 20} MiB")
        self._note("server", f"{self._process().memory_info().rss >> 20} MiB")

    def _fork(self, numbers: Sequence[int]) -> list[float]:
        return self._send(("POST", "/v1/sessions/s/fork", {"id": f"s{n}"}) for n in numbers)

    def _copy(self, name: str, numbers: Sequence[int]) -> None:
        """Copy all keys of a session under other names, and list the new sessions."""
        home = "imprint:{{default/{}}}:"
        with connect_redis(self.server.data_dir) as redis:
            keys: list[bytes] = list(redis.scan_iter(match=f"{home.format(name)}*"))
            dumps = {key.decode().removeprefix(home.format(name)): redis.dump(key) for key in keys}
            for start in range(0, len(numbers), COPIED_AT_ONCE):
                pipeline = redis.pipeline(transaction=False)
                for new in (f"s{n}" for n in numbers[start : start + COPIED_AT_ONCE]):
                    for key, dump in dumps.items():
                        pipeline.restore(home.format(new) + key, 0, dump)
                    pipeline.hset(f"{home.format(new)}meta", "id", json.dumps(new))
                    pipeline.zadd("imprint:sessions:default", {new: 0})
                pipeline.execute()

    def _list(self) -> None:
        """List all sessions in pages of 100 and of 1,000, and look how long the server is silent meanwhile."""
        for limit in (100, 1000):
            with measured_gap(self.server.url) as gap, Client(self.server.url) as client:
                ids, times = self._listed(client, limit)
            if len(set(ids)) != len(ids) or {f"s{n}" for n in range(self.number)} - set(ids):
                self.faults.append(f"{len(ids)} sessions listed, {len(set(ids))} of them different")
            label = f"list {len(ids):,} sessions, {limit:,} a page"
            self._note(label, f"{sum(times):.1f} s; a page {percentiles(times)}; silence {1000 * gap.seconds:.0f} ms")

    def _listed(self, client: Client, limit: int) -> tuple[list[str], list[float]]:
        ids, times, after = [], [], ""
        while after is not None:
            began = time.monotonic()
            page: Json = client.http.get("/v1/sessions", params={"limit": limit, "after": after}).json()
            times.append(time.monotonic() - began)
            ids += [session["id"] for session in page["data"]]
            after = page["next"]
        return ids, times

    def _scrape(self) -> None:
        with Client(self.server.url) as client:
            times = [seconds_of(lambda: client.http.get("/metrics")) for _ in range(20)]
            size = len(client.http.get("/metrics").content)
        self._note("/metrics", f"{percentiles(times)}; {size / 1024:.0f} KiB")

    def _expire(self) -> None:
        """Create sessions that expire at about the same time, and look at the others meanwhile."""
        number = min(2 * CREATED, self.number)
        self._send(("PUT", f"/v1/sessions/t{n}", {"ttl_s": EXPIRES_S}) for n in range(number))
        until = time.monotonic() + EXPIRES_S + 2
        meanwhile = iter(lambda: time.monotonic() > until, True)
        self._note(f"a turn while {number:,} sessions expire", self._turns("s0" for _ in meanwhile))

    def _names(self) -> int:
        """Return the number of names in the list, some of which may be of expired sessions."""
        with connect_redis(self.server.data_dir) as redis:
            return int(redis.zcard("imprint:sessions:default"))

    def _rewrite(self) -> None:
        """Rewrite the append-only file while users teach; compare their latencies with those before."""
        with self._load(), connect_redis(self.server.data_dir) as redis:
            time.sleep(LOAD_S)
            size, began = append_only_bytes(self.server.data_dir), time.monotonic()
            redis.bgrewriteaof()
            wait_until(lambda: not info(redis, "persistence")["aof_rewrite_in_progress"])
            ended = time.monotonic()
            fork_ms = info(redis, "stats")["latest_fork_usec"] / 1000
            after = append_only_bytes(self.server.data_dir)
        before = [s for at, s in self._latencies if at < began]
        during = [s for at, s in self._latencies if began <= at < ended]
        self._note("the rewrite", f"{ended - began:.1f} s; {size >> 20} to {after >> 20} MiB; fork {fork_ms:.0f} ms")
        self._note(f"a turn of {USERS} users before", percentiles(before))
        self._note("… during the rewrite", f"{percentiles(during)}; {len(during)} turns")

    def _stored(self, names: Iterable[str]) -> dict[bytes, dict[bytes, bytes]]:
        """Return the meta and the rows of sessions, by key."""
        homes = {f"imprint:{{default/{name}}}".encode() for name in names}
        with connect_redis(self.server.data_dir) as redis:
            keys = redis.scan_iter(match="imprint:{default/*:*", count=5000)
            own = [key for key in keys if key[: key.index(b"}") + 1] in homes]
            return {key: redis.hgetall(key) for key in own if key.endswith(b":meta") or b"}:rows:" in key}

    def _compare(self, before: dict[bytes, dict[bytes, bytes]], names: Iterable[str]) -> None:
        """Compare sessions with what they were, and the versions of the load's sessions with what was acknowledged."""
        if not before or self._stored(names) != before:
            self.faults.append("a session has changed")
        with Client(self.server.url) as client:
            for user, version in enumerate(self._acknowledged):
                if client.version(f"load-{user}") != version:
                    self.faults.append(f"load-{user} has version {client.version(f'load-{user}')}, not {version}")
            ids, _ = self._listed(client, 1000)
        if lost := {f"s{n}" for n in range(self.number)} - set(ids):
            self.faults.append(f"{len(lost)} sessions are lost")
        self._note("turns acknowledged in the load, none lost", str(sum(self._acknowledged)))

    # --- helpers --------------------------------------------------------------------------------------------------

    @contextmanager
    def _load(self) -> Iterator[None]:
        """Let users teach one session each during the block."""
        over = threading.Event()

        def teach(user: int) -> None:
            rng = random.Random(user)
            with Client(self.server.url) as client:
                while not over.wait(rng.expovariate(5)):
                    began = time.monotonic()
                    answer = client.observe(f"load-{user}", " ".join(rng.choices(WORDS, k=30)))
                    self._latencies.append((began, time.monotonic() - began))
                    self._acknowledged[user] = answer["version"]

        with ThreadPoolExecutor(USERS) as pool:
            users = [pool.submit(teach, user) for user in range(USERS)]
            yield
            over.set()
        for user in users:
            user.result()

    def _turns(self, names: Iterable[str]) -> str:
        """Ask for a completion that learns nothing of one session after another; return the percentiles."""
        times = []
        with Client(self.server.url) as client:
            for name in names:
                began = time.monotonic()
                client.complete("The fox", session=name, adapt="predict")
                times.append(time.monotonic() - began)
        return percentiles(times)

    def _send(self, requests: Iterable[tuple[str, str, Json]]) -> list[float]:
        """Send many requests on a few connections; return the seconds of each."""
        pending, address = deque(requests), urlsplit(self.server.url)
        times: list[float] = []

        def work() -> None:
            connection = http.client.HTTPConnection(address.hostname or "", address.port)
            with suppress(IndexError):
                while True:
                    method, path, body = pending.popleft()
                    began = time.monotonic()
                    connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
                    response = connection.getresponse()
                    content = response.read()
                    times.append(time.monotonic() - began)
                    assert response.status == 201, content

        with ThreadPoolExecutor(WORKERS) as pool:
            for worker in [pool.submit(work) for _ in range(WORKERS)]:
                worker.result()
        return times

    def _process(self) -> psutil.Process:
        assert self.server.process is not None
        return psutil.Process(self.server.process.pid)

    def _store_bytes(self) -> int:
        valkey = find_valkey(self.server.data_dir)
        assert valkey is not None
        return int(valkey.memory_info().rss)

    def _note(self, name: str, value: str) -> None:
        self.rows.append((name, value))
        console.print(f"{name}: {value}", highlight=False)


def info(redis: Redis, section: str) -> dict[str, Any]:
    found: dict[str, Any] = redis.info(section)
    return found


def seconds_of(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def seconds(work: Callable[[], object]) -> str:
    return f"{seconds_of(work):.1f} s"


def percentiles(times: list[float]) -> str:
    """Return the median and the 99th percentile of times in seconds, as text."""
    p50, p99 = np.percentile(times, [50, 99]) * 1000
    return f"p50 {p50:.1f}, p99 {p99:.1f} ms"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.many_sessions", description=__doc__)
    parser.add_argument("--sessions", type=int, default=50_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="imprint-many-sessions-") as name:
        run = ManySessions(Path(name), str(build_tiny_base(Path(name) / "tiny")), options.sessions)
        try:
            run.run()
        finally:
            if run.server.process is not None:
                run.server.stop()
        table = Table("what", "figure", title=f"{options.sessions:,} sessions")
        for row in run.rows:
            table.add_row(*row)
        console.print(table)
        for fault in run.faults:
            console.print(f"FAULT {fault}", markup=False)
        return 1 if run.faults else 0


if __name__ == "__main__":
    sys.exit(main())
