"""The kept responses in Redis. The keys are a session's: `store.py` lists them."""

from __future__ import annotations

import json
from typing import Any

from service.store.answers import KEPT_OF_SESSION, KEPT_OF_TENANT
from service.store.errors import newest_response_moved
from service.store.redis.codec import Keys
from service.store.redis.connect import AnyRedis
from service.store.redis.scripts import ALLOW_OOM, NO_WRITES, load_script, retry_while_away

MOVED = -1  # what the script returns if another response is the newest one


class RedisResponses:
    """The `ResponseStore` of a Redis or Valkey server. Every method is one run of `responses.lua`.

    default_ttl_s: seconds after its last use at which a session expires that has no option of its own; 0 = never.
    """

    def __init__(self, client: AnyRedis, keys: Keys, default_ttl_s: int) -> None:
        self._keys = keys
        self._default_ttl_s = default_ttl_s
        self._put = load_script(client, "common", "responses")
        self._get = load_script(client, "common", "responses", first_line=NO_WRITES)
        self._delete = load_script(client, "common", "responses", first_line=ALLOW_OOM)

    async def put(
        self,
        tenant: str,
        sid: str,
        name: str,
        record: bytes,
        *,
        ttl_s: int,
        created: float | None,
        after: str | None = None,
    ) -> bool:
        kept = KEPT_OF_SESSION if sid else KEPT_OF_TENANT
        stamp = "" if created is None else json.dumps(created)
        arguments = ["put", name, record, ttl_s, kept, self._default_ttl_s, stamp]
        outcome = await self._run(self._put, tenant, sid, arguments + ([] if after is None else [after]))
        if outcome == MOVED:
            raise newest_response_moved(sid)
        return bool(outcome)

    async def get(self, tenant: str, sid: str, name: str | None) -> bytes | None:
        record: bytes | None = await self._run(self._get, tenant, sid, ["get", name or ""])
        return record

    async def delete(self, tenant: str, sid: str, name: str) -> bool:
        return bool(await self._run(self._delete, tenant, sid, ["delete", name]))

    async def _run(self, script: Any, tenant: str, sid: str, arguments: list[Any]) -> Any:
        key = self._keys.meta(tenant, sid) if sid else self._keys.of_no_session(tenant)
        return await retry_while_away(lambda: script([key], arguments))
