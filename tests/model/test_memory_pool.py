"""The pool of fast weights: drafts are copy on write, no cell leaks, and stored rows are the rows of the session."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from model.memory import Draft, MemoryConfig, Pool, PoolFullError, SiteConfig, SiteRows, choose_backend
from model.memory.config import GATE_CLOSED, SESSION_SCALARS_SUFFIX
from model.memory.lexical.types import NGRAM_SIZES

SLOTS, P, SESSIONS, R = 16, 4, 4, len(NGRAM_SIZES)
ROWS = 22  # not a multiple of P: room for 6 cells of words, and for 22 states
NAMES = ("words", "states")
BACKEND = choose_backend(torch.device("cpu"))
CELLS, CAPACITY, CELL = {"words": 4, "states": 16}, {"words": 6, "states": 22}, {"words": P, "states": 1}
CONFIG = MemoryConfig(
    hidden_size=8,
    sites=(
        SiteConfig("words", "lexical", slots=SLOTS, k=2, width=3, cell=P),
        SiteConfig("states", "hidden", slots=SLOTS, k=2, layer=0, width=5),
    ),
)

Image = dict[str, dict[int, bytes]]  # site → slot → the row's bytes; <site>_own → 0 → the session scalars


def new_pool(rows: int = ROWS, sessions: int = SESSIONS) -> Pool:
    return Pool(CONFIG, rows=rows, sessions=sessions, backend=BACKEND)


def put(draft: Draft, name: str, cells: list[int], seed: int) -> None:
    """Write random rows into the first row of `cells` and some of the others; the other rows stay."""
    g, old = torch.Generator().manual_seed(seed), draft.get(name, torch.tensor(cells))
    shape = (len(cells), CELL[name])
    if name == "words":
        new = [
            torch.randint(1, 99, shape, generator=g, dtype=torch.int32),
            torch.randint(0, 99, shape, generator=g, dtype=torch.int32),
            torch.randint(-99, 99, (*shape, R), generator=g, dtype=torch.int32).to(torch.int16),
            torch.randint(-127, 128, (*shape, 3), generator=g, dtype=torch.int32).to(torch.int8),
        ]
    else:
        new = [torch.randn(*shape[:1], 5, generator=g)]
    chosen = torch.rand(*shape, generator=g) < 0.4
    chosen[:, 0] = True
    fields = [torch.where(_like(chosen, b), b, a) for a, b in zip(old, new, strict=True)]
    draft.put(name, torch.tensor(cells), fields)


def numbers(trust: float, balance: float, closed: float) -> Tensor:
    """Return session scalars [3, R + 1] that differ a little for each number of n-gram matches."""
    return torch.tensor([[trust], [balance], [closed]]) * torch.linspace(1.0, 0.5, R + 1)


def _like(mask: Tensor, field: Tensor) -> Tensor:
    return mask.unsqueeze(-1) if field.dim() > mask.dim() else mask.expand_as(field)


def rows_by_slot(state: Mapping[str, SiteRows]) -> Image:
    for rows in state.values():
        assert rows.slots.dtype == torch.int32
        assert rows.data.dtype == torch.uint8
        assert rows.slots.tolist() == sorted(set(rows.slots.tolist()))
    return {
        name: dict(zip(rows.slots.tolist(), (row.numpy().tobytes() for row in rows.data), strict=True))
        for name, rows in state.items()
    }


def stored(state: Image) -> dict[str, SiteRows]:
    """Return a state as a store does."""
    return {
        name: SiteRows(
            torch.tensor(sorted(rows), dtype=torch.int32),
            torch.tensor([list(rows[slot]) for slot in sorted(rows)], dtype=torch.uint8),
        )
        for name, rows in state.items()
    }


def merged(old: Image, new: Image) -> Image:
    """Return the state that a store holds after a commit: the rows of `new` replace those of `old`."""
    return {name: old.get(name, {}) | new.get(name, {}) for name in old.keys() | new.keys()}


def changed(new: Image, old: Image) -> Image:
    """Return the rows of `new` that `old` lacks or has differently."""
    rows = {name: {slot: row for slot, row in new[name].items() if old.get(name, {}).get(slot) != row} for name in new}
    return {name: found for name, found in rows.items() if found}


def contents(draft: Draft, name: str, cells: Iterable[int]) -> dict[int, bytes]:
    """Return the rows in some cells of a draft that are not empty."""
    fields, rows = draft.get(name, torch.tensor(list(cells))), {}
    for at, cell in enumerate(cells):
        for row in range(CELL[name]):
            parts = [field[at].view(CELL[name], -1)[row].contiguous() for field in fields]
            if any(bool(part.any()) for part in parts):
                rows[cell * CELL[name] + row] = b"".join(part.numpy().tobytes() for part in parts)
    return rows


def cells_of(state: Image, name: str) -> set[int]:
    return {slot // CELL[name] for slot in state.get(name, {})}


def free_counts(pool: Pool) -> list[int]:
    return [len(pool._sessions), *(len(site.free) for site in pool.sites.values())]


def learned(pool: Pool, index: int, seed: int = 0) -> None:
    """Give a session a few rows at each site, and session scalars."""
    draft = pool.draft(index)
    put(draft, "words", [3, 1], seed)
    put(draft, "states", [0, 15], seed + 1)
    pool.sites["words"].session_scalars[draft.index] = numbers(0.1 + seed, -3.0, 1.0)
    draft.commit()


class PoolMachine(RuleBasedStateMachine):
    """A pool compared with plain dictionaries. As in serving, a session has one draft at a time and outlives it."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = new_pool()
        words = self.pool.sites["words"]
        words.tables = words.tables.clone()  # as on a GPU: a copy of the host's tables
        self.model: dict[int, Image] = {}
        self.held: dict[int, dict[str, set[int]]] = {}  # session or draft → site → the cells that have a physical cell
        self.open: dict[int, tuple[Draft, Image]] = {}  # index of a draft → the draft and its state

    def free(self, name: str) -> int:
        return CAPACITY[name] - sum(len(cells[name]) for cells in self.held.values())

    @property
    def full(self) -> bool:
        return len(self.model) + len(self.open) == SESSIONS

    @property
    def idle(self) -> list[int]:
        """Return the sessions without a draft."""
        return [index for index in self.model if all(one.base_index != index for one, _ in self.open.values())]

    @precondition(lambda self: not self.full)
    @rule()
    def open_empty(self) -> None:
        index = self.pool.open()
        assert index not in self.model.keys() | self.open.keys()
        self.model[index], self.held[index] = {}, {name: set() for name in NAMES}

    @precondition(lambda self: not self.full and self.model)
    @rule(data=st.data())
    def open_copy(self, data: st.DataObject) -> None:
        """Open the stored state of another session; if the pool is too full, nothing happens."""
        state = self.model[data.draw(st.sampled_from(sorted(self.model)))]
        before = free_counts(self.pool)
        if any(self.free(name) < len(cells_of(state, name)) for name in NAMES):
            with pytest.raises(PoolFullError):
                self.pool.open(stored(state))
            assert free_counts(self.pool) == before
        else:
            index = self.pool.open(stored(state))
            self.model[index] = {name: dict(rows) for name, rows in state.items()}
            self.held[index] = {name: cells_of(state, name) for name in NAMES}

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
        self.open[draft.index] = (draft, self.model[draft.base_index])
        self.held[draft.index] = {name: set() for name in NAMES}

    @precondition(lambda self: self.open)
    @rule(data=st.data(), name=st.sampled_from(NAMES), seed=st.integers(0, 99))
    def put(self, data: st.DataObject, name: str, seed: int) -> None:
        cells = data.draw(st.lists(st.integers(0, CELLS[name] - 1), min_size=1, max_size=8, unique=True))
        one, state = self.open[data.draw(st.sampled_from(sorted(self.open)))]
        held = self.held[one.index][name]
        if len(set(cells) - held) > self.free(name):
            with pytest.raises(PoolFullError):
                put(one, name, cells, seed)
        else:
            put(one, name, cells, seed)
            held.update(cells)
            if rows := contents(one, name, cells):
                self.open[one.index] = (one, merged(state, {name: rows}))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), drawn=st.tuples(st.floats(-4, -1, width=32), st.floats(-9, 9, width=32), st.booleans()))
    def experience(self, data: st.DataObject, drawn: tuple[float, float, bool]) -> None:
        one, state = self.open[data.draw(st.sampled_from(sorted(self.open)))]
        session_scalars = numbers(*drawn)
        self.pool.sites["words"].session_scalars[one.index] = session_scalars
        self.open[one.index] = (
            one,
            merged(state, {"words" + SESSION_SCALARS_SUFFIX: {0: session_scalars.numpy().tobytes()}}),
        )

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        one, state = self.open.pop(data.draw(st.sampled_from(sorted(self.open))))
        for name, cells in self.held.pop(one.index).items():
            self.held[one.base_index][name] |= cells
        self.model[one.base_index] = state
        one.commit()

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def rollback(self, data: st.DataObject) -> None:
        one, _ = self.open.pop(data.draw(st.sampled_from(sorted(self.open))))
        del self.held[one.index]
        one.rollback()

    @precondition(lambda self: self.idle)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(self.idle))
        self.pool.close(session)
        del self.model[session], self.held[session]

    @invariant()
    def pool_equals_model(self) -> None:
        for index, state in self.model.items():
            assert rows_by_slot(self.pool.dump(index)) == state
            assert self.pool.num_rows(index) == {name: len(state.get(name, {})) for name in NAMES}
        for index, (one, state) in self.open.items():
            assert rows_by_slot(self.pool.dump(index)) == state
            assert rows_by_slot(one.touched()) == changed(state, self.model[one.base_index])
            assert one.num_rows() == {name: len(state.get(name, {})) for name in NAMES}

    @invariant()
    def nothing_leaks(self) -> None:
        sessions = SESSIONS - len(self.model) - len(self.open)
        assert free_counts(self.pool) == [sessions, *(self.free(name) for name in NAMES)]

    @invariant()
    def the_tables_of_device_and_host_agree(self) -> None:
        assert all((site.tables.numpy() == site.physical_cells).all() for site in self.pool.sites.values())

    @invariant()
    def the_empty_session_stays_empty(self) -> None:
        assert not any(site.tables[0].any() or site.session_scalars[0].any() for site in self.pool.sites.values())
        assert not any(field[0].any() for site in self.pool.sites.values() for field in site.fields)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def test_a_read_sees_each_sessions_own_rows_and_nothing_of_cells_never_written() -> None:
    pool = new_pool()
    first, second = pool.open(), pool.open()
    learned(pool, first)
    draft = pool.draft(second)
    put(draft, "words", [1], seed=7)
    index, cells = torch.tensor([0, first, second, draft.index]), torch.tensor([[1, 3]]).expand(4, 2)
    mine, drafted = pool.draft(first).get("words", cells[0]), draft.get("words", cells[0, :1])
    for field, base_field, new in zip(pool.sites["words"].read(index, cells), mine, drafted, strict=True):
        assert torch.equal(field[1], base_field)
        assert torch.equal(field[3, :1], new)
        assert base_field.any()
        assert new.any()
        assert not field[0].any()
        assert not field[2].any()
        assert not field[3, 1].any()


