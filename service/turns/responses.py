"""The responses that clients may continue: their names, and what is kept of them."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from service.concurrency import run_off_loop
from service.errors import BadRequest, Unavailable, VersionConflict
from service.store.base import SessionStore

MAX_TRIES = 64  # to keep a chat as the newest one while others do the same; every failure is a success of another
MAX_KEPT_CHARS = 1_048_576  # of a kept response with its messages as JSON, before the reply
PACKED = 8  # characters that a packed byte may stand for
_ID = re.compile(r"resp_([0-9a-f]{32})(?:_([A-Za-z0-9._~:@+=-]{1,128}))?")
_ITEM_ID = re.compile(r"(?:msg|fc|fco)_([0-9a-f]{32})\.(i?)([0-9]{1,5})(?:_([A-Za-z0-9._~:@+=-]{1,128}))?")

Json = dict[str, Any]


@dataclass(frozen=True)
class ResponseId:
    """The name of a response: a random number, and the session that it belongs to ("" = none)."""

    number: str
    session: str

    def __str__(self) -> str:
        return f"resp_{self.number}{self._suffix}"

    def item(self, kind: str, index: int, *, of_input: bool = False) -> str:
        """Return the id of item number `index` of the response's output, or of the chat before the output."""
        return f"{kind}_{self.number}.{'i' if of_input else ''}{index}{self._suffix}"

    @classmethod
    def parse(cls, text: str) -> ResponseId | None:
        """Return the name that a text is; None if no response can have it."""
        found = _ID.fullmatch(text)
        return None if found is None else cls(found[1], found[2] or "")

    @classmethod
    def parse_item(cls, text: str) -> ResponseId | None:
        """Return the response that an item belongs to; None if no item has this id."""
        found = _ITEM_ID.fullmatch(text)
        return None if found is None else cls(found[1], found[4] or "")

    @property
    def _suffix(self) -> str:
        return f"_{self.session}" if self.session else ""


@dataclass(frozen=True)
class KeptResponse:
    """A response as it is kept.

    Attributes:
        messages: the chat with the reply, as OpenAI's messages, without the instructions.
        reply: the body of the reply; where a client has added to the chat and there is none, an object of another kind
            with an id and an empty output.
    """

    messages: list[Json]
    reply: Json

    @property
    def is_response(self) -> bool:
        """Return whether there is a reply."""
        return bool(self.reply["object"] == "response")

    @property
    def name(self) -> ResponseId:
        """Return the name of the response."""
        name = ResponseId.parse(self.reply["id"])
        assert name is not None
        return name

    @property
    def work(self) -> int:
        """Return what the work on the chat grows with: the characters of its contents."""
        return sum(len(message.get("content") or "") for message in self.messages)

    def pack(self) -> bytes:
        """Return the bytes that are stored."""
        text = json.dumps({"messages": self.messages, "reply": self.reply}, separators=(",", ":"), ensure_ascii=False)
        return zlib.compress(text.encode(), 1)

    @classmethod
    def unpack(cls, record: bytes) -> KeptResponse:
        """Return the response of which `pack` made the bytes."""
        return cls(**json.loads(zlib.decompress(record)))


Newest = KeptResponse | None
Grow = Callable[[Newest], Awaitable[KeptResponse]]


class TenantResponses:
    """The kept responses of one tenant.

    ttl_s: seconds for which a response is kept; 0 = none is.
    """

    def __init__(self, store: SessionStore, tenant: str, ttl_s: int) -> None:
        self._store, self._tenant, self._ttl_s = store, tenant, ttl_s

    async def find(self, name: ResponseId | None) -> KeptResponse | None:
        """Return a response; None if it has expired, was erased, or never was."""
        return None if name is None else await self._get(name.session, name.number)

    async def newest(self, session: str) -> KeptResponse | None:
        """Return the newest response of a session; None if none is kept."""
        return await self._get(session, None)

    async def keep(self, kept: KeptResponse, created: float | None, *, after: str | None = None) -> bool:
        """Keep a response; return whether it is kept. The answer is worth more than what is kept of it.

        created: `SessionMeta.created` of the response's session; None for no session.
        after: number of the newest response, as `ResponseStore.put` takes and refuses it.
        """
        name = kept.name
        if not self._ttl_s or (name.session and created is None):
            return False
        record = await run_off_loop(kept.work, kept.pack)
        try:
            return await self._store.responses.put(
                self._tenant, name.session, name.number, record, ttl_s=self._ttl_s, created=created, after=after
            )
        except Unavailable:
            return False

    async def keep_next(self, session: str, grow: Grow, created: float | None) -> tuple[Newest, KeptResponse] | None:
        """Keep the chat that goes on with a session's newest response, also while others do the same.

        grow: makes the chat from the newest response; called again if another response has become the newest one.
        created: `SessionMeta.created` of the session.

        Return the newest response and the chat; None if the chat is not kept.
        """
        for _ in range(MAX_TRIES):
            with suppress(VersionConflict):
                before = await self.newest(session)
                kept = await grow(before)
                number = "" if before is None else before.name.number
                return (before, kept) if await self.keep(kept, created, after=number) else None
        return None

    async def delete(self, name: ResponseId) -> bool:
        """Erase a response; return whether there was one."""
        return await self._store.responses.delete(self._tenant, name.session, name.number)

    async def _get(self, session: str, number: str | None) -> KeptResponse | None:
        record = await self._store.responses.get(self._tenant, session, number)
        return None if record is None else await run_off_loop(PACKED * len(record), KeptResponse.unpack, record)


def require_small(size: int) -> None:
    """Raise BadRequest for a chat of more characters than are kept of one response."""
    if size > MAX_KEPT_CHARS:
        raise BadRequest(
            f"A response is kept with its chat, which may have {MAX_KEPT_CHARS} characters as JSON, got {size};"
            " 'store': false keeps none.",
            param="input",
        )
