"""A Redis that loses single keys or refuses commands: the damage is named, and what can be restored is restored."""

from __future__ import annotations

import re
import struct
import uuid
from collections.abc import AsyncIterator, Awaitable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.asyncio.connection import Connection
from redis.exceptions import ResponseError

from service.errors import EngineError, StoreRefused, Unavailable
from service.metrics import Metrics
from service.model_loading import StartError
from service.settings import Settings
from service.store import CommitMetadata, IdempotencyRecord
from service.store.redis import store as store_module
from service.store.redis.codec import Keys
from service.store.redis.heartbeat import BEAT
from service.store.redis.rights import OPTIONAL, needed_calls
from service.store.redis.scripts import retry_while_away
from service.store.redis.store import RedisStore
from service.store_watch import check_store
from tests.service.store_backends import new_meta, rows
from tests.service.valkeys import free_ports, valkey

ALL = "on >pw ~* &* +@all"
RECORD = IdempotencyRecord("key", 600, b"answer")
METADATA = CommitMetadata({"kind": "learn"}, b"text", RECORD)


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    (port,) = free_ports(1)
    with valkey(tmp_path_factory.mktemp("damage"), port):
        yield port


@pytest.fixture
def raw(port: int) -> Iterator[Any]:
    with Redis(port=port) as client:
        yield client


@pytest.fixture
async def store(port: int) -> AsyncIterator[RedisStore]:
    store = RedisStore.from_url(f"redis://127.0.0.1:{port}")
    yield store
    await store.close()


@pytest.fixture
def tenant() -> str:
    return uuid.uuid4().hex


async def make_session(store: RedisStore, tenant: str) -> None:
    await store.commit(tenant, new_meta("s", 1), {"a": rows(range(30)), "b": rows([1])})
    await store.commit(tenant, new_meta("s", 2), {"a": rows([5])}, commit_metadata=METADATA)


def lose_page(raw: Any, home: str) -> None:
    raw.hdel(f"{home}rows:a", struct.pack("<I", 1))


def flip_bit(raw: Any, home: str) -> None:
    page = raw.hget(f"{home}rows:a", struct.pack("<I", 1))
    raw.hset(f"{home}rows:a", struct.pack("<I", 1), page[:-1] + bytes([page[-1] ^ 1]))


