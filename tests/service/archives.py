"""Sessions in an archive, for tests: they are taught, archived and compared."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from service.store import CommitMetadata, IdempotencyRecord
from service.store.objects import Objects
from service.store.redis.archive import SUFFIX
from service.store.redis.store import RedisStore
from tests.service.store_backends import new_meta, rows, snapshot

VOLATILE = {b"archived", b"brought", b"file", b"once_until"}


@asynccontextmanager
async def opened(url: str, folder: Path | None) -> AsyncIterator[RedisStore]:
    """Yield a store of one more server."""
    store = RedisStore.from_url(url, objects=None if folder is None else Objects(str(folder)))
    yield store
    await store.close()


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob(f"*{SUFFIX}"))


def content(raw: Any, tenant: str) -> dict[bytes, Any]:
    """Return what is stored of the tenant's sessions, without fences, rights, and fields that are about files."""
    found = {}
    for key in snapshot(raw, tenant):
        kind, suffix = raw.type(key), key.rpartition(b":")[2]
        if suffix in (b"fence", b"archiving", b"lease"):
            continue
        if kind == b"hash":
            found[key] = {name: value for name, value in raw.hgetall(key).items() if name not in VOLATILE}
        else:
            found[key] = raw.dump(key)
    return found


async def teach(store: RedisStore, sid: str = "s", versions: int = 3, tenant: str = "t") -> None:
    """Take a session through versions, of which each writes a row of its own and rows that others write too."""
    for _ in range(versions):
        turn = await store.begin_turn(tenant, sid, write="always")
        version = 1 + (turn.meta.version if turn.meta else 0)
        record = IdempotencyRecord(f"n{version}", 1000, b"the answer")
        await store.commit(
            tenant,
            new_meta(sid, version),
            {"a": rows([0, version], version), "b": rows(range(40), version, 16)},
            lease=turn.lease,
            commit_metadata=CommitMetadata({"kind": "learn"}, b"tokens", record),
        )


async def assert_whole(store: RedisStore, sid: str, version: int, tenant: str = "t") -> None:
    """Check that the session is at `version` with all that its versions wrote, its log and its undo steps."""
    loaded = await store.load(tenant, sid)
    assert loaded is not None and loaded.meta == new_meta(sid, version)
    assert loaded.sites["a"].slots.tolist() == list(range(version + 1))
    assert loaded.sites["a"].data[1:, 0].tolist() == [n % 256 for n in range(1, version + 1)]
    history = await store.history(tenant, sid, undo=True)
    assert history is not None and [entry["version"] for entry in history.log] == list(range(1, version + 1))[-512:]
    assert [step.version for step in history.undo] == list(range(version, max(0, version - 32), -1))
