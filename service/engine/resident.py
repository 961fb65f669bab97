"""The sessions whose fast weights are on the device: pinned while a turn uses them, least recently used out first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from model.memory import Pool, SiteRows
from service.engine.types import SessionKey, StateId


@dataclass
class _Resident:
    index: int
    state_id: StateId
    pins: int = 0
    pending_removal: bool = False


class ResidentSessions:
    """Maps sessions to indices in a pool. `pin` and `set_state_id` may be called from any thread, the rest from the
    engine's alone."""

    def __init__(self, make_pool: Callable[[Callable[[], bool]], Pool], *, on_evict: Callable[[], None]) -> None:
        self._sessions: OrderedDict[SessionKey, _Resident] = OrderedDict()
        self._lock = threading.Lock()
        self._on_evict = on_evict
        self.pool = make_pool(self._evict)

    def __len__(self) -> int:
        return len(self._sessions)

    def pin(self, key: SessionKey, state_id: StateId) -> bool:
        """Keeps a session hot until `release`, if it is hot as of then; else returns False."""
        with self._lock:
            resident = self._sessions.get(key)
            if resident is None or resident.state_id != state_id or resident.pending_removal:
                return False
            resident.pins += 1
            return True

    def set_state_id(self, key: SessionKey, state_id: StateId) -> None:
        """A pinned session will be as of then by the time that the engine reads it next."""
        with self._lock:
            self._sessions[key].state_id = state_id

    def acquire(self, key: SessionKey, state_id: StateId, stored: dict[str, SiteRows] | None) -> int:
        """The index of a session that was pinned, or (with `stored`) is made hot and pinned now. Raises
        PoolFullError."""
        if stored is not None:
            self._close(key)
            index = self.pool.open(stored)
            with self._lock:
                self._sessions[key] = _Resident(index, state_id, pins=1)
        with self._lock:
            self._sessions.move_to_end(key)
            return self._sessions[key].index

    def release(self, key: SessionKey) -> None:
        """Undoes one pin."""
        with self._lock:
            resident = self._sessions[key]
            resident.pins -= 1
            pending_removal = resident.pending_removal and resident.pins == 0
        if pending_removal:
            self._close(key)

    def only_resident(self, key: SessionKey) -> bool:
        """Whether no other session is hot."""
        with self._lock:
            return not self._sessions.keys() - {key}

    def resident_keys(self) -> list[SessionKey]:
        """The sessions that are hot."""
        with self._lock:
            return list(self._sessions)

    def drop(self, key: SessionKey) -> None:
        """Drops a session; at its last `release` if it is pinned."""
        with self._lock:
            resident = self._sessions.get(key)
            if resident is not None and resident.pins:
                resident.pending_removal = True
                return
        self._close(key)

    def _evict(self) -> bool:
        """Drops the least recently used session that is not pinned; False if there is none."""
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
