"""The byte formats of a session in Redis: key names, the meta hash, pages and records of rows, packed undo steps.

The Lua scripts read and write the same formats. `service/store/redis/store.py` lists the keys.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import EngineError
from service.store import errors
from service.store.base import RowBatch, SessionMeta, Slots, UndoStep, check_name

FORMAT = b"5"
ARCHIVED = b"archived"  # the format of a session of which the store has only a stub, see archive.py
# Formats 1 and 2 have a hash field for each row, format 3 has one for five slots. Format 1 also has its digests in
# another form, and neither a log nor undo steps. Format 4 has nothing that proves its rows whole.
OLD_FORMATS = (b"1", b"2", b"3", b"4")
SLOT_BYTES = 4
PAGE_ROWS = 10  # slots of a page, as in pages.lua
SITE = "site:"
SUM_RANGE = 2**48  # of the checksum of a site, as in pages.lua
ADDED_FIELDS = frozenset({"actions", "action_tags"})  # of SessionMeta that format 4 may lack
DEFAULT_PREFIX = "imprint"
_PREFIX = re.compile(r"[A-Za-z0-9._-]{1,64}")
META_FIELDS = frozenset(field.name for field in fields(SessionMeta))


@dataclass(frozen=True)
class Keys:
    """The names that begin with a prefix. Deployments of different prefixes can share a Redis.

    Raises:
        ValueError: the prefix is not valid.
    """

    prefix: str = DEFAULT_PREFIX

    def __post_init__(self) -> None:
        if not _PREFIX.fullmatch(self.prefix):
            raise ValueError(f"the prefix of the keys must match {_PREFIX.pattern}, not {self.prefix!r}")

    @property
    def erased_channel(self) -> str:
        """Return the channel on which servers hear of erased sessions."""
        return f"{self.prefix}:erased"

    @property
    def meta_pattern(self) -> str:
        """Return the glob pattern of the names of all meta hashes."""
        return f"{self.prefix}:{{*}}:meta"

    @property
    def archive(self) -> str:
        """Return the name of the key that holds the folder of this store's archive."""
        return f"{self.prefix}:archive"

    @property
    def archiver(self) -> str:
        """Return the name of the key that one server at a time has, which looks for idle sessions."""
        return f"{self.prefix}:archiver"

    @property
    def index_pattern(self) -> str:
        """Return the glob pattern of the names of all indexes."""
        return f"{self.prefix}:sessions:*"

    def tenant_of_index(self, key: bytes) -> str:
        """Return the tenant that an index belongs to."""
        return key.decode().removeprefix(f"{self.prefix}:sessions:")

    def session(self, tenant: str, sid: str, suffix: str) -> str:
        """Return the name of one key of a session. A cluster hashes what stands in the braces."""
        return f"{self.prefix}:{{{check_name('tenant', tenant)}/{check_name('session id', sid)}}}:{suffix}"

    def meta(self, tenant: str, sid: str) -> str:
        """Return the name of the meta hash, from which the scripts derive the session's other keys."""
        return self.session(tenant, sid, "meta")

    def of_no_session(self, tenant: str) -> str:
        """Return the name that a meta hash would have, for the keys that belong to a tenant and to no session."""
        return f"{self.prefix}:{{{check_name('tenant', tenant)}/}}:meta"

    def index(self, tenant: str) -> str:
        """Return the name of the tenant's index of sessions."""
        return f"{self.prefix}:sessions:{check_name('tenant', tenant)}"

    def account(self, tenant: str) -> list[str]:
        """Return the names of the two keys of the tenant's account: its sessions, and its bucket of tokens."""
        return [f"{self.prefix}:{{{tenant}}}:sessions", f"{self.prefix}:{{{tenant}}}:tokens"]

    def alive(self, owner: str) -> str:
        """Return the name of a server's heartbeat."""
        return f"{self.prefix}:alive:{owner}"


def tenant_and_session(key: bytes) -> tuple[str, str]:
    """Return the tenant and the session that a key belongs to."""
    name = key.decode()
    tenant, _, sid = name[name.index("{") + 1 : name.rindex("}")].partition("/")
    return tenant, sid


