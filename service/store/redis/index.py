"""The index of each tenant's sessions. It lies in another hash slot than the sessions, so no script can change both.

The index may name sessions that do not exist, and misses none: a name is added before its session is created, and
readers skip and remove the names of sessions that have gone, and `restore` removes those that nobody reads.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import cast

from service.errors import Unavailable
from service.store.base import SessionMeta
from service.store.redis.codec import Keys, absent_fields, decode, tenant_and_session
from service.store.redis.connect import AnyRedis
from service.store.redis.scripts import retry_while_away

SCAN_KEYS = 1000
LISTED_AT_ONCE = 100  # sessions whose values are decoded before other requests have their turn: 25 ms at most

log = logging.getLogger(__name__)


class SessionIndex:
    """A sorted set of session ids for each tenant, all of score 0 and hence in the order of their bytes."""

    def __init__(self, client: AnyRedis, keys: Keys, report_fault: Callable[[str], None]) -> None:
        self._client, self._keys = client, keys
        self._report_fault = report_fault

    @asynccontextmanager
    async def naming(self, tenant: str, sid: str, *, new: bool) -> AsyncIterator[None]:
        """Name a new session before it is created, so that no reader misses it, and once more after it is created,
        since a reader may have removed the name of a session that did not exist yet."""
        if new:
            await self._add(tenant, sid)
        yield
        if new:
            try:
                await self._add(tenant, sid)
            except Unavailable as error:  # the session exists; `restore` lists it if the first name is gone
                log.warning("a new session may be missing from the list: %s", error)
                self._report_fault("unlisted")

    async def remove(self, tenant: str, sid: str) -> None:
        """Remove the name of a session that does not exist; add the name again if the session exists after all."""
        await retry_while_away(lambda: self._client.zrem(self._keys.index(tenant), sid))
        if await retry_while_away(lambda: self._client.exists(self._keys.meta(tenant, sid))):
            await self._add(tenant, sid)

    async def list_sessions(self, tenant: str, after: str, limit: int) -> list[SessionMeta]:
        """Return up to `limit` sessions with ids after `after`, in order; remove names of sessions that have gone."""
        sessions: list[SessionMeta] = []
        while len(sessions) < limit:
            num_names = min(LISTED_AT_ONCE, limit - len(sessions))
            page = await retry_while_away(partial(self._page, tenant, after, num_names))
            if not page:
                break
            for sid, meta_hash in page:
                if not meta_hash:
                    await self.remove(tenant, sid)
                elif not absent_fields(meta_hash):  # a session without its values is an error of that session alone
                    sessions.append(decode(sid, meta_hash))
            after = page[-1][0]
        return sessions

    async def count(self, tenant: str) -> int:
        count: int = await retry_while_away(lambda: self._client.zcard(self._keys.index(tenant)))
        return count

    async def restore(self) -> int:
        """Make the index name the sessions that exist, and no others; return how many had no name."""
        async for key in self._client.scan_iter(match=self._keys.index_pattern, count=SCAN_KEYS):
            await self._remove_gone(self._keys.tenant_of_index(key))
        restored, ids = 0, dict[str, dict[str, float]]()
        async for key in self._client.scan_iter(match=self._keys.meta_pattern, count=SCAN_KEYS):
            tenant, sid = tenant_and_session(key)
            ids.setdefault(tenant, {})[sid] = 0
            if len(ids[tenant]) == SCAN_KEYS:
                restored += await self._name_all(tenant, ids.pop(tenant))
        return restored + sum([await self._name_all(tenant, names) for tenant, names in ids.items()])

    async def _remove_gone(self, tenant: str) -> None:
        """Remove the names of sessions that have gone: nothing else does where sessions expire and nobody lists."""
        after = ""
        while names := await retry_while_away(partial(self._names, tenant, after, SCAN_KEYS)):
            if gone := await retry_while_away(partial(self.absent, tenant, names)):
                await retry_while_away(partial(self._client.zrem, self._keys.index(tenant), *gone))
                # A session may have been created since.
                if created := set(gone) - set(await retry_while_away(partial(self.absent, tenant, gone))):
                    await self._name_all(tenant, dict.fromkeys(created, 0))
            after = names[-1]

    async def absent(self, tenant: str, ids: Sequence[str]) -> list[str]:
        """Return those of the ids of which there is no session."""
        pipeline = self._client.pipeline(transaction=False)
        for sid in ids:
            pipeline.exists(self._keys.meta(tenant, sid))
        return [sid for sid, exists in zip(ids, await pipeline.execute(), strict=True) if not exists]

    async def _name_all(self, tenant: str, names: Mapping[str, float]) -> int:
        return int(await retry_while_away(lambda: self._client.zadd(self._keys.index(tenant), names)) or 0)

    async def _add(self, tenant: str, sid: str) -> None:
        await retry_while_away(lambda: self._client.zadd(self._keys.index(tenant), {sid: 0}))

    async def _page(self, tenant: str, after: str, limit: int) -> Sequence[tuple[str, dict[bytes, bytes]]]:
        """Return the next ids with their meta hashes, which are empty for a session that does not exist."""
        ids = await self._names(tenant, after, limit)
        pipeline = self._client.pipeline(transaction=False)
        for sid in ids:
            pipeline.hgetall(self._keys.meta(tenant, sid))
        return list(zip(ids, await pipeline.execute(), strict=True))

    async def _names(self, tenant: str, after: str, limit: int) -> list[str]:
        start = f"({after}" if after else "-"
        names = await self._client.zrangebylex(self._keys.index(tenant), start, "+", 0, limit)
        return [name.decode() for name in cast(list[bytes], names)]
