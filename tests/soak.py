"""Many users at once, some of whom leave early, on a server that is restarted under them; then every answer is checked.

    python -m tests.soak --minutes 10 --streams 16

Each user has a few sessions and sends turns of every kind to one after the other. At the end, the turns that a session
has taken are replayed alone on a fresh server: what was said, the version and every stored byte must be the same. Exit
code 1 if anything is not, if a request failed for another reason than a restart, or if the server's memory, descriptors
or threads kept growing.
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
TURNS_PER_S = 12  # of all users together: little enough for a replay, one turn after the other, to end in time
SESSIONS = 6  # a user: with them all, more than are kept on the device
HANG_UP_PROBABILITY = 0.15  # the share of turns whose client goes before their end
MAX_FAULTS = 20
GROWTH = {"rss": 64 * 2**20, "fds": 24, "threads": 8}  # what a server may gain from its first half to its end

console = Console(soft_wrap=True)


@dataclass(frozen=True)
class Turn:
    """A request. `session` is in the path or in the body."""

    path: str
    body: Json


@dataclass
class CompletedTurn:
    """A turn that the session took, and what its client heard: all of the answer, or the beginning of its text."""

    turn: Turn
    received: Json
    is_complete: bool


@dataclass
class SessionHistory:
    """One session and what it went through; `version` is what the server must say."""

    name: str
    random: random.Random
    version: int = 0
    completed: list[CompletedTurn] = field(default_factory=list)
    chat: list[Json] = field(default_factory=list)

    def next_turn(self) -> Turn:
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
        """The turn is part of the session's life."""
        self.completed.append(CompletedTurn(turn, received, is_complete))
        if "messages" in turn.body and is_complete and received["text"]:
            self.chat.append({"role": "assistant", "content": received["text"]})

    def _words(self, least: int, most: int) -> str:
        start, count = self.random.randrange(len(WORDS)), self.random.randint(least, most)
        return " ".join(
            self.random.choice(WORDS) if n % 7 == 3 else WORDS[(start + n) % len(WORDS)] for n in range(count)
        )


def comparable_answer(body: Json) -> Json:
    """What an answer says, without what differs from one time to the next."""
    if "choices" not in body:
        return body
    (choice,) = body["choices"]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    return {"text": text, "finish_reason": choice["finish_reason"], "adaptation": body["adaptation"]}


def versions(received: Json, before: int) -> tuple[int, int]:
    """From which to which version an answer says that its turn went."""
    told = received.get("adaptation") or {"version_from": before, "version_to": received["version"]}
    return told["version_from"], told["version_to"]


