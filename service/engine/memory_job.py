"""What every job on the device does alike: it takes its session's memory, writes to a draft of it, and lets go."""

from __future__ import annotations

from model.adaptive_lm import EMPTY_SESSION
from model.memory import Draft
from service.engine.resident import ResidentSessions
from service.engine.types import Job, JobFinished, JobStats


class MemoryJob:
    """A job and its session's memory. Only the engine's thread uses it; `close`, whatever happens."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.stats = JobStats()
        self._index = EMPTY_SESSION
        self._draft: Draft | None = None
        self._acquired = False

    @property
    def index(self) -> int:
        """The pool's index of the fast weights that this job reads."""
        return self._index

    @property
    def writes(self) -> bool:
        """Whether there may be something to gather from the device at the end."""
        return self._draft is not None

    def start(self, resident: ResidentSessions) -> None:
        """Takes its session's memory. Raises PoolFullError."""
        memory = self.job.memory
        if memory is not None:
            self._index = resident.acquire(memory.key, memory.state_id, memory.stored)
            self._acquired = True
            if memory.write:
                self._draft = resident.pool.draft(self._index)
                self._index = self._draft.index

    def close(self, resident: ResidentSessions, *, commit: bool) -> None:
        """Ends the turn: its draft becomes the session, or is forgotten."""
        if self._draft is not None:
            if commit:
                self._draft.commit()
            else:
                self._draft.rollback()
            self._draft = None
        memory = self.job.memory
        if memory is not None and (self._acquired or memory.stored is None):
            resident.release(memory.key)

    def finished(self) -> JobFinished:
        """What is told of the job, once it is done. On the device it only reads, and waits for it, so that another
        thread can do it meanwhile."""
        draft = self._draft
        if draft is None:
            return JobFinished(self.stats, {})
        sites = draft.pool.sites
        rows_by_site = draft.pool.rows(draft.index)
        touched = draft.touched()
        return JobFinished(
            self.stats,
            touched,
            rows_written=sum(len(rows.slots) for name, rows in touched.items() if name in sites),
            rows_held=sum(rows_by_site.values()),
            bytes_held=sum(rows * sites[name].config.row_bytes for name, rows in rows_by_site.items()),
            guards=draft.num_guards_shut(),
        )
