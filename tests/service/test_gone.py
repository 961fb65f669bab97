"""Law 14: what is erased, expired, unlearned or rolled back for good is in no key, file, pool, cache, answer or log."""

from __future__ import annotations

import asyncio
import logging
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from redis import Redis
from safetensors.numpy import load

from model.text.tokenizer import Tokenizer
from service.engine import Engine
from service.store import RetentionConfig
from service.store.embedded import EmbeddedValkey
from service.store.redis.store import RedisStore
from service.turns import sessions as sessions_module
from tests.live import Client, Json, assert_success, wait_until
from tests.service.in_process import InProcessServer

SECRET = "Zarquon keeps the ledger of Ombria under a violet stone."
ASKS = "Where does Zarquon keep the ledger of Ombria?"  # has none of the words that are searched for
WORDS = b"violet stone"
OTHERS = ("The fox sleeps at noon.", "A dog learns the way home.", "Nine wheels turn the mill.", "The harbour is red.")
KEEP_VERSIONS, ANSWER_TTL_S = 2, 2
MIN_ROW_BYTES = 32  # shorter ones could be equal by chance
RUN = 6  # tokens


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    embedded = EmbeddedValkey(tmp_path_factory.mktemp("gone") / "data")
    yield embedded
    embedded.stop()


@pytest.fixture(scope="module")
def redis(valkey: EmbeddedValkey) -> Iterator[Redis]:
    with Redis.from_url(valkey.start()) as client:
        client.config_set("rdbcompression", "no")  # else the search of the files would miss what they hold
        yield client


@pytest.fixture(scope="module")
def memory_server(tiny_base: Path, valkey: EmbeddedValkey, redis: Redis) -> Iterator[InProcessServer]:
    """Yield a server on an embedded store, for `client`."""
    url = f"unix://{redis.get_connection_kwargs()['path']}"
    store = RedisStore.from_url(url, RetentionConfig(versions=KEEP_VERSIONS), exclusive=True)
    settings: Json = {"recall_tokens": 64, "hot_rows": 200_000, "idempotency_ttl_s": ANSWER_TTL_S, "retry_ttl_s": 0}
    server = InProcessServer(tiny_base, store, **settings)
    yield server
    server.stop()


class Search:
    """A search for everything by which a server could know `SECRET`.

    tokens: of the text. asked: of the question, which nobody takes back. rows: the rows that the text taught, as they
    are stored.
    """

    def __init__(
        self, redis: Redis, data_dir: Path, engine: Engine, tokens: list[int], asked: list[int], rows: list[bytes]
    ) -> None:
        self._redis, self._data_dir, self._engine = redis, data_dir, engine
        self._tokens = tuple(tokens)
        runs = _runs(tokens) - _runs(asked)
        needles = [WORDS, *(np.array(run, kind).tobytes() for run in runs for kind in ("<i4", "<i8")), *rows]
        self._needle = re.compile(b"|".join(map(re.escape, needles)), re.DOTALL)

    def places(self, log: str) -> set[str]:
        """Return the kinds of places that hold any part of the text."""
        found = {name for name, value in self._values() if self._is_in(value)}
        found |= {path.name for path in self._data_dir.rglob("*") if path.is_file() and self._is_in(path.read_bytes())}
        found |= {"log"} if self._is_in(log.encode()) else set()
        return found | self._device()

    def _values(self) -> Iterator[tuple[str, bytes]]:
        """Yield the kind and each value of each key of the store."""
        readers: dict[Any, Any] = {
            b"string": self._redis.get,
            b"hash": self._redis.hgetall,
            b"list": lambda key: self._redis.lrange(key, 0, -1),
            b"zset": lambda key: self._redis.zrange(key, 0, -1),
        }
        for key in self._redis.scan_iter():
            value = readers[self._redis.type(key)](key)
            kind = key.decode().rpartition("}:")[2].partition(":")[0]
            parts = [] if value is None else [value] if isinstance(value, bytes) else _flat(value)
            yield from ((kind, part) for part in parts)

    def _is_in(self, data: bytes) -> bool:
        """Return whether data holds a part of the text, as it is or compressed by zlib."""
        if self._needle.search(data):
            return True
        for start in re.finditer(b"x\x01", data):
            try:
                if self._needle.search(zlib.decompressobj().decompress(data[start.start() :])):
                    return True
            except zlib.error:
                continue
        return False

    def _device(self) -> set[str]:
        """Return the pools with cells that no session has and that are not empty, and the caches that have the text."""
        found = set()
        for name, site in self._engine._resident.pool.sites.items():
            used = np.unique(site.physical_cells)
            free = np.setdiff1d(np.arange(len(site.fields[0])), used)
            rows = site._bytes(used).tobytes()
            if any(field[free].any() for field in site.fields) or self._is_in(rows):
                found.add(f"pool {name}")
        episodes = self._engine._lm.episodes
        assert episodes is not None
        owners = {owner for owner, _, ids in episodes._hot if ids[: len(self._tokens)] == self._tokens}
        return found | ({"hot episodes"} if owners else set())


