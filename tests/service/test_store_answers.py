"""The answers that a store keeps: those that it remembers for requests sent again, and responses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from service.errors import StoreFull, VersionConflict
from service.store import CommitMetadata, IdempotencyRecord, SessionStore
from service.store.answers import KEPT_OF_SESSION, KEPT_OF_TENANT, erased_answer
from tests.service.store_backends import StoreBackend, new_meta


@pytest.fixture
def store(backend: StoreBackend) -> SessionStore:
    return backend.open()


async def test_an_answer_is_recorded_for_its_time(store: SessionStore, backend: StoreBackend, tenant: str) -> None:
    for version, name in ((1, "one"), (2, "two")):
        record = IdempotencyRecord(name, 1000 * version, name.encode())
        await store.commit(tenant, new_meta("s", version), {}, commit_metadata=CommitMetadata({}, b"", record))
    for names, expected in ((["two"], b"two"), (["none", "one", "two"], b"one"), (["none"], None), ([], None)):
        turn_start = await store.begin_turn(tenant, "s", write="never", names=names)
        assert turn_start.record == expected
        assert (turn_start.meta is None) == (expected is not None)
    backend.advance(tenant, 1001)
    assert (await store.begin_turn(tenant, "s", write="never", names=["one"])).record is None
    assert (await store.begin_turn(tenant, "s", write="never", names=["two"])).record == b"two"


async def test_no_answer_outlives_its_session(store: SessionStore, backend: StoreBackend, tenant: str) -> None:
    record = IdempotencyRecord("one", 10_000, b"one")
    for sid, options in (("short", {"ttl_s": 1000}), ("shortened", {})):
        meta = replace(new_meta(sid, 1), options=dict(options))
        await store.commit(tenant, meta, {}, commit_metadata=CommitMetadata({}, b"", record))
    await store.configure(tenant, "shortened", {"ttl_s": 1000})
    for sid in ("short", "shortened"):
        assert (await store.begin_turn(tenant, sid, write="never", names=["one"])).record == b"one"
    backend.advance(tenant, 1001)
    for sid in ("short", "shortened"):
        turn_start = await store.begin_turn(tenant, sid, write="never", names=["one"])
        assert turn_start.record is None and turn_start.meta is None


@pytest.mark.parametrize("sid", ["s", ""])
async def test_responses_are_kept_for_their_time_and_the_newest_only(
    sid: str, store: SessionStore, backend: StoreBackend, tenant: str
) -> None:
    created, responses = None, store.responses
    if sid:
        created = (await store.create(tenant, new_meta(sid))).created
    assert await responses.get(tenant, sid, None) is None
    most = KEPT_OF_SESSION if sid else KEPT_OF_TENANT
    for number in range(most + 2):
        assert await responses.put(tenant, sid, f"r{number}", b"%d" % number, ttl_s=1000, created=created)
    assert await responses.get(tenant, sid, "r1") is None
    assert await responses.get(tenant, sid, "r2") == b"2"
    before = backend.dump(tenant)
    assert await responses.get(tenant, sid, None) == b"%d" % (most + 1)
    assert backend.dump(tenant) == before
    assert await responses.delete(tenant, sid, f"r{most + 1}") and not await responses.delete(tenant, sid, "r1")
    assert await responses.get(tenant, sid, None) == b"%d" % most
    assert await responses.get(tenant, "other" if sid else "s", "r2") is None
    assert await responses.get(tenant + "2", sid, "r2") is None
    assert await responses.put(tenant, sid, "r2", b"once more", ttl_s=2000, created=created)
    backend.advance(tenant, 1001)
    assert await responses.get(tenant, sid, "r3") is None
    assert await responses.get(tenant, sid, None) == b"once more"
    assert [meta.id for meta in await store.list(tenant)] == ([sid] if sid else [])


async def test_a_response_that_goes_on_with_the_newest_one_is_refused_if_there_is_a_newer_one(
    store: SessionStore, backend: StoreBackend, tenant: str
) -> None:
    created = (await store.create(tenant, new_meta("s"))).created
    other = backend.open().responses

    async def put(responses: Any, name: str, after: str | None) -> bool:
        kept: bool = await responses.put(tenant, "s", name, name.encode(), ttl_s=1000, created=created, after=after)
        return kept

    with pytest.raises(VersionConflict):
        await put(store.responses, "a", "z")
    assert await put(store.responses, "a", "") and await put(other, "b", "a")
    for after in ("", "a", "z"):
        with pytest.raises(VersionConflict, match="has been kept"):
            await put(store.responses, "c", after)
    assert await put(store.responses, "a", ""), "a call that is repeated has kept it"
    assert await store.responses.get(tenant, "s", None) == b"b" and await other.get(tenant, "s", "c") is None
    assert await put(store.responses, "c", "b") and await put(store.responses, "d", None)
    await other.delete(tenant, "s", "d")
    assert await put(store.responses, "e", "c")
    backend.advance(tenant, 1001)
    assert await put(store.responses, "f", "")


async def test_responses_go_with_their_session_and_with_what_it_has_learned(
    store: SessionStore, backend: StoreBackend, tenant: str
) -> None:
    responses, stored = store.responses, new_meta("s", 1)
    await store.commit(tenant, stored, {})
    for drops, expected in ((False, b"a"), (True, None)):
        assert await responses.put(tenant, "s", "a", b"a", ttl_s=10_000, created=stored.created)
        stored = new_meta("s", stored.version + 1)
        await store.commit(tenant, stored, {}, commit_metadata=CommitMetadata(drops_responses=drops))
        assert await responses.get(tenant, "s", "a") == expected
    assert await responses.put(tenant, "s", "a", b"a", ttl_s=10_000, created=stored.created)
    await store.configure(tenant, "s", {"ttl_s": 1000})
    assert await responses.get(tenant, "s", "a") == b"a"
    backend.advance(tenant, 1001)
    assert await responses.get(tenant, "s", "a") is None
    assert not await responses.put(tenant, "s", "a", b"a", ttl_s=10_000, created=stored.created)  # it has expired
    await store.create(tenant, replace(new_meta("s"), created=2.5))
    assert not await responses.put(tenant, "s", "a", b"a", ttl_s=10_000, created=stored.created)  # of another session
    assert await responses.put(tenant, "s", "a", b"a", ttl_s=10_000, created=2.5)
    await store.delete(tenant, "s")
    await store.create(tenant, replace(new_meta("s"), created=2.5))
    assert await responses.get(tenant, "s", "a") is None
    with backend.full():
        with pytest.raises(StoreFull):
            await responses.put(tenant, "s", "a", b"a", ttl_s=10_000, created=2.5)
        assert not await responses.delete(tenant, "s", "a")


async def test_a_commit_that_erases_the_past_erases_the_content_of_answers(
    store: SessionStore, backend: StoreBackend, tenant: str
) -> None:
    """The names stay for as long as they would have, or a request that is sent again would be learned again."""

    async def remembered(name: str) -> bytes | None:
        return (await store.begin_turn(tenant, "s", write="never", names=[name])).record

    for version, name in ((1, "one"), (2, "two"), (3, "erasing")):
        meta, record = new_meta("s", version), IdempotencyRecord(name, 1000, name.encode())
        commit = CommitMetadata({}, b"", record, erases_past=name == "erasing")
        await store.commit(tenant, meta, {}, commit_metadata=commit)
    assert [await remembered(name) for name in ("one", "two", "erasing", "never")] == [
        erased_answer(3),
        erased_answer(3),
        b"erasing",
        None,
    ]
    backend.advance(tenant, 1001)
    assert [await remembered(name) for name in ("one", "two", "erasing")] == [None] * 3
