"""A quarter of a minute of the load test, with a restart and a kill -9."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak import soak


@pytest.mark.e2e
def test_a_quarter_of_a_minute_of_many_users(tiny_base: Path, tmp_path: Path) -> None:
    run = soak(tmp_path, str(tiny_base), minutes=0.25, streams=16, kill=True)
    assert run.report()
    assert run.replayed == len(run.histories)
    assert {"answered", "hang-ups", "refused in a restart"} <= run.counts.keys()
