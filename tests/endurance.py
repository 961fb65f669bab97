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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from rich.table import Table

from research.plots import load_pyplot
from tests.live import find_valkey
from tests.soak import MAX_FAULTS, Soak, console
from tests.tiny import build_tiny_base

SAMPLE_EVERY_S = 2.0
SETTLE = 0.1  # share of a window at its beginning that counts for neither kind
SHOWN_SAMPLES = 13
ALLOWED_5XX = ("503", "507")  # answers with which a server may defend itself
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

    Args:
        folder: where the servers keep their data.
        model: the base.
        streams: number of users.
        abusers: number of abusive clients.
        pause_s: mean seconds between two attacks of one of them.
        seed: seed of the behaviour of both.
    """

    turns_per_s = 6  # about half of what two cores can do: a full server's latency is the length of its queue
    num_replicas = 2

    def __init__(self, folder: Path, model: str, *, streams: int, abusers: int, pause_s: float, seed: int) -> None:
        # The server's own limits face the abusive clients. Few enough sessions stay in memory that some are loaded.
        super().__init__(folder, model, streams=streams, seed=seed, hot_sessions=32, max_queue=256)
        self.windows: list[Window] = []
        self.outcomes: dict[str, int] = {}
        self._options = ["--clients", str(abusers), "--pause", str(pause_s), "--seed", str(seed)]
        self._began = 0.0

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
        run = Endurance(
            Path(name), model, streams=streams, abusers=abusers, pause_s=options.pause, seed=options.seed
        )
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
