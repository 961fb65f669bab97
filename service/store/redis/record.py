"""A session as one file: all that the store keeps of the session except for recorded answers and kept responses.

An export (`service/versions/export_file.py`) holds what a session has learned, for any server. A record holds the
store's own bytes, so that a session comes back with the same versions, options, log and undo steps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from service.store.redis import codec
from service.store.redis.codec import pairs

MAGIC = b"imprint-session-1\n"
LEVEL = 1  # of zstd; docs/decisions/store.md has the measurement
MAX_BYTES = 2**30  # of an unpacked record


class RecordError(ValueError):
    """The bytes are no record, or a damaged one."""


@dataclass(frozen=True, eq=False)
class SessionRecord:
    """All that the store keeps of a session, of one version.

    Attributes:
        meta: the meta hash.
        hashes: by the last part of its key, each other hash: `rows:<site>` and `undo`.
        log: the log's entries, oldest first.
    """

    tenant: str
    sid: str
    meta: Mapping[bytes, bytes]
    hashes: Mapping[str, Mapping[bytes, bytes]]
    log: list[bytes]

    def find_damage(self) -> str:
        """Return what is missing or changed by the counts and checksums of the meta hash; "" = nothing."""
        for site in codec.row_sizes(self.meta):
            if damage := codec.find_damage(site, self.hashes.get(f"rows:{site}", {}), self.meta):
                return damage
        if len(self.log) < (logged := int(self.meta.get(b"logged", 0))):
            return f"the log has {len(self.log)} of {logged} entries"
        version, undo = int(self.meta.get(b"version", 0)), self.hashes.get("undo", {})
        kept = range(int(self.meta.get(b"undo_from", version)) + 1, version + 1)
        missing = [n for n in kept if f"{n}:rows".encode() not in undo or f"{n}:meta".encode() not in undo]
        return f"the undo step of version {missing[0]} is missing" if missing else ""

    def pack(self) -> bytes:
        """Return the record as the bytes of a file, compressed and with a checksum."""
        import zstandard

        sections = {"meta": self.meta, **self.hashes}
        header = {
            "tenant": self.tenant,
            "id": self.sid,
            "hashes": {name: len(fields) for name, fields in sections.items()},
            "log": len(self.log),
        }
        parts = [json.dumps(header).encode()]
        for fields in sections.values():
            for field, value in fields.items():
                parts += (field, value)
        parts += self.log
        body = b"".join(piece for part in parts for piece in (len(part).to_bytes(4, "little"), part))
        return MAGIC + zstandard.ZstdCompressor(level=LEVEL, write_checksum=True).compress(body)


def unpack_record(data: bytes, tenant: str, sid: str) -> SessionRecord:
    """Return the record of a session. Raises RecordError for other bytes, and for the record of another session."""
    import zstandard

    if not data.startswith(MAGIC):
        raise RecordError("it does not begin as a record of a session")
    packed = data[len(MAGIC) :]
    try:
        if not 0 <= (size := zstandard.frame_content_size(packed)) <= MAX_BYTES:
            raise RecordError(f"it has {size} bytes, and may have {MAX_BYTES}")
        parts = codec.unpack_parts(zstandard.ZstdDecompressor().decompress(packed))
        header = json.loads(next(parts))
        if (header["tenant"], header["id"]) != (tenant, sid):
            raise RecordError("it is the record of another session")
        hashes = {name: pairs(_take(parts, 2 * count)) for name, count in header["hashes"].items()}
        log = list(_take(parts, header["log"]))
    except RecordError:
        raise
    except (zstandard.ZstdError, ValueError, LookupError, TypeError, StopIteration, RuntimeError) as error:
        raise RecordError(f"it is damaged ({type(error).__name__})") from error
    return SessionRecord(tenant, sid, hashes.pop("meta"), hashes, log)


def _take(parts: Iterator[bytes], count: int) -> list[bytes]:
    return [next(parts) for _ in range(count)]
