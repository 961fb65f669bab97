"""The answers that a store keeps: the marks of erased ones, and responses that a client may continue."""

from __future__ import annotations

from typing import Protocol

KEPT_OF_SESSION = 32  # newest responses that a session keeps
KEPT_OF_TENANT = 1024  # newest responses of no session that a tenant keeps
ERASED = b"erased at "  # then the version, as in commit.lua; no answer begins so


def erased_answer(version: int) -> bytes:
    """Return the record that stands for an answer which the commit of `version` has erased."""
    return ERASED + b"%d" % version


def version_that_erased(record: bytes) -> int:
    """Return the version whose commit has erased an answer; 0 if the record is the answer."""
    return int(record.removeprefix(ERASED)) if record.startswith(ERASED) else 0


class ResponseStore(Protocol):
    """Kept responses: those of each session, and of each tenant those of no session, whose `sid` is "".

    A response of a session goes with the session, and with a commit that says so (`CommitMetadata.drops_responses`).
    Every response expires; beyond `KEPT_OF_SESSION` and `KEPT_OF_TENANT` the oldest go. Every method is atomic, and
    raises what `SessionStore` says; only `put` raises StoreFull and VersionConflict.
    """

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
        """Keep a response under a name for `ttl_s` seconds, but no longer than its session lives. Idempotent.

        Args:
            created: `SessionMeta.created` of the session; None for no session.
            after: name of the newest response, which this one goes on with; "" for none. A response of this name that
                is kept then stays as it is. None: the response becomes the newest one, whatever is kept.

        Returns:
            Whether the response is kept: False if the session has been erased, or was never stored.

        Raises:
            VersionConflict: another response than `after` is the newest one.
        """
        ...

    async def get(self, tenant: str, sid: str, name: str | None) -> bytes | None:
        """Return the response of that name, or with None the newest one; None if there is none. Changes nothing."""
        ...

    async def delete(self, tenant: str, sid: str, name: str) -> bool:
        """Erase a response; return whether there was one."""
        ...
