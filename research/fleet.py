"""A simulation of many servers on one store: who serves a turn, what is loaded, and what faults cost.

    python -m research.fleet --out fleet

Visits come at random; a visit is some turns of one session, with a pause before each next one. A server runs so many
turns at once and keeps so many sessions hot; a session that is not hot there is loaded from the store. The times are
those that `imprint bench` measured on two CPU cores (docs/performance-tables.md).
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
from bisect import insort
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from research.machine import hardware
from research.plots import load_pyplot

TABLE_SIZE = 65_537  # places of the Maglev table (Eisenbud et al. 2016), as in Envoy


@dataclass(frozen=True)
class Fleet:
    """The servers and their load. Times are in seconds.

    routing: `random`, `hash` (a session's turns go to one server) or `bounded` (the same, unless that server has 1.5
        times its share of the running turns). visits: per second. turns: of a visit. pause: before the next turn.
    slots: turns that a server runs at once. turn: time of one. load: of a session that is not hot. hot: sessions that
        a server keeps. lease: time after which the turns of a dead server go on elsewhere.
    """

    servers: int = 100
    routing: str = "bounded"
    visits: float = 29.0
    turns: int = 20
    pause: float = 15.0
    slots: int = 16
    turn: float = 2.0
    load: float = 0.0135
    megabytes: float = 1.05
    hot: int = 1024
    lease: float = 3.0
    seconds: float = 800.0
    dies_at: float = math.inf
    grows_at: float = math.inf
    grows_to: int = 0
    seed: int = 0


@dataclass
class _Server:
    running: set[int] = field(default_factory=set)
    waiting: deque[int] = field(default_factory=deque)
    hot: OrderedDict[int, None] = field(default_factory=OrderedDict)


@dataclass
class Outcome:
    """The measures of one run, in the second half of its time: visits have begun to end by then."""

    turns: int = 0
    loads: int = 0
    waits: list[float] = field(default_factory=list)
    loads_by_second: dict[int, int] = field(default_factory=dict)
    moved: float | None = None

    def table_row(self, fleet: Fleet) -> dict[str, float | None]:
        """Return what the tables show."""
        busiest = max(self.loads_by_second.values(), default=0)
        return {
            "turns_per_second": self.turns / (fleet.seconds / 2),
            "loaded": self.loads / max(1, self.turns),
            "store_mb_per_second": self.loads * fleet.megabytes / (fleet.seconds / 2),
            "busiest_second_mb": busiest * fleet.megabytes,
            "wait_p50_ms": 1e3 * float(np.quantile(self.waits, 0.5)),
            "wait_p99_ms": 1e3 * float(np.quantile(self.waits, 0.99)),
            "moved": self.moved,
        }


def maglev(servers: Sequence[int], size: int = TABLE_SIZE) -> NDArray[np.int64]:
    """Return the server [size] of each place: every server fills its own permutation of the places in turn."""
    table, filled = np.full(size, -1), 0
    seeds = [np.random.default_rng(server) for server in servers]
    offsets = [int(seed.integers(size)) for seed in seeds]
    steps = [int(seed.integers(1, size)) for seed in seeds]
    at = [0] * len(servers)
    while filled < size:
        for row, server in enumerate(servers):
            while table[place := (offsets[row] + at[row] * steps[row]) % size] >= 0:
                at[row] += 1
            table[place] = server
            filled += 1
            if filled == size:
                break
    return table


class Simulation:
    """One run of a fleet, event by event."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet, self._random = fleet, random.Random(fleet.seed)
        self._servers = [_Server() for _ in range(fleet.servers)]
        self._up: Sequence[int] = range(fleet.servers)
        self._table = maglev(self._up)
        self._events: list[tuple[float, int, str, int]] = []
        self._order, self._sessions = count(), count()
        self._came: dict[int, float] = {}
        self._left: dict[int, int] = {}
        self._at: dict[int, int] = {}
        self._running = 0
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """Return the measures after all of the time."""
        fleet = self._fleet
        self._plan(0.0, "visit", 0)
        for moment, event in ((fleet.dies_at, "die"), (fleet.grows_at, "grow")):
            if moment < fleet.seconds:
                self._plan(moment, event, 0)
        now = 0.0
        while self._events and now < fleet.seconds:
            now, _, event, session = heapq.heappop(self._events)
            getattr(self, f"_{event}")(now, session)
        return self.outcome

    def _plan(self, moment: float, event: str, session: int) -> None:
        heapq.heappush(self._events, (moment, next(self._order), event, session))

    def _visit(self, now: float, _: int) -> None:
        session = next(self._sessions)
        self._left[session] = self._fleet.turns
        self._plan(now, "turn", session)
        self._plan(now + self._random.expovariate(self._fleet.visits), "visit", 0)

    def _turn(self, now: float, session: int) -> None:
        """A turn of a session comes to a server, and waits there if all slots are taken."""
        self._came[session] = now
        self._send(now, session)

    def _send(self, now: float, session: int) -> None:
        self._at[session] = server = self._choose(session)
        here = self._servers[server]
        if len(here.running) < self._fleet.slots:
            self._begin(now, session, here)
        else:
            here.waiting.append(session)

    def _choose(self, session: int) -> int:
        if self._fleet.routing == "random":
            return self._random.choice(self._up)
        limit = math.inf if self._fleet.routing == "hash" else math.ceil(1.5 * (self._running + 1) / len(self._up))
        for server in self._places(session):
            here = self._servers[server]
            if len(here.running) + len(here.waiting) < limit:
                return server
        return self._up[0]

    def _places(self, session: int) -> Iterator[int]:
        start = hash((session, self._fleet.seed)) % TABLE_SIZE
        for step in range(TABLE_SIZE):
            yield int(self._table[(start + step) % TABLE_SIZE])

    def _begin(self, now: float, session: int, here: _Server) -> None:
        here.running.add(session)
        self._running += 1
        is_hot = session in here.hot
        here.hot[session] = None
        here.hot.move_to_end(session)
        while len(here.hot) > self._fleet.hot:
            here.hot.popitem(last=False)
        if now > self._fleet.seconds / 2:
            self._record(now, session, is_hot)
        work = self._random.lognormvariate(math.log(self._fleet.turn) - 0.125, 0.5)
        self._plan(now + (0.0 if is_hot else self._fleet.load) + work, "end", session)

    def _record(self, now: float, session: int, is_hot: bool) -> None:
        outcome = self.outcome
        outcome.turns += 1
        outcome.waits.append(now - self._came[session] + (0.0 if is_hot else self._fleet.load))
        if not is_hot:
            outcome.loads += 1
            outcome.loads_by_second[int(now)] = outcome.loads_by_second.get(int(now), 0) + 1

    def _end(self, now: float, session: int) -> None:
        here = self._servers[self._at[session]]
        here.running.discard(session)
        self._running -= 1
        self._left[session] -= 1
        if self._left[session]:
            self._plan(now + self._random.expovariate(1 / self._fleet.pause), "turn", session)
        else:
            del self._left[session], self._at[session], self._came[session]
        if here.waiting:
            self._begin(now, here.waiting.popleft(), here)

    def _die(self, now: float, _: int) -> None:
        """Server 0 dies; its turns go on elsewhere when their leases have ended."""
        gone = self._servers[0]
        self._running -= len(gone.running)
        self._events = [each for each in self._events if each[2] != "end" or each[3] not in gone.running]
        heapq.heapify(self._events)
        for session in [*gone.running, *gone.waiting]:
            self._plan(now + self._fleet.lease, "again", session)
        gone.running.clear()
        gone.waiting.clear()
        self._move(range(1, len(self._servers)))

    def _again(self, now: float, session: int) -> None:
        self._send(now, session)

    def _grow(self, now: float, _: int) -> None:
        self._servers += [_Server() for _ in range(self._fleet.grows_to - len(self._servers))]
        self._move(range(len(self._servers)))

    def _move(self, servers: Sequence[int]) -> None:
        before, self._up, self._table = self._table, servers, maglev(servers)
        self.outcome.moved = float((before != self._table).mean())


