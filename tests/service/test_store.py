"""The promises of `SessionStore` (service/store/base.py), on every store: one contract, one suite."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from service.errors import EngineError, NotFound, StoreFull, VersionConflict
from service.store import CommitMetadata, IdempotencyRecord, RetentionConfig, RowBatch, SessionStore
from service.store.base import MAX_LOG_ENTRIES
from tests.service.store_backends import (
    ODD_ID,
    StoreBackend,
    assert_same,
    assert_same_rows,
    new_meta,
    rows,
)

LEARN = CommitMetadata({"kind": "learn"})


@pytest.fixture
def store(backend: StoreBackend) -> SessionStore:
    return backend.open()


# --- commit and load --------------------------------------------------------------------------------------------------


async def test_load_returns_what_was_committed(store: SessionStore, tenant: str) -> None:
    meta = new_meta("s", 1)
    sites = {"lexical": rows([0, 5, 2**31 - 1]), "layer 22": rows(range(300), row_bytes=36)}
    assert await store.load(tenant, "s") is None
    assert await store.meta(tenant, "s") is None
    assert await store.history(tenant, "s", undo=True) is None

    await store.commit(tenant, meta, sites)

    assert_same(await store.load(tenant, "s"), meta, sites)
    assert await store.meta(tenant, "s") == meta


async def test_a_commit_leaves_other_rows_and_empties_slots(store: SessionStore, tenant: str) -> None:
    await store.commit(tenant, new_meta("s", 1), {"a": rows([1, 2, 3], 1), "b": rows([0], 1, row_bytes=8)})
    cleared = {"a": np.array([2, 3, 9], np.int32)}
    await store.commit(tenant, new_meta("s", 2), {"a": rows([3, 4], 2)}, cleared_slots=cleared)
    both = RowBatch(np.array([1, 4], np.int32), np.concatenate([rows([1], 1).data, rows([4], 2).data]))
    assert_same(await store.load(tenant, "s"), new_meta("s", 2), {"a": both, "b": rows([0], 1, row_bytes=8)})

    cleared = {"b": np.array([0], np.int32)}
    await store.commit(tenant, new_meta("s", 3), {"b": rows([], row_bytes=8)}, cleared_slots=cleared)
    assert_same(await store.load(tenant, "s"), new_meta("s", 3), {"a": both})
    await store.commit(tenant, new_meta("s", 4), {"b": rows([5], row_bytes=4)})
    assert_same(await store.load(tenant, "s"), new_meta("s", 4), {"a": both, "b": rows([5], row_bytes=4)})


@pytest.mark.parametrize("version", [1, 2, 4])
async def test_conflict_changes_nothing(store: SessionStore, backend: StoreBackend, tenant: str, version: int) -> None:
    for v in (1, 2):
        await store.commit(tenant, new_meta("s", v), {"a": rows([v], v)})
    before = backend.dump(tenant)
    with pytest.raises(VersionConflict, match="version 2"):
        await store.commit(tenant, new_meta("s", version), {"a": rows([1], 9), "new": rows([1], 9)})
    assert backend.dump(tenant) == before


async def test_a_later_session_of_the_same_id_is_another_one(store: SessionStore, tenant: str) -> None:
    await store.commit(tenant, new_meta("s", 1), {})
    await store.delete(tenant, "s")
    with pytest.raises(VersionConflict, match="version 0"):
        await store.commit(tenant, new_meta("s", 2), {})
    await store.commit(tenant, replace(new_meta("s", 1), created=2e9), {})
    with pytest.raises(VersionConflict, match="created again"):
        await store.commit(tenant, new_meta("s", 2), {"a": rows([1])})


async def test_one_of_many_concurrent_commits_wins(backend: StoreBackend, tenant: str) -> None:
    stores = [backend.open() for _ in range(8)]
    outcomes = await asyncio.gather(
        *(store.commit(tenant, new_meta("s", 1), {"a": rows(range(50), i)}) for i, store in enumerate(stores)),
        return_exceptions=True,
    )
    (winner,) = [i for i, outcome in enumerate(outcomes) if outcome is None]
    assert sum(isinstance(outcome, VersionConflict) for outcome in outcomes) == 7
    assert_same(await stores[0].load(tenant, "s"), new_meta("s", 1), {"a": rows(range(50), winner)})


async def test_load_is_of_one_version(backend: StoreBackend, tenant: str) -> None:
    store, writer = backend.open(), backend.open()
    sizes = {"a": 200, "b": 50}
    done = asyncio.Event()

    async def write() -> None:
        for version in range(1, 61):
            await writer.commit(tenant, new_meta("s", version), {k: rows(range(n), version) for k, n in sizes.items()})
            await asyncio.sleep(0)
        done.set()

    async def read() -> set[int]:
        versions = set()
        while not done.is_set():
            if (loaded := await store.load(tenant, "s")) is not None:
                version = loaded.meta.version
                assert_same(loaded, new_meta("s", version), {k: rows(range(n), version) for k, n in sizes.items()})
                versions.add(version)
            await asyncio.sleep(0)
        return versions

    _, seen = await asyncio.gather(write(), read())
    assert len(seen) > 1


@pytest.mark.parametrize("count", [1, 1999, 2000, 2001, 20_000])
async def test_commit_of_any_size(store: SessionStore, tenant: str, count: int) -> None:
    slots = np.sort(np.random.default_rng(0).permutation(32_768)[:count])
    await store.commit(tenant, new_meta("s", 1), {"a": rows(slots), "b": rows(slots, 3, row_bytes=1)})
    assert_same(await store.load(tenant, "s"), new_meta("s", 1), {"a": rows(slots), "b": rows(slots, 3, row_bytes=1)})


@pytest.mark.parametrize("sites", [{}, {"a": rows([])}], ids=["no sites", "a site without rows"])
async def test_commit_without_rows(store: SessionStore, tenant: str, sites: dict[str, RowBatch]) -> None:
    await store.commit(tenant, new_meta("s", 1), sites)
    assert_same(await store.load(tenant, "s"), new_meta("s", 1), {})


async def test_rows_of_another_size_are_refused(store: SessionStore, backend: StoreBackend, tenant: str) -> None:
    await store.commit(tenant, new_meta("s", 1), {"a": rows([1])})
    before = backend.dump(tenant)
    with pytest.raises(EngineError, match="site a are 128 bytes each, not 64"):
        await store.commit(tenant, new_meta("s", 2), {"b": rows([1]), "a": rows([1], row_bytes=64)})
    assert backend.dump(tenant) == before


async def test_the_store_shares_no_value_with_its_callers(store: SessionStore, tenant: str) -> None:
    meta, sites = new_meta("s", 1), {"a": rows([1, 2], 1)}
    await store.commit(tenant, meta, sites)
    sites["a"].data[:] = 9
    meta.options["note"] = "changed"
    loaded, found = await store.load(tenant, "s"), await store.meta(tenant, "s")
    assert loaded is not None and found is not None
    loaded.sites["a"].data[:] = 9
    for each in (loaded.meta, found):
        each.options["note"] = "changed"
    assert_same(await store.load(tenant, "s"), new_meta("s", 1), {"a": rows([1, 2], 1)})


@pytest.mark.parametrize(
    ("slots", "data", "message"),
    [
        (np.zeros(1, np.int64), np.zeros((1, 4), np.uint8), r"slots must be int32 \[n\], not int64 \[1\]"),
        (np.zeros(1, np.int32), np.zeros((1, 4), np.float32), r"data must be uint8 .* not float32 \[1, 4\]"),
        (np.zeros(1, np.int32), np.zeros((1, 0), np.uint8), r"not uint8 \[1, 0\]"),
        (np.zeros(1, np.int32), np.zeros((2, 4), np.uint8), "1 slots do not match 2 rows"),
        (np.array([2, 2], np.int32), np.zeros((2, 4), np.uint8), "strictly increasing"),
        (np.array([-1], np.int32), np.zeros((1, 4), np.uint8), "none negative"),
    ],
)
def test_malformed_rows_are_refused(slots: Any, data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RowBatch(slots, data)


# --- create, configure, delete, list ----------------------------------------------------------------------------------


async def test_create_keeps_a_session_that_exists(store: SessionStore, tenant: str) -> None:
    assert await store.create(tenant, new_meta("s")) == new_meta("s")
    later = replace(new_meta("s"), created=2e9, options={})
    assert await store.create(tenant, later) == new_meta("s")
    await store.commit(tenant, new_meta("s", 1), {"a": rows([1])})
    assert await store.create(tenant, later) == new_meta("s", 1)
    assert_same(await store.load(tenant, "s"), new_meta("s", 1), {"a": rows([1])})


async def test_configure_replaces_the_options_alone(store: SessionStore, tenant: str) -> None:
    with pytest.raises(NotFound, match="'s'"):
        await store.configure(tenant, "s", {"adapt": "predict"})
    assert await store.meta(tenant, "s") is None

    await store.commit(tenant, new_meta("s", 1), {})
    configured = await store.configure(tenant, "s", {"adapt": "predict"})
    assert configured == replace(new_meta("s", 1), options={"adapt": "predict"})
    # A turn that began before carries the old options; its commit must not bring them back.
    await store.commit(tenant, new_meta("s", 2), {})
    assert await store.meta(tenant, "s") == replace(new_meta("s", 2), options={"adapt": "predict"})


async def test_delete_erases_all_of_the_session_and_nothing_else(
    store: SessionStore, backend: StoreBackend, tenant: str
) -> None:
    answer = CommitMetadata({"kind": "learn"}, b"text", IdempotencyRecord("key", 60, b"answer"))
    for sid in ("s", "s2"):
        await store.commit(tenant, new_meta(sid, 1), {"a": rows([1])}, commit_metadata=answer)
    with pytest.raises(VersionConflict, match="version 1"):
        await store.delete(tenant, "s", version=2)
    assert await store.delete(tenant, "s", version=1) is True
    assert await store.load(tenant, "s") is None
    assert await store.history(tenant, "s", undo=True) is None
    assert (await store.begin_turn(tenant, "s", write="never", names=["key"])).record is None
    assert [meta.id for meta in await store.list(tenant)] == ["s2"]
    assert await store.delete(tenant, "s") is False
    assert await store.delete(tenant, "s", version=0) is False
    assert_same(await store.load(tenant, "s2"), new_meta("s2", 1), {"a": rows([1])})
    assert (await store.begin_turn(tenant, "s2", write="never", names=["key"])).record == b"answer"


async def test_list_pages_through_the_ids_in_order(store: SessionStore, tenant: str) -> None:
    ids = sorted(["B", "a", "a.b", "a~", "b10", "b2", "z", "Z", ODD_ID])
    for sid in reversed(ids):
        await store.create(tenant, new_meta(sid))
    await store.create(tenant + "2", new_meta("c"))
    await store.delete(tenant, "b2")
    ids.remove("b2")

    for limit in (1, 3, 100):
        seen: list[str] = []
        while page := await store.list(tenant, after=seen[-1] if seen else "", limit=limit):
            assert len(page) <= limit
            seen += [meta.id for meta in page]
        assert seen == ids
    assert await store.list(tenant, limit=0) == []
    assert await store.list("nobody") == []
    assert await store.count(tenant) == len(ids)
    assert await store.count(tenant + "2") == 1
    assert await store.count("nobody") == 0


async def test_sessions_of_tenants_are_apart(store: SessionStore, tenant: str) -> None:
    await store.commit(tenant, new_meta(ODD_ID, 1), {"a": rows([1], 1)})
    await store.commit(tenant + "2", new_meta(ODD_ID, 1), {"a": rows([1], 2)})
    assert_same(await store.load(tenant, ODD_ID), new_meta(ODD_ID, 1), {"a": rows([1], 1)})
    assert await store.delete(tenant + "2", ODD_ID)
    assert_same(await store.load(tenant, ODD_ID), new_meta(ODD_ID, 1), {"a": rows([1], 1)})


@pytest.mark.parametrize("name", ["", "a}b", "a{b", "a/b", "a b", "a\n", "*"])
async def test_names_that_could_leave_their_key_are_refused(store: SessionStore, name: str) -> None:
    with pytest.raises(ValueError, match="session id must match"):
        await store.load("t", name)
    with pytest.raises(ValueError, match="tenant must match"):
        await store.commit(name, new_meta("s", 1), {})
    with pytest.raises(ValueError, match="tenant must match"):
        await store.list(name)


# --- what is kept, and for how long -----------------------------------------------------------------------------------


async def test_history_undoes_each_version(store: SessionStore, tenant: str) -> None:
    first, second = new_meta("s", 1), replace(new_meta("s", 2), digests=())
    await store.commit(tenant, first, {"a": rows([1, 2], 1)}, commit_metadata=CommitMetadata({"kind": "learn"}, b"one"))
    await store.commit(
        tenant,
        second,
        {"a": rows([2, 3], 2), "b": rows([0], 2)},
        cleared_slots={"a": np.array([1, 7], np.int32)},
        commit_metadata=CommitMetadata({"kind": "rollback", "of": 1}),
    )
    history = await store.history(tenant, "s", undo=True)
    assert history is not None and history.meta == second
    assert history.log == [{"version": 1, "kind": "learn"}, {"version": 2, "kind": "rollback", "of": 1}]
    last, earlier = history.undo
    assert (last.version, last.packed_tokens, earlier.version, earlier.packed_tokens) == (2, b"", 1, b"one")
    assert_same_rows(last.sites, {"a": rows([1, 2], 1), "b": rows([])})
    assert {site: slots.tolist() for site, slots in last.cleared_slots.items()} == {"a": [3, 7], "b": [0]}
    changed = ("version", "tokens_learned", "updated", "requests", "digests")
    assert last.meta == {name: getattr(first, name) for name in changed}
    assert_same_rows(earlier.sites, {"a": rows([])})
    assert earlier.cleared_slots["a"].tolist() == [1, 2] and earlier.meta == {}

    without_undo = await store.history(tenant, "s", undo=False, entries=1)
    assert without_undo is not None and (without_undo.log, without_undo.undo) == (history.log[1:], [])


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (RetentionConfig(versions=3), [6, 5, 4]),
        (RetentionConfig(versions=0), []),
        (RetentionConfig(history_bytes=30_000), [6, 5]),
        (RetentionConfig(history_bytes=10), []),
    ],
)
async def test_history_stays_within_its_limits(
    backend: StoreBackend, tenant: str, retention: RetentionConfig, kept: list[int]
) -> None:
    store = backend.open(retention)
    for version in range(1, 7):  # an undo step has 100 rows: 13,000 bytes
        await store.commit(tenant, new_meta("s", version), {"a": rows(range(100), version)}, commit_metadata=LEARN)
    history = await store.history(tenant, "s", undo=True)
    assert history is not None and [step.version for step in history.undo] == kept
    assert [entry["version"] for entry in history.log] == [1, 2, 3, 4, 5, 6]


async def test_a_commit_that_erases_the_past_leaves_no_undo_step(store: SessionStore, tenant: str) -> None:
    for version in (1, 2):
        learned = CommitMetadata({"kind": "learn"}, b"text")
        await store.commit(tenant, new_meta("s", version), {"a": rows([1], version)}, commit_metadata=learned)
    gone = CommitMetadata({"kind": "unlearn"}, erases_past=True)
    await store.commit(tenant, new_meta("s", 3), {"a": rows([1], 3)}, commit_metadata=gone)
    history = await store.history(tenant, "s", undo=True)
    assert history is not None and (len(history.log), history.undo) == (3, [])
    await store.commit(tenant, new_meta("s", 4), {"a": rows([1], 4)}, commit_metadata=LEARN)
    history = await store.history(tenant, "s", undo=True)
    assert history is not None and [step.version for step in history.undo] == [4]


async def test_the_log_keeps_the_newest_entries(store: SessionStore, tenant: str) -> None:
    last = MAX_LOG_ENTRIES + 2
    for version in range(1, last + 1):
        await store.commit(tenant, new_meta("s", version), {}, commit_metadata=LEARN)
    history = await store.history(tenant, "s", undo=False)
    assert history is not None and [entry["version"] for entry in history.log] == list(range(3, last + 1))


async def test_a_session_is_forgotten_when_it_was_not_used_for_its_time(backend: StoreBackend, tenant: str) -> None:
    store = backend.open(RetentionConfig(ttl_s=10_000))
    for sid, options in (("default", {}), ("own", {"ttl_s": 1000}), ("never", {"ttl_s": 0})):
        meta = replace(new_meta(sid, 1), options=dict(options))
        await store.commit(tenant, meta, {"a": rows([1])}, commit_metadata=LEARN)
    for _ in range(4):  # every turn counts as use, also a turn that only reads
        backend.advance(tenant, 400)
        assert (await store.begin_turn(tenant, "own", write="never")).meta is not None
    assert [meta.id for meta in await store.list(tenant)] == ["default", "never", "own"]
    backend.advance(tenant, 1200)
    assert [meta.id for meta in await store.list(tenant)] == ["default", "never"]
    assert await store.count(tenant) == 2, "`list` removes expired sessions from the index"
    assert await store.load(tenant, "own") is None
    assert await store.history(tenant, "own", undo=True) is None
    await store.configure(tenant, "default", {"ttl_s": 0})
    backend.advance(tenant, 100_000)
    assert_same(
        await store.load(tenant, "default"), replace(new_meta("default", 1), options={"ttl_s": 0}), {"a": rows([1])}
    )


async def test_a_full_store_learns_nothing_and_can_be_read_and_emptied(
    store: SessionStore, backend: StoreBackend, tenant: str
) -> None:
    await store.commit(tenant, new_meta("s", 1), {"a": rows([1])})
    before = backend.dump(tenant)
    with backend.full():
        for call in (
            store.commit(tenant, new_meta("s", 2), {"a": rows([2])}),
            store.create(tenant, new_meta("new")),
            store.begin_turn(tenant, "s", write="always"),
            store.configure(tenant, "s", {}),
        ):
            with pytest.raises(StoreFull) as full:
                await call
            assert full.value.code == "store_full" and full.value.retry_after
        after = backend.dump(tenant)
        assert {key: after[key] for key in before} == before
        assert (await store.begin_turn(tenant, "s", write="never")).meta == new_meta("s", 1)
        assert await store.meta(tenant, "new") is None
        assert_same(await store.load(tenant, "s"), new_meta("s", 1), {"a": rows([1])})
        assert await store.history(tenant, "s", undo=True)
        turn_start = await store.begin_turn(tenant, "s", write="always", even_if_full=True)
        await store.commit(tenant, new_meta("s", 2), {"a": rows([1])}, lease=turn_start.lease, even_if_full=True)
        assert_same(await store.load(tenant, "s"), new_meta("s", 2), {"a": rows([1])})
        assert await store.delete(tenant, "s")


async def test_memory_tells_what_is_used_and_what_may_be(store: SessionStore, tenant: str) -> None:
    before, limit = await store.memory()
    assert limit == 0
    await store.commit(tenant, new_meta("s", 1), {"a": rows(range(20_000))})
    assert (await store.memory())[0] - before > 20_000 * 100
