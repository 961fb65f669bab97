"""A load test: many users at once, some of whom hang up early, on a server that is restarted meanwhile.

    python -m tests.soak --minutes 10 --streams 16

Each user has a few sessions and sends turns of every kind to them. At the end, the turns of each session are replayed
alone on a fresh server: the answers, the version and every stored byte must be the same. The exit code is 1 if anything
differs, if a request failed for another reason than a restart, or if the server's memory, descriptors or threads kept
growing.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import httpx
import psutil
from rich.console import Console
from rich.table import Table

from tests.conftest import Server
from tests.live import Client, Json, assert_success, chunks, find_valkey, retry_until_success, state, wait_until
from tests.tiny import TEXT, build_tiny_base

WORDS = TEXT.split()
SESSIONS = 6  # per user; together more than the device keeps
HANG_UP_PROBABILITY = 0.15  # share of turns that the client abandons before their end
MAX_FAULTS = 20
GROWTH = {"rss": 64 * 2**20, "fds": 24, "threads": 8}  # allowed growth from a process's first half to its end

Stored = dict[str, dict[bytes, bytes]]

console = Console(soft_wrap=True)


@dataclass(frozen=True)
class Turn:
    """One request. The session is named in the path or in the body."""

    path: str
    body: Json


@dataclass
class CompletedTurn:
    """A turn that the session committed.

    Attributes:
        turn: the request.
        received: the answer, or the beginning of its text.
        is_complete: whether the client received the whole answer.
    """

    turn: Turn
    received: Json
    is_complete: bool


@dataclass
class SessionHistory:
    """One session, its version and the turns that it committed."""

    name: str
    random: random.Random
    version: int = 0
    completed: list[CompletedTurn] = field(default_factory=list)
    chat: list[Json] = field(default_factory=list)

    def next_turn(self) -> Turn:
        """Draw the next turn."""
        kind = self.random.choices(["completion", "chat", "observe", "score"], [4, 3, 2, 1])[0]
        if kind == "observe":
            return Turn(f"sessions/{self.name}/observe", {"text": self._words(20, 400)})
        if kind == "score":
            scored = {"text": self._words(5, 150), "learn": self.random.random() < 0.5}
            return Turn(f"sessions/{self.name}/score", scored)
        body: Json = {
            "session": self.name,
            "max_tokens": self.random.randint(2, 60),
            "stream": self.random.random() < 0.7,
            "adapt": self.random.choices(["both", "predict", "observe"], [8, 2, 1])[0],
            "learn": self.random.choice(["prompt", "completion", "all"]),
            "temperature": self.random.choice([0, 1]),
            "seed": self.random.randrange(2**31),
        }
        if self.random.random() < 0.3:
            body["stop"] = [self.random.choice(WORDS), "\n\n"]
        if kind == "completion":
            return Turn("completions", body | {"prompt": self._words(3, 80)})
        if self.random.random() < 0.1:
            self.chat.clear()
        self.chat = [*self.chat[-4:], {"role": "user", "content": self._words(2, 20)}]
        return Turn("chat/completions", body | {"messages": list(self.chat)})

    def record_answer(self, turn: Turn, received: Json, *, is_complete: bool) -> None:
        """Record that the session committed the turn."""
        self.completed.append(CompletedTurn(turn, received, is_complete))
        if "messages" in turn.body and is_complete and received["text"]:
            self.chat.append({"role": "assistant", "content": received["text"]})

    def _words(self, low: int, high: int) -> str:
        start, count = self.random.randrange(len(WORDS)), self.random.randint(low, high)
        return " ".join(
            self.random.choice(WORDS) if n % 7 == 3 else WORDS[(start + n) % len(WORDS)] for n in range(count)
        )


def comparable_answer(body: Json) -> Json:
    """Return an answer without the fields that differ between equal requests."""
    if "choices" not in body:
        return body
    (choice,) = body["choices"]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    return {
        "text": text,
        "finish_reason": choice["finish_reason"],
        "adaptation": without_times(body["adaptation"]),
    }


def without_times(adaptation: Json | None) -> Json | None:
    """Return what a turn did to its session, without the times at which the episodes were taught."""
    if adaptation is None:
        return None
    recalled = [{name: value for name, value in entry.items() if name != "time"} for entry in adaptation["recalled"]]
    return {**adaptation, "recalled": recalled}


def versions(received: Json, before: int) -> tuple[int, int]:
    """Return the versions before and after the turn, as its answer names them."""
    adaptation = received.get("adaptation") or {"version_from": before, "version_to": received["version"]}
    return adaptation["version_from"], adaptation["version_to"]


class Soak:
    """One run of the load test: users, server, replay and report.

    Attributes:
        faults: one sentence for each fault.
        growth: allowed growth of each resource from a process's first half to its end.
        latencies: when each answered turn began, and the seconds until the end of its answer.
    """

    turns_per_s = 12  # of all users together; low enough for the sequential replay to end in time

    def __init__(
        self, folder: Path, model: str, *, streams: int, seed: int, replicas: int = 1, **settings: object
    ) -> None:
        # A user may have two turns in flight: one that it abandoned, and the next.
        self.server = Server(model, folder / "data", **{"hot_sessions": 1, "max_queue": 2 * streams} | settings)
        self.replicas = [Server(model, folder / f"replay-{n}") for n in range(replicas)]
        self.histories = [SessionHistory(f"s{n}", random.Random(f"{seed}/{n}")) for n in range(streams * SESSIONS)]
        self._streams = streams
        self.growth = GROWTH
        self.faults: list[str] = []
        self.latencies: list[tuple[float, float]] = []
        self.counts: Counter[str] = Counter()
        self.samples: list[list[dict[str, int]]] = []
        self.replayed = 0
        self._outages: list[float] = []  # the end of each; infinity while it lasts
        self._finished = threading.Event()

    # --- the users ------------------------------------------------------------------------------------------------

    def _run_user(self, histories: list[SessionHistory], rng: random.Random) -> None:
        """Act as one user, on a thread of its own, until the run ends."""
        with Client(self.server.url, self.server.model) as client:
            while not self._finished.wait(rng.expovariate(self.turns_per_s / self._streams)):
                history = rng.choice(histories)
                turn, began = history.next_turn(), time.monotonic()
                self.counts["turns"] += 1
                try:
                    if rng.random() < HANG_UP_PROBABILITY:
                        self._send_and_hang_up(client, history, turn, rng, began)
                    else:
                        self._send_and_read(client, history, turn, began)
                except (httpx.TransportError, OSError) as error:
                    self._record_failure(f"{history.name}: {turn.path}: {error!r}", began)
                    self._sync_version(client, history, turn, {"text": ""})
                except AssertionError as error:
                    self.faults.append(f"{history.name}: {turn.path}: {str(error)[:300]}")

    def _send_and_read(self, client: Client, history: SessionHistory, turn: Turn, began: float) -> None:
        body = turn.body if turn.path.startswith("sessions/") else {"model": client.model} | turn.body
        with client.http.stream("POST", f"/v1/{turn.path}", json=body) as response:
            if response.status_code == 503:
                self._record_failure(f"{history.name}: {turn.path}: {response.read().decode()}", began)
                self._sync_version(client, history, turn, {"text": ""})
                return
            assert response.status_code == 200, response.read().decode()
            received = (
                answer_from_chunks(chunks(response)) if body.get("stream") else comparable_answer(decoded(response))
            )
        before, after = versions(received, history.version)
        assert before == history.version and after - before in (0, 1), (
            f"from {before} to {after}, not {history.version}"
        )
        history.version = after
        self.latencies.append((began, time.monotonic() - began))
        history.record_answer(turn, received, is_complete=True)
        self.counts["answered"] += 1

    def _send_and_hang_up(
        self, client: Client, history: SessionHistory, turn: Turn, rng: random.Random, began: float
    ) -> None:
        """Send a turn and hang up before its end; then find out whether the session committed the turn."""
        self.counts["hang-ups"] += 1
        text = ""
        if turn.body.get("stream"):
            num_chunks = rng.randint(0, 8)
            try:
                with client.stream(turn.path, **{"model": client.model} | turn.body) as incoming:
                    for _, chunk in zip(range(num_chunks), incoming, strict=False):
                        text += chunk_text(chunk)
            except AssertionError as error:  # the status is not 200
                self._record_failure(f"{history.name}: {turn.path}: {error}", began)
        else:
            with client.abandoned_request(turn.path, turn.body):
                time.sleep(rng.random() * 0.2)
        self._sync_version(client, history, turn, {"text": text})

    def _sync_version(self, client: Client, history: SessionHistory, turn: Turn, received: Json) -> None:
        """Read the session's version, and record the turn if the session committed it.

        An empty turn waits for the session's last turn and returns the version after it. The server must have read the
        abandoned request before: it has read all that came before the second of two requests in a row.
        """
        for _ in range(3):
            retry_until_success(lambda: client.http.get("/livez"))
        version = retry_until_success(lambda: client.score(history.name, "")["version"])
        assert version - history.version in (0, 1), f"version {version} after {history.version}"
        if version > history.version:
            self.counts["committed without an answer"] += 1
            history.record_answer(turn, received, is_complete=False)
        history.version = version

    def _record_failure(self, message: str, began: float) -> None:
        """Record a failed request: a fault, unless the server was down at some time since the request began."""
        if any(end >= began for end in self._outages):
            self.counts["refused in a restart"] += 1
        else:
            self.faults.append(message)

    # --- the server -----------------------------------------------------------------------------------------------

    @contextmanager
    def _outage(self) -> Iterator[None]:
        self._outages.append(float("inf"))
        yield
        self.server.start(forked=False)
        self._track_process()
        self._outages[-1] = time.monotonic()

    def _track_process(self) -> None:
        """Start the samples of a new server process."""
        assert self.server.process is not None
        self._process = psutil.Process(self.server.process.pid)
        self.samples.append([])

    def _sample(self) -> None:
        process = self._process
        self.samples[-1].append(
            {"rss": process.memory_info().rss, "fds": process.num_fds(), "threads": process.num_threads()}
        )

    @contextmanager
    def _users(self) -> Iterator[None]:
        """Start the server, run the users during the block, and look at the server when it is idle again."""
        self.server.start(forked=False)
        self._track_process()
        threads = [
            threading.Thread(
                target=self._run_user, args=(self.histories[n :: self._streams], random.Random(n)), daemon=True
            )
            for n in range(self._streams)
        ]
        for thread in threads:
            thread.start()
        yield
        self._finished.set()
        for thread in threads:
            thread.join(120)
        with Client(self.server.url) as client:
            wait_until(client.idle)
            self.counts["evictions"] = int(client.metric("session_evictions_total"))
        self._sample()
        self.faults += [f"{resource} grew from {first} to {last}" for resource, first, last in self._leaks()]

    def run(self, seconds: float, *, kill: bool) -> None:
        """Run the users for `seconds`, with a restart halfway and, with `kill`, a kill -9 after three quarters."""
        with self._users():
            began = last_report = time.monotonic()
            disruptions = [(0.5, self._restart), *([(0.75, self._kill)] if kill else [])]
            while (elapsed := time.monotonic() - began) < seconds and len(self.faults) < MAX_FAULTS:
                if disruptions and elapsed > disruptions[0][0] * seconds:
                    disruptions.pop(0)[1]()
                self._sample()
                if time.monotonic() - last_report > 10:
                    last_report = time.monotonic()
                    self._print_progress(f"{elapsed:5.0f} s")
                time.sleep(0.5)

    def _restart(self) -> None:
        self._print_progress("restarting")
        with self._outage():
            code = self.server.stop()
        if code != 0:
            self.faults.append(f"the server ended with exit code {code}")

    def _kill(self) -> None:
        self._print_progress("killing")
        with self._outage():
            self.server.kill()

    def _leaks(self) -> Iterator[tuple[str, int, int]]:
        for samples in self.samples:
            for resource, allowed in self.growth.items():
                values = [sample[resource] for sample in samples]
                first, last = max(values[: len(values) // 2 + 1]), int(median(values[-5:]))
                if last > first + allowed:
                    yield resource, first, last

    # --- the check ------------------------------------------------------------------------------------------------

    def verify(self, seconds: float) -> None:
        """Replay every session alone on a fresh server, and compare; stop after `seconds`."""
        stored = {history.name: state(self.server.data_dir, history.name) for history in self.histories}
        if (code := self.server.stop()) != 0:
            self.faults.append(f"the server ended with exit code {code}")
        deadline, pending = time.monotonic() + seconds, list(self.histories)
        with ThreadPoolExecutor(len(self.replicas)) as pool:
            replays = [pool.submit(self._replay_on, replica, pending, stored, deadline) for replica in self.replicas]
        for replay in replays:
            replay.result()

    def _replay_on(
        self, replica: Server, pending: list[SessionHistory], stored: dict[str, Stored], deadline: float
    ) -> None:
        """Replay one pending session after another on a server of its own, until none is left or the time is over."""
        replica.start()
        last_report = time.monotonic()
        with Client(replica.url, replica.model) as client:
            while pending and time.monotonic() < deadline:
                history = pending.pop()
                alone = self._replay(client, history)
                difference = alone or self._compare(client, history, stored[history.name], replica.data_dir)
                self.replayed += 1
                if difference is not None:
                    self.faults.append(f"{history.name}: {difference}")
                if time.monotonic() - last_report > 10:
                    last_report = time.monotonic()
                    self._print_progress(f"replayed {self.replayed} of {len(self.histories)}")
        replica.stop()

    def _replay(self, client: Client, history: SessionHistory) -> str | None:
        """Send a session's turns again, alone; return a description of the first answer that differs, or None."""
        for number, completed in enumerate(history.completed):
            body = {name: value for name, value in completed.turn.body.items() if name != "stream"}
            full_body = body if completed.turn.path.startswith("sessions/") else {"model": client.model} | body
            answer = comparable_answer(assert_success(client.post(completed.turn.path, full_body)))
            if completed.is_complete and answer != completed.received:
                received = str(completed.received)[:200]
                return f"turn {number}, {completed.turn.path}: received {received}, alone {str(answer)[:200]}"
            if not completed.is_complete and not answer.get("text", "").startswith(completed.received["text"]):
                began = completed.received["text"][:200]
                return f"turn {number}, {completed.turn.path}: began {began}, alone {str(answer)[:200]}"
        return None

    def _compare(self, client: Client, history: SessionHistory, stored: Stored, alone_dir: Path) -> str | None:
        """Compare the stored bytes of the session and of its replay; return a description of a difference, or None."""
        if history.version == 0:  # the read of a session's version has created the session
            return None
        alone = state(alone_dir, history.name)
        if (version := client.version(history.name)) != history.version:
            return f"version {history.version}, alone {version}"
        differing = [
            f"{key} {name!r}"
            for key in stored.keys() | alone.keys()
            for name in stored.get(key, {}).keys() | alone.get(key, {}).keys()
            if stored.get(key, {}).get(name) != alone.get(key, {}).get(name)
        ]
        return f"{len(differing)} stored values differ, such as {differing[:3]}" if differing else None

    def end(self) -> None:
        """Stop both servers and their stores."""
        for server in (self.server, *self.replicas):
            if server.process is not None:
                server.stop()
            if (valkey := find_valkey(server.data_dir)) is not None:
                valkey.terminate()

    # --- the report -----------------------------------------------------------------------------------------------

    def _print_progress(self, label: str) -> None:
        numbers = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        sample = self.samples[-1][-1] if self.samples and self.samples[-1] else {"rss": 0, "fds": 0, "threads": 0}
        usage = f"{sample['rss'] >> 20} MiB, {sample['fds']} descriptors, {sample['threads']} threads"
        console.print(f"{label}: {numbers}; {usage}; {len(self.faults)} faults", highlight=False)

    def report(self) -> bool:
        """Print the table and the verdict; return whether there was no fault."""
        table = Table("name", "value", title="Soak")
        for name, count in self.counts.items():
            table.add_row(name, str(count))
        table.add_row("versions", str(sum(history.version for history in self.histories)))
        for number, samples in enumerate(self.samples):
            for resource in self.growth:
                values = [sample[resource] for sample in samples]
                shown = [
                    f"{value >> 20} MiB" if value >= 2**20 else str(value)
                    for value in (values[0], values[-1], max(values))
                ]
                table.add_row(f"process {number}: {resource}", "{} at first, {} at last, {} at most".format(*shown))
        table.add_row("sessions replayed", f"{self.replayed} of {len(self.histories)}")
        table.add_row("faults", str(len(self.faults)))
        console.print(table)
        for fault in self.faults:
            console.print(f"FAULT {fault}", markup=False)
        console.print("failed" if self.faults else "passed", style="red" if self.faults else "green")
        return not self.faults


