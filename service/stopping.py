"""Stopping a server at any instant, within a time limit."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Any, Self

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
END_LIMIT_S = 4.0  # seconds that a server whose start failed or was stopped may take to clean up

log = logging.getLogger(__name__)


class StopSignals:
    """Notes SIGTERM and SIGINT from the first instant of a start until the end of the process.

    A signal must not end a starting server by itself: the server may have a child process by then. The web server takes
    the signals over while it runs (`uvicorn.Server.capture_signals`).
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}
        self._end_timer: threading.Timer | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._end_timer is not None:
            self._end_timer.cancel()  # the start has ended by itself

    def end_within(self, code: int, seconds: float = END_LIMIT_S) -> None:
        """End the process with an exit code after `seconds`, unless the start has ended by itself until then."""

        def end() -> None:
            sys.stderr.flush()
            os._exit(code)

        if self._end_timer is None:
            self._end_timer = threading.Timer(seconds, end)
            self._end_timer.daemon = True
            self._end_timer.start()

    def is_set(self) -> bool:
        """Return whether a signal has come."""
        return self.received is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number


def exit_at_signals() -> None:
    """Make SIGTERM and SIGINT end the process at once and silently, for the time before it has children."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: os._exit(0))


async def end_tasks(tasks: Iterable[asyncio.Task[Any]], timeout_s: float = 3.0) -> None:
    """Cancel tasks until they have ended, at most for `timeout_s` seconds.

    One cancellation is not enough: Python 3.11's `asyncio.wait_for` loses a cancellation that comes with a result, and
    libraries use it.
    """
    pending = {task for task in tasks if not task.done()}
    deadline = asyncio.get_running_loop().time() + timeout_s
    while pending and asyncio.get_running_loop().time() < deadline:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=0.1)
    for task in pending:
        log.warning("the task %s does not end", task.get_name())


def first_line(error: BaseException) -> str:
    """Return what an error says in one line; the name of its class for an error without words."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
