"""Loss of single keys in the store, as by an eviction, an operator's `DEL` or a partial restore."""

from __future__ import annotations

import asyncio
import json
import random
import time
from pathlib import Path
from typing import Any, cast

import psutil
from redis import Redis
from redis.exceptions import RedisError, ResponseError

from tests.clients import ContractViolation, SessionHistory
from tests.live import Client, assert_error, connect_redis, wait_until
from tests.oracle.deployment import RECOVERY_S, Fault, Run

INDEX = "imprint:sessions:default"
INDEX_PROBABILITY = 0.1  # of a Redis that others may use; nobody else writes to an embedded store
KEPT = "lost:"  # begins the name under which the oracle keeps what the session has lost
STORE_AWAY = (RedisError, AssertionError, StopIteration, RuntimeError, OSError, psutil.Error)


def home_of(session: str) -> str:
    """Return what the names of a session's keys begin with."""
    return f"imprint:{{default/{session}}}:"


class LostKey(Fault):
    """Takes one random key of a random session away; the session must say so, or be unharmed.

    The key is renamed, so that the comparison has what the session had at that instant.
    """

    kind = "key lost"

    async def inject(self, run: Run) -> None:
        await run.pause(0, 1)
        while not await asyncio.to_thread(self._take, run):
            await asyncio.sleep(0.2)

    def _take(self, run: Run) -> bool:
        """Take a key of a session that has all of them; return False if none was taken."""
        histories = [client.history for client in run.session_clients]
        whole = [history for history in histories if history.known_versions and history.lost_key is None]
        if not whole:
            return False
        history = run.random.choice(whole)
        store = run.deployment.store_of(history.name)
        if isinstance(store, str) and run.random.random() < INDEX_PROBABILITY:
            return self._take_index(run, store)
        try:
            with connect_redis(store) as redis:
                key = self._choose(redis, history.name, run.random)
        except STORE_AWAY:
            return False
        history.lost_key = key.removeprefix(home_of(history.name)) or None
        if history.lost_key is None or not self._rename(store, key):
            history.lost_key = None
            return False
        history.lost_at = len(history.turns)
        run.result.counts[f"lost {history.lost_key.partition(':')[0]}"] += 1
        return True

    @staticmethod
    def _take_index(run: Run, store: Path | str) -> bool:
        try:
            with connect_redis(store) as redis:
                redis.delete(INDEX)
        except STORE_AWAY:
            return False
        run.result.counts["lost index"] += 1
        return True

    @staticmethod
    def _choose(redis: Redis, session: str, rng: random.Random) -> str:
        """Return a random key of a random kind; "" if the session has none."""
        by_kind: dict[str, list[str]] = {}
        for key in sorted(redis.scan_iter(match=f"{home_of(session)}*", count=10_000)):
            kind = key.decode().removeprefix(home_of(session)).partition(":")[0]
            by_kind.setdefault(kind, []).append(key.decode())
        return rng.choice(by_kind[rng.choice(sorted(by_kind))]) if by_kind else ""

    @staticmethod
    def _rename(store: Path | str, key: str) -> bool:
        """Rename the key once the store answers; return False if the key had gone by itself."""
        for _ in range(10_000):
            try:
                with connect_redis(store) as redis:
                    if not redis.exists(KEPT + key):
                        redis.rename(key, KEPT + key)
                    return True
            except ResponseError as error:
                if "no such key" in str(error):
                    return False
            except STORE_AWAY:
                pass
            time.sleep(0.05)
        raise ContractViolation(f"{key} could not be renamed: the store does not come back")


def check_losses(run: Run) -> None:
    """Check that sessions which cannot be used say so, and that all others are listed again after a start."""
    histories = [history for client in run.session_clients for history in client.histories]
    server = run.deployment.servers[0]
    with Client(server.url) as client:
        for history in (each for each in histories if each.is_unusable):
            try:
                check_unusable(client, history)
            except AssertionError as error:
                run.result.add_wrong(f"{history.name} without {history.lost_key}: {error}")
    if run.result.counts["lost index"]:
        server.stop()
        server.start()
        names = {history.name for history in histories if history.known_versions and history.lost_key != "meta"}
        with Client(server.url) as client:
            try:
                wait_until(lambda: names <= listed(client), RECOVERY_S)
            except AssertionError:
                run.result.add_wrong(f"not listed again: {sorted(names - listed(client))}")


def listed(client: Client) -> set[str]:
    """Return the ids of all sessions in the list."""
    ids, after = set[str](), ""
    while True:
        page = client.http.get("/v1/sessions", params={"limit": 100} | ({"after": after} if after else {})).json()
        ids |= {session["id"] for session in page["data"]}
        after = page["next"]
        if after is None:
            return ids


def check_unusable(client: Client, history: SessionHistory) -> None:
    """Check that a session which cannot be used says so; an export holds no log. Raises AssertionError."""
    path = f"sessions/{history.name}"
    assert_error(client.post(f"{path}/score", {"text": "a"}), 500, "damaged_session")
    assert_error(client.post(f"{path}/observe", {"text": "a"}), 500, "damaged_session")
    export = client.http.get(f"/v1/{path}/export")
    if history.lost_key == "log":
        assert export.status_code == 200, export.text
    else:
        assert_error(export, 500, "damaged_session")


def lost_content(redis: Redis, history: SessionHistory) -> dict[str, dict[bytes, bytes]]:
    """Return the key that a session has lost, by the last part of its name, as `stored` returns the others."""
    key = f"{KEPT}{home_of(history.name)}{history.lost_key}"
    if history.lost_key is None or redis.type(key) != b"hash":
        return {}
    return {history.lost_key: cast(dict[bytes, bytes], redis.hgetall(key))}


def log_of(redis: Redis, history: SessionHistory) -> list[Any]:
    """Return the entries of a session's log as the store has them, oldest first, also of a log that was lost."""
    log = f"{home_of(history.name)}log"
    entries = cast(list[bytes], redis.lrange(KEPT + log if history.lost_key == "log" else log, 0, -1))
    return [json.loads(entry) for entry in entries]
