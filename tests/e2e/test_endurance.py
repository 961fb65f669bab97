"""A few seconds of the endurance test: users beside abusive clients, and none of the users' sessions is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.endurance import Endurance


@pytest.mark.e2e
def test_abusive_clients_harm_no_session_and_hold_nothing(tiny_base: Path, tmp_path: Path) -> None:
    run = Endurance(tmp_path, str(tiny_base), streams=4, abusers=4, pause_s=0.05, seed=0, replicas=1)
    run.growth = {"threads": 8}  # in a few seconds memory has not settled
    try:
        run.endure(6, window_s=1.5)
        run.verify(120)
    finally:
        run.end()
    assert run.report()
    assert run.replayed == len(run.histories)
    assert [window.abusive for window in run.windows] == [False, True, False, True]
    assert sum(run.outcomes.values()) > 20
    assert max(sample["connections"] for sample in run.samples[0]) > 4 + 4  # those of users, and abandoned ones
