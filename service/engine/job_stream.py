"""The events of one turn's jobs, as an asynchronous iterator on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import TracebackType

from service.engine.engine import Engine
from service.engine.types import Event, Job, JobFailed, JobFinished, StateId

EVENTS_PER_STEP = 16


class JobStream:
    """The jobs of one turn: submits them, yields their events, and cancels every unsettled job on exit.

    A job that uses a session's memory stays unsettled after `JobFinished` until `settle`; any other job settles at
    once.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._queue: asyncio.Queue[tuple[Job, Event]] = asyncio.Queue()
        self._numbers: dict[Job, int] = {}
        self._unsettled: set[Job] = set()
        self.finished: list[JobFinished] = []

    async def __aenter__(self) -> JobStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for job in self._unsettled:
            self._engine.cancel(job)

    def submit(self, job: Job) -> None:
        """Hand a job, whose `emit` is this stream's, to the engine."""
        self._numbers[job] = len(self._numbers)
        self._unsettled.add(job)
        self._engine.submit(job)

    def emit(self, job: Job, event: Event) -> None:
        """Take an event from the engine; the engine calls this method on the event loop."""
        self._queue.put_nowait((job, event))

    async def events(self) -> AsyncGenerator[tuple[int, Event], None]:
        """Yield each event with the number of its segment over all jobs, until every job has finished.

        Raises the error of the first job that fails.
        """
        taken = 0
        while len(self.finished) < len(self._numbers):
            job, event = await self._queue.get()
            taken += 1
            if taken % EVENTS_PER_STEP == 0:  # a queue that is not empty never gives the loop to others
                await asyncio.sleep(0)
            if isinstance(event, JobFailed):
                self._unsettled.discard(job)
                raise event.error
            if isinstance(event, JobFinished):
                self.finished.append(event)
                if job.memory is None:
                    self._settle(job, None)
            else:
                yield self._numbers[job] + event.segment, event

    def settle(self, committed: StateId | None) -> None:
        """Tell the engine under which id the written rows are stored; None discards the rows."""
        for job in list(self._unsettled):
            self._settle(job, committed)

    def _settle(self, job: Job, committed: StateId | None) -> None:
        self._unsettled.discard(job)
        self._engine.settle(job, committed)
