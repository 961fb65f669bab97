"""The simulation of many servers: its routing keeps what routing promises, and no turn is lost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from research.fleet import Fleet, Simulation, maglev

SMALL = Fleet(servers=4, visits=1.0, turns=5, pause=2.0, turn=0.5, slots=4, seconds=200.0)


def test_the_places_are_shared_evenly_and_few_move() -> None:
    before, after = maglev(range(10), 2003), maglev(range(11), 2003)
    shares = np.bincount(before, minlength=10)
    assert shares.min() >= 200 and shares.max() <= 201
    assert 1 / 11 <= (before != after).mean() < 0.16


def test_a_visit_loads_its_session_once_if_its_turns_go_to_one_server() -> None:
    by_session = Simulation(replace(SMALL, routing="hash")).run()
    at_random = Simulation(replace(SMALL, routing="random")).run()
    assert by_session.loads / by_session.turns == pytest.approx(1 / SMALL.turns, abs=0.03)
    assert at_random.loads / at_random.turns > 0.6


def test_bounded_load_shortens_the_longest_waits() -> None:
    busy = replace(SMALL, visits=4.5, seconds=400.0)
    waits = {routing: Simulation(replace(busy, routing=routing)).run().waits for routing in ("hash", "bounded")}
    assert np.quantile(waits["bounded"], 0.99) < np.quantile(waits["hash"], 0.99)


def test_a_turn_that_begins_again_takes_all_of_its_time() -> None:
    """The turn of a dead server does not end the one that goes on elsewhere."""
    simulation = Simulation(replace(SMALL, turn=20.0, visits=0.2, seconds=100.0, dies_at=50.0))
    ends = dict[int, list[float]]()
    begin, end = simulation._begin, simulation._end
    begun = dict[int, float]()

    def begins(now: float, session: int, here: Any) -> None:
        begun[session] = now
        begin(now, session, here)

    def ended(now: float, session: int) -> None:
        ends.setdefault(session, []).append(now - begun[session])
        end(now, session)

    simulation._begin, simulation._end = begins, ended  # type: ignore[method-assign]
    simulation.run()
    assert min(min(times) for times in ends.values()) > 3.0


def test_a_server_that_dies_loses_no_turn() -> None:
    fleet = replace(SMALL, dies_at=100.0)
    simulation = Simulation(fleet)
    outcome = simulation.run()
    assert not simulation._servers[0].running and not simulation._servers[0].waiting
    assert outcome.moved is not None and 0.2 < outcome.moved < 0.4
    assert max(outcome.waits) >= fleet.lease, "the turns of the dead server have waited for their leases"
    assert all(session in simulation._at for session in simulation._left if session in simulation._came)