def test_a_draft_changes_its_base_only_when_it_is_committed() -> None:
    pool = new_pool()
    index = pool.open()
    learned(pool, index)
    before, free = rows_by_slot(pool.dump(index)), free_counts(pool)
    for end in ("rollback", "commit"):
        draft = pool.draft(index)
        put(draft, "words", [1, 2], seed=5)
        pool.sites["words"].session_scalars[draft.index] = 3.0
        after = rows_by_slot(pool.dump(draft.index))
        assert rows_by_slot(pool.dump(index)) == before != after
        getattr(draft, end)()
        assert rows_by_slot(pool.dump(index)) == (before if end == "rollback" else after)
    free[1] -= 1  # cell 2 is new; cell 1 replaces a physical cell that is free again
    assert free_counts(pool) == free


def test_only_rows_that_changed_are_touched() -> None:
    """One row of a cell of four changed: the other three are copied, but not stored again."""
    pool = new_pool()
    index = pool.open()
    learned(pool, index)
    draft, cells = pool.draft(index), torch.tensor([1, 3])
    fields = [field.clone() for field in draft.get("words", cells)]
    draft.put("words", cells, fields)
    assert draft.touched() == {}, "a write of the same bits is no change"
    fields[3][1, 2, 0] += 1
    draft.put("words", cells, fields)
    touched = draft.touched()
    assert set(touched) == {"words"}
    assert touched["words"].slots.tolist() == [3 * P + 2]


