"""The rights that the store needs of its Redis user: each command by name, on the store's own keys and channel.

`tests/service/test_store_damage.py` compares the names with the commands that the scripts and this package use.
"""

from __future__ import annotations

import json

from redis.exceptions import NoPermissionError

from service.store.errors import store_refused
from service.store.redis.codec import Keys
from service.store.redis.connect import AnyRedis
from service.store.redis.scripts import NO_WRITES, load_script, retry_while_away

ON_KEYS = (
    *("DEL", "EXISTS", "EXPIRE", "GET", "HDEL", "HEXISTS", "HGET", "HGETALL", "HINCRBY", "HKEYS", "HLEN", "HMGET"),
    *(
        "HSCAN",
        "HSET",
        "HSETNX",
        "HSTRLEN",
        "INCR",
        "LLEN",
        "LRANGE",
        "LTRIM",
        "PERSIST",
        "PEXPIRE",
        "PTTL",
        "RPUSH",
        "SET",
        "TTL",
    ),
    *("UNLINK", "ZADD", "ZCARD", "ZRANGE", "ZRANGEBYLEX", "ZREM", "ZREMRANGEBYSCORE", "ZSCORE"),
)
WITHOUT_KEYS = ("PING", "SCAN", "TIME")
OPTIONAL = ("CONFIG", "INFO")  # without them the size and the settings of the server are unknown
PROBE = "imprint-probe"


def needed_calls(keys: Keys) -> list[list[str]]:
    """Return a call of each command that the store needs, for each kind of key; no call is ever made."""
    owned = [keys.meta(PROBE, PROBE), keys.index(PROBE), *keys.account(PROBE), keys.alive(PROBE)]
    calls = [[command, key] for command in ON_KEYS for key in owned]
    calls += [[command, "0"] for command in WITHOUT_KEYS]
    calls += [["PUBLISH", keys.erased_channel, ""], ["SUBSCRIBE", keys.erased_channel]]
    return [*calls, ["SCRIPT", "LOAD", ""], ["EVALSHA", "", "1", owned[0]]]


class Rights:
    """The rights of one client's user."""

    def __init__(self, client: AnyRedis, keys: Keys) -> None:
        self._keys = keys
        self._script = load_script(client, "rights", first_line=NO_WRITES)

    async def check(self) -> None:
        """Return if the user may run every command that the store needs; write nothing.

        Raises:
            StoreRefused: a right is missing; `__cause__` names the commands.
        """
        key, calls = self._keys.meta(PROBE, PROBE), [json.dumps(call) for call in needed_calls(self._keys)]
        missing = await retry_while_away(lambda: self._script([key], calls))
        if missing:
            names = ", ".join(dict.fromkeys(name.decode() for name in missing))
            prefix = self._keys.prefix
            raise store_refused() from NoPermissionError(
                f"its user lacks the right to run {names} on the keys {prefix}:* or the channel {prefix}:erased"
            )
