"""The Lua scripts of the Redis store, and calls that are tried again while Redis is away."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import TypeVar

from redis.commands.core import AsyncScript
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ClusterDownError,
    ConnectionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TimeoutError,
    TryAgainError,
)

from service.errors import StoreUnavailable
from service.store import errors
from service.store.base import SessionMeta
from service.store.errors import damaged_session, store_full, store_refused
from service.store.redis.codec import unknown_format
from service.store.redis.connect import AnyRedis

READ_RETRY_S = 0.5
COMMIT_RETRY_S = 2.0
FIRST_PAUSE_S = 0.01

UNAVAILABLE_ERRORS = (
    ConnectionError,
    TimeoutError,
    ClusterDownError,
    RedisClusterException,
    TryAgainError,
    ReadOnlyError,
    OSError,
)
CLIENT_ERRORS = (RedisError, RedisClusterException, OSError, RuntimeError, AttributeError)  # all that a call may raise
UNAVAILABLE_REPLIES = ("BUSY", "MISCONF", "NOREPLICAS", "MASTERDOWN", "CLUSTERDOWN", "UNBLOCKED")

T = TypeVar("T")

log = logging.getLogger(__name__)


async def retry_while_away(call: Callable[[], Awaitable[T]], retry_s: float = READ_RETRY_S) -> T:
    """Return the result of `call`, repeated while the server is away.

    Args:
        call: what to repeat; must be safe to repeat unless `retry_s` is 0.
        retry_s: seconds from the first failure within which a repetition may begin; 0 = never repeat.

    Raises:
        StoreUnavailable: the server was away for longer.
        StoreFull: the server has no memory for a write.
        StoreRefused: the server refuses the command, for a lack of rights, for example.
        EngineError: a key has a type that no release writes (code `damaged_session`).
    """
    deadline, pause = None, FIRST_PAUSE_S
    task = asyncio.current_task()
    cancellations = task.cancelling() if task else 0
    while True:
        cause: Exception | None = None
        try:
            result = await call()
        except CLIENT_ERRORS as error:
            if _is_full(error):
                raise store_full() from error
            if not _is_away(error):
                raise _refusal(error) from error
            cause = error
        if task and task.cancelling() > cancellations:
            # Python 3.11's `asyncio.wait_for`, which the client uses, loses a cancellation that comes with a result.
            # An abandoned turn would go on, and its tokens would be learned.
            raise asyncio.CancelledError
        if cause is None:
            return result
        deadline = deadline or time.monotonic() + retry_s
        if time.monotonic() + pause > deadline:
            log.warning("the session store is away: %s: %s", type(cause).__name__, cause)
            raise StoreUnavailable(_unavailable_message(cause), retry_after=1.0) from cause
        await asyncio.sleep(pause)
        pause *= 2


def _refusal(error: Exception) -> Exception:
    """Return the error for a call that no repetition would help."""
    if not isinstance(error, RedisError):
        return error
    if "WRONGTYPE" in str(error)[:200]:
        return damaged_session("", "a key of it has another type")
    log.error("the session store refuses a command: %s: %s", type(error).__name__, error)
    return store_refused()


def is_lost_connection(error: RuntimeError | AttributeError) -> bool:
    """Return whether a connection was closed while a command was being sent, an error that redis-py does not translate.

    uvloop refuses to write to such a connection. The client of a cluster drops the streams of all connections when it
    asks for the nodes anew, so that a command which is being sent finds None in place of its stream.
    """
    if isinstance(error, RuntimeError):
        return "handler is closed" in str(error)
    innermost = error.__traceback__
    while innermost is not None and innermost.tb_next is not None:
        innermost = innermost.tb_next
    module = innermost.tb_frame.f_globals.get("__name__", "") if innermost else ""
    return error.obj is None and str(module).startswith("redis.")


def _unavailable_message(cause: Exception) -> str:
    if str(cause).startswith("NOREPLICAS"):
        return "the session store takes no writes now: what was learned can be used, nothing more can be learned"
    return "the session store does not answer, try again"


def _is_full(error: Exception) -> bool:
    return isinstance(error, OutOfMemoryError) or (isinstance(error, ResponseError) and "OOM " in str(error)[:80])


def _is_away(error: Exception) -> bool:
    if isinstance(error, AuthenticationError | AuthorizationError):
        return False
    if isinstance(error, UNAVAILABLE_ERRORS):
        return True
    if isinstance(error, ResponseError):
        return str(error).startswith(UNAVAILABLE_REPLIES)
    return isinstance(error, RuntimeError | AttributeError) and is_lost_connection(error)


ALLOW_OOM = "#!lua flags=allow-oom\n"  # the first line of a script that runs although the server has no memory left
NO_WRITES = "#!lua flags=no-writes\n"  # the first line of a script that also runs on a server that takes no writes


class SessionScripts:
    """The scripts that work on one session; each runs atomically on the server. Their files say what they return."""

    def __init__(self, client: AnyRedis) -> None:
        self.create = load_script(client, "common", "create")
        self.configure = load_script(client, "common", "configure")
        self.enter = load_script(client, "common", "enter")
        self.enter_full = load_script(client, "common", "enter", first_line=ALLOW_OOM)
        self.lease = load_script(client, "common", "lease")
        self.history = load_script(client, "common", "history")
        self.commit = load_script(client, "common", "pages", "commit")
        self.commit_full = load_script(client, "common", "pages", "commit", first_line=ALLOW_OOM)
        self.upgrade = load_script(client, "common", "pages", "upgrade", first_line=ALLOW_OOM)
        self.delete = load_script(client, "common", "delete", first_line=ALLOW_OOM)


def load_script(client: AnyRedis, *parts: str, first_line: str = "") -> AsyncScript:
    """Return the script that the files `lua/<part>.lua` make together."""
    folder = files(__package__) / "lua"
    text = first_line + "".join(folder.joinpath(f"{part}.lua").read_text("utf-8") for part in parts)
    return client.register_script(text)


def raise_for_verdict(verdict: bytes, detail: bytes, meta: SessionMeta) -> None:
    """Raise the error that a verdict of `commit.lua` or `create.lua` stands for; return if the verdict is `done`."""
    match verdict:
        case b"format":
            raise unknown_format(meta.id, detail)
        case b"conflict":
            raise errors.version_moved(meta.id, detail.decode(), meta.version - 1)
        case b"renewed":
            raise errors.session_renewed(meta.id)
        case b"fenced":
            raise errors.lease_lost(meta.id)
        case b"damaged":
            raise errors.damaged_session(meta.id, f"missing are {detail.decode()}")
        case b"erased":
            raise errors.session_erased(meta.id)
        case b"width":
            raise errors.row_size_differs(meta.id, detail.decode())
