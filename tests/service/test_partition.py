"""A replica that cannot reach the store writes nothing late, once another has gone on."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from service.store import RedisStore
from tests.conftest import Server
from tests.live import ENDLESS, Client, Json, refusal, state, success, until
from tests.service.stalling_proxy import FailingLine
from tests.service.valkeys import free_ports, valkey
from tests.tiny import TEXT

LONG: Json = {"prompt": TEXT, "max_tokens": 300, "logit_bias": ENDLESS, "temperature": 0, "learn": "all"}


@dataclass
class World:
    """Two replicas on one store; the line of the first can fail."""

    url: str
    line: FailingLine
    far: Client
    near: Client

    def commits_held(self, mark: bytes) -> bool:
        return mark in self.line.kept


@pytest.fixture(scope="module")
def mark() -> bytes:
    """What is in every commit on the wire."""
    return RedisStore.from_url("redis://127.0.0.1")._commit.sha.encode()


@pytest.fixture(scope="module")
def world(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("partition")
    (port,) = free_ports(1)
    with valkey(folder / "valkey", port), FailingLine(port).open() as line, ExitStack() as stack:
        urls = [f"redis://127.0.0.1:{one}/0" for one in (line.port, port)]
        servers = [Server(str(tiny_base), folder / f"{n}", redis_url=url, lease_s=1) for n, url in enumerate(urls)]
        for server in servers:
            server.start(wait=False)
            stack.callback(server.stop)
        for server in servers:
            server.wait_until_ready()
        far, near = (stack.enter_context(Client(server.url)) for server in servers)
        yield World(urls[1], line, far, near)


@pytest.fixture
def session(world: World) -> str:
    """A session that both have taught, and `<session>-naive`, its like."""
    session = uuid4().hex
    for one in (session, f"{session}-naive"):
        world.near.observe(one, TEXT[:80])
    with ThreadPoolExecutor(8) as pool:  # on a stalled line no new connection would get as far as a commit
        list(pool.map(lambda n: world.far.observe(f"{session}-{n}", TEXT), range(8)))
    return session


def completion(client: Client, session: str) -> Any:
    return client.post("completions", {"model": client.model, "session": session} | LONG)


def test_a_commit_that_comes_late_is_refused_and_its_turn_learned_after_the_others(
    world: World, session: str, mark: bytes
) -> None:
    """The commit reaches the store only after another replica has taken the lease and gone on."""
    with ThreadPoolExecutor(1) as pool:
        turn = pool.submit(completion, world.far, session)
        until(lambda: world.far.metric("kv_tokens_reserved") > 0)
        world.line.stall()
        assert world.near.observe(session, TEXT[30:])["version"] == 2
        before = state(world.url, session)
        until(lambda: world.commits_held(mark))
        assert state(world.url, session) == before
        world.line.mend()
        told = success(turn.result())["adaptation"]
    assert (told["version_from"], told["version_to"]) == (2, 3)
    world.near.observe(f"{session}-naive", TEXT[30:])
    success(completion(world.near, f"{session}-naive"))
    assert state(world.url, session) == state(world.url, f"{session}-naive")


def test_a_stream_whose_commit_comes_late_ends_with_an_error_and_teaches_nothing(
    world: World, session: str, mark: bytes
) -> None:
    with world.far.stream(session=session, **LONG) as chunks:
        next(chunks)
        world.line.stall()
        assert world.near.observe(session, TEXT[30:])["version"] == 2
        before = state(world.url, session)
        until(lambda: world.commits_held(mark))
        world.line.mend()
        with pytest.raises(AssertionError, match="session_busy"):
            list(chunks)
    until(world.far.idle)
    assert state(world.url, session) == before
    assert world.far.observe(session, TEXT)["version"] == 3, "the replica sees what the other did"


def test_a_replica_that_is_cut_off_refuses_and_finds_its_way_back(world: World, session: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        turn = pool.submit(completion, world.far, session)
        until(lambda: world.far.metric("kv_tokens_reserved") > 0)
        world.line.cut()
        assert world.near.observe(session, TEXT[30:])["version"] == 2
        before = state(world.url, session)
        refusal(turn.result(), 503, "store_unavailable")
        refusal(world.far.post(f"sessions/{session}/observe", {"text": TEXT}), 503, "store_unavailable")
        assert world.far.complete()["choices"][0]["finish_reason"], "the base needs no store"
        world.line.mend()
    assert state(world.url, session) == before
    until(lambda: world.far.http.get(f"/v1/sessions/{session}").status_code == 200)
    assert world.far.observe(session, TEXT)["version"] == 3
