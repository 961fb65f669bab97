"""The contract of the tenants' accounts; no account is kept here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol


class QuotaLedger(Protocol):
    """The account of each tenant: the bytes that its sessions hold, and a bucket of tokens that it may learn.

    All servers of a store share the accounts. Every method is atomic. Every method raises `StoreUnavailable` like
    `SessionStore`; no method raises `StoreFull`, since an account must also be kept when the store is full. A tenant
    has no account, and costs nothing, until the first method that changes one.
    """

    async def reserve(self, tenant: str, sid: str, limit: int) -> tuple[bool, int]:
        """Enter a new session into the account, unless the account has `limit` sessions.

        Idempotent: a session that the account names already is granted and left unchanged.

        Args:
            limit: the number of sessions that the tenant may have; 0 = no limit.

        Returns:
            Whether the account names the session now, and the number of sessions before the call.
        """
        ...

    async def record(self, tenant: str, sid: str, *, num_bytes: int | None, rate: int, tokens: int) -> None:
        """Note what a commit changed. Not idempotent: each call takes `tokens` from the bucket.

        Args:
            num_bytes: bytes that the session holds now, which ends its reservation; None = leave the sessions alone.
            rate: tokens per minute that the tenant may learn: the size of the bucket, which fills within a minute and
                may be overdrawn; 0 = no bucket.
            tokens: number of tokens that the commit learned.
        """
        ...

    async def drop(self, tenant: str, sids: Sequence[str], *, min_age_s: float = 0.0) -> None:
        """Remove sessions and their bytes from the account. Idempotent.

        A reservation (see `reserve`) that is younger than `min_age_s` stays: the session may be in its first turn.
        """
        ...

    async def set_bytes(self, tenant: str, sizes: Mapping[str, int]) -> None:
        """Set the bytes of several sessions, by id. Idempotent; leaves other sessions unchanged."""
        ...

    async def gone(self, tenant: str, cursor: int) -> tuple[int, list[str]]:
        """Look at a page of the account from `cursor` on, which is 0 at the beginning.

        Returns where to go on, 0 at the end, and the ids of which there is no session (reservations included).
        """
        ...

    async def is_settled(self, tenant: str) -> bool:
        """Return whether the account, as it is kept now, was once compared with all stored sessions."""
        ...

    async def mark_settled(self, tenant: str) -> None:
        """Note that the account was compared with all stored sessions."""
        ...

    async def usage(self, tenant: str, rate: int) -> tuple[int, int]:
        """Return the bytes that the tenant's sessions hold, and the tokens left in its bucket (rounded down).

        The tokens are negative after an overdraft, and 0 if `rate` is 0. Changes nothing.
        """
        ...
