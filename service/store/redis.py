"""Sessions in Redis or Valkey: consistent reads, and commits that are atomic, durable and counted once.

Keys, all of a session's in one hash slot of a cluster:

    imprint:{<tenant>/<id>}:meta         hash: format, nonce of the last commit, SessionMeta's fields as JSON,
                                         and `site:<name>` = bytes per row, for each site that has rows
    imprint:{<tenant>/<id>}:rows:<site>  hash: slot (4 bytes, little-endian) -> row
    imprint:sessions:<tenant>            sorted set of ids, all of score 0, hence in the order of their bytes

Every step on a session is one server-side script. The index cannot be part of it (another slot), so it is
written first: it may name sessions that do not exist, which readers skip, but misses none.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from importlib.resources import files
from typing import Any, cast

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    ClusterDownError,
    ConnectionError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TimeoutError,
    TryAgainError,
)

from service.errors import EngineError, NotFound, StoreUnavailable, VersionConflict
from service.store.types import RowBatch, SessionMeta, StoredSession

FORMAT = "1"
CONNECTIONS = 16
CONNECT_TIMEOUT_S = 2.0
TIMEOUT_S = 10.0
HEALTH_CHECK_S = 15
READ_PATIENCE_S = 0.5
COMMIT_PATIENCE_S = 2.0

_AWAY = (
    ConnectionError,
    TimeoutError,
    ClusterDownError,
    TryAgainError,
    ReadOnlyError,
    OutOfMemoryError,
    OSError,
)
_AWAY_REPLIES = ("BUSY", "MISCONF", "NOREPLICAS")
_NAME = re.compile(r"[A-Za-z0-9._~:@+=-]+")

log = logging.getLogger(__name__)


class RedisStore:
    """Sessions of all tenants, kept in one Redis or Valkey server (or cluster).

    Every method raises `StoreUnavailable` when the server does not answer, or not yet; nothing has to be
    restarted when it comes back. A session in a format that this release does not know is refused with
    `EngineError`, and names that could break out of a key with `ValueError`.

    Args:
        client: must answer in bytes, and not retry by itself: only this class knows what may be repeated.
    """

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._create, self._configure, self._commit, self._load, self._delete = (
            client.register_script(files(__package__).joinpath(f"{name}.lua").read_text("utf-8"))
            for name in ("create", "configure", "commit", "load", "delete")
        )

    @classmethod
    def from_url(cls, url: str) -> RedisStore:
        """A store on the server at `redis://`, `rediss://` or `unix://`.

        Raises:
            ValueError: the URL is none of these.
        """
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS,
            timeout=TIMEOUT_S,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=CONNECT_TIMEOUT_S,
            health_check_interval=HEALTH_CHECK_S,
            retry=Retry(NoBackoff(), 0),
        )
        return cls(Redis.from_pool(pool))

    async def load(self, tenant: str, sid: str) -> StoredSession | None:
        """The session with all its rows, both of the same version; None if there is no such session."""
        key, rows_prefix = _meta_key(tenant, sid), _rows_key(tenant, sid, "")
        flat, *rows = await _patiently(lambda: self._load([key], [rows_prefix]))
        if not flat:
            return None
        raw = _pairs(flat)
        meta = _decode(sid, raw)
        sites = {
            site.decode(): RowBatch.unpack(packed, int(raw[b"site:" + site])) for site, packed in _pairs(rows).items()
        }
        return StoredSession(meta, sites)

    async def meta(self, tenant: str, sid: str) -> SessionMeta | None:
        """The session without its rows; None if there is no such session."""
        key = _meta_key(tenant, sid)
        raw = await _patiently(lambda: self._client.hgetall(key))
        return _decode(sid, raw) if raw else None

    async def create(self, tenant: str, meta: SessionMeta) -> SessionMeta:
        """Stores a session without rows, unless there is one of that id; returns what is stored then."""
        key, values = _meta_key(tenant, meta.id), {"format": FORMAT, **_encode(meta)}
        await self._index(tenant, meta.id)
        return _decode(meta.id, _pairs(await _patiently(lambda: self._create([key], _flat(values)))))

    async def configure(self, tenant: str, sid: str, options: Mapping[str, str]) -> SessionMeta:
        """Replaces the session's options, and leaves its version.

        Raises:
            NotFound: there is no such session.
        """
        key, args = _meta_key(tenant, sid), [FORMAT, json.dumps(dict(options))]
        flat = await _patiently(lambda: self._configure([key], args))
        if not flat:
            raise NotFound(f"session {sid!r} does not exist")
        return _decode(sid, _pairs(flat))

    async def commit(self, tenant: str, meta: SessionMeta, sites: Mapping[str, RowBatch]) -> None:
        """Takes the session from version `meta.version - 1` to `meta.version`, entirely or not at all.

        When this returns, the step is as durable as the server makes it. A lost reply is resolved by
        repeating the commit under its nonce, which the server applies once. Shield this call: cancelling it
        leaves the outcome open.

        Args:
            meta: the new meta; its options are stored only if the session is new.
            sites: the touched rows alone, by site.

        Raises:
            VersionConflict: the stored session is not at that version any more; nothing was written.
            StoreUnavailable: nothing was written, or the outcome is unknown: load again before the next turn.
        """
        keys = [_meta_key(tenant, meta.id), *(_rows_key(tenant, meta.id, site) for site in sites)]
        values = _encode(meta)
        options = values.pop("options")
        args: list[str | int | bytes] = [FORMAT, meta.version - 1, values["created"], secrets.token_hex(16)]
        args += [options, 2 * len(values), *_flat(values)]
        for site, batch in sites.items():
            args += [site, batch.row_bytes, batch.pack()]
        attempts = 0

        async def attempt() -> Any:
            nonlocal attempts
            attempts += 1
            return await self._commit(keys, args)

        await self._index(tenant, meta.id)
        verdict, detail = await _patiently(attempt, COMMIT_PATIENCE_S)
        if verdict == b"conflict" and attempts > 1 and int(detail) > meta.version:
            # An earlier attempt may have landed, and another commit since then have replaced its nonce.
            raise StoreUnavailable(f"unknown whether session {meta.id!r} took the step to {meta.version}")
        _check(verdict, detail, meta)

    async def delete(self, tenant: str, sid: str) -> bool:
        """Deletes every key of the session; returns whether there was one."""
        key, args = _meta_key(tenant, sid), [FORMAT, _rows_key(tenant, sid, "")]
        # Not repeated: a second attempt could not tell whether the first one found a session.
        verdict, detail = await _patiently(lambda: self._delete([key], args), patience=0)
        if verdict == b"format":
            raise _unknown_format(sid, detail)
        await _patiently(lambda: self._client.zrem(_index_key(tenant), sid))
        return bool(detail == b"1")

    async def list(self, tenant: str, *, after: str = "", limit: int = 100) -> list[SessionMeta]:
        """Up to `limit` sessions whose ids follow `after`, in order of their ids; fewer only at the end."""
        found: list[SessionMeta] = []
        while len(found) < limit:
            missing = limit - len(found)
            page = await _patiently(partial(self._page, tenant, after, missing))
            if not page:
                break
            found += [_decode(sid, raw) for sid, raw in page if raw]
            after = page[-1][0]
        return found

    async def count(self, tenant: str) -> int:
        """How many sessions the index names."""
        count: int = await _patiently(lambda: self._client.zcard(_index_key(tenant)))
        return count

    def script(self, name: str) -> Callable[[Sequence[str], Sequence[str | int]], Awaitable[Any]]:
        """A script of this package, to be called with keys of one hash tag and arguments."""
        script = self._client.register_script(files(__package__).joinpath(f"{name}.lua").read_text("utf-8"))
        return lambda keys, args: _patiently(lambda: script(keys, args))

    async def ping(self) -> None:
        """Returns if the server answers right now."""
        await _patiently(lambda: self._client.ping(), patience=0)

    async def close(self) -> None:
        await self._client.aclose()

    async def _index(self, tenant: str, sid: str) -> None:
        """Names the session in the tenant's index; free when it is there, and mends one that is not."""
        await _patiently(lambda: self._client.zadd(_index_key(tenant), {sid: 0}))

    async def _page(self, tenant: str, after: str, limit: int) -> Sequence[tuple[str, dict[bytes, bytes]]]:
        """The next ids of the index with their meta hashes, empty where an entry has no session."""
        start = f"({after}" if after else "-"
        names = await self._client.zrangebylex(_index_key(tenant), start, "+", 0, limit)
        ids = [name.decode() for name in cast(list[bytes], names)]
        pipeline = self._client.pipeline(transaction=False)
        for sid in ids:
            pipeline.hgetall(_meta_key(tenant, sid))
        return list(zip(ids, await pipeline.execute(), strict=True))


