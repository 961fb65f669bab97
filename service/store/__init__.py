"""The session store: durable sessions behind the Redis protocol; `embedded` runs a Valkey that speaks it."""

from service.store.base import CommitMetadata, IdempotencyRecord, RetentionConfig, RowBatch, SessionMeta, StoredSession
from service.store.redis.store import RedisStore

__all__ = [
    "CommitMetadata",
    "IdempotencyRecord",
    "RedisStore",
    "RetentionConfig",
    "RowBatch",
    "SessionMeta",
    "StoredSession",
]
