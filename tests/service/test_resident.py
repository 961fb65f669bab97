"""Resident sessions: pinned sessions stay, unused ones are evicted, and no row of the pool leaks."""

from __future__ import annotations

import random

import pytest
import torch

from model.memory import MemoryConfig, PoolFullError, SiteConfig, SiteRows, choose_backend
from service.engine.resident import ResidentSessions
from service.engine.types import StateId

SITE = SiteConfig("states", "hidden", slots=16, k=1, width=2)
ROWS, SESSIONS = 8, 3
CPU = torch.device("cpu")
A, B, C, D = (("tenant", name) for name in "abcd")


class CountingResidentSessions(ResidentSessions):
    """The resident sessions of a small pool, with a counter of evictions."""

    def __init__(self, rows: int = ROWS, sessions: int = SESSIONS) -> None:
        self.evicted = 0
        config = MemoryConfig(hidden_size=4, sites=(SITE,))
        super().__init__(
            config,
            rows=rows,
            sessions=sessions,
            device=CPU,
            backend=choose_backend(CPU),
            on_evict=self._count,
        )

    def _count(self) -> None:
        self.evicted += 1

    def use(self, key: tuple[str, str], state_id: StateId, rows: int = 2) -> int:
        """Load a session, release it as at the end of a turn, and return its index in the pool."""
        index = self.acquire(key, state_id, stored(rows))
        self.release(key)
        return index

    @property
    def free(self) -> tuple[int, int]:
        """The number of free sessions and of free rows in the pool."""
        return len(self.pool._sessions), len(self.pool.sites["states"].free)


def at(version: int) -> StateId:
    return (1.5, 2.5, version)


def stored(rows: int, value: float = 1.0) -> dict[str, SiteRows]:
    data = torch.full((rows, 2), value).view(torch.uint8)
    return {"states": SiteRows(torch.arange(rows, dtype=torch.int32), data)} if rows else {}


def test_a_session_is_resident_only_at_its_loaded_version() -> None:
    resident = CountingResidentSessions()
    assert not resident.pin(A, at(1))
    index = resident.use(A, at(1))
    assert len(resident) == 1
    assert not resident.pin(A, at(0))
    assert not resident.pin(A, at(2))
    assert not resident.pin(("other tenant", "a"), at(1))
    assert resident.pin(A, at(1))
    assert resident.acquire(A, at(1), None) == index
    resident.release(A)


def test_a_new_state_id_replaces_the_old_one() -> None:
    resident = CountingResidentSessions()
    index = resident.acquire(A, at(1), stored(2))
    resident.set_state_id(A, at(2))
    assert not resident.pin(A, at(1))
    assert resident.pin(A, at(2))
    assert resident.acquire(A, at(2), None) == index


def test_loading_again_replaces_the_rows() -> None:
    resident = CountingResidentSessions()
    resident.use(A, at(1), rows=3)
    index = resident.acquire(A, at(2), stored(5, value=7.0))
    assert resident.pool.num_rows(index) == {"states": 5}
    assert len(resident) == 1
    assert resident.free == (SESSIONS - 1, ROWS - 5)
    assert resident.evicted == 0, "a replacement is no eviction"
    resident.release(A)
    assert not resident.pin(A, at(1))
    assert resident.pin(A, at(2))


def test_the_least_recently_used_session_makes_room() -> None:
    resident = CountingResidentSessions()
    for key in (A, B, C):
        resident.use(key, at(1))
    assert resident.pin(A, at(1))
    resident.acquire(A, at(1), None)
    resident.release(A)
    resident.use(D, at(1))
    assert resident.evicted == 1
    assert [key for key in (A, B, C, D) if resident.pin(key, at(1))] == [A, C, D]


def test_rows_make_room_too_one_session_after_another() -> None:
    resident = CountingResidentSessions()
    resident.use(A, at(1), rows=4)
    resident.use(B, at(1), rows=3)
    resident.use(C, at(1), rows=6)
    assert resident.evicted == 2
    assert resident.free == (SESSIONS - 1, ROWS - 6)


def test_a_pinned_session_is_never_evicted_before_its_last_pin_is_gone() -> None:
    resident = CountingResidentSessions()
    index = resident.acquire(A, at(1), stored(6, value=3.0))
    assert resident.pin(A, at(1))
    resident.use(B, at(1), rows=2)
    for _ in range(2):
        with pytest.raises(PoolFullError):
            resident.acquire(C, at(1), stored(3))
        assert not resident.pin(C, at(1)), "a session that could not be loaded is not resident"
        resident.release(A)
    assert resident.evicted == 1, "B, in the first attempt"
    resident.acquire(C, at(1), stored(3))
    assert resident.evicted == 2
    assert not resident.pin(A, at(1))
    assert resident.pool.num_rows(index) != {"states": 6}


def test_a_draft_of_a_pinned_session_gets_room_from_the_others() -> None:
    resident = CountingResidentSessions(sessions=2)
    resident.use(B, at(1), rows=4)
    index = resident.acquire(A, at(1), stored(4))
    draft = resident.pool.draft(index)
    assert resident.evicted == 1, "the pool has room for two sessions, and the draft needs one"
    draft.put("states", torch.arange(4), [torch.zeros(4, 2)])
    with pytest.raises(PoolFullError):
        draft.put("states", torch.tensor([9]), [torch.zeros(1, 2)])
    draft.rollback()
    assert resident.pool.num_rows(index) == {"states": 4}


def test_a_dropped_session_is_gone_at_once() -> None:
    resident = CountingResidentSessions()
    resident.use(A, at(1))
    resident.drop(A)
    assert not resident.pin(A, at(1))
    assert (len(resident), resident.free, resident.evicted) == (0, (SESSIONS, ROWS), 0)
    resident.drop(A)
    resident.drop(B)


def test_a_session_that_is_dropped_while_in_use_goes_with_its_last_pin() -> None:
    resident = CountingResidentSessions()
    index = resident.acquire(A, at(1), stored(2))
    assert resident.pin(A, at(1))
    resident.drop(A)
    assert not resident.pin(A, at(1)), "no new turn gets the session"
    assert resident.pool.num_rows(index) == {"states": 2}, "the running turns keep it"
    resident.release(A)
    assert resident.pool.num_rows(index) == {"states": 2}
    resident.release(A)
    assert (len(resident), resident.free) == (0, (SESSIONS, ROWS))
    assert resident.use(A, at(1)) == index, "a new session of the same name may follow"
    assert resident.pin(A, at(1))


def test_a_session_of_a_thousand_turns_leaks_nothing() -> None:
    """Run turns as the engine does, from residence or from the store, with commits, failures and erasures."""
    resident, rng = CountingResidentSessions(), random.Random(0)
    versions = dict.fromkeys((A, B, C, D), 0)
    for _ in range(1000):
        key = rng.choice([A, B, C, D])
        if rng.random() < 0.1:
            resident.drop(key)
        if not resident.pin(key, at(versions[key])):
            resident.acquire(key, at(versions[key]), stored(versions[key] % 4))
        else:
            resident.acquire(key, at(versions[key]), None)
        if rng.random() < 0.1:
            resident.drop(key)
        elif rng.random() < 0.5:
            versions[key] += 1
            resident.set_state_id(key, at(versions[key]))
        resident.release(key)
    assert resident.evicted > 0
    for key in versions:
        resident.drop(key)
    assert (len(resident), resident.free) == (0, (SESSIONS, ROWS))