def encode(meta: SessionMeta) -> dict[str, str]:
    """Return the fields of the meta hash that hold `meta`, as JSON."""
    values = {field.name: getattr(meta, field.name) for field in fields(meta)}
    values["digests"] = base64.b64encode(bytes.fromhex("".join(meta.digests))).decode()
    return {name: json.dumps(value) for name, value in values.items()}


def decode(sid: str, meta_hash: Mapping[bytes, bytes]) -> SessionMeta:
    """Return the meta that a meta hash holds; that of an archived session is without its digests.

    Raises:
        EngineError: the session has a format that this release does not know.
    """
    session_format = meta_hash.get(b"format", b"none")
    if session_format == ARCHIVED:
        values = json.loads(meta_hash[b"archived"])["meta"]
        meta_hash = {name.encode(): raw.encode() for name, raw in values.items()} | dict(meta_hash)
    elif session_format not in (*OLD_FORMATS, FORMAT):
        raise unknown_format(sid, session_format)
    stored = {name: meta_hash[name.encode()] for name in META_FIELDS if name.encode() in meta_hash}
    values = {name: _decode_value(name, raw) for name, raw in stored.items()}
    if session_format == ARCHIVED:
        values["digests"] = ()
    if absent := absent_fields(meta_hash):
        raise errors.damaged_session(sid, f"missing are the values {', '.join(absent)}")
    # Earlier formats do not count actions. There is at most one action a version, and the ids have no tag.
    return SessionMeta(**({"actions": values["version"], "action_tags": ((values["version"], ""),)} | values))


def absent_fields(meta_hash: Mapping[bytes, bytes]) -> list[str]:
    """Return the fields of `SessionMeta` that a meta hash of any known format has and this one lacks."""
    if meta_hash.get(b"format") not in (*OLD_FORMATS, FORMAT):
        return []
    return sorted(name for name in META_FIELDS - ADDED_FIELDS if name.encode() not in meta_hash)


def row_sizes(meta_hash: Mapping[bytes, bytes]) -> dict[str, int]:
    """Return the bytes per row of each site that has rows."""
    entries = ((name.decode(), size) for name, size in meta_hash.items())
    return {name.removeprefix(SITE): int(size) for name, size in entries if name.startswith(SITE)}


def find_damage(site: str, pages: Mapping[bytes, bytes], meta_hash: Mapping[bytes, bytes]) -> str:
    """Return what is wrong with the pages of a site by the counts and checksums of the meta hash; "" = nothing."""
    expected, found = int(meta_hash.get(f"pages:{site}".encode(), 0)), len(pages)
    if found != expected:
        return f"site {site} has {found} of {expected} pages of rows"
    hashes = (hashlib.sha1(number + page, usedforsecurity=False).hexdigest() for number, page in pages.items())
    if sum(int(digits[:12], 16) for digits in hashes) % SUM_RANGE != int(meta_hash.get(f"sum:{site}".encode(), -1)):
        return f"rows of site {site} do not match their checksum"
    return ""


def unknown_format(sid: str, found: bytes) -> EngineError:
    return errors.unknown_format(sid, found.decode(errors="replace"), FORMAT.decode())


def _decode_value(name: str, raw: bytes) -> Any:
    value = json.loads(raw)
    if name == "action_tags":
        return tuple((number, tag) for number, tag in value)
    if name != "digests":
        return value
    digests = base64.b64decode(value).hex() if isinstance(value, str) else "".join(value)
    return tuple(digests[at : at + 16] for at in range(0, len(digests), 16))


def pack_records(batch: RowBatch) -> bytes:
    """Return the rows as records, one after the other: the slot (uint32, little-endian), then the row."""
    records = np.empty((len(batch.slots), SLOT_BYTES + batch.row_bytes), np.uint8)
    records[:, :SLOT_BYTES] = batch.slots.astype("<u4").view(np.uint8).reshape(-1, SLOT_BYTES)
    records[:, SLOT_BYTES:] = batch.data
    return records.tobytes()