class Soak:
    """One run. `faults` says what was wrong."""

    def __init__(self, folder: Path, model: str, *, streams: int, seed: int) -> None:
        # A user may have two turns in hand: one that it left, and the next.
        self.server = Server(model, folder / "data", hot_sessions=1, max_queue=2 * streams)
        self.replica = Server(model, folder / "replay")
        self.histories = [SessionHistory(f"s{n}", random.Random(f"{seed}/{n}")) for n in range(streams * SESSIONS)]
        self._streams = streams
        self.faults: list[str] = []
        self.counts: Counter[str] = Counter()
        self.samples: list[list[dict[str, int]]] = []
        self.replayed = 0
        self._outages: list[float] = []  # when each ended; infinity while it lasts
        self._over = threading.Event()

    # --- the users ------------------------------------------------------------------------------------------------

    def _run_user(self, histories: list[SessionHistory], rng: random.Random) -> None:
        """One user, on a thread of its own."""
        with Client(self.server.url, self.server.model) as client:
            while not self._over.wait(rng.expovariate(TURNS_PER_S / self._streams)):
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
        history.record_answer(turn, received, is_complete=True)
        self.counts["heard"] += 1

    def _send_and_hang_up(
        self, client: Client, history: SessionHistory, turn: Turn, rng: random.Random, began: float
    ) -> None:
        """Sends a turn and goes before its end; whether the session took it shows afterwards."""
        self.counts["left"] += 1
        text = ""
        if turn.body.get("stream"):
            patience = rng.randint(0, 8)
            try:
                with client.stream(turn.path, **{"model": client.model} | turn.body) as incoming:
                    for _, chunk in zip(range(patience), incoming, strict=False):
                        text += chunk_text(chunk)
            except AssertionError as error:  # another status than 200
                self._record_failure(f"{history.name}: {turn.path}: {error}", began)
        else:
            with client.sent(turn.path, turn.body):
                time.sleep(rng.random() * 0.2)
        self._sync_version(client, history, turn, {"text": text})

    def _sync_version(self, client: Client, history: SessionHistory, turn: Turn, received: Json) -> None:
        """An empty turn waits for the session's last one, and says at which version that left it."""

        version = retry_until_success(lambda: client.score(history.name, "")["version"])
        assert version - history.version in (0, 1), f"version {version} after {history.version}"
        if version > history.version:
            self.counts["not heard, yet taken"] += 1
            history.record_answer(turn, received, is_complete=False)
        history.version = version

    def _record_failure(self, what: str, began: float) -> None:
        """A failure is none if the server was away at some time since the request began."""
        if any(end >= began for end in self._outages):
            self.counts["refused in a restart"] += 1
        else:
            self.faults.append(what)

    # --- the server -----------------------------------------------------------------------------------------------

    @contextmanager
    def _outage(self) -> Iterator[None]:
        self._outages.append(float("inf"))
        yield
        self.server.start()
        self._track_process()
        self._outages[-1] = time.monotonic()

    def _track_process(self) -> None:
        """A new process: its samples are its own."""
        assert self.server.process is not None
        self._process = psutil.Process(self.server.process.pid)
        self.samples.append([])

    def _sample(self) -> None:
        process = self._process
        self.samples[-1].append(
            {"rss": process.memory_info().rss, "fds": process.num_fds(), "threads": process.num_threads()}
        )

    def run(self, seconds: float, *, kill: bool) -> None:
        """The load, with a restart in its middle and, if asked for, a kill -9 after three quarters."""
        self.server.start()
        self._track_process()
        threads = [
            threading.Thread(
                target=self._run_user, args=(self.histories[n :: self._streams], random.Random(n)), daemon=True
            )
            for n in range(self._streams)
        ]
        for thread in threads:
            thread.start()
        began = told = time.monotonic()
        todo = [(0.5, self._restart), *([(0.75, self._kill)] if kill else [])]
        while (passed := time.monotonic() - began) < seconds and len(self.faults) < MAX_FAULTS:
            if todo and passed > todo[0][0] * seconds:
                todo.pop(0)[1]()
            self._sample()
            if time.monotonic() - told > 10:
                told = time.monotonic()
                self._print_progress(f"{passed:5.0f} s")
            time.sleep(0.5)
        self._over.set()
        for thread in threads:
            thread.join(120)
        with Client(self.server.url) as client:
            wait_until(client.idle)
            self.counts["evictions at last"] = int(client.metric("session_evictions_total"))
        self._sample()
        self.faults += [f"{what} grew from {first} to {last}" for what, first, last in self._leaks()]

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
            for what, allowed in GROWTH.items():
                values = [sample[what] for sample in samples]
                first, last = max(values[: len(values) // 2 + 1]), int(median(values[-5:]))
                if last > first + allowed:
                    yield what, first, last

    # --- the check ------------------------------------------------------------------------------------------------

    def verify(self, seconds: float) -> None:
        """Replays every session alone, for at most so long."""
        stored = {history.name: state(self.server.data_dir, history.name) for history in self.histories}
        if (code := self.server.stop()) != 0:
            self.faults.append(f"the server ended with exit code {code}")
        self.replica.start()
        said = time.monotonic()
        deadline = said + seconds
        with Client(self.replica.url, self.replica.model) as client:
            for history in self.histories:
                if time.monotonic() > deadline:
                    break
                wrong = self._replay(client, history) or self._compare(client, history, stored[history.name])
                self.replayed += 1
                if wrong is not None:
                    self.faults.append(f"{history.name}: {wrong}")
                if time.monotonic() - said > 10:
                    said = time.monotonic()
                    self._print_progress(f"replayed {self.replayed} of {len(self.histories)}")
        self.replica.stop()

    def _replay(self, client: Client, history: SessionHistory) -> str | None:
        """The first wrong answer."""
        for number, completed in enumerate(history.completed):
            body = {name: value for name, value in completed.turn.body.items() if name != "stream"}
            named = body if completed.turn.path.startswith("sessions/") else {"model": client.model} | body
            answer = comparable_answer(assert_success(client.post(completed.turn.path, named)))
            if completed.is_complete and answer != completed.received:
                heard = str(completed.received)[:200]
                return f"turn {number}, {completed.turn.path}: heard {heard}, alone {str(answer)[:200]}"
            if not completed.is_complete and not answer.get("text", "").startswith(completed.received["text"]):
                began = completed.received["text"][:200]
                return f"turn {number}, {completed.turn.path}: began {began}, alone {str(answer)[:200]}"
        return None

    def _compare(self, client: Client, history: SessionHistory, stored: dict[str, dict[bytes, bytes]]) -> str | None:
        if history.version == 0:  # asking for a session's version stores it
            return None
        alone = state(self.replica.data_dir, history.name)
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
        """Leaves no process behind."""
        for server in (self.server, self.replica):
            if server.process is not None:
                server.stop()
            if (valkey := find_valkey(server.data_dir)) is not None:
                valkey.terminate()

    # --- the report -----------------------------------------------------------------------------------------------

    def _print_progress(self, what: str) -> None:
        numbers = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        sample = self.samples[-1][-1] if self.samples and self.samples[-1] else {"rss": 0, "fds": 0, "threads": 0}
        held = f"{sample['rss'] >> 20} MiB, {sample['fds']} descriptors, {sample['threads']} threads"
        console.print(f"{what}: {numbers}; {held}; {len(self.faults)} faults", highlight=False)

    def report(self) -> bool:
        """Prints the table and the verdict; returns whether all was well."""
        table = Table("what", "value", title="Soak")
        for name, count in self.counts.items():
            table.add_row(name, str(count))
        table.add_row("versions", str(sum(history.version for history in self.histories)))
        for number, samples in enumerate(self.samples):
            for what in GROWTH:
                first, last = samples[0][what], samples[-1][what]
                shown = [f"{value >> 20} MiB" if what == "rss" else str(value) for value in (first, last)]
                most = max(sample[what] for sample in samples)
                shown.append(f"{most >> 20} MiB" if what == "rss" else str(most))
                table.add_row(f"process {number}: {what}", "{} at first, {} at last, {} at most".format(*shown))
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
    """The answer that a stream's chunks are together."""
    told = list(incoming)
    text = "".join(map(chunk_text, told))
    return {
        "text": text,
        "finish_reason": told[-1]["choices"][0]["finish_reason"],
        "adaptation": told[-1]["adaptation"],
    }


def decoded(response: httpx.Response) -> Json:
    response.read()
    return assert_success(response)


def soak(folder: Path, model: str, *, minutes: float, streams: int, seed: int = 0, kill: bool = True) -> Soak:
    """One whole run; takes at most about four times `minutes`."""
    run = Soak(folder, model, streams=streams, seed=seed)
    try:
        run.run(60 * minutes, kill=kill)
        run.verify(180 * minutes)
    finally:
        run.end()
    return run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="how long the load lasts (default 10)")
    parser.add_argument("--streams", type=int, default=16, help="users at once (default 16)")
    parser.add_argument("--model", help="what IMPRINT_MODEL takes; default: a tiny base with random weights")
    parser.add_argument("--kill", action="store_true", help="also kill -9 the server after three quarters")
    parser.add_argument("--seed", type=int, default=0, help="of what the users do (default 0)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="imprint-soak-") as name:
        folder = Path(name)
        model = given.model or str(build_tiny_base(folder / "tiny"))
        done = soak(folder, model, minutes=given.minutes, streams=given.streams, seed=given.seed, kill=given.kill)
        return 0 if done.report() else 1


if __name__ == "__main__":
    sys.exit(main())
