"""Fast weights on the device: drafts are copy on write, nothing leaks, and what is stored is what was there."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from model.memory import Draft, MemoryConfig, Pool, PoolFullError, SiteConfig, SiteRows
from model.memory.config import TRUST

SLOTS, ROWS, SESSIONS = 16, 14, 4
NAMES = ("words", "states")
CONFIG = MemoryConfig(
    hidden_size=8,
    sites=(
        SiteConfig("words", "lexical", slots=SLOTS, k=2, pairs=3),
        SiteConfig("states", "hidden", slots=SLOTS, k=2, layer=0, width=5),
    ),
)

Image = dict[str, dict[int, bytes]]  # site → slot → the row's bytes


def new_pool(rows: int = ROWS, sessions: int = SESSIONS) -> Pool:
    return Pool(CONFIG, rows=rows, sessions=sessions)


def put(draft: Draft, name: str, slots: list[int], seed: int) -> None:
    """Writes random rows, to `slots`."""
    g, n = torch.Generator().manual_seed(seed), len(slots)
    if name == "words":
        fields = [torch.randint(0, 99, (n, 3), generator=g, dtype=torch.int32), torch.randn(n, 3, generator=g)]
    else:
        fields = [torch.randn(n, 5, generator=g)]
    draft.put(name, torch.tensor(slots), fields)


def image(state: Mapping[str, SiteRows]) -> Image:
    for rows in state.values():
        assert rows.slots.dtype == torch.int32
        assert rows.data.dtype == torch.uint8
        assert rows.slots.tolist() == sorted(set(rows.slots.tolist()))
    return {
        name: dict(zip(rows.slots.tolist(), (row.numpy().tobytes() for row in rows.data), strict=True))
        for name, rows in state.items()
    }


def merged(old: Image, new: Image) -> Image:
    """What a store holds after a commit: each row of `new` replaces that of `old`."""
    return {name: old.get(name, {}) | new.get(name, {}) for name in old.keys() | new.keys()}


def free_counts(pool: Pool) -> list[int]:
    return [pool._sessions._top, *(site.free._top for site in pool.sites.values())]


def learned(pool: Pool, index: int, seed: int = 0) -> None:
    """Makes a session hold a few rows at each site, and trust."""
    draft = pool.draft(index)
    put(draft, "words", [3, 1, 9], seed)
    put(draft, "states", [0, 15], seed + 1)
    pool.sites["words"].trust[draft.index] = 0.1 + seed
    draft.commit()


class PoolMachine(RuleBasedStateMachine):
    """A pool beside a plain dictionary. As in serving, a session has one draft at a time and outlives it."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = new_pool()
        self.model: dict[int, Image] = {}
        self.open: dict[int, tuple[Draft, Image]] = {}  # by the index of the draft: it, and what it wrote

    def free(self, name: str) -> int:
        used = sum(len(rows.get(name, {})) for rows in self.model.values())
        return ROWS - used - sum(len(own.get(name, {})) for _, own in self.open.values())

    @property
    def full(self) -> bool:
        return len(self.model) + len(self.open) == SESSIONS

    @property
    def idle(self) -> list[int]:
        """Sessions without a draft."""
        return [index for index in self.model if all(one.base != index for one, _ in self.open.values())]

    def view(self, draft: int) -> Image:
        one, own = self.open[draft]
        return merged(self.model[one.base], own)

    @precondition(lambda self: not self.full)
    @rule()
    def open_empty(self) -> None:
        index = self.pool.open()
        assert index not in self.model.keys() | self.open.keys()
        self.model[index] = {}

    @precondition(lambda self: not self.full and self.model)
    @rule(data=st.data())
    def open_copy(self, data: st.DataObject) -> None:
        """Opens what another session is stored as; without room for it, nothing happens."""
        other = data.draw(st.sampled_from(sorted(self.model)))
        before, state = free_counts(self.pool), self.model[other]
        if any(self.free(name) < len(state.get(name, {})) for name in NAMES):
            with pytest.raises(PoolFullError):
                self.pool.open(self.pool.dump(other))
            assert free_counts(self.pool) == before
        else:
            index = self.pool.open(self.pool.dump(other))
            self.model[index] = {name: dict(rows) for name, rows in state.items()}

    @precondition(lambda self: self.full)
    @rule()
    def open_too_many(self) -> None:
        with pytest.raises(PoolFullError):
            self.pool.open()
        with pytest.raises(PoolFullError):
            self.pool.draft(min(self.model))

    @precondition(lambda self: not self.full and self.idle)
    @rule(data=st.data())
    def draft(self, data: st.DataObject) -> None:
        draft = self.pool.draft(data.draw(st.sampled_from(self.idle)))
        self.open[draft.index] = (draft, {})

    @precondition(lambda self: self.open)
    @rule(
        data=st.data(),
        name=st.sampled_from(NAMES),
        slots=st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=8, unique=True),
        seed=st.integers(0, 99),
    )
    def put(self, data: st.DataObject, name: str, slots: list[int], seed: int) -> None:
        one, own = self.open[data.draw(st.sampled_from(sorted(self.open)))]
        fresh = [slot for slot in slots if slot not in own.get(name, {})]
        if len(fresh) > self.free(name):
            with pytest.raises(PoolFullError):
                put(one, name, slots, seed)
        else:
            put(one, name, slots, seed)
            fields = one.get(name, torch.tensor(slots))
            rows = [b"".join(field[i].numpy().tobytes() for field in fields) for i in range(len(slots))]
            own.setdefault(name, {}).update(zip(slots, rows, strict=True))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        draft = data.draw(st.sampled_from(sorted(self.open)))
        self.model[self.open[draft][0].base] = self.view(draft)
        self.open.pop(draft)[0].commit()

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def rollback(self, data: st.DataObject) -> None:
        self.open.pop(data.draw(st.sampled_from(sorted(self.open))))[0].rollback()

    @precondition(lambda self: self.idle)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(self.idle))
        self.pool.close(session)
        del self.model[session]

    @invariant()
    def pool_equals_model(self) -> None:
        for index, state in self.model.items():
            assert image(self.pool.dump(index)) == state
            assert self.pool.rows(index) == {name: len(state.get(name, {})) for name in NAMES}
        for index, (one, own) in self.open.items():
            assert image(self.pool.dump(index)) == self.view(index)
            assert image(one.touched()) == own

    @invariant()
    def nothing_leaks(self) -> None:
        sessions = SESSIONS - len(self.model) - len(self.open)
        assert free_counts(self.pool) == [sessions, *(self.free(name) for name in NAMES)]

    @invariant()
    def the_empty_session_stays_empty(self) -> None:
        assert not any(site.tables[0].any() for site in self.pool.sites.values())
        assert not any(field[0].any() for site in self.pool.sites.values() for field in site.fields)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def test_a_read_sees_each_sessions_own_rows_and_nothing_of_slots_never_written() -> None:
    pool = new_pool()
    first, second = pool.open(), pool.open()
    learned(pool, first)
    draft = pool.draft(second)
    put(draft, "states", [0], seed=7)
    (rows,) = pool.sites["states"].read(
        torch.tensor([0, first, second, draft.index]), torch.tensor([[0, 15]]).expand(4, 2)
    )
    (own,) = pool.draft(first).get("states", torch.tensor([0, 15]))
    (drafted,) = draft.get("states", torch.tensor([0]))
    assert torch.equal(rows[1], own)
    assert torch.equal(rows[3, :1], drafted)
    assert not rows[0].any()
    assert not rows[2].any()
    assert not rows[3, 1].any()