def chunk_text(chunk: Json) -> str:
    choice = chunk["choices"][0]
    text: str = choice["text"] if "text" in choice else choice["delta"].get("content", "")
    return text


def answer_from_chunks(incoming: Iterator[Json]) -> Json:
    """Return the answer that the chunks of a stream make together."""
    received = list(incoming)
    text = "".join(map(chunk_text, received))
    return {
        "text": text,
        "finish_reason": received[-1]["choices"][0]["finish_reason"],
        "adaptation": without_times(received[-1]["adaptation"]),
    }


def decoded(response: httpx.Response) -> Json:
    response.read()
    return assert_success(response)


def soak(folder: Path, model: str, *, minutes: float, streams: int, seed: int = 0, kill: bool = True) -> Soak:
    """Run the whole load test, which takes at most about four times `minutes`."""
    run = Soak(folder, model, streams=streams, seed=seed)
    try:
        run.run(60 * minutes, kill=kill)
        run.verify(180 * minutes)
    finally:
        run.end()
    return run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="duration of the load (default 10)")
    parser.add_argument("--streams", type=int, default=16, help="number of users (default 16)")
    parser.add_argument("--model", help="a value of IMPRINT_MODEL; default: a tiny base with random weights")
    parser.add_argument("--kill", action="store_true", help="also kill -9 the server after three quarters")
    parser.add_argument("--seed", type=int, default=0, help="seed of the users' behaviour (default 0)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="imprint-soak-") as name:
        folder = Path(name)
        model = options.model or str(build_tiny_base(folder / "tiny"))
        done = soak(
            folder, model, minutes=options.minutes, streams=options.streams, seed=options.seed, kill=options.kill
        )
        return 0 if done.report() else 1


if __name__ == "__main__":
    sys.exit(main())
