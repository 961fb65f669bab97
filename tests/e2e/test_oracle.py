"""Short runs of the fault-injection test, and a check that it detects every kind of fault."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest

from service.store.redis.codec import PAGE_ROWS
from tests.oracle import Evidence, KillInjector, PauseInjector, Result, collect_evidence, run, verify
from tests.replay import ReferenceModel

pytestmark = pytest.mark.e2e
ROWS = "rows:lexical"


def first(evidence: Evidence) -> str:
    """Return a session with at least three versions."""
    return next(history.name for history in evidence.histories if len(evidence.logs[history.name]) > 2)


def drop_a_turn(evidence: Evidence) -> None:
    evidence.logs[first(evidence)].pop()


def duplicate_a_turn(evidence: Evidence) -> None:
    log = evidence.logs[first(evidence)]
    log.append(log[-1] | {"version": len(log) + 1})


def change_a_row(evidence: Evidence) -> None:
    rows = evidence.content[first(evidence)][ROWS]
    number = min(rows)
    page = bytearray(rows[number])
    slot = page.index(1)  # the first slot that has a row
    page[PAGE_ROWS + slot * (len(page) // PAGE_ROWS - 1)] ^= 1
    rows[number] = bytes(page)


def drop_a_row(evidence: Evidence) -> None:
    rows = evidence.content[first(evidence)][ROWS]
    del rows[min(rows)]


def change_a_counter(evidence: Evidence) -> None:
    meta = evidence.content[first(evidence)]["meta"]
    meta[b"tokens_learned"] = str(int(meta[b"tokens_learned"]) + 1).encode()


FORGERIES: list[Callable[[Evidence], None]] = [
    drop_a_turn,
    duplicate_a_turn,
    change_a_row,
    drop_a_row,
    change_a_counter,
]


def test_kills_of_the_server_and_its_store_lose_and_double_nothing(tiny_base: Path, tmp_path: Path) -> None:
    injector, result, model = (
        KillInjector(tmp_path, str(tiny_base), kills=6, seed=0),
        Result(),
        ReferenceModel(tiny_base),
    )
    evidence = collect_evidence(injector, tiny_base.name, result, seed=0)
    verify(evidence, model, result)
    assert result.passed, result.line()
    assert (result.counts["kills"], result.sessions) == (6, 20)
    assert result.counts["acknowledged"] and result.counts["retries"]

    single = Evidence(
        [history for history in evidence.histories if history.name == first(evidence)], evidence.logs, evidence.content
    )
    for forge in FORGERIES:
        forged, verdict = copy.deepcopy(single), Result()
        forge(forged)
        verify(forged, model, verdict)
        assert not verdict.passed, forge.__name__
        assert (verdict.lost > 0) == (forge is drop_a_turn)
        assert (verdict.duplicated > 0) == (forge is duplicate_a_turn)


def test_paused_replicas_lose_and_double_nothing(tiny_base: Path, tmp_path: Path) -> None:
    injector = PauseInjector(tmp_path, str(tiny_base), replicas=2, seconds=10, seed=0)
    result = run(injector, tiny_base, seed=0)
    assert result.passed, result.line()
    assert result.counts["pauses"] and result.counts["given up"]
