"""The names of all keys and channels of one deployment in Redis; store.py lists what the keys hold."""

from __future__ import annotations

import re
from dataclasses import dataclass

from service.store.base import check_name

DEFAULT_PREFIX = "imprint"
_PREFIX = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class Keys:
    """The names that begin with a prefix. Deployments of different prefixes can share a Redis.

    Raises:
        ValueError: the prefix is not valid.
    """

    prefix: str = DEFAULT_PREFIX

    def __post_init__(self) -> None:
        if not _PREFIX.fullmatch(self.prefix):
            raise ValueError(f"the prefix of the keys must match {_PREFIX.pattern}, not {self.prefix!r}")

    @property
    def erased_channel(self) -> str:
        """Return the channel on which servers hear of erased sessions."""
        return f"{self.prefix}:erased"

    @property
    def meta_pattern(self) -> str:
        """Return the glob pattern of the names of all meta hashes."""
        return f"{self.prefix}:{{*}}:meta"

    def session(self, tenant: str, sid: str, suffix: str) -> str:
        """Return the name of one key of a session. A cluster hashes what stands in the braces."""
        return f"{self.prefix}:{{{check_name('tenant', tenant)}/{check_name('session id', sid)}}}:{suffix}"

    def meta(self, tenant: str, sid: str) -> str:
        """Return the name of the meta hash, from which the scripts derive the session's other keys."""
        return self.session(tenant, sid, "meta")

    def index(self, tenant: str) -> str:
        """Return the name of the tenant's index of sessions."""
        return f"{self.prefix}:sessions:{check_name('tenant', tenant)}"

    def account(self, tenant: str) -> list[str]:
        """Return the names of the two keys of the tenant's account: its sessions, and its bucket of tokens."""
        return [f"{self.prefix}:{{{tenant}}}:sessions", f"{self.prefix}:{{{tenant}}}:tokens"]

    def alive(self, owner: str) -> str:
        """Return the name of a server's heartbeat."""
        return f"{self.prefix}:alive:{owner}"


def tenant_and_session(key: bytes) -> tuple[str, str]:
    """Return the tenant and the session that a key belongs to."""
    name = key.decode()
    tenant, _, sid = name[name.index("{") + 1 : name.rindex("}")].partition("/")
    return tenant, sid
