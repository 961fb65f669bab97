"""Short runs of the fault-injection test, and a check that it detects every kind of fault."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from service.store.redis.codec import PAGE_ROWS
from tests.oracle.comparison import Evidence, verify
from tests.oracle.deployments import DEPLOYMENTS, SHARES, embedded, plan, shared
from tests.oracle.result import Result
from tests.oracle.run import collect_evidence, run_faults
from tests.replay import ReferenceModel
from tests.service.small_disk import can_mount

pytestmark = pytest.mark.e2e
ROWS = "rows:lexical"


def first(evidence: Evidence) -> str:
    """Return a session with at least three versions, the last of a turn that was acknowledged, that has lost no key."""
    whole = (history for history in evidence.histories if history.lost_key is None)
    return next(
        history.name
        for history in whole
        if (newest := len(evidence.logs[history.name])) > 2 and any(turn.version == newest for turn in history.turns)
    )


def drop_a_turn(evidence: Evidence) -> None:
    evidence.logs[evidence.histories[0].name].pop()


def duplicate_a_turn(evidence: Evidence) -> None:
    log = evidence.logs[evidence.histories[0].name]
    log.append(log[-1] | {"version": len(log) + 1})


def change_a_row(evidence: Evidence) -> None:
    rows = evidence.content[evidence.histories[0].name][ROWS]
    number = min(rows)
    page = bytearray(rows[number])
    slot = page.index(1)  # the first slot that has a row
    page[PAGE_ROWS + slot * (len(page) // PAGE_ROWS - 1)] ^= 1
    rows[number] = bytes(page)


def drop_a_row(evidence: Evidence) -> None:
    rows = evidence.content[evidence.histories[0].name][ROWS]
    del rows[min(rows)]


def change_a_counter(evidence: Evidence) -> None:
    meta = evidence.content[evidence.histories[0].name]["meta"]
    meta[b"tokens_learned"] = str(int(meta[b"tokens_learned"]) + 1).encode()


FORGERIES: list[Callable[[Evidence], None]] = [
    drop_a_turn,
    duplicate_a_turn,
    change_a_row,
    drop_a_row,
    change_a_counter,
]


def test_kills_of_the_server_and_its_store_lose_and_double_nothing(tiny_base: Path, tmp_path: Path) -> None:
    """Also a full disk, where this process may mount one, a client that never reads, and lost keys."""
    kills = Counter({"kill of the server": 1, "kill of the store": 2, "kill of both": 1})
    faults, result = kills + Counter({"full disk": int(can_mount()), "frozen reader": 1, "key lost": 3}), Result("test")
    with embedded(tmp_path, str(tiny_base)) as deployment:
        evidence = collect_evidence(deployment, faults, tiny_base.name, result, seed=0)
    model = ReferenceModel(tiny_base)
    verify(evidence, model, result)
    assert result.passed, result.findings
    assert result.injected == faults and result.sessions > deployment.num_clients
    assert result.counts["acknowledged"] and result.counts["retries"]

    single = Evidence(
        [history for history in evidence.histories if history.name == first(evidence)], evidence.logs, evidence.content
    )
    for forge in FORGERIES:
        forged, verdict = copy.deepcopy(single), Result("forged")
        forge(forged)
        verify(forged, model, verdict)
        assert not verdict.passed, forge.__name__
        assert (verdict.lost > 0) == (forge is drop_a_turn)
        assert (verdict.doubled > 0) == (forge is duplicate_a_turn)


def test_paused_replicas_lose_and_double_nothing(tiny_base: Path, tmp_path: Path) -> None:
    """Also lines to the store that drop, delay or half-close, a client that never reads, and lost keys."""
    lines = Counter({"line dropped": 2, "line delayed": 2, "line half-closed": 2})
    faults = lines + Counter({"pause of a replica": 3, "frozen reader": 1, "key lost": 2})
    with shared(tmp_path, str(tiny_base)) as deployment:
        result = run_faults(deployment, faults, tiny_base, seed=0)
    assert result.passed, result.findings
    assert result.injected == faults and result.counts["given up"]


@pytest.mark.parametrize("name", ["sentinel", "cluster"])
def test_failovers_lose_and_double_nothing_that_was_replicated(name: str, tiny_base: Path, tmp_path: Path) -> None:
    with DEPLOYMENTS[name](tmp_path, str(tiny_base)) as deployment:
        result = run_faults(deployment, Counter({f"failover ({name})": 2}), tiny_base, seed=0)
    assert result.passed, result.findings
    assert result.injected.total() == 2 and result.versions


def test_a_run_has_as_many_faults_as_asked_for() -> None:
    for total in (1, 30, 1000):
        assert sum(faults.total() for faults in plan(total).values()) == total
    assert {name: dict(faults) for name, faults in plan(1000).items()} == SHARES
