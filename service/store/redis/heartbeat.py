"""The heartbeat of a server: a key that expires soon after the server stops, so that others may take its leases."""

from __future__ import annotations

from service.store.base import HEARTBEAT_S, Lease
from service.store.redis.codec import Keys
from service.store.redis.connect import AnyRedis
from service.store.redis.scripts import ALLOW_OOM, retry_while_away

BEATING = "beating-"  # prefix of the owners that have a heartbeat; servers of earlier releases have none
BEAT = ALLOW_OOM + "return redis.call('SET', KEYS[1], '', 'PX', ARGV[1])"


class Heartbeat:
    """The heartbeats of all servers of a store."""

    def __init__(self, client: AnyRedis, keys: Keys) -> None:
        self._client, self._keys = client, keys
        self._beat = client.register_script(BEAT)

    async def beat(self, owner: str) -> None:
        """Say that the server `owner` runs."""
        await retry_while_away(lambda: self._beat([self._keys.alive(owner)], [int(1000 * HEARTBEAT_S)]))

    async def is_dead(self, lease: Lease) -> bool:
        """Return whether the owner of a lease had a heartbeat and has none any more."""
        owner = lease.value.rpartition(":")[0]
        if not owner.startswith(BEATING):
            return False
        return not await retry_while_away(lambda: self._client.exists(self._keys.alive(owner)))