DAMAGES: dict[str, tuple[Any, str, bool]] = {  # what happens, what the error names, whether every turn notices it
    "rows": (lambda raw, home: raw.delete(f"{home}rows:a"), "site a", True),
    "page": (lose_page, "2 of 3", True),
    "bit": (flip_bit, "checksum", False),
    "meta": (lambda raw, home: raw.delete(f"{home}meta"), "its meta", True),
    "log": (lambda raw, home: raw.delete(f"{home}log"), "entries of its log", True),
    "value": (lambda raw, home: raw.hdel(f"{home}meta", "loss_sum"), "loss_sum", True),
    "undo": (lambda raw, home: raw.delete(f"{home}undo"), "undo steps of the versions 1 to 2", False),
    "type": (lambda raw, home: (raw.delete(f"{home}rows:a"), raw.set(f"{home}rows:a", "x")), "another type", True),
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_session_that_lost_a_part_says_which(store: RedisStore, raw: Any, tenant: str, damage: str) -> None:
    await make_session(store, tenant)
    harm, name, by_every_turn = DAMAGES[damage]
    harm(raw, f"imprint:{{{tenant}/s}}:")
    calls: list[Awaitable[Any]] = [
        store.history(tenant, "s", undo=True) if damage in ("undo", "log") else store.load(tenant, "s")
    ]
    if damage == "meta":
        calls += [store.meta(tenant, "s"), store.history(tenant, "s", undo=False)]
    if by_every_turn:
        calls += [store.begin_turn(tenant, "s", write="always"), store.begin_turn(tenant, "s", write="never")]
        if damage not in ("meta", "value"):
            calls += [store.commit(tenant, new_meta("s", 3), {"b": rows([1])})]
    for call in calls:
        with pytest.raises(EngineError, match=name) as damaged:
            await call
        assert damaged.value.code == "damaged_session"
    assert await store.delete(tenant, "s"), "there was a session"
    assert raw.keys(f"imprint:{{{tenant}/s}}:rows:*") == []
    await make_session(store, tenant)
    assert await store.load(tenant, "s")


@pytest.mark.parametrize("lost", ["once:key", "onces", "once:key onces"])
async def test_a_lost_answer_is_not_learned_again(store: RedisStore, raw: Any, tenant: str, lost: str) -> None:
    await make_session(store, tenant)
    raw.delete(*(f"imprint:{{{tenant}/s}}:{name}" for name in lost.split()))
    if lost == "onces":
        assert (await store.begin_turn(tenant, "s", write="always", names=["key"])).record == b"answer"
        return
    for version in (3, 4):
        with pytest.raises(EngineError, match="answer") as damaged:
            await store.begin_turn(tenant, "s", write="always", names=["key"])
        assert damaged.value.code == "damaged_session"
        assert (await store.begin_turn(tenant, "s", write="always")).meta == new_meta("s", version - 1)
        other = IdempotencyRecord(f"other-{version}", 60, b"other")
        await store.commit(tenant, new_meta("s", version), {}, commit_metadata=CommitMetadata(idempotency_record=other))


async def test_sessions_lost_from_the_list_are_listed_again(store: RedisStore, raw: Any, tenant: str) -> None:
    await make_session(store, tenant)
    raw.delete(f"imprint:sessions:{tenant}")
    assert await store.list(tenant) == []
    assert await store.restore_list() == 1
    assert await store.list(tenant) == [new_meta("s", 2)]
    assert await store.restore_list() == 0


async def test_names_of_expired_sessions_leave_the_list_although_nobody_reads_it(
    store: RedisStore, raw: Any, tenant: str
) -> None:
    for n in range(2500):  # more than one page
        raw.zadd(f"imprint:sessions:{tenant}", {f"expired-{n}": 0})
    await make_session(store, tenant)
    assert await store.count(tenant) == 2501
    assert await store.restore_list() == 0
    assert await store.count(tenant) == 1
    assert await store.list(tenant) == [new_meta("s", 2)]


async def test_a_session_that_is_created_while_its_name_is_removed_stays_listed(
    store: RedisStore, raw: Any, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw.zadd(f"imprint:sessions:{tenant}", {"s": 0})
    absent, found = store._index.absent, list[list[str]]()

    async def create_after_the_look(owner: str, ids: list[str]) -> list[str]:
        if owner != tenant:  # of another test
            return await absent(owner, ids)
        found.append(await absent(tenant, ids))
        if len(found) == 1:
            await make_session(store, tenant)
        return found[-1]

    monkeypatch.setattr(store._index, "absent", create_after_the_look)
    await store.restore_list()
    assert found == [["s"], []]
    assert await store.list(tenant) == [new_meta("s", 2)]


async def test_a_damaged_session_does_not_hide_the_others(store: RedisStore, raw: Any, tenant: str) -> None:
    for sid in ("a", "b"):
        await store.create(tenant, new_meta(sid))
    raw.hdel(f"imprint:{{{tenant}/a}}:meta", "rows")
    assert [meta.id for meta in await store.list(tenant)] == ["b"]


async def test_a_session_of_format_4_is_taken_over_and_then_proved_whole(
    store: RedisStore, raw: Any, tenant: str
) -> None:
    await make_session(store, tenant)
    key = f"imprint:{{{tenant}/s}}:meta"
    expected = await store.load(tenant, "s")
    sealed = raw.hgetall(key)
    added = [name for name in sealed if name.startswith((b"pages:", b"sum:", b"action", b"once_"))]
    raw.hdel(key, *added)
    raw.hset(key, "format", "4")
    assert (await store.begin_turn(tenant, "s", write="always")).meta is not None
    loaded = await store.load(tenant, "s")
    assert loaded is not None and expected is not None and loaded.sites.keys() == expected.sites.keys()
    kept = {name: value for name, value in raw.hgetall(key).items() if name.startswith((b"pages:", b"sum:"))}
    assert kept == {name: sealed[name] for name in kept} and len(kept) == 4 and raw.hget(key, "format") == b"5"
    raw.delete(f"imprint:{{{tenant}/s}}:rows:b")
    with pytest.raises(EngineError, match="site b"):
        await store.load(tenant, "s")


@pytest.mark.parametrize("policy", ["noeviction", "allkeys-lru", "volatile-ttl"])
async def test_a_store_tells_whether_it_evicts(store: RedisStore, raw: Any, policy: str) -> None:
    raw.config_set("maxmemory-policy", policy)
    assert await store.may_evict() == (policy != "noeviction")
    raw.config_set("maxmemory-policy", "noeviction")


async def test_a_server_refuses_a_store_that_evicts_unless_it_is_told_to(
    store: RedisStore, raw: Any, caplog: pytest.LogCaptureFixture
) -> None:
    raw.config_set("maxmemory-policy", "allkeys-lru")
    metrics = Metrics()
    try:
        with pytest.raises(StartError, match="noeviction"):
            await check_store(store, Settings(), metrics)
        await check_store(store, Settings(allow_eviction=True), metrics)
    finally:
        raw.config_set("maxmemory-policy", "noeviction")
    assert "may evict" in caplog.text
    assert metrics.registry.get_sample_value("imprint_store_evicts") == 1


# --- rights -----------------------------------------------------------------------------------------------------------


NEEDED = {call[0] for call in needed_calls(Keys())}
NOT_SENT = {"pipeline", "pubsub", "register_script", "execute", "initialize", "aclose", "get_message"}
SENT_AS = {"scan_iter": "SCAN", "config_get": "CONFIG"}  # what methods of the client send, if not their own name
SENT_FOR_SCRIPTS = {"EVALSHA", "SCRIPT"}


def limited(raw: Any, port: int, *rules: str) -> RedisStore:
    """Return a store whose user has all rights but what the rules take away."""
    raw.execute_command("ACL", "SETUSER", "limited", "reset", *ALL.split(), *rules)
    return RedisStore.from_url(f"redis://limited:pw@127.0.0.1:{port}")


def test_the_rights_that_are_checked_are_those_that_are_used() -> None:
    """Every command of the scripts and every call of the client, in turns and in background tasks alike."""
    package = Path(store_module.__file__).parent
    scripts = "".join(path.read_text() for path in package.rglob("*.lua")) + BEAT
    code = "".join(path.read_text() for path in package.glob("*.py"))
    calls = re.findall(r"\bredis\.p?call\(", scripts)
    commands = re.findall(r"\bredis\.p?call\('(\w+)'", scripts)
    assert len(calls) == len(commands) > 40, "a script computes the name of a command"
    methods = set(re.findall(r"\b(?:client|_client|pipeline|channel)\.(\w+)\(", code)) - NOT_SENT - {"execute_command"}
    commands += [SENT_AS.get(method, method.upper()) for method in methods]
    by_name = re.findall(r"execute_command\(\s*\"(\w+)\"", code)
    assert len(by_name) == code.count("execute_command("), "the code computes the name of a command"
    commands += by_name
    assert set(commands) | SENT_FOR_SCRIPTS == NEEDED | set(OPTIONAL)


async def test_the_rights_are_checked_by_name(port: int, raw: Any) -> None:
    for lacking in sorted(NEEDED):
        store = limited(raw, port, f"-{lacking.lower()}")
        with pytest.raises(StoreRefused) as refused:
            await store.check_rights()
        assert lacking.lower() in str(refused.value.__cause__).lower(), lacking
        await store.close()
    for rules in (["resetkeys", "~other:*"], ["resetkeys", "%R~imprint:*"], ["resetchannels", "&other"]):
        store = limited(raw, port, *rules)
        with pytest.raises(StoreRefused):
            await store.check_rights()
        await store.close()


async def test_the_rights_that_are_checked_suffice(port: int, raw: Any, tenant: str) -> None:
    """Those that docs/security.md lists, without the optional ones."""
    page = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
    rules = page.partition("ACL SETUSER imprint on >PASSWORD ")[2].partition("```")[0].split()
    optional = ["+info", "+config|get"]
    assert {rule.upper() for rule in rules if rule.startswith("+")} == {
        f"+{name}" for name in (*NEEDED, "INFO", "CONFIG|GET")
    }
    keys = raw.dbsize()
    store = limited(raw, port, *(rule for rule in rules if rule not in optional))
    await store.check_rights()
    assert raw.dbsize() == keys, "the check writes nothing"
    await make_session(store, tenant)
    await store.load(tenant, "s")
    await store.history(tenant, "s", undo=True)
    turn = await store.begin_turn(tenant, "s", write="always")
    assert turn.lease is not None and await store.renew(turn.lease)
    await store.release(turn.lease)
    await store.ledger.reserve(tenant, "s", 1)
    await store.ledger.record(tenant, "s", num_bytes=10, rate=10, tokens=1)
    assert await store.ledger.gone(tenant, 0) == (0, [])
    await store.ledger.mark_settled(tenant)
    assert await store.ledger.is_settled(tenant)
    assert await store.restore_list() == 0 and len(await store.list(tenant)) == await store.count(tenant) == 1
    assert await store.memory() == (0, 0) and not await store.may_evict()
    await store.ping()
    assert await store.delete(tenant, "s")
    await store.close()


async def test_a_wrong_password_is_a_refusal(port: int) -> None:
    store = RedisStore.from_url(f"redis://nobody:wrong@127.0.0.1:{port}")
    with pytest.raises(StoreRefused):
        await store.load("t", "s")
    await store.close()


async def test_an_erasure_that_happened_is_told_as_such(port: int, raw: Any, tenant: str) -> None:
    raw.execute_command("ACL", "SETUSER", "mute", "reset", *ALL.split(), "-publish")
    faults: list[str] = []
    store = RedisStore.from_url(f"redis://mute:pw@127.0.0.1:{port}", report_fault=faults.append)
    await make_session(store, tenant)
    assert await store.delete(tenant, "s") is True
    assert faults == ["untold"] and await store.load(tenant, "s") is None
    await store.close()


@pytest.mark.parametrize("error", ["ERR something", "NOPERM no", "NOAUTH no", "EXECABORT", "CROSSSLOT", "WRONGPASS"])
async def test_every_error_of_redis_has_an_answer(
    store: RedisStore, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: Any) -> Any:
        raise ResponseError(error)

    monkeypatch.setattr(store._client, "hgetall", fail)
    with pytest.raises(Unavailable):
        await store.meta("t", "s")


async def test_a_connection_that_is_dropped_while_it_opens_is_opened_again(
    store: RedisStore, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client of a cluster does this to its connections when it asks for the nodes anew."""
    opened = 0
    open_whole = Connection.on_connect_check_health

    async def open_and_drop(connection: Connection, check_health: bool = True) -> None:
        nonlocal opened
        opened += 1
        if opened == 1:
            await connection.disconnect(nowait=True)
        await open_whole(connection, check_health)

    monkeypatch.setattr(Connection, "on_connect_check_health", open_and_drop)
    await make_session(store, tenant)
    assert opened > 1


async def test_an_error_of_ours_is_not_taken_for_a_lost_connection() -> None:
    async def call() -> None:
        nothing: Any = None
        nothing.writelines()

    with pytest.raises(AttributeError):
        await retry_while_away(call)
