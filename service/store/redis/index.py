"""The index of each tenant's sessions. It lies in another hash slot than the sessions, so no script can change both.

The index may name sessions that do not exist, and misses none: a name is added before its session is created, and
readers skip and remove the names of sessions that have gone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import cast

from service.store.base import SessionMeta
from service.store.redis.codec import decode, index_key, meta_key
from service.store.redis.connect import AnyRedis
from service.store.redis.retry import retry_while_away


class SessionIndex:
    """A sorted set of session ids for each tenant, all of score 0 and hence in the order of their bytes."""

    def __init__(self, client: AnyRedis) -> None:
        self._client = client

    @asynccontextmanager
    async def naming(self, tenant: str, sid: str, *, new: bool) -> AsyncIterator[None]:
        """Name a new session before it is created, so that no reader misses it, and once more after it is created,
        since a reader may have removed the name of a session that did not exist yet."""
        if new:
            await self._add(tenant, sid)
        yield
        if new:
            await self._add(tenant, sid)

    async def remove(self, tenant: str, sid: str) -> None:
        """Remove the name of a session that does not exist; add the name again if the session exists after all."""
        await retry_while_away(lambda: self._client.zrem(index_key(tenant), sid))
        if await retry_while_away(lambda: self._client.exists(meta_key(tenant, sid))):
            await self._add(tenant, sid)

    async def list_sessions(self, tenant: str, after: str, limit: int) -> list[SessionMeta]:
        """Return up to `limit` sessions with ids after `after`, in order; remove names of sessions that have gone."""
        sessions: list[SessionMeta] = []
        while len(sessions) < limit:
            page = await retry_while_away(partial(self._page, tenant, after, limit - len(sessions)))
            if not page:
                break
            sessions += [decode(sid, meta_hash) for sid, meta_hash in page if meta_hash]
            for sid, meta_hash in page:
                if not meta_hash:
                    await self.remove(tenant, sid)
            after = page[-1][0]
        return sessions

    async def count(self, tenant: str) -> int:
        count: int = await retry_while_away(lambda: self._client.zcard(index_key(tenant)))
        return count

    async def _add(self, tenant: str, sid: str) -> None:
        await retry_while_away(lambda: self._client.zadd(index_key(tenant), {sid: 0}))

    async def _page(self, tenant: str, after: str, limit: int) -> Sequence[tuple[str, dict[bytes, bytes]]]:
        """Return the next ids with their meta hashes, which are empty for a session that does not exist."""
        start = f"({after}" if after else "-"
        names = await self._client.zrangebylex(index_key(tenant), start, "+", 0, limit)
        ids = [name.decode() for name in cast(list[bytes], names)]
        pipeline = self._client.pipeline(transaction=False)
        for sid in ids:
            pipeline.hgetall(meta_key(tenant, sid))
        return list(zip(ids, await pipeline.execute(), strict=True))
