"""An hour of mixed load of which a tenth of the clients is abusive.

    python -m tests.endurance --minutes 60 --abusive 0.1 --plot docs/img/endurance.png

The users are those of `tests.soak`. The abusive clients (`tests.abuse`) act in every second window of time, so that the
latencies with and without them are of the same minutes. The server is not restarted: its memory, descriptors and
threads, and the store's files, are measured over the whole time. At the end the sessions are replayed, as in the soak.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from rich.table import Table

from research.plots import load_pyplot
from tests.live import find_valkey
from tests.soak import GROWTH, MAX_FAULTS, Soak, console
from tests.tiny import build_tiny_base

SAMPLE_EVERY_S = 2.0
MAX_IDLE_S = 90.0  # more than a server lets a connection be idle
SETTLE = 0.1  # share of a window at its beginning that counts for neither kind
SHOWN_SAMPLES = 13
# The limits that face the abusive clients are the server's own. Two sessions for each place in the queue stay in
# memory; with fewer places than by default, some sessions have to be loaded from the store.
SETTINGS: dict[str, object] = {"hot_sessions": 32, "max_queue": 100}
ALLOWED_5XX = ("503", "507")  # answers with which a server may defend itself
AOF_SLACK = 64 * 2**20  # below it, the file is not rewritten; above it, when it has doubled
COLUMNS = {  # of a sample: name, unit, divisor
    "rss": ("server", "MiB", 2**20),
    "store_rss": ("Valkey", "MiB", 2**20),
    "aof": ("append-only file", "MiB", 2**20),
    "fds": ("open files", "", 1),
    "connections": ("connections", "", 1),
    "threads": ("threads", "", 1),
}


@dataclass(frozen=True)
class Window:
    """A stretch of time, in seconds of the monotonic clock, with or without abusive clients."""

    start: float
    end: float
    abusive: bool

    def seconds_of(self, latencies: Sequence[tuple[float, float]]) -> list[float]:
        """Return the latencies of the turns that began in the window, after its clients had settled."""
        settled = self.start + SETTLE * (self.end - self.start)
        return [seconds for began, seconds in latencies if settled <= began < self.end]


class Endurance(Soak):
    """One run: users and abusive clients, samples, windows, replay and report.

    Valkey rewrites its file once the file has 64 MiB and twice what it had after the last rewrite.

    Args:
        folder: where the servers keep their data.
        model: the base.
        streams: number of users.
        abusers: number of abusive clients.
        pause_s: mean seconds between two attacks of one of them.
        seed: seed of the behaviour of both.
        replicas: servers that replay at the same time, each one session after another.
    """

    turns_per_s = 6  # about half of what two cores can do: a full server's latency is the length of its queue

    def __init__(
        self, folder: Path, model: str, *, streams: int, abusers: int, pause_s: float, seed: int, replicas: int = 2
    ) -> None:
        super().__init__(folder, model, streams=streams, seed=seed, replicas=replicas, **SETTINGS)
        self.growth = {"rss": GROWTH["rss"], "threads": GROWTH["threads"]}
        self.windows: list[Window] = []
        self.outcomes: dict[str, int] = {}
        self._options = ["--clients", str(abusers), "--pause", str(pause_s), "--seed", str(seed)]
        self._began = 0.0

    def endure(self, seconds: float, window_s: float) -> None:
        """Run the users for `seconds`, and the abusive clients in every second window of `window_s`."""
        with self._abuse() as abuse, self._users():
            self._began = time.monotonic()
            while (start := time.monotonic()) < self._began + seconds and len(self.faults) < MAX_FAULTS:
                abusive = len(self.windows) % 2 == 1
                print("go" if abusive else "rest", file=abuse.stdin, flush=True)
                while time.monotonic() < start + window_s:
                    self._sample()
                    time.sleep(min(SAMPLE_EVERY_S, window_s / 4))
                self.windows.append(Window(start, time.monotonic(), abusive))
                self._print_window()
            print("rest", file=abuse.stdin, flush=True)
        self._settle()
        first, last = self.samples[0][0], self.samples[0][-1]
        if last["connections"] or last["fds"] > first["fds"] + GROWTH["fds"]:
            self.faults.append(f"{last['connections']} connections and {last['fds']} open files remain")
        if last["aof"] > 2 * last["store_rss"] + AOF_SLACK:
            self.faults.append(f"the append-only file has {last['aof']} bytes, the store {last['store_rss']}")
        bad = {
            name: count
            for name, count in self.outcomes.items()
            if name.endswith("no answer") or (name[-3] == "5" and name[-3:] not in ALLOWED_5XX and name[-3:].isdigit())
        }
        self.faults += [f"{name}, {count} times" for name, count in bad.items()]

    def _settle(self) -> None:
        """Wait until the connections of clients that are gone are closed, at most as long as one may be idle."""
        deadline = time.monotonic() + MAX_IDLE_S
        self._sample()
        while self.samples[0][-1]["connections"] and time.monotonic() < deadline:
            time.sleep(SAMPLE_EVERY_S)
            self._sample()

    @contextmanager
    def _abuse(self) -> Iterator[subprocess.Popen[str]]:
        """Run the abusive clients in a process of their own, which waits for "go"."""
        command = [sys.executable, "-m", "tests.abuse", self.server.url]
        with subprocess.Popen(
            [*command, *self._options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as abuse:
            assert abuse.stdout is not None
            assert abuse.stdout.readline() == "ready\n"
            yield abuse
            answer, _ = abuse.communicate()
            self.outcomes = json.loads(answer)

    def _sample(self) -> None:
        super()._sample()
        valkey = find_valkey(self.server.data_dir)
        self.samples[-1][-1] |= {
            "seconds": round(time.monotonic() - self._began),
            "store_rss": valkey.memory_info().rss if valkey is not None else 0,
            "aof": append_only_bytes(self.server.data_dir),
            "connections": sum(c.status == psutil.CONN_ESTABLISHED for c in self._process.net_connections("tcp")),
        }

    # --- the report -----------------------------------------------------------------------------------------------

    def percentiles(self, *, abusive: bool) -> tuple[float, float, float]:
        """Return the median, the 95th and the 99th percentile, in seconds, of all turns in windows of one kind."""
        own = [w.seconds_of(self.latencies) for w in self.windows if w.abusive == abusive]
        p50, p95, p99 = np.percentile([seconds for window in own for seconds in window], [50, 95, 99])
        return float(p50), float(p95), float(p99)

    def ratio(self) -> tuple[float, float, float]:
        """Return the ratio of the 99th percentiles with and without abuse, and its 95% interval over pairs of windows.

        A pair is a window with abuse and the window before it; the interval draws pairs again (bootstrap).
        """
        off = [w.seconds_of(self.latencies) for w in self.windows if not w.abusive]
        on = [w.seconds_of(self.latencies) for w in self.windows if w.abusive]
        pairs, rng = min(len(off), len(on)), np.random.default_rng(0)

        def ratio_of(drawn: Sequence[int]) -> float:
            both = [np.concatenate([windows[pair] for pair in drawn]) for windows in (on, off)]
            return float(np.percentile(both[0], 99) / np.percentile(both[1], 99))

        drawn = [ratio_of(rng.integers(0, pairs, pairs).tolist()) for _ in range(500)]
        low, high = np.percentile(drawn, [2.5, 97.5])
        return ratio_of(range(pairs)), float(low), float(high)

    def _print_window(self) -> None:
        window = self.windows[-1]
        seconds = window.seconds_of(self.latencies)
        p50, p99 = np.percentile(seconds, [50, 99]) * 1000 if seconds else (0, 0)
        kind = "with abuse" if window.abusive else "without"
        aof = self.samples[-1][-1]["aof"] >> 20
        label = f"{window.end - self._began:5.0f} s {kind}: p50 {p50:.0f} ms, p99 {p99:.0f} ms, AOF {aof} MiB"
        self._print_progress(label)

    def report(self) -> bool:
        """Print the tables and the verdict; return whether there was no fault."""
        samples = self.samples[0]
        table = Table(*(name for name, _, _ in COLUMNS.values()), title="Over time")
        for sample in samples[:: max(1, len(samples) // SHOWN_SAMPLES)]:
            table.add_row(*(f"{sample[key] // size}" for key, (_, _, size) in COLUMNS.items()))
        console.print(table)
        table = Table("windows", "turns", "p50 ms", "p95 ms", "p99 ms", title="Users")
        for abusive in (False, True):
            turns = sum(len(w.seconds_of(self.latencies)) for w in self.windows if w.abusive == abusive)
            shown = (f"{1000 * value:.0f}" for value in self.percentiles(abusive=abusive))
            table.add_row("with abuse" if abusive else "without", str(turns), *shown)
        console.print(table)
        console.print("p99 with abuse ÷ without: {:.2f} ({:.2f} to {:.2f})".format(*self.ratio()), highlight=False)
        table = Table("attack: outcome", "times", title="Abusive clients")
        for name, count in self.outcomes.items():
            table.add_row(name, str(count))
        console.print(table)
        return super().report()

    def draw(self, path: Path) -> None:
        """Draw memory, files, and the latencies by window. Raises PlotsMissingError."""
        figure, axes = load_pyplot().subplots(1, 3, figsize=(13, 4), layout="constrained")
        minutes = [sample["seconds"] / 60 for sample in self.samples[0]]
        for keys, place in ((("rss", "store_rss", "aof"), axes[0]), (("fds", "connections", "threads"), axes[1])):
            for key in keys:
                name, unit, size = COLUMNS[key]
                place.plot(minutes, [sample[key] / size for sample in self.samples[0]], label=name, linewidth=0.8)
            place.set(xlabel="minutes", ylabel=unit or "number", ylim=(0, None))
            place.legend(fontsize=8)
        for abusive, colour in ((False, "tab:blue"), (True, "tab:red")):
            own = [w for w in self.windows if w.abusive == abusive]
            middles = [((w.start + w.end) / 2 - self._began) / 60 for w in own]
            for percent, style in ((50, "--"), (99, "-")):
                values = [1000 * np.percentile(w.seconds_of(self.latencies), percent) for w in own]
                label = f"p{percent} {'with abuse' if abusive else 'without'}"
                axes[2].plot(middles, values, style, color=colour, marker=".", label=label)
        axes[2].set(xlabel="minutes", ylabel="ms until the answer's end", ylim=(0, None))
        axes[2].legend(fontsize=8)
        figure.savefig(path, dpi=110)


def append_only_bytes(data_dir: Path) -> int:
    """Return the size of the embedded store's append-only file: a base and what came after it."""
    size = 0
    for path in (data_dir / "valkey" / "appendonlydir").iterdir():
        with suppress(FileNotFoundError):  # a rewrite has replaced it
            size += path.stat().st_size
    return size


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.endurance", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="duration of the load (default 60)")
    parser.add_argument("--window", type=float, default=90, help="seconds of a window (default 90)")
    parser.add_argument("--clients", type=int, default=50, help="number of clients of both kinds (default 50)")
    parser.add_argument("--abusive", type=float, default=0.1, help="share of abusive clients (default 0.1)")
    parser.add_argument("--pause", type=float, default=1, help="mean seconds between a client's attacks (default 1)")
    parser.add_argument("--replay", type=float, default=15, help="minutes for the replay (default 15)")
    parser.add_argument("--plot", type=Path, help="file of the figure")
    parser.add_argument("--seed", type=int, default=0, help="seed of the clients' behaviour (default 0)")
    options = parser.parse_args()
    abusers = max(1, round(options.clients * options.abusive))
    with tempfile.TemporaryDirectory(prefix="imprint-endurance-") as name:
        model, streams = str(build_tiny_base(Path(name) / "tiny")), options.clients - abusers
        run = Endurance(Path(name), model, streams=streams, abusers=abusers, pause_s=options.pause, seed=options.seed)
        try:
            run.endure(60 * options.minutes, options.window)
            run.verify(60 * options.replay)
        finally:
            run.end()
        passed = run.report()
        if options.plot is not None:
            run.draw(options.plot)
        return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
