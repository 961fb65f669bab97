"""How a session is written down: the names of its keys, its meta hash, and what leads back to earlier versions."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from service.errors import EngineError
from service.store.base import SLOT_BYTES, RowBatch, SessionMeta, Slots, UndoStep

FORMAT = b"4"
# A hash field for each row; "1" had its digests in another form, too, and neither log nor earlier versions.
OLD_FORMATS = (b"1", b"2", b"3")
SITE = "site:"
_FIELDS = frozenset(field.name for field in fields(SessionMeta))
_NAME = re.compile(r"[A-Za-z0-9._~:@+=-]+")


def meta_key(tenant: str, sid: str) -> str:
    """The key that all others of the session are named after; its braces hold what a cluster hashes."""
    return f"imprint:{{{checked('tenant', tenant)}/{checked('session id', sid)}}}:meta"


def index_key(tenant: str) -> str:
    return f"imprint:sessions:{checked('tenant', tenant)}"


def checked(kind: str, name: str) -> str:
    """A name that cannot break out of its place in a key: no brace, slash or blank."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{kind} must match {_NAME.pattern}, not {name!r}")
    return name


def encode(meta: SessionMeta) -> dict[str, str]:
    values = {field.name: getattr(meta, field.name) for field in fields(meta)}
    values["digests"] = base64.b64encode(bytes.fromhex("".join(meta.digests))).decode()
    return {name: json.dumps(value) for name, value in values.items()}


def decode(sid: str, raw: Mapping[bytes, bytes]) -> SessionMeta:
    found = raw.get(b"format", b"none")
    if found not in (*OLD_FORMATS, FORMAT):
        raise unknown_format(sid, found)
    return SessionMeta(**{name: decode_value(name, raw[name.encode()]) for name in _FIELDS})


def sites_of(raw: Mapping[bytes, bytes]) -> dict[str, int]:
    """The sites of which a session has rows, and how many bytes a row has."""
    fields = ((name.decode(), size) for name, size in raw.items())
    return {name.removeprefix(SITE): int(size) for name, size in fields if name.startswith(SITE)}


def decode_value(name: str, raw: bytes) -> Any:
    value = json.loads(raw)
    if name != "digests":
        return value
    digests = base64.b64decode(value).hex() if isinstance(value, str) else "".join(value)
    return tuple(digests[at : at + 16] for at in range(0, len(digests), 16))


def unknown_format(sid: str, found: bytes) -> EngineError:
    return EngineError(
        f"session {sid!r} is stored in format {found.decode(errors='replace')}, but this release knows only "
        f"formats up to {FORMAT.decode()}: serve it with the release that wrote it, or a later one",
        code="unknown_store_format",
    )


def damaged(sid: str) -> EngineError:
    return EngineError(
        f"session {sid!r} is damaged in the store: it has rows that no memory writes; erase it, or import an export",
        code="damaged_session",
    )


def decode_undo(version: int, rows: bytes, meta: bytes, text: bytes) -> UndoStep:
    sites: dict[str, RowBatch] = {}
    cleared_slots: dict[str, Slots] = {}
    parts = list(_unpacked(rows))
    for at in range(0, len(parts), 4):
        name = parts[at].decode()
        sites[name] = RowBatch.unpack(parts[at + 2], int(parts[at + 1]))
        cleared_slots[name] = unpack_slots(parts[at + 3])
    values = {name.decode(): raw for name, raw in pairs(_unpacked(meta)).items()}
    old = {name: decode_value(name, raw) for name, raw in values.items() if name in _FIELDS}
    return UndoStep(version, sites, cleared_slots, old, text)


def _unpacked(packed: bytes) -> Iterator[bytes]:
    """The parts that the commit script packed, each behind its length."""
    at = 0
    while at < len(packed):
        size = int.from_bytes(packed[at : at + 4], "little")
        yield packed[at + 4 : at + 4 + size]
        at += 4 + size


def pack_slots(slots: Slots) -> bytes:
    return slots.astype("<u4").tobytes()


def unpack_slots(packed: bytes) -> Slots:
    assert len(packed) % SLOT_BYTES == 0
    return np.sort(np.frombuffer(packed, "<u4")).astype(np.int32)


def flat(mapping: Mapping[str, str]) -> list[str]:
    return [text for pair in mapping.items() for text in pair]


def pairs(items: Iterable[bytes]) -> dict[bytes, bytes]:
    """The mapping that a script returned as key, value, key, value, ..."""
    each = iter(items)
    return dict(zip(each, each, strict=True))
