"""The session store: durable sessions behind the Redis protocol; `embedded` runs a Valkey that speaks it."""

from service.store.base import Keeping, Note, Once, RowBatch, SessionMeta, StoredSession
from service.store.redis.store import RedisStore

__all__ = ["Keeping", "Note", "Once", "RedisStore", "RowBatch", "SessionMeta", "StoredSession"]
