"""A slice of the oracle's runs, and that the oracle would see what it looks for."""

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
    """A session with at least three versions."""
    return next(history.name for history in evidence.histories if len(evidence.logs[history.name]) > 2)


def turn_is_not_there(evidence: Evidence) -> None:
    evidence.logs[first(evidence)].pop()


def turn_is_there_twice(evidence: Evidence) -> None:
    log = evidence.logs[first(evidence)]
    log.append(log[-1] | {"version": len(log) + 1})


def row_is_another(evidence: Evidence) -> None:
    rows = evidence.found[first(evidence)][ROWS]
    number = min(rows)
    page = bytearray(rows[number])
    held = page.index(1)
    page[PAGE_ROWS + held * (len(page) // PAGE_ROWS - 1)] ^= 1
    rows[number] = bytes(page)


def row_is_not_there(evidence: Evidence) -> None:
    rows = evidence.found[first(evidence)][ROWS]
    del rows[min(rows)]


def counter_is_another(evidence: Evidence) -> None:
    meta = evidence.found[first(evidence)]["meta"]
    meta[b"tokens_learned"] = str(int(meta[b"tokens_learned"]) + 1).encode()


FORGERIES: list[Callable[[Evidence], None]] = [
    turn_is_not_there,
    turn_is_there_twice,
    row_is_another,
    row_is_not_there,
    counter_is_another,
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

    few = Evidence(
        [history for history in evidence.histories if history.name == first(evidence)], evidence.logs, evidence.found
    )
    for forge in FORGERIES:
        forged, found = copy.deepcopy(few), Result()
        forge(forged)
        verify(forged, model, found)
        assert not found.passed, forge.__name__
        assert (found.lost > 0) == (forge is turn_is_not_there)
        assert (found.duplicated > 0) == (forge is turn_is_there_twice)


def test_paused_replicas_lose_and_double_nothing(tiny_base: Path, tmp_path: Path) -> None:
    injector = PauseInjector(tmp_path, str(tiny_base), replicas=2, seconds=10, seed=0)
    result = run(injector, tiny_base, seed=0)
    assert result.passed, result.line()
    assert result.counts["pauses"] and result.counts["given up"]
