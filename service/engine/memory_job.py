"""What every job on the device does alike: it takes its session's memory, writes to a draft of it, and lets go."""

from __future__ import annotations

from model.adaptive_lm import EMPTY
from model.memory import Draft
from service.engine.resident import HotSessions
from service.engine.types import Finished, Job, Stats


class Hold:
    """A job and its session's memory. Only the engine's thread uses it; `close`, whatever happens."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.stats = Stats()
        self._index = EMPTY
        self._draft: Draft | None = None
        self._entered = False

    @property
    def index(self) -> int:
        """The pool's index of the fast weights that this job reads."""
        return self._index

    @property
    def writes(self) -> bool:
        """Whether there may be something to gather from the device at the end."""
        return self._draft is not None

    def start(self, hot: HotSessions) -> None:
        """Takes its session's memory. Raises PoolFullError."""
        memory = self.job.memory
        if memory is not None:
            self._index = hot.enter(memory.key, memory.stamp, memory.stored)
            self._entered = True
            if memory.write:
                self._draft = hot.pool.draft(self._index)
                self._index = self._draft.index

    def close(self, hot: HotSessions, *, commit: bool) -> None:
        """Ends the turn: its draft becomes the session, or is forgotten."""
        if self._draft is not None:
            if commit:
                self._draft.commit()
            else:
                self._draft.rollback()
            self._draft = None
        memory = self.job.memory
        if memory is not None and (self._entered or memory.stored is None):
            hot.leave(memory.key)

    def finished(self) -> Finished:
        """What is told of the job, once it is done. On the device it only reads, and waits for it, so that another
        thread can do it meanwhile."""
        draft = self._draft
        if draft is None:
            return Finished(self.stats, {})
        sites = draft.pool.sites
        held = draft.pool.rows(draft.index)
        touched = draft.touched()
        return Finished(
            self.stats,
            touched,
            rows_written=sum(len(rows.slots) for name, rows in touched.items() if name in sites),
            rows_held=sum(held.values()),
            bytes_held=sum(rows * sites[name].config.row_bytes for name, rows in held.items()),
            guards=draft.guards(),
        )
