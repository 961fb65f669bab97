"""The scheduler: first come, first served, within limits, with blocks in round robin."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.scheduler import Scheduler
from service.engine.types import JobRequest, Segment


@dataclass(eq=False)
class Run:
    """A stand-in for a job, with the fields that the scheduler reads; it has `blocks` to prefill, then it decodes."""

    num_sequences: int = 1
    num_tokens: int = 10
    blocks: int = 0

    @property
    def wants_block(self) -> bool:
        return self.blocks > 0


def scheduler(*runs: Run, max_sequences: int = 4, max_tokens: int = 100) -> Scheduler[Run]:
    new_scheduler = Scheduler[Run](max_sequences=max_sequences, max_tokens=max_tokens)
    for run in runs:
        new_scheduler.add(run)
    return new_scheduler


# Admission.


def test_runs_are_admitted_in_order_of_arrival_while_they_fit() -> None:
    runs = [Run() for _ in range(6)]
    order = scheduler(*runs)
    assert order.admit() == runs[:4]
    assert order.admit() == []
    order.remove(runs[1])
    assert order.admit() == [runs[4]]
    assert list(order.running) == [runs[0], runs[2], runs[3], runs[4]]
    assert list(order.waiting) == [runs[5]]


def test_a_run_that_does_not_fit_is_not_overtaken() -> None:
    first, large, small = Run(num_tokens=60), Run(num_tokens=50), Run(num_tokens=1)
    order = scheduler(first, large, small)
    assert order.admit() == [first]
    assert order.admit() == []
    order.remove(first)
    assert order.admit() == [large, small]


@pytest.mark.parametrize("oversize", [Run(num_sequences=5), Run(num_tokens=101)])
def test_a_run_over_a_limit_runs_alone(oversize: Run) -> None:
    before, after = Run(), Run()
    order = scheduler(before, oversize, after)
    assert order.admit() == [before]
    order.remove(before)
    assert order.admit() == [oversize]
    order.remove(oversize)
    assert order.admit() == [after]


def test_a_run_may_fill_a_limit_exactly() -> None:
    runs = [Run(num_sequences=3, num_tokens=99), Run(num_sequences=1, num_tokens=1)]
    order = scheduler(*runs)
    assert order.admit() == runs
    assert order.tokens_reserved == 100


@given(st.lists(st.builds(Run, st.integers(1, 6), st.integers(1, 130)), max_size=12), st.randoms())
def test_limits_hold_and_everyone_runs_once_in_order(runs: list[Run], random: st.randoms) -> None:  # type: ignore[valid-type]
    order, admitted = scheduler(*runs), []
    while order.waiting or order.running:
        admitted += order.admit()
        assert order.running, "at least one run is always admitted"
        assert order.tokens_reserved == sum(run.num_tokens for run in order.running)
        if len(order.running) > 1:
            assert sum(run.num_sequences for run in order.running) <= 4
            assert order.tokens_reserved <= 100
        order.remove(random.choice(list(order.running)))  # type: ignore[attr-defined]
    assert admitted == runs


# Round robin.


def test_blocks_go_round_robin_among_the_runs_that_want_one() -> None:
    long, decoding, short = Run(blocks=9), Run(), Run(blocks=2)
    order, served = scheduler(long, decoding, short), []
    order.admit()
    for _ in range(6):
        turn = order.next_block()
        assert turn is not None
        turn.blocks -= 1
        served.append(turn)
    assert served == [long, short, long, short, long, long]
    assert set(order.running) == {long, decoding, short}


def test_a_newcomer_waits_at_most_one_round() -> None:
    old = [Run(blocks=99), Run(blocks=99)]
    order = scheduler(*old)
    order.admit()
    order.next_block()
    newcomer = Run(blocks=1)
    order.add(newcomer)
    order.admit()
    assert newcomer in [order.next_block() for _ in range(3)]


def test_there_is_no_block_if_no_run_wants_one() -> None:
    order = scheduler(Run(), Run(blocks=3))
    assert order.next_block() is None, "no run is admitted yet"
    order.admit()
    order.remove(next(run for run in order.running if run.wants_block))
    assert order.next_block() is None


def test_a_run_can_be_removed_whether_running_waiting_or_unknown() -> None:
    running, waiting, stranger = Run(num_tokens=99), Run(num_tokens=99), Run()
    order = scheduler(running, waiting)
    order.admit()
    order.remove(stranger)
    order.remove(waiting)
    assert (list(order.running), list(order.waiting)) == ([running], [])
    order.remove(running)
    assert (list(order.running), list(order.waiting)) == ([], [])


# The proof sample.


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.1, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("start", [0, 7])
def test_the_proof_sample_is_a_share_of_the_segments_with_the_first_of_a_session(rate: float, start: int) -> None:
    """The sample depends on a segment's position in its session, not on the job that it is in."""
    whole = JobRequest([Segment([1])] * 300, lambda job, event: None, proof_rate=rate)
    later = JobRequest([Segment([1])] * 300, lambda job, event: None, proof_from=start, proof_rate=rate)
    proved = [whole.in_proof_sample(n) for n in range(300)]
    assert proved[0] == (rate > 0)
    assert abs(sum(proved) - 300 * rate) <= 1
    assert [later.in_proof_sample(n) for n in range(300 - start)] == proved[start:]