def scenarios() -> dict[str, Fleet]:
    """Return the runs of docs/scale.md."""
    peak = Fleet()
    runs = {f"100 servers, {routing}": replace(peak, routing=routing) for routing in ("random", "hash", "bounded")}
    for servers in (10, 1000):
        runs[f"{servers} servers, bounded"] = replace(peak, servers=servers, visits=peak.visits * servers / 100)
    runs["100 servers, one dies"] = replace(peak, dies_at=600.0)
    runs["100 servers become 150"] = replace(peak, grows_at=600.0, grows_to=150)
    return runs


def draw(outcomes: dict[str, Outcome], path: Path) -> None:
    """Draw the loads of each second of some runs."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    for name, outcome in outcomes.items():
        seconds: list[int] = []
        for second in outcome.loads_by_second:
            insort(seconds, second)
        axes.plot(seconds, [outcome.loads_by_second[second] for second in seconds], label=name, linewidth=0.8)
    axes.set_xlabel("second")
    axes.set_ylabel("sessions loaded")
    axes.set_yscale("log")
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("fleet"), help="Folder of the results.")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    rows, outcomes = {}, dict[str, Outcome]()
    for name, fleet in scenarios().items():
        outcomes[name] = Simulation(fleet).run()
        rows[name] = outcomes[name].table_row(fleet)
        print(name, {key: value and round(value, 4) for key, value in rows[name].items()}, flush=True)
    fleets = {name: asdict(fleet) for name, fleet in scenarios().items()}
    (out / "fleet.json").write_text(json.dumps({"machine": hardware(), "fleets": fleets, "rows": rows}, indent=1))
    draw({name: outcome for name, outcome in outcomes.items() if name.startswith("100 servers")}, out / "fleet.png")


if __name__ == "__main__":
    main()
