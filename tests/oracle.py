"""A fault-injection test: clients teach sessions while processes are killed or paused.

    python -m tests.oracle --kills 300                   # one server on its embedded store: it, its store, or both
    python -m tests.oracle --replicas 2 --minutes 10     # two servers on one Valkey, paused for longer than a lease

Each client repeats a turn until it is acknowledged, then sends the next one. At the end, a session's log must name the
acknowledged turns, each once and at the acknowledged version. A client that hung up got no acknowledgement, so its turn
may be in the log or not. The session's rows, scalars, version and counters must equal, bit for bit, what the model
alone makes of these turns. Prints one line of JSON; the exit code is 1 if anything is wrong.
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

from service.store.redis.codec import decode
from service.turns.prompts import TextPrompt
from tests.clients import ContractViolation, SessionClient, SessionHistory, Turn
from tests.conftest import Server
from tests.live import Client, assert_success, find_valkey, rows_of, stored, wait_until
from tests.replay import ReferenceModel, Replay, Rows, one_thread
from tests.service.valkeys import free_ports, valkey
from tests.tiny import build_tiny_base

SESSIONS = 20
PAUSE_S = 0.5  # mean pause of a client between two turns
LEASE_S = 1.0
START_TIMEOUT_S = 60.0
LAST_TURN_TIMEOUT_S = 120.0
MAX_FAULTS = 20

console = Console(stderr=True)
Json = dict[str, Any]


@dataclass
class Result:
    """The outcome of a run.

    Attributes:
        lost: number of acknowledged turns that are missing in their session.
        duplicated: number of turns that are more than once in their session.
        faults: one sentence for each fault.
        counts: counters of the clients and of the injected faults.
        sessions: number of sessions compared.
        versions: number of versions of these sessions.
        seconds: duration of the run.
    """

    lost: int = 0
    duplicated: int = 0
    faults: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    sessions: int = 0
    versions: int = 0
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not (self.lost or self.duplicated or self.faults)

    def line(self) -> str:
        counts = {name.replace(" ", "_"): count for name, count in sorted(self.counts.items())}
        verdict = {"passed": self.passed, "lost": self.lost, "doubled": self.duplicated, "sessions": self.sessions}
        rest = {"versions": self.versions, "seconds": round(self.seconds), "faults": self.faults[:5]}
        return json.dumps(verdict | counts | rest)


# --- injected faults --------------------------------------------------------------------------------------------------


class KillInjector:
    """Kills one server, its embedded store, or both in turn, at random instants; some of them during a start."""

    progress_label = "killed"
    timeout_s = 20.0  # for which a client waits for an answer

    def __init__(self, folder: Path, model: str, *, kills: int, seed: int) -> None:
        self.server = Server(model, folder / "data", max_queue=4 * SESSIONS, hot_sessions=SESSIONS // 2)
        self.url, self.urls, self.store = self.server.url, [self.server.url], folder / "data"
        self.steps = kills
        self._random = random.Random(f"{seed}/kills")

    @contextmanager
    def running(self) -> Iterator[None]:
        self.server.start()
        yield
        self.server.stop()
        if (orphan := find_valkey(self.server.data_dir)) is not None:
            orphan.terminate()

    async def inject_faults(self, result: Result, step: Callable[[], None]) -> None:
        for number in range(self.steps):
            await self._wait_random()
            victim = ("server", "store", "both")[number % 3]
            while not await self._kill(victim):
                await asyncio.sleep(0.01)
            result.counts[f"kills of the {victim}" if victim != "both" else "kills of both"] += 1
            result.counts["kills"] += 1
            step()
        await self._ready()

    async def _wait_random(self) -> None:
        """Wait until a random instant, mostly of a server that is ready, sometimes of one that is starting."""
        if self._random.random() > 0.15:
            await self._ready()
            await asyncio.sleep(self._random.uniform(0, 2.5))
        else:
            await asyncio.sleep(self._random.uniform(0, 4.0))

    async def _kill(self, victim: str) -> bool:
        """Kill -9 the victim and restart a killed server at once; return False if there was nothing to kill."""
        self._restart_if_ended()
        server, store = self.server.process, find_valkey(self.server.data_dir)
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

    def _restart_if_ended(self) -> None:
        """Restart a server that ended because its store was killed during the start, as a supervisor would."""
        assert self.server.process is not None
        if self.server.process.poll() is None:
            return
        output = self.server.log.read_text()[-2000:]
        if "valkey did not start (status -9)" not in output.splitlines()[-1]:
            raise ContractViolation(f"the server ended by itself: {output}")
        self.server.start(wait=False)

    async def _ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        async with httpx.AsyncClient(timeout=5) as http:
            while time.monotonic() < deadline:
                self._restart_if_ended()
                try:
                    if (await http.get(f"{self.url}/readyz")).status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                await asyncio.sleep(0.1)
        raise ContractViolation(f"the server does not come up: {self.server.log.read_text()[-2000:]}")


class PauseInjector:
    """Pauses replicas on one Valkey, each for longer than a lease lasts.

    Meanwhile other replicas take over the paused one's sessions; then it continues in the middle of its work.
    """

    progress_label = "paused, s"
    timeout_s = 2 * LEASE_S

    def __init__(self, folder: Path, model: str, *, replicas: int, seconds: float, seed: int) -> None:
        self._port, self._folder = free_ports(1)[0], folder
        self.store = f"redis://127.0.0.1:{self._port}/0"
        settings = {"redis_url": self.store, "lease_s": LEASE_S, "lease_wait_s": 5, "max_queue": 4 * SESSIONS}
        self.servers = [Server(model, folder / f"replica-{n}", **settings) for n in range(replicas)]
        self.url, self.urls = self.servers[0].url, [server.url for server in self.servers]
        self.steps = round(seconds)
        self._random = random.Random(f"{seed}/pauses")

    @contextmanager
    def running(self) -> Iterator[None]:
        with ExitStack() as stack:
            options = ("--appendonly", "yes", "--appendfsync", "always")
            stack.enter_context(valkey(self._folder / "valkey", self._port, *options))
            for server in self.servers:
                server.start(wait=False)
                stack.callback(server.stop)
            for server in self.servers:
                server.wait_until_ready()
            yield

    async def inject_faults(self, result: Result, step: Callable[[], None]) -> None:
        start, num_steps = time.monotonic(), 0
        while time.monotonic() < start + self.steps:
            await asyncio.sleep(self._random.uniform(0.2, 1.5))
            server = self._random.choice(self.servers).process
            assert server is not None
            server.send_signal(signal.SIGSTOP)
            await asyncio.sleep(LEASE_S * self._random.uniform(1.1, 3))
            server.send_signal(signal.SIGCONT)
            result.counts["pauses"] += 1
            while num_steps < min(self.steps, time.monotonic() - start):
                num_steps += 1
                step()


# --- a run ------------------------------------------------------------------------------------------------------------


@dataclass
class Evidence:
    """The records of a run: the clients' histories, and each session's log (oldest first) and stored bytes."""

    histories: list[SessionHistory]
    logs: dict[str, list[Json]]
    content: dict[str, dict[str, dict[bytes, bytes]]]


def run(injector: KillInjector | PauseInjector, base: Path, *, seed: int) -> Result:
    """Run the clients and inject the faults, then compare every session with the reference."""
    result, began = Result(), time.monotonic()
    verify(collect_evidence(injector, base.name, result, seed=seed), ReferenceModel(base), result)
    result.seconds = time.monotonic() - began
    return result


def collect_evidence(injector: KillInjector | PauseInjector, model: str, result: Result, *, seed: int) -> Evidence:
    """Run the clients while faults are injected, and read what the servers then have."""
    with injector.running():
        histories = asyncio.run(_run_clients(injector, model, result, seed))
        for url in injector.urls:
            with Client(url) as client:
                wait_until(client.idle)
        with Client(injector.url) as client:
            logs = {history.name: _log(client, history.name) for history in histories}
        return Evidence(histories, logs, {history.name: stored(injector.store, history.name) for history in histories})


async def _run_clients(
    injector: KillInjector | PauseInjector, model: str, result: Result, seed: int
) -> list[SessionHistory]:
    """Run the clients until all faults are injected and every turn is acknowledged."""
    finished = asyncio.Event()
    session_clients = [
        SessionClient(f"s{seed}-{number}", injector.urls, model, result.counts, timeout_s=injector.timeout_s)
        for number in range(SESSIONS)
    ]
    tasks = [asyncio.create_task(session_client.run(finished.is_set, PAUSE_S)) for session_client in session_clients]
    with _progress(injector.progress_label, injector.steps) as step:
        try:
            await injector.inject_faults(result, step)
        except ContractViolation as error:
            result.faults.append(str(error))
    finished.set()
    for session_client, task in zip(session_clients, tasks, strict=True):
        try:
            await asyncio.wait_for(task, LAST_TURN_TIMEOUT_S)
        except (ContractViolation, TimeoutError) as error:
            result.faults.append(f"{session_client.history.name}: {error!r}")
    return [history for session_client in session_clients for history in session_client.histories]


@contextmanager
def _progress(label: str, steps: int) -> Iterator[Callable[[], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=steps)
        yield lambda: progress.advance(task)


# --- the comparison ---------------------------------------------------------------------------------------------------


def _log(client: Client, session: str) -> list[Json]:
    """Return the whole log of a session, oldest first."""
    entries: list[Json] = []
    before: int | None = None
    while True:
        params = {"limit": 100} | ({} if before is None else {"before": before})
        response = client.http.get(f"/v1/sessions/{session}/log", params=params)
        if response.status_code == 404:
            return []
        page = assert_success(response)
        entries += page["data"]
        before = page["next"]
        if before is None:
            return entries[::-1]


def verify(evidence: Evidence, model: ReferenceModel, result: Result) -> None:
    """Compare every session with the reference, and record the differences in `result`."""
    with one_thread(), _progress("compared", len(evidence.histories)) as step:
        for history in evidence.histories:
            turns = _turns(history, evidence.logs[history.name], result)
            result.sessions += 1
            result.versions += len(turns)
            differences = _differences(history, turns, evidence.content[history.name], model)
            result.faults += [f"{history.name}: {difference}" for difference in differences]
            step()


def _turns(history: SessionHistory, log: list[Json], result: Result) -> list[Turn]:
    """Return the turns that the session's log names, and count those that are lost or duplicated."""
    logged = [history.turns[int(entry["request_id"].split("/")[1])] for entry in log]
    times = Counter(turn.number for turn in logged)
    for number in (number for number, count in times.items() if count > 1):
        result.duplicated += 1
        named = [(entry["version"], entry["request_id"]) for entry in log if f"/{number}/" in entry["request_id"]]
        result.faults.append(f"doubled: {history.turns[number].describe()}, in the log as {named}")
    if [entry["version"] for entry in log] != list(range(1, len(log) + 1)):
        result.faults.append(f"{history.name}: the log has other versions than 1..{len(log)}")
    for turn in history.turns:
        if turn.version is not None:
            if turn.version > len(logged) or logged[turn.version - 1] is not turn:
                result.lost += 1
                result.faults.append(f"lost: {turn.describe()}, not in the log at its version")
        elif turn.acknowledged and times[turn.number]:
            result.faults.append(
                f"{history.name}: turn {turn.number} was acknowledged without a change, but made a version"
            )
        elif not turn.acknowledged:
            result.counts["hang-ups that landed"] += bool(times[turn.number])
    return logged


