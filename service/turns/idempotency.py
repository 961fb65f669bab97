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
from service.store.base import IdempotencyRecord
from service.tenants import Tenant

Json = dict[str, Any]


@dataclass
class RequestContext:
    """One HTTP request.

    tenant: whose it is, as its API key says.

    digest: of its route and body; empty = it is never remembered. key: its `Idempotency-Key`. attempt: how often its
    client says to have sent it before; None = it does not say. began: the version that its turn found, once it has
    begun. committed, replayed: whether a session has learned from it, now or before. id, created: of its answer; a
    repetition has those of the first.
    """

    tenant: Tenant
    request_id: str = ""
    digest: str = ""
    key: str | None = None
    attempt: int | None = None
    began: int | None = None
    committed: bool = False
    replayed: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def names(self) -> list[str]:
        """Under which name its answer may be there already."""
        asks = self.key is not None or self.attempt is not None or self.began is not None
        return [self._name] if self.digest and asks else []

    def idempotency_record(
        self, result: Json, version: int, *, key_ttl_s: int, retry_ttl_s: int
    ) -> IdempotencyRecord | None:
        """What to remember of it with the commit of a version, if anything."""
        ttl_s = retry_ttl_s if self.key is None else key_ttl_s
        if not self.digest or not ttl_s:
            return None
        payload = {"request": self.digest, "version": version, "attempt": self.attempt or 0, "result": result}
        payload |= {"id": self.id, "created": self.created}
        record = json.dumps(payload, separators=(",", ":"))
        return IdempotencyRecord(self._name, ttl_s, zlib.compress(record.encode(), 1))

    def replay(self, record: bytes) -> Json | None:
        """The result that was remembered of it; None of an equal request that was another one. Raises KeyReused."""
        found = json.loads(zlib.decompress(record))
        if self.key is None and not self.attempt and (self.began is None or self.began >= found["version"]):
            return None
        if found["request"] != self.digest:
            raise KeyReused(
                "'Idempotency-Key' has been used for another request to this session; take a new one.",
                param="Idempotency-Key",
            )
        self.committed = self.replayed = True
        self.id, self.created = found["id"], found["created"]
        result: Json = found["result"]
        return result

    def has_later_attempt(self, record: bytes) -> bool:
        """Whether an equal request was answered at a later attempt: this may be its first, which has been given up."""
        return bool(json.loads(zlib.decompress(record))["attempt"])

    @property
    def _name(self) -> str:
        return f"auto-{self.digest}" if self.key is None else hashlib.sha256(self.key.encode()).hexdigest()
