"""The tenants' accounts in the memory of this process, for tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import floor, inf

MINUTE_S = 60.0

Clock = Callable[[], float]  # seconds


class MemoryLedger:
    """The `QuotaLedger` in this process's memory. exists: returns whether a tenant has a session of that id."""

    def __init__(self, clock: Clock, exists: Callable[[str, str], bool]) -> None:
        self._clock, self._exists = clock, exists
        self._settled: set[str] = set()
        self._bytes: dict[str, dict[str, int]] = {}  # tenant -> session id -> bytes
        self._reserved_at: dict[tuple[str, str], float] = {}  # sessions that have not been recorded yet
        self._buckets: dict[str, tuple[float, float]] = {}  # tenant -> tokens left, time

    async def reserve(self, tenant: str, sid: str, limit: int) -> tuple[bool, int]:
        sessions = self._bytes.setdefault(tenant, {})
        count = len(sessions)
        if sid not in sessions:
            if limit and count >= limit:
                return False, count
            sessions[sid], self._reserved_at[tenant, sid] = 0, self._clock()
        return True, count

    async def record(self, tenant: str, sid: str, *, num_bytes: int | None, rate: int, tokens: int) -> None:
        if num_bytes is not None:
            await self.set_bytes(tenant, {sid: num_bytes})
        if rate:
            self._buckets[tenant] = self._tokens_left(tenant, rate) - tokens, self._clock()

    async def drop(self, tenant: str, sids: Sequence[str], *, min_age_s: float = 0.0) -> None:
        for sid in sids:
            reserved_at = self._reserved_at.get((tenant, sid), -inf)
            if self._clock() - reserved_at >= min_age_s:
                self._bytes.get(tenant, {}).pop(sid, None)
                self._reserved_at.pop((tenant, sid), None)

    async def set_bytes(self, tenant: str, sizes: Mapping[str, int]) -> None:
        self._bytes.setdefault(tenant, {}).update(sizes)
        for sid in sizes:
            self._reserved_at.pop((tenant, sid), None)

    async def gone(self, tenant: str, cursor: int) -> tuple[int, list[str]]:
        return 0, [sid for sid in self._bytes.get(tenant, {}) if not self._exists(tenant, sid)]

    async def is_settled(self, tenant: str) -> bool:
        return tenant in self._settled

    async def mark_settled(self, tenant: str) -> None:
        self._settled.add(tenant)

    async def usage(self, tenant: str, rate: int) -> tuple[int, int]:
        return sum(self._bytes.get(tenant, {}).values()), floor(self._tokens_left(tenant, rate)) if rate else 0

    def _tokens_left(self, tenant: str, rate: int) -> float:
        left, at = self._buckets.get(tenant, (float(rate), self._clock()))
        return min(rate, left + max(0.0, self._clock() - at) * rate / MINUTE_S)
