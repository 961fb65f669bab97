"""The tenants' accounts in Redis.

Keys, all of a tenant's in one hash slot of a cluster:

    imprint:{<tenant>}:sessions  hash: session id -> bytes of its rows, or `new <ms>` for a reservation; `*` -> the sum
    imprint:{<tenant>}:tokens    hash: the bucket of tokens that the tenant may learn; expires when it is full again

A tenant without limits has no keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from service.store.redis.codec import Keys
from service.store.redis.connect import AnyRedis
from service.store.redis.scripts import ALLOW_OOM, NO_WRITES, load_script, retry_while_away

SUM_FIELD = "*"  # not a session id: names of sessions may not contain it


class RedisLedger:
    """The `QuotaLedger` of a Redis or Valkey server. Every method is one run of `ledger.lua`."""

    def __init__(self, client: AnyRedis, keys: Keys) -> None:
        self._keys = keys
        self._script = load_script(client, "ledger", first_line=ALLOW_OOM)
        self._read_script = load_script(client, "ledger", first_line=NO_WRITES)

    async def reserve(self, tenant: str, sid: str, limit: int) -> tuple[bool, int]:
        granted, count = await self._run(tenant, "place", sid, limit)
        return bool(granted), int(count)

    async def record(self, tenant: str, sid: str, *, num_bytes: int | None, rate: int, tokens: int) -> None:
        await self._run(tenant, "hold", sid, "" if num_bytes is None else num_bytes, rate, tokens)

    async def drop(self, tenant: str, sid: str, *, min_age_s: float = 0.0) -> None:
        await self._run(tenant, "drop", sid, int(1000 * min_age_s))

    async def set_bytes(self, tenant: str, sizes: Mapping[str, int]) -> None:
        await self._run(tenant, "state", *(word for item in sizes.items() for word in item))

    async def session_ids(self, tenant: str) -> set[str]:
        return {name.decode() for name in await self._run(tenant, "names", reads=True)} - {SUM_FIELD}

    async def usage(self, tenant: str, rate: int) -> tuple[int, int]:
        num_bytes, tokens = await self._run(tenant, "look", rate, reads=True)
        return int(num_bytes), int(tokens)

    async def _run(self, tenant: str, *arguments: str | int, reads: bool = False) -> Any:
        script = self._read_script if reads else self._script
        return await retry_while_away(lambda: script(self._keys.account(tenant), arguments))
