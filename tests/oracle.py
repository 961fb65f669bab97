"""Clients teach sessions while processes are killed or paused; then every session must be what they were told.

    python -m tests.oracle --kills 300                   # one server on its embedded store: it, its store, or both
    python -m tests.oracle --replicas 2 --minutes 10     # two servers on one Valkey, paused for longer than a lease

Each client sends its next turn when the last one is acknowledged, and repeats it until then. At the end, the turns that
a session's log names must be those that were acknowledged, each once and at the version that was told (a client that
hung up has been told nothing: it looks whether the log names its turn), and its rows, own numbers, version and counters
must equal, bit for bit, what the model alone makes of these turns. Prints one line of JSON; exit code 1 if anything is
wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from service.store.codec import decode
from service.turns.prompts import TextPrompt
from tests.clients import Life, Pupil, Turn, Wrong
from tests.conftest import Server
from tests.live import Client, rows_of, stored, success, until, valkey_of
from tests.replay import Model, Replay, Rows, one_thread
from tests.service.valkeys import free_ports, valkey
from tests.tiny import build_tiny_base

SESSIONS = 20
PAUSE_S = 0.5  # of a client between two turns
LEASE_S = 1.0
LONGEST_START_S = 60.0
LAST_TURN_S = 120.0
MAX_FAULTS = 20

console = Console(stderr=True)
Json = dict[str, Any]


@dataclass
class Result:
    """What a run found. lost: acknowledged turns that a session has not; doubled: turns that it has more than once."""

    lost: int = 0
    doubled: int = 0
    faults: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    sessions: int = 0
    versions: int = 0
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not (self.lost or self.doubled or self.faults)

    def line(self) -> str:
        told = {name.replace(" ", "_"): count for name, count in sorted(self.counts.items())}
        found = {"passed": self.passed, "lost": self.lost, "doubled": self.doubled, "sessions": self.sessions}
        rest = {"versions": self.versions, "seconds": round(self.seconds), "faults": self.faults[:5]}
        return json.dumps(found | told | rest)


# --- what goes wrong --------------------------------------------------------------------------------------------------


class Kills:
    """One server on its embedded store. The server, its store and both are killed in turns, at random instants, some of
    them before the server has come up again."""

    does = "killed"
    patience_s = 20.0  # of a client with a server that says nothing

    def __init__(self, folder: Path, model: str, *, kills: int, seed: int) -> None:
        self.server = Server(model, folder / "data", max_queue=4 * SESSIONS, hot_sessions=SESSIONS // 2)
        self.url, self.urls, self.store = self.server.url, [self.server.url], folder / "data"
        self.steps = kills
        self._random = random.Random(f"{seed}/kills")

    @contextmanager
    def up(self) -> Iterator[None]:
        self.server.start()
        yield
        self.server.stop()
        if (orphan := valkey_of(self.server.data_dir)) is not None:
            orphan.terminate()

    async def trouble(self, result: Result, step: Callable[[], None]) -> None:
        for number in range(self.steps):
            await self._moment()
            victim = ("server", "store", "both")[number % 3]
            while not await self._kill(victim):
                await asyncio.sleep(0.01)
            result.counts[f"kills of the {victim}" if victim != "both" else "kills of both"] += 1
            result.counts["kills"] += 1
            step()
        await self._ready()

    async def _moment(self) -> None:
        """A random instant; mostly of a server that is ready, at times of one that comes up."""
        if self._random.random() > 0.15:
            await self._ready()
            await asyncio.sleep(self._random.uniform(0, 2.5))
        else:
            await asyncio.sleep(self._random.uniform(0, 4.0))

    async def _kill(self, victim: str) -> bool:
        """Whether there was one to kill, -9; a server comes up again at once."""
        self._revive()
        server, store = self.server.process, valkey_of(self.server.data_dir)
        assert server is not None
        if victim != "server" and store is None:
            return False
        killed = [server] if victim != "store" else []
        killed += [store] if victim != "server" and store is not None else []  # type: ignore[list-item]
        self._random.shuffle(killed)
        for process in killed:
            process.kill()
        if victim != "store":
            await asyncio.to_thread(server.wait)
            self.server.start(wait=False)
        return True

    def _revive(self) -> None:
        """A server whose store is killed while it starts says so and ends; whoever keeps it up starts it again."""
        assert self.server.process is not None
        if self.server.process.poll() is None:
            return
        said = self.server.log.read_text()[-2000:]
        if "valkey did not start (status -9)" not in said.splitlines()[-1]:
            raise Wrong(f"the server ended by itself: {said}")
        self.server.start(wait=False)

    async def _ready(self) -> None:
        deadline = time.monotonic() + LONGEST_START_S
        async with httpx.AsyncClient(timeout=5) as http:
            while time.monotonic() < deadline:
                self._revive()
                try:
                    if (await http.get(f"{self.url}/readyz")).status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                await asyncio.sleep(0.1)
        raise Wrong(f"the server does not come up: {self.server.log.read_text()[-2000:]}")


class Pauses:
    """Replicas on one Valkey. One after the other is stopped for longer than a lease lasts, in the midst of whatever it
    does, and goes on where it was when others have gone on with its sessions."""

    does = "paused, s"
    patience_s = 2 * LEASE_S

    def __init__(self, folder: Path, model: str, *, replicas: int, seconds: float, seed: int) -> None:
        self._port, self._folder = free_ports(1)[0], folder
        self.store = f"redis://127.0.0.1:{self._port}/0"
        settings = {"redis_url": self.store, "lease_s": LEASE_S, "lease_wait_s": 5, "max_queue": 4 * SESSIONS}
        self.servers = [Server(model, folder / f"replica-{n}", **settings) for n in range(replicas)]
        self.url, self.urls = self.servers[0].url, [server.url for server in self.servers]
        self.steps = round(seconds)
        self._random = random.Random(f"{seed}/pauses")

    @contextmanager
    def up(self) -> Iterator[None]:
        with ExitStack() as stack:
            options = ("--appendonly", "yes", "--appendfsync", "always")
            stack.enter_context(valkey(self._folder / "valkey", self._port, *options))
            for server in self.servers:
                server.start(wait=False)
                stack.callback(server.stop)
            for server in self.servers:
                server.wait_until_ready()
            yield

    async def trouble(self, result: Result, step: Callable[[], None]) -> None:
        ends, passed = time.monotonic() + self.steps, 0
        began = time.monotonic()
        while time.monotonic() < ends:
            await asyncio.sleep(self._random.uniform(0.2, 1.5))
            server = self._random.choice(self.servers).process
            assert server is not None
            server.send_signal(signal.SIGSTOP)
            await asyncio.sleep(LEASE_S * self._random.uniform(1.1, 3))
            server.send_signal(signal.SIGCONT)
            result.counts["pauses"] += 1
            while passed < min(self.steps, time.monotonic() - began):
                passed += 1
                step()


# --- a run ------------------------------------------------------------------------------------------------------------


@dataclass
class Evidence:
    """What is left of a run when it is over: by session, its log (oldest first) and every stored byte."""

    lives: list[Life]
    logs: dict[str, list[Json]]
    found: dict[str, dict[str, dict[bytes, bytes]]]


def run(world: Kills | Pauses, base: Path, *, seed: int) -> Result:
    """One whole run."""
    result, began = Result(), time.monotonic()
    judge(witness(world, base.name, result, seed=seed), Model(base), result)
    result.seconds = time.monotonic() - began
    return result


def witness(world: Kills | Pauses, model: str, result: Result, *, seed: int) -> Evidence:
    """The clients, and what befalls the servers."""
    with world.up():
        lives = asyncio.run(_live(world, model, result, seed))
        for url in world.urls:
            with Client(url) as client:
                until(client.idle)
        with Client(world.url) as client:
            logs = {life.name: _log(client, life.name) for life in lives}
        return Evidence(lives, logs, {life.name: stored(world.store, life.name) for life in lives})


async def _live(world: Kills | Pauses, model: str, result: Result, seed: int) -> list[Life]:
    """The clients and what befalls the servers, until that is over and every turn is acknowledged."""
    over = asyncio.Event()
    pupils = [
        Pupil(f"s{seed}-{number}", world.urls, model, result.counts, patience_s=world.patience_s)
        for number in range(SESSIONS)
    ]
    tasks = [asyncio.create_task(pupil.live(over.is_set, PAUSE_S)) for pupil in pupils]
    with _progress(world.does, world.steps) as step:
        try:
            await world.trouble(result, step)
        except Wrong as error:
            result.faults.append(str(error))
    over.set()
    for pupil, task in zip(pupils, tasks, strict=True):
        try:
            await asyncio.wait_for(task, LAST_TURN_S)
        except (Wrong, TimeoutError) as error:
            result.faults.append(f"{pupil.life.name}: {error!r}")
    return [life for pupil in pupils for life in pupil.lives]


@contextmanager
def _progress(what: str, steps: int) -> Iterator[Callable[[], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=steps)
        yield lambda: progress.advance(task)


# --- the verdict ------------------------------------------------------------------------------------------------------


def _log(client: Client, session: str) -> list[Json]:
    """The whole log of a session, oldest first."""
    entries: list[Json] = []
    before: int | None = None
    while True:
        page = {"limit": 100} | ({} if before is None else {"before": before})
        response = client.http.get(f"/v1/sessions/{session}/log", params=page)
        if response.status_code == 404:
            return []
        found = success(response)
        entries += found["data"]
        before = found["next"]
        if before is None:
            return entries[::-1]


def judge(evidence: Evidence, model: Model, result: Result) -> None:
    with one_thread(), _progress("judged", len(evidence.lives)) as step:
        for life in evidence.lives:
            turns = _turns(life, evidence.logs[life.name], result)
            result.sessions += 1
            result.versions += len(turns)
            differences = _differences(life, turns, evidence.found[life.name], model)
            result.faults += [f"{life.name}: {wrong}" for wrong in differences]
            step()


def _turns(life: Life, log: list[Json], result: Result) -> list[Turn]:
    """The turns that the session has taken, by its log; counts those that are lost or doubled."""
    taken = [life.turns[int(entry["request_id"].split("/")[1])] for entry in log]
    times = Counter(turn.number for turn in taken)
    for number in (number for number, count in times.items() if count > 1):
        result.doubled += 1
        named = [(entry["version"], entry["request_id"]) for entry in log if f"/{number}/" in entry["request_id"]]
        result.faults.append(f"doubled: {life.turns[number].told()}, in the log as {named}")
    if [entry["version"] for entry in log] != list(range(1, len(log) + 1)):
        result.faults.append(f"{life.name}: the log has other versions than 1..{len(log)}")
    for turn in life.turns:
        if turn.version is not None:
            if turn.version > len(taken) or taken[turn.version - 1] is not turn:
                result.lost += 1
                result.faults.append(f"lost: {turn.told()}, not in the log at its version")
        elif turn.acknowledged and times[turn.number]:
            result.faults.append(f"{life.name}: turn {turn.number} was told to change nothing, and did")
        elif not turn.acknowledged:
            result.counts["hang-ups that landed"] += bool(times[turn.number])
    return taken


def _differences(life: Life, turns: list[Turn], found: dict[str, dict[bytes, bytes]], model: Model) -> Iterator[str]:
    """What of a session is not as the model alone makes it of these turns."""
    replay = Replay(model)
    for turn in turns:
        said = _tell(replay, turn)
        if said is not None and turn.acknowledged and said != turn.said:
            yield f"turn {turn.number} was answered {turn.said!r}, alone {said!r}"
    version = len(replay.versions) - 1
    if found:
        meta = decode(life.name, found["meta"])
        if meta.version != version:
            yield f"version {meta.version}, alone {version}"
        yield from replay.versions[-1].differs(_rows(found), meta)[:3]
    elif version:
        yield f"not there, alone at version {version}"
    replay.end()


def _tell(replay: Replay, turn: Turn) -> str | None:
    if turn.path.endswith("/rollback"):
        replay.rollback(turn.body["version"])
    elif turn.path.endswith("/observe"):
        replay.observe(TextPrompt(turn.body["text"]))
    else:
        return replay.complete(turn.body)
    return None


def _rows(found: dict[str, dict[bytes, bytes]]) -> Rows:
    return {key.removeprefix("rows:"): rows_of(content) for key, content in found.items() if key.startswith("rows:")}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.oracle", description=__doc__)
    parser.add_argument("--kills", type=int, default=300, help="how often to kill something (default 300)")
    parser.add_argument(
        "--replicas", type=int, default=1, help="more than 1: servers on one Valkey, paused, not killed"
    )
    parser.add_argument("--minutes", type=float, default=10, help="how long replicas are paused (default 10)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of what the clients do, and when something fails (default 0)"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="imprint-oracle-") as name:
        folder = Path(name)
        base = build_tiny_base(folder / "tiny")
        world: Kills | Pauses = Kills(folder, str(base), kills=given.kills, seed=given.seed)
        if given.replicas > 1:
            seconds = 60 * given.minutes
            world = Pauses(folder, str(base), replicas=given.replicas, seconds=seconds, seed=given.seed)
        result = run(world, base, seed=given.seed)
    print(result.line())
    return 0 if result.passed else 1


if __name__ == "__main__":
    sys.exit(main())
