"""A request as the sessions see it: who asks, what it may be the repetition of, and what became of it."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
import zlib
from dataclasses import dataclass, field
from typing import Any

from service.errors import KeyReused
from service.store.types import Once
from service.tenants import Tenant

Json = dict[str, Any]


@dataclass
class Call:
    """One HTTP request.

    tenant: whose it is, as its API key says.

    digest: of its route and body; empty = it is never remembered. key: its `Idempotency-Key`. retried: its client says
    that it has sent it before. committed, replayed: whether a session has learned from it, now or before. id, created:
    of its answer; a repetition has those of the first.
    """

    tenant: Tenant
    request_id: str = ""
    digest: str = ""
    key: str | None = None
    retried: bool = False
    committed: bool = False
    replayed: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def names(self) -> list[str]:
        """Under which name its answer may be there already."""
        return [self._name] if self.digest and (self.key is not None or self.retried) else []

    def once(self, result: Json, *, key_ttl_s: int, retry_ttl_s: int) -> Once | None:
        """What to remember of it, if anything."""
        ttl_s = retry_ttl_s if self.key is None else key_ttl_s
        if not self.digest or not ttl_s:
            return None
        told = {"request": self.digest, "id": self.id, "created": self.created, "result": result}
        record = json.dumps(told, separators=(",", ":"))
        return Once(self._name, ttl_s, zlib.compress(record.encode(), 1))

    def replay(self, record: bytes) -> Json:
        """The result that was remembered of it. Raises KeyReused."""
        found = json.loads(zlib.decompress(record))
        if found["request"] != self.digest:
            raise KeyReused(
                "'Idempotency-Key' has been used for another request to this session; take a new one.",
                param="Idempotency-Key",
            )
        self.committed = self.replayed = True
        self.id, self.created = found["id"], found["created"]
        result: Json = found["result"]
        return result

    @property
    def _name(self) -> str:
        return f"auto-{self.digest}" if self.key is None else hashlib.sha256(self.key.encode()).hexdigest()
