"""The tenants' accounts in Redis.

Keys, all of a tenant's in one hash slot of a cluster:

    imprint:{<tenant>}:sessions  hash: session id -> bytes of its rows, or `new <ms>` for a reservation; `*` -> the sum;
                                 `*settled` -> 1 once the account was compared with all stored sessions
    imprint:{<tenant>}:tokens    hash: the bucket of tokens that the tenant may learn; expires when it is full again

A tenant without limits has no keys.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, cast

from service.store.redis.codec import Keys
from service.store.redis.connect import AnyRedis
from service.store.redis.scripts import ALLOW_OOM, NO_WRITES, load_script, retry_while_away

SUM_FIELD, SETTLED_FIELD = b"*", b"*settled"  # no session ids: names of sessions may not contain an asterisk
PAGE_SIZE = 200  # fields of an account that are read at a time, about


class RedisLedger:
    """The `QuotaLedger` of a Redis or Valkey server. Every method that changes an account is one run of `ledger.lua`.

    absent: returns those of a tenant's session ids of which there is no session.
    """

    def __init__(
        self, client: AnyRedis, keys: Keys, absent: Callable[[str, Sequence[str]], Awaitable[list[str]]]
    ) -> None:
        self._client, self._keys, self._absent = client, keys, absent
        self._script = load_script(client, "ledger", first_line=ALLOW_OOM)
        self._read_script = load_script(client, "ledger", first_line=NO_WRITES)

    async def reserve(self, tenant: str, sid: str, limit: int) -> tuple[bool, int]:
        granted, count = await self._run(tenant, "place", sid, limit)
        return bool(granted), int(count)

    async def record(self, tenant: str, sid: str, *, num_bytes: int | None, rate: int, tokens: int) -> None:
        await self._run(tenant, "hold", sid, "" if num_bytes is None else num_bytes, rate, tokens)

    async def drop(self, tenant: str, sids: Sequence[str], *, min_age_s: float = 0.0) -> None:
        await self._run(tenant, "drop", int(1000 * min_age_s), *sids)

    async def set_bytes(self, tenant: str, sizes: Mapping[str, int]) -> None:
        await self._run(tenant, "state", *(word for item in sizes.items() for word in item))

    async def gone(self, tenant: str, cursor: int) -> tuple[int, list[str]]:
        key = self._keys.account(tenant)[0]
        after, fields = await retry_while_away(lambda: self._client.hscan(key, cursor, count=PAGE_SIZE))
        ids = [field.decode() for field in cast(dict[bytes, bytes], fields) if field not in (SUM_FIELD, SETTLED_FIELD)]
        return int(after), await retry_while_away(lambda: self._absent(tenant, ids)) if ids else []

    async def is_settled(self, tenant: str) -> bool:
        key = self._keys.account(tenant)[0]
        return bool(await retry_while_away(lambda: self._client.hexists(key, SETTLED_FIELD)))

    async def mark_settled(self, tenant: str) -> None:
        await self._run(tenant, "settled")

    async def usage(self, tenant: str, rate: int) -> tuple[int, int]:
        num_bytes, tokens = await self._run(tenant, "look", rate, reads=True)
        return int(num_bytes), int(tokens)

    async def _run(self, tenant: str, *arguments: str | int, reads: bool = False) -> Any:
        script = self._read_script if reads else self._script
        return await retry_while_away(lambda: script(self._keys.account(tenant), arguments))