def _differences(
    history: SessionHistory, turns: list[Turn], content: dict[str, dict[bytes, bytes]], model: ReferenceModel
) -> Iterator[str]:
    """Yield the differences between a stored session and what the model alone makes of its turns."""
    replay = Replay(model)
    for turn in turns:
        output = _replay_turn(replay, turn)
        if output is not None and turn.acknowledged and output != turn.output:
            yield f"turn {turn.number} was answered {turn.output!r}, alone {output!r}"
    version = len(replay.versions) - 1
    if content:
        meta = decode(history.name, content["meta"])
        if meta.version != version:
            yield f"version {meta.version}, alone {version}"
        yield from replay.versions[-1].diff(_rows(content), meta)[:3]
    elif version:
        yield f"not there, alone at version {version}"
    replay.end()


def _replay_turn(replay: Replay, turn: Turn) -> str | None:
    if turn.path.endswith("/rollback"):
        replay.rollback(turn.body["version"])
    elif turn.path.endswith("/observe"):
        replay.observe(TextPrompt(turn.body["text"]))
    else:
        return replay.complete(turn.body)
    return None


def _rows(content: dict[str, dict[bytes, bytes]]) -> Rows:
    return {key.removeprefix("rows:"): rows_of(pages) for key, pages in content.items() if key.startswith("rows:")}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.oracle", description=__doc__)
    parser.add_argument("--kills", type=int, default=300, help="number of kills (default 300)")
    parser.add_argument("--replicas", type=int, default=1, help="more than 1: pause replicas on one Valkey instead")
    parser.add_argument("--minutes", type=float, default=10, help="duration of the pauses (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the clients and of the faults (default 0)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="imprint-oracle-") as name:
        folder = Path(name)
        base = build_tiny_base(folder / "tiny")
        injector: KillInjector | PauseInjector = KillInjector(folder, str(base), kills=options.kills, seed=options.seed)
        if options.replicas > 1:
            seconds = 60 * options.minutes
            injector = PauseInjector(folder, str(base), replicas=options.replicas, seconds=seconds, seed=options.seed)
        result = run(injector, base, seed=options.seed)
    print(result.line())
    return 0 if result.passed else 1


if __name__ == "__main__":
    sys.exit(main())