def unpack_records(packed: bytes, row_bytes: int) -> RowBatch:
    """Return the rows of `pack_records`; the records may be in any order."""
    records = np.frombuffer(packed, np.uint8).reshape(-1, SLOT_BYTES + row_bytes)
    slots = records[:, :SLOT_BYTES].copy().view("<u4").reshape(-1).astype(np.int32)
    order = np.argsort(slots)
    return RowBatch(slots[order], records[order, SLOT_BYTES:])


def unpack_pages(pages: Mapping[bytes, bytes], row_bytes: int) -> RowBatch:
    """Return the rows of a site's pages (see pages.lua); the pages may be in any order.

    Raises:
        ValueError: a page is not of the form that the scripts write.
    """
    numbers = np.frombuffer(b"".join(pages), "<u4").astype(np.int64)
    order, values = numbers.argsort(), list(pages.values())
    packed = [values[at] for at in order.tolist()]
    counts, rest = np.divmod(np.fromiter(map(len, packed), np.int64, len(packed)) - PAGE_ROWS, row_bytes)
    if rest.any() or counts.min(initial=1) < 1:
        raise ValueError(f"a page must be {PAGE_ROWS} bytes and some rows of {row_bytes}")
    data = np.frombuffer(b"".join(packed), np.uint8)
    starts = np.arange(len(packed)) * PAGE_ROWS + (counts.cumsum() - counts) * row_bytes
    occupied = data[starts[:, None] + np.arange(PAGE_ROWS)]
    if occupied.max(initial=0) > 1 or (occupied.sum(1) != counts).any():
        raise ValueError("the flags of a page must be 0 or 1, and 1 for each of its rows")
    page, offset = occupied.nonzero()
    slots = (numbers[order][page] * PAGE_ROWS + offset).astype(np.int32)
    return RowBatch(slots, _rows_of_pages(data, page, row_bytes))


def _rows_of_pages(data: NDArray[np.uint8], page: NDArray[np.int64], row_bytes: int) -> NDArray[np.uint8]:
    """Return the rows `[n, row_bytes]` of joined pages, given the index of each row's page `[n]` in their order."""
    if not len(page):
        return np.empty((0, row_bytes), np.uint8)
    starts = (page + 1) * PAGE_ROWS + np.arange(len(page)) * row_bytes
    rows: NDArray[np.uint8] = np.lib.stride_tricks.sliding_window_view(data, row_bytes)[starts]
    return rows


def pack_slots(slots: Slots) -> bytes:
    return slots.astype("<u4").tobytes()


def unpack_slots(packed: bytes) -> Slots:
    assert len(packed) % SLOT_BYTES == 0
    return np.sort(np.frombuffer(packed, "<u4")).astype(np.int32)


def decode_undo(version: int, rows: bytes, meta: bytes, text: bytes) -> UndoStep:
    """Return an undo step from the parts that the commit script packed."""
    sites: dict[str, RowBatch] = {}
    cleared_slots: dict[str, Slots] = {}
    parts = list(unpack_parts(rows))
    for at in range(0, len(parts), 4):
        name = parts[at].decode()
        sites[name] = unpack_records(parts[at + 2], int(parts[at + 1]))
        cleared_slots[name] = unpack_slots(parts[at + 3])
    values = {name.decode(): raw for name, raw in pairs(unpack_parts(meta)).items()}
    replaced = {name: _decode_value(name, raw) for name, raw in values.items() if name in META_FIELDS}
    return UndoStep(version, sites, cleared_slots, replaced, text)


def unpack_parts(packed: bytes) -> Iterator[bytes]:
    """Yield the parts that the commit script packed, each behind its length."""
    at = 0
    while at < len(packed):
        size = int.from_bytes(packed[at : at + 4], "little")
        yield packed[at + 4 : at + 4 + size]
        at += 4 + size


def flatten(mapping: Mapping[str, str]) -> list[str]:
    """Return key, value, key, value, … as a script takes a mapping."""
    return [text for pair in mapping.items() for text in pair]


def pairs(items: Iterable[bytes]) -> dict[bytes, bytes]:
    """Return the mapping that a script returned as key, value, key, value, …"""
    each = iter(items)
    return dict(zip(each, each, strict=True))
