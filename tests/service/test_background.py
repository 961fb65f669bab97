"""Background tasks: one that fails or ends is logged, counted and started again."""

from __future__ import annotations

import asyncio
import threading

import pytest

from service import background
from service.background import find_malloc_trim, keep_running, return_free_memory
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


async def test_free_memory_is_returned_again_and_again_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "TRIM_EVERY_S", 0.001)
    trim, threads, twice = find_malloc_trim() or (lambda pad: 0), list[threading.Thread](), asyncio.Event()
    loop = asyncio.get_running_loop()

    def traced(pad: int) -> int:
        threads.append(threading.current_thread())
        if len(threads) == 2:
            loop.call_soon_threadsafe(twice.set)
        return trim(pad)

    returning = asyncio.create_task(return_free_memory(traced))
    async with asyncio.timeout(30):
        await twice.wait()
    returning.cancel()
    with pytest.raises(asyncio.CancelledError):
        await returning
    assert threading.main_thread() not in threads