def test_session_scalars_are_stored_even_if_no_row_changed() -> None:
    pool = new_pool()
    index = pool.open()
    draft = pool.draft(index)
    assert draft.touched() == {}
    pool.sites["words"].session_scalars[draft.index] = numbers(0.0, -2.5, 0.0)
    touched = draft.touched()
    assert set(touched) == {"words" + SESSION_SCALARS_SUFFIX}
    draft.commit()
    assert pool.sites["words"].session_scalars[pool.open(touched)].tolist() == numbers(0.0, -2.5, 0.0).tolist()
    assert pool.num_rows(index) == {"words": 0, "states": 0}


@pytest.mark.parametrize(("was", "is_now", "counted"), [(0.0, 1.0, 1), (1.0, 0.0, -1), (1.0, 1.0, 0), (0.0, 0.0, 0)])
def test_a_turn_counts_the_gates_that_it_closed(was: float, is_now: float, counted: int) -> None:
    pool = new_pool()
    index = pool.open()
    pool.sites["words"].session_scalars[index, GATE_CLOSED, 2] = was
    draft = pool.draft(index)
    pool.sites["words"].session_scalars[draft.index, GATE_CLOSED, 2] = is_now
    assert draft.num_guards_closed() == counted


def test_a_dump_opens_as_the_same_bits_session_scalars_included() -> None:
    pool, other = new_pool(), new_pool()
    index = pool.open()
    learned(pool, index, seed=3)
    learned(other, other.open(), seed=4)
    state = pool.dump(index)
    again = other.open(state)
    assert rows_by_slot(other.dump(again)) == rows_by_slot(state)
    assert set(state) == {"words", "states", "words" + SESSION_SCALARS_SUFFIX}
    for name, site in pool.sites.items():
        assert torch.equal(site.session_scalars[index], other.sites[name].session_scalars[again])
        cells = torch.arange(CELLS[name])[None]
        fields = site.read(torch.tensor([index]), cells)
        for field, other_field in zip(fields, other.sites[name].read(torch.tensor([again]), cells), strict=True):
            assert torch.equal(field, other_field)