async def _patiently(call: Callable[[], Awaitable[Any]], patience: float = READ_PATIENCE_S) -> Any:
    """Repeats a call while the server is away, for `patience` seconds from the first failure."""
    deadline, pause = None, 0.01
    while True:
        try:
            return await call()
        except _AWAY as error:
            cause: Exception = error
        except ResponseError as error:
            if not str(error).startswith(_AWAY_REPLIES):
                raise
            cause = error
        deadline = deadline or time.monotonic() + patience
        if time.monotonic() + pause > deadline:
            log.warning("the session store is away: %s: %s", type(cause).__name__, cause)
            raise StoreUnavailable("the session store does not answer, try again", retry_after=1.0) from cause
        await asyncio.sleep(pause)
        pause *= 2


def _meta_key(tenant: str, sid: str) -> str:
    return f"imprint:{_hash_tag(tenant, sid)}:meta"


def _rows_key(tenant: str, sid: str, site: str) -> str:
    return f"imprint:{_hash_tag(tenant, sid)}:rows:{site}"


def _index_key(tenant: str) -> str:
    return f"imprint:sessions:{_checked('tenant', tenant)}"


def _hash_tag(tenant: str, sid: str) -> str:
    """The part of a key that a cluster hashes; no two sessions share it."""
    return f"{{{_checked('tenant', tenant)}/{_checked('session id', sid)}}}"


