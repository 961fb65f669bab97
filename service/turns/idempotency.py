"""The context of one HTTP request: its tenant, its idempotency key, and the answer that the store may remember."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
import zlib
from dataclasses import dataclass, field
from typing import Any, cast

from service.concurrency import dump_json
from service.errors import Conflict, KeyReused
from service.store.answers import version_that_erased
from service.store.base import IdempotencyRecord
from service.tenants import Tenant

Json = dict[str, Any]


@dataclass
class RequestContext:
    """One HTTP request.

    Attributes:
        tenant: the tenant of the request's API key.
        digest: digest of the route and the body; empty = the answer is never remembered.
        key: the `Idempotency-Key`.
        attempt: how often the client says to have sent the request before; None = the client does not say.
        start_version: the session's version when the turn began; None before the turn begins.
        committed: whether a session has learned from the request, now or before.
        replayed: whether the answer is a remembered one.
        id, created: id and Unix time (s) of the answer; a replay has those of the first answer.
    """

    tenant: Tenant
    request_id: str = ""
    digest: str = ""
    key: str | None = None
    attempt: int | None = None
    start_version: int | None = None
    committed: bool = False
    replayed: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def names(self) -> list[str]:
        """The names under which the store may remember the answer: one or none."""
        may_repeat = self.key is not None or self.attempt is not None or self.start_version is not None
        return [self._name] if self.digest and may_repeat else []

    def idempotency_record(
        self, result: Json, version: int, *, key_ttl_s: int, retry_ttl_s: int, large: bool = False
    ) -> IdempotencyRecord | None:
        """Return the record to store with the commit of `version`; None if the answer is not to be remembered.

        result: JSON, in which an iterator may stand for a list. large: whether the JSON is to be written step by step,
        which is slower and lets other threads run.
        """
        ttl_s = retry_ttl_s if self.key is None else key_ttl_s
        if not self.digest or not ttl_s:
            return None
        payload = {"request": self.digest, "version": version, "attempt": self.attempt or 0, "result": result}
        payload |= {"id": self.id, "created": self.created}
        record = dump_json(payload) if large else json.dumps(payload, separators=(",", ":"), default=list)
        return IdempotencyRecord(self._name, ttl_s, zlib.compress(record.encode(), 1))

    def adopt_replay(self, record: bytes) -> Json | None:
        """Return the remembered result and take over the id and the time of its answer; mark this context as replayed.

        Returns None, and changes nothing, if the record belongs to another request with an equal body. Raises
        KeyReused if the key belongs to a request with another route or body, and Conflict (`answer_erased`) if the
        answer had read what the session has unlearned for good since.
        """
        erased = version_that_erased(record)
        stored: Json = {"version": erased} if erased else json.loads(zlib.decompress(record))
        if not self._is_same_request(stored["version"]):
            return None
        if erased:
            raise Conflict(
                f"The request has been answered, and version {erased} has erased the answer with what the session has "
                "unlearned for good; it was not run again.",
                code="answer_erased",
            )
        if stored["request"] != self.digest:
            raise KeyReused(
                "'Idempotency-Key' has been used for another request to this session; take a new one.",
                param="Idempotency-Key",
            )
        self.committed = self.replayed = True
        self.id, self.created = stored["id"], stored["created"]
        return cast(Json, stored["result"])

    def _is_same_request(self, stored_version: int) -> bool:
        """Return whether a remembered answer belongs to this request.

        Without a key or an attempt number, an equal body is a retry only if its commit came after this turn began.
        """
        if self.key is not None or self.attempt:
            return True
        return self.start_version is not None and self.start_version < stored_version

    def has_later_attempt(self, record: bytes) -> bool:
        """Return whether a retry of an equal request was answered.

        The client may then have abandoned this connection and sent the request again on another one.
        """
        return not version_that_erased(record) and bool(json.loads(zlib.decompress(record))["attempt"])

    @property
    def _name(self) -> str:
        return f"auto-{self.digest}" if self.key is None else hashlib.sha256(self.key.encode()).hexdigest()