@pytest.mark.parametrize("trust", [0.5, 0.25, 0.0])
def test_what_was_touched_over_the_old_dump_is_the_new_dump(trust: float) -> None:
    """The store applies the rows of a commit to the rows that it has; the result must open as the session."""
    pool = new_pool(rows=2 * ROWS)
    index = pool.open()
    learned(pool, index)
    pool.sites["words"].session_scalars[index] = numbers(0.5, 0.0, 0.0)
    old = rows_by_slot(pool.dump(index))
    draft = pool.draft(index)
    put(draft, "words", [1, 2], seed=6)
    put(draft, "words", [2, 0], seed=8)
    put(draft, "states", [15, 4, 7], seed=7)
    pool.sites["words"].session_scalars[draft.index] = numbers(trust, 0.0, 0.0)
    touched = rows_by_slot(draft.touched())
    draft.commit()
    assert cells_of(touched, "words") == {0, 1, 2}
    assert cells_of(touched, "states") == {4, 7, 15}
    assert ("words" + SESSION_SCALARS_SUFFIX in touched) == (trust != 0.5)
    again = pool.open(stored(merged(old, touched)))
    assert rows_by_slot(pool.dump(again)) == rows_by_slot(pool.dump(index))
    assert pool.sites["words"].session_scalars[again].tolist() == numbers(trust, 0.0, 0.0).tolist()


