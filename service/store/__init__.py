"""The session store: durable sessions behind the Redis protocol; `embedded` runs a Valkey that speaks it."""

from service.store.redis import RedisStore
from service.store.types import Keeping, Note, Once, RowBatch, SessionMeta, StoredSession

__all__ = ["Keeping", "Note", "Once", "RedisStore", "RowBatch", "SessionMeta", "StoredSession"]
