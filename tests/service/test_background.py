"""Background tasks: one that fails or ends is logged, counted and started again."""

from __future__ import annotations

import asyncio

import pytest

from service import background
from service.background import keep_running
from service.metrics import Metrics


async def test_a_background_task_that_fails_is_logged_counted_and_started_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background, "FIRST_PAUSE_S", 0.0)
    metrics, runs = Metrics(), asyncio.Event()
    outcomes = [KeyError("unseen"), None]

    async def task() -> None:
        if not outcomes:
            runs.set()
            await asyncio.sleep(60)
        if error := outcomes.pop(0):
            raise error

    running = asyncio.create_task(keep_running("listen", task, metrics))
    async with asyncio.timeout(5):
        await runs.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert metrics.registry.get_sample_value("imprint_background_restarts_total", {"task": "listen"}) == 2
    assert "unseen" in caplog.text and "listen has ended" in caplog.text