def test_a_reused_index_has_no_state() -> None:
    pool = new_pool(sessions=1)
    index = pool.open()
    pool.sites["words"].session_scalars[index] = 2.0
    pool.close(index)
    assert pool.open() == index
    assert pool.dump(index) == {}
    assert not pool.sites["words"].session_scalars.any()


def test_a_reused_physical_cell_holds_none_of_its_old_rows() -> None:
    """A stored session has one row in a cell and gets a physical cell that was full of another session's rows."""
    pool = Pool(CONFIG, rows=2 * P, sessions=2, backend=BACKEND)
    first = pool.open()
    draft = pool.draft(first)
    full = [field.clone().fill_(5) for field in draft.get("words", torch.tensor([0, 1]))]
    draft.put("words", torch.tensor([0, 1]), full)
    draft.commit()
    pool.close(first)
    row = SiteRows(torch.tensor([P + 2], dtype=torch.int32), torch.full((1, CONFIG.sites[0].row_bytes), 9).byte())
    again = pool.open({"words": row})
    assert rows_by_slot(pool.dump(again)) == rows_by_slot({"words": row})
    assert pool.num_rows(again) == {"words": 1, "states": 0}


@pytest.mark.parametrize("end", ["close", "commit", "rollback"])
def test_a_free_cell_holds_nothing(end: str) -> None:
    pool = new_pool()
    index = pool.open()
    learned(pool, index, seed=1)
    draft = pool.draft(index)
    put(draft, "states", [0, 1], seed=2)
    assert all(site.free.utilization for site in pool.sites.values())
    draft.rollback() if end == "rollback" else draft.commit()
    if end == "close":
        pool.close(index)
    for site in pool.sites.values():
        free = np.setdiff1d(np.arange(len(site.fields[0])), site.physical_cells)
        assert len(free) and not any(field[free].any() for field in site.fields)


def test_a_state_that_does_not_fit_is_not_opened_in_part() -> None:
    """The rows of the first site fit, those of the second do not: no rows and no session stay behind."""
    source = new_pool()
    index = source.open()
    learned(source, index, seed=2)
    state, pool = source.dump(index), new_pool(rows=SLOTS)
    assert {"words", "states"} <= state.keys()
    draft = pool.draft(pool.open())
    put(draft, "states", list(range(SLOTS)), seed=0)
    before = free_counts(pool)
    with pytest.raises(PoolFullError):
        pool.open(state)
    assert free_counts(pool) == before


class Evictable:
    """Closes one of the sessions in `cold` each time that room is needed."""

    def __init__(self) -> None:
        self.cold: list[int] = []
        self.pool: Pool | None = None

    def make_room(self) -> bool:
        if not self.cold or self.pool is None:
            return False
        self.pool.close(self.cold.pop(0))
        return True


def test_room_is_made_only_when_needed_and_as_often_as_needed() -> None:
    evictable = Evictable()
    pool = evictable.pool = Pool(CONFIG, rows=10, sessions=3, make_room=evictable.make_room, backend=BACKEND)
    cold = [pool.open(), pool.open()]
    for index in cold:
        draft = pool.draft(index)
        put(draft, "states", [0, 1, 2, 3], seed=index)
        draft.commit()
    evictable.cold = list(cold)
    draft = pool.draft(pool.open())
    assert evictable.cold == cold[1:], "the pool has room for three sessions: one was closed"
    put(draft, "states", [0, 1, 2, 3, 4, 5], seed=9)
    assert evictable.cold == cold[1:], "six rows were free"
    put(draft, "states", [6, 7], seed=9)
    assert evictable.cold == []
    before = rows_by_slot(pool.dump(draft.index))
    with pytest.raises(PoolFullError, match="3 needed, 2 of 10 free"):
        put(draft, "states", [0, 9, 10, 11], seed=9)
    assert rows_by_slot(pool.dump(draft.index)) == before
