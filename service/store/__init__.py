"""Durable sessions. `base` states the contract; `redis` and `memory` hold stores; `embedded` runs a Valkey server."""

from service.store.base import (
    CommitMetadata,
    IdempotencyRecord,
    RetentionConfig,
    RowBatch,
    SessionMeta,
    SessionStore,
    StoredSession,
)
from service.store.ledger import QuotaLedger

__all__ = [
    "CommitMetadata",
    "IdempotencyRecord",
    "QuotaLedger",
    "RetentionConfig",
    "RowBatch",
    "SessionMeta",
    "SessionStore",
    "StoredSession",
]
