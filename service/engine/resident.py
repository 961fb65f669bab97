"""The sessions whose fast weights are on the device: pinned while a turn uses them, least recently used out first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from model.memory import Pool, SiteRows
from service.engine.types import SessionKey, Stamp


@dataclass
class _Hot:
    index: int
    stamp: Stamp
    pins: int = 0
    doomed: bool = False


class HotSessions:
    """Maps sessions to indices in a pool. `pin` and `promise` may be called from any thread, the rest from the engine's
    alone."""

    def __init__(self, make_pool: Callable[[Callable[[], bool]], Pool], *, on_evict: Callable[[], None]) -> None:
        self._sessions: OrderedDict[SessionKey, _Hot] = OrderedDict()
        self._lock = threading.Lock()
        self._on_evict = on_evict
        self.pool = make_pool(self._evict)

    def __len__(self) -> int:
        return len(self._sessions)

    def pin(self, key: SessionKey, stamp: Stamp) -> bool:
        """Keeps a session hot until `leave`, if it is hot as of then; else returns False."""
        with self._lock:
            hot = self._sessions.get(key)
            if hot is None or hot.stamp != stamp or hot.doomed:
                return False
            hot.pins += 1
            return True

    def promise(self, key: SessionKey, stamp: Stamp) -> None:
        """A pinned session will be as of then by the time that the engine reads it next."""
        with self._lock:
            self._sessions[key].stamp = stamp

    def enter(self, key: SessionKey, stamp: Stamp, stored: dict[str, SiteRows] | None) -> int:
        """The index of a session that was pinned, or (with `stored`) is made hot and pinned now. Raises
        PoolFullError."""
        if stored is not None:
            self._close(key)
            index = self.pool.open(stored)
            with self._lock:
                self._sessions[key] = _Hot(index, stamp, pins=1)
        with self._lock:
            self._sessions.move_to_end(key)
            return self._sessions[key].index

    def leave(self, key: SessionKey) -> None:
        """Undoes one pin."""
        with self._lock:
            hot = self._sessions[key]
            hot.pins -= 1
            doomed = hot.doomed and hot.pins == 0
        if doomed:
            self._close(key)

    def alone(self, key: SessionKey) -> bool:
        """Whether no other session is hot."""
        with self._lock:
            return not self._sessions.keys() - {key}

    def everyone(self) -> list[SessionKey]:
        """The sessions that are hot."""
        with self._lock:
            return list(self._sessions)

    def forget(self, key: SessionKey) -> None:
        """Drops a session; at its last `leave` if it is pinned."""
        with self._lock:
            hot = self._sessions.get(key)
            if hot is not None and hot.pins:
                hot.doomed = True
                return
        self._close(key)

    def _evict(self) -> bool:
        """Drops the least recently used session that is not pinned; False if there is none."""
        with self._lock:
            key = next((key for key, hot in self._sessions.items() if not hot.pins), None)
        if key is None:
            return False
        self._close(key)
        self._on_evict()
        return True

    def _close(self, key: SessionKey) -> None:
        with self._lock:
            hot = self._sessions.get(key)
            if hot is None or hot.pins:
                return
            del self._sessions[key]
        self.pool.close(hot.index)
