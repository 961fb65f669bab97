"""The Lua scripts of this package, registered with a client, and the meaning of the verdicts that they return."""

from __future__ import annotations

from importlib.resources import files

from redis.commands.core import AsyncScript

from service.store import errors
from service.store.base import SessionMeta
from service.store.redis.codec import unknown_format
from service.store.redis.connect import AnyRedis

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