def test_a_draft_changes_its_base_only_when_it_is_committed() -> None:
    pool = new_pool()
    index = pool.open()
    learned(pool, index)
    before, free = image(pool.dump(index)), free_counts(pool)
    for end in ("rollback", "commit"):
        draft = pool.draft(index)
        put(draft, "words", [1, 2], seed=5)
        pool.sites["words"].trust[draft.index] = 3.0
        after = image(pool.dump(draft.index))
        assert image(pool.dump(index)) == before
        getattr(draft, end)()
        assert image(pool.dump(index)) == (before if end == "rollback" else after)
    free[1] -= 1  # slot 2 is new, slot 1 replaces a row that is free again
    assert free_counts(pool) == free


def test_a_dump_opens_as_the_same_bits_trust_included() -> None:
    pool, other = new_pool(), new_pool()
    index = pool.open()
    learned(pool, index, seed=3)
    learned(other, other.open(), seed=4)
    state = pool.dump(index)
    again = other.open(state)
    assert image(other.dump(again)) == image(state)
    assert set(state) == {"words", "states", "words" + TRUST}
    for name, site in pool.sites.items():
        assert torch.equal(site.trust[index], other.sites[name].trust[again])
        slots = torch.arange(SLOTS)[None]
        fields = site.read(torch.tensor([index]), slots)
        for mine, theirs in zip(fields, other.sites[name].read(torch.tensor([again]), slots), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("trust", [0.5, 0.25, 0.0])
def test_what_was_touched_over_the_old_dump_is_the_new_dump(trust: float) -> None:
    """The store applies a commit's rows to what it has; opened again, that must be the session, its trust included."""
    pool = new_pool()
    index = pool.open()
    learned(pool, index)
    pool.sites["words"].trust[index] = 0.5
    old = image(pool.dump(index))
    draft = pool.draft(index)
    put(draft, "words", [1, 2], seed=5)
    put(draft, "words", [2, 7], seed=6)
    put(draft, "states", [15, 4], seed=7)
    pool.sites["words"].trust[draft.index] = trust
    touched = image(draft.touched())
    draft.commit()
    stored = merged(old, touched)
    assert {name: set(rows) for name, rows in touched.items() if name in NAMES} == {
        "words": {1, 2, 7},
        "states": {4, 15},
    }
    again = pool.open(
        {
            name: SiteRows(
                torch.tensor(sorted(rows), dtype=torch.int32),
                torch.tensor([list(rows[slot]) for slot in sorted(rows)], dtype=torch.uint8),
            )
            for name, rows in stored.items()
        }
    )
    assert image(pool.dump(again)) == image(pool.dump(index))
    assert float(pool.sites["words"].trust[again]) == trust


def test_an_index_that_is_used_again_remembers_nothing() -> None:
    pool = new_pool(sessions=1)
    index = pool.open()
    pool.sites["words"].trust[index] = 2.0
    pool.close(index)
    assert pool.open() == index
    assert pool.dump(index) == {}
    assert not pool.sites["words"].trust.any()


def test_what_does_not_fit_whole_is_not_opened_at_all() -> None:
    """The first site's rows fit, the second's do not: neither they nor the session stay behind."""
    source = new_pool()
    index = source.open()
    learned(source, index)
    state, pool = source.dump(index), new_pool(rows=SLOTS + 1)
    draft = pool.draft(pool.open())
    put(draft, "states", list(range(SLOTS)), seed=0)
    before = free_counts(pool)
    with pytest.raises(PoolFullError):
        pool.open(state)
    assert free_counts(pool) == before


class Evictable:
    """Closes the sessions in `cold`, one each time that room is asked for."""

    def __init__(self) -> None:
        self.cold: list[int] = []
        self.pool: Pool | None = None

    def make_room(self) -> bool:
        if not self.cold or self.pool is None:
            return False
        self.pool.close(self.cold.pop(0))
        return True


def test_room_is_made_only_when_needed_and_as_often_as_it_takes() -> None:
    evictable = Evictable()
    pool = evictable.pool = Pool(CONFIG, rows=10, sessions=3, make_room=evictable.make_room)
    cold = [pool.open(), pool.open()]
    for index in cold:
        draft = pool.draft(index)
        put(draft, "words", [0, 1, 2, 3], seed=index)
        draft.commit()
    evictable.cold = list(cold)
    draft = pool.draft(pool.open())
    assert evictable.cold == cold[1:], "three sessions and two asked for: one had to go"
    put(draft, "words", [0, 1, 2, 3, 4, 5], seed=9)
    assert evictable.cold == cold[1:], "six rows were free"
    put(draft, "words", [6, 7], seed=9)
    assert evictable.cold == []
    before = image(pool.dump(draft.index))
    with pytest.raises(PoolFullError, match="3 needed, 2 of 10 free"):
        put(draft, "words", [0, 9, 10, 11], seed=9)
    assert image(pool.dump(draft.index)) == before