def _checked(kind: str, name: str) -> str:
    """A name that cannot break out of its place in a key: no brace, slash or blank."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{kind} must match {_NAME.pattern}, not {name!r}")
    return name


def _encode(meta: SessionMeta) -> dict[str, str]:
    return {field.name: json.dumps(getattr(meta, field.name)) for field in fields(meta)}


def _decode(sid: str, raw: Mapping[bytes, bytes]) -> SessionMeta:
    found = raw.get(b"format", b"none")
    if found != FORMAT.encode():
        raise _unknown_format(sid, found)
    values = {field.name: json.loads(raw[field.name.encode()]) for field in fields(SessionMeta)}
    return SessionMeta(**{**values, "digests": tuple(values["digests"])})


def _unknown_format(sid: str, found: bytes) -> EngineError:
    return EngineError(
        f"session {sid!r} is stored in format {found.decode(errors='replace')}, but this release knows only "
        f"format {FORMAT}: serve it with the release that wrote it, or a later one",
        code="unknown_store_format",
    )


def _check(verdict: bytes, detail: bytes, meta: SessionMeta) -> None:
    """Raises the error that a commit's verdict stands for, if it is not `done`."""
    found, session = detail.decode(), f"session {meta.id!r}"
    match verdict:
        case b"format":
            raise _unknown_format(meta.id, detail)
        case b"conflict":
            raise VersionConflict(f"{session} is at version {found}, the turn began at {meta.version - 1}")
        case b"renewed":
            raise VersionConflict(f"{session} was deleted and created again since the turn began")
        case b"width":
            raise EngineError(f"rows of {session} at site {found}")


def _flat(mapping: Mapping[str, str]) -> list[str]:
    return [text for pair in mapping.items() for text in pair]


def _pairs(flat: Iterable[bytes]) -> dict[bytes, bytes]:
    """The mapping that a script returned as key, value, key, value, ..."""
    items = iter(flat)
    return dict(zip(items, items, strict=True))