def _runs(tokens: list[int]) -> set[tuple[int, ...]]:
    return {tuple(tokens[start : start + RUN]) for start in range(len(tokens) - RUN + 1)}


def _flat(value: Any) -> list[bytes]:
    return [part for pair in (value.items() if isinstance(value, dict) else [value]) for part in pair]


@pytest.fixture
def search(
    client: Client, memory_server: InProcessServer, redis: Redis, valkey: EmbeddedValkey, tiny_base: Path
) -> Search:
    session = uuid4().hex
    client.observe(session, SECRET)
    exported = load(client.http.get(f"/v1/sessions/{session}/export").content)
    rows = [row.tobytes() for array in exported.values() if array.ndim > 1 for row in array]
    assert_success(client.http.delete(f"/v1/sessions/{session}"))
    tokenizer = Tokenizer.load(tiny_base)
    tokens, asked = (tokenizer.encode(text)[tokenizer.add_bos :] for text in (SECRET, ASKS))
    rows = [row for row in rows if len(row) >= MIN_ROW_BYTES]
    assert rows
    return Search(redis, valkey._data_dir, memory_server.engine, tokens, asked, rows)


def rewrite(redis: Redis) -> None:
    redis.bgrewriteaof()
    wait_until(
        lambda: not (info := redis.info("persistence"))["aof_rewrite_in_progress"] and not info["aof_rewrite_scheduled"]
    )


def teach(client: Client, session: str) -> None:
    """Teach `SECRET` as version 2; ask for it in a chat whose answer is remembered, as version 3, and in a response."""
    client.observe(session, OTHERS[0])
    client.observe(session, SECRET)
    chat = {"model": client.model, "session": session, "messages": [{"role": "user", "content": ASKS}], "max_tokens": 4}
    answer = assert_success(client.post("chat/completions", chat, **{"Idempotency-Key": uuid4().hex}))
    assert [episode["text"] for episode in answer["adaptation"]["recalled"]] == [SECRET]
    response = {"model": client.model, "conversation": session, "input": ASKS, "max_output_tokens": 4}
    kept = assert_success(client.post("responses", response | {"adapt": "predict", "store": True}))
    assert kept["store"] and [episode["text"] for episode in kept["adaptation"]["recalled"]] == [SECRET]


def learn_others(client: Client, session: str) -> None:
    """Learn as many versions as are kept, so that no kept version goes back to the versions before."""
    for text in OTHERS[: KEEP_VERSIONS + 1]:
        client.observe(session, text)


@pytest.mark.parametrize(
    "way", ["erased", "expired", "unlearned", "unlearned late", "unlearned for good", "rolled back"]
)
def test_what_is_gone_is_nowhere(
    way: str,
    client: Client,
    memory_server: InProcessServer,
    redis: Redis,
    search: Search,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.DEBUG)
    neighbour, session = uuid4().hex, uuid4().hex
    client.observe(neighbour, OTHERS[0])
    rewrite(redis)
    assert search.places(caplog.text) == set()
    options: Json = {"keep_text": True} | ({"ttl_s": 3} if way == "expired" else {})
    assert_success(client.http.put(f"/v1/sessions/{session}", json=options))
    teach(client, session)
    everywhere = {"rows", "undo", "once", "response", "pool lexical", "pool episodes", "hot episodes"}
    found = search.places(caplog.text)
    assert found >= everywhere and any(name.endswith(".incr.aof") for name in found)

    if way == "erased":
        assert_success(client.http.delete(f"/v1/sessions/{session}"))
    elif way == "expired":
        monkeypatch.setattr(sessions_module, "CHECK_EVERY_S", 0.1)
        wait_until(lambda: not any(session in key.decode() for key in redis.scan_iter("*:meta")))
        dropping = asyncio.run_coroutine_threadsafe(memory_server.sessions.drop_missing(), memory_server.loop)
        wait_until(lambda: ("default", session) not in memory_server.engine.resident_keys())
        dropping.cancel()
    elif way == "unlearned for good":
        assert_success(client.post(f"sessions/{session}/unlearn", {"version": 2, "erase": True}))
    elif way == "unlearned late":
        learn_others(client, session)
        assert_success(client.post(f"sessions/{session}/unlearn", {"version": 2, "erase": True}))
    else:
        undo = {"unlearned": ("unlearn", 2), "rolled back": ("rollback", 1)}[way]
        assert_success(client.post(f"sessions/{session}/{undo[0]}", {"version": undo[1]}))
        learn_others(client, session)
    if way in ("erased", "unlearned for good", "unlearned late"):
        assert not {"once", "response"} & search.places(caplog.text), "what is erased is at once in no answer"
    wait_until(lambda: not any(b":once:" in key or b":response:" in key for key in redis.scan_iter()))
    client.observe(neighbour, OTHERS[1])  # the engine has done what it was told before
    rewrite(redis)
    assert search.places(caplog.text) == set()
    assert client.version(neighbour) == 2
