"""The sessions whose fast weights are on the device, and how a job uses one of them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch

from model.adaptive_lm import EMPTY_SESSION
from model.memory import Draft, MemoryBackend, MemoryConfig, Pool, SiteRows
from service.engine.types import JobFinished, JobRequest, JobStats, SessionKey, StateId


@dataclass
class _Resident:
    index: int
    state_id: StateId
    pins: int = 0
    pending_removal: bool = False


class ResidentSessions:
    """A map from sessions to indices in a pool, from which the least recently used session without a pin goes first.

    `pin` and `set_state_id` may be called from any thread, all other methods from the engine's thread only.
    """

    def __init__(
        self,
        config: MemoryConfig,
        *,
        rows: int,
        sessions: int,
        device: torch.device,
        backend: MemoryBackend,
        on_evict: Callable[[], None],
        on_close: Callable[[SessionKey], None] = lambda key: None,
    ) -> None:
        """Make an empty pool; the arguments are those of `Pool`.

        `on_evict` is called after each eviction, and `on_close` whenever the pool forgets a session's rows.
        """
        self._sessions: OrderedDict[SessionKey, _Resident] = OrderedDict()
        self._lock = threading.Lock()
        self._on_evict, self._on_close = on_evict, on_close
        self.pool = Pool(config, rows=rows, sessions=sessions, device=device, backend=backend, make_room=self._evict)

    def __len__(self) -> int:
        return len(self._sessions)

    def pin(self, key: SessionKey, state_id: StateId) -> bool:
        """Keep a session on the device until `release`; return False if that content is not on the device."""
        with self._lock:
            resident = self._sessions.get(key)
            if resident is None or resident.state_id != state_id or resident.pending_removal:
                return False
            resident.pins += 1
            return True

    def set_state_id(self, key: SessionKey, state_id: StateId) -> None:
        """Set the content's id of a pinned session, before the engine commits that content to the pool."""
        with self._lock:
            self._sessions[key].state_id = state_id

    def acquire(self, key: SessionKey, state_id: StateId, stored: dict[str, SiteRows] | None) -> int:
        """Return the pool's index of a pinned session; with `stored`, first copy the session to the device and pin it.

        Raises PoolFullError.
        """
        if stored is not None:
            self._close(key)
            index = self.pool.open(stored)
            with self._lock:
                self._sessions[key] = _Resident(index, state_id, pins=1)
        with self._lock:
            self._sessions.move_to_end(key)
            return self._sessions[key].index

    def release(self, key: SessionKey) -> None:
        """Remove one pin."""
        with self._lock:
            resident = self._sessions[key]
            resident.pins -= 1
            pending_removal = resident.pending_removal and resident.pins == 0
        if pending_removal:
            self._close(key)

    def only_resident(self, key: SessionKey) -> bool:
        """Return whether no other session is on the device."""
        with self._lock:
            return not self._sessions.keys() - {key}

    def resident_keys(self) -> list[SessionKey]:
        """Return the sessions that are on the device."""
        with self._lock:
            return list(self._sessions)

    def drop(self, key: SessionKey) -> None:
        """Drop a session; a pinned session goes at its last `release`."""
        with self._lock:
            resident = self._sessions.get(key)
            if resident is not None and resident.pins:
                resident.pending_removal = True
                return
        self._close(key)

    def _evict(self) -> bool:
        """Drop the least recently used session without a pin; return False if there is none."""
        with self._lock:
            key = next((key for key, resident in self._sessions.items() if not resident.pins), None)
        if key is None:
            return False
        self._close(key)
        self._on_evict()
        return True

    def _close(self, key: SessionKey) -> None:
        with self._lock:
            resident = self._sessions.get(key)
            if resident is None or resident.pins:
                return
            del self._sessions[key]
        self.pool.close(resident.index)
        self._on_close(key)


class MemoryJob:
    """The base of the jobs: acquires the session's memory, writes to a draft of the memory, and releases the session.

    Only the engine's thread uses a job, except for `finished`. Every job ends with `close`.
    """

    def __init__(self, request: JobRequest) -> None:
        self.request = request
        self.stats = JobStats()
        self._index = EMPTY_SESSION
        self._draft: Draft | None = None
        self._acquired = False
        self._pool: Pool | None = None

    @property
    def index(self) -> int:
        """The pool's index of the fast weights that the job reads."""
        return self._index

    @property
    def writes(self) -> bool:
        """True if the job may have rows to gather from the device at the end."""
        return self._draft is not None

    def start(self, resident: ResidentSessions) -> None:
        """Acquire the session's memory. Raises PoolFullError."""
        memory = self.request.memory
        if memory is not None:
            self._pool = resident.pool
            self._index = resident.acquire(memory.key, memory.state_id, memory.stored)
            self._acquired = True
            if memory.write:
                self._draft = resident.pool.draft(self._index)
                self._index = self._draft.index

    def close(self, resident: ResidentSessions, *, commit: bool) -> None:
        """Commit the draft to the pool, or roll the draft back, and release the session."""
        if self._draft is not None:
            if commit:
                self._draft.commit()
            else:
                self._draft.rollback()
            self._draft = None
        memory = self.request.memory
        if memory is not None and (self._acquired or memory.stored is None):
            resident.release(memory.key)

    def finished(self) -> JobFinished:
        """Return the last event of the job.

        This method only reads from the device and waits for the device, so that another thread may call it.
        """
        draft = self._draft
        if draft is None:
            return JobFinished(self.stats, {})
        sites = draft.pool.sites
        rows_by_site = draft.num_rows()
        touched = draft.touched()
        counted = {name for name, site in sites.items() if site.config.kind != "meaning"}  # a part of an episode
        return JobFinished(
            self.stats,
            touched,
            rows_written=sum(len(rows.slots) for name, rows in touched.items() if name in counted),
            rows_held=sum(rows for name, rows in rows_by_site.items() if name in counted),
            bytes_held=sum(rows * sites[name].config.row_bytes for name, rows in rows_by_site.items()),
            num_guards_closed=draft.num_guards_closed(),
        )
