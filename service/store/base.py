"""What the store keeps of a session, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

SLOT_BYTES = 4
PAGE_ROWS = 10  # as in pages.lua
Option = str | int | bool
Slots = NDArray[np.int32]


@dataclass(frozen=True)
class SessionMeta:
    """Everything about a session but its rows.

    Attributes:
        id: the session's id, unique within its tenant.
        version: number of commits so far; 0 until the first.
        model: fingerprint of the slow weights that wrote the rows.
        tokens_learned: tokens learned since the session began.
        rows: rows written at least once, all sites together.
        bytes: size of those rows.
        created: unix time in seconds; never changes, and tells a session from a later one of the same id.
        updated: unix time in seconds of the last commit.
        proof_tokens: tokens of which both losses below were taken.
        loss_sum: nats over the proof tokens, with the session's memory.
        frozen_loss_sum: nats over the same tokens, without it.
        requests: requests learned from since the session began.
        options: the session's own defaults; `RedisStore.configure` alone replaces them.
        digests: of the chat messages already learned, newest last: 16 hex digits each.
    """

    id: str
    version: int
    model: str
    tokens_learned: int
    rows: int
    bytes: int
    created: float
    updated: float
    proof_tokens: int
    loss_sum: float
    frozen_loss_sum: float
    requests: int
    options: dict[str, Option]
    digests: tuple[str, ...]

    @property
    def state_id(self) -> tuple[float, float, int]:
        """What tells its content from every other that a session of this id had, has or will have.

        The version alone does not: a session may be erased and made anew, and a failover may lose commits."""
        return self.created, self.updated, self.version


@dataclass(frozen=True, eq=False)
class RowBatch:
    """Some rows of one site.

    Attributes:
        slots: `[n]`, int32, strictly increasing, none negative.
        data: `[n, row_bytes]`, uint8: the row of each slot.

    Raises:
        ValueError: the arrays are not of that kind.
    """

    slots: NDArray[np.int32]
    data: NDArray[np.uint8]

    def __post_init__(self) -> None:
        if self.slots.ndim != 1 or self.slots.dtype != np.int32:
            raise ValueError(f"slots must be int32 [n], not {self.slots.dtype} {list(self.slots.shape)}")
        if self.data.ndim != 2 or self.data.dtype != np.uint8 or self.data.shape[1] == 0:
            raise ValueError(f"data must be uint8 [n, row_bytes >= 1], not {self.data.dtype} {list(self.data.shape)}")
        if len(self.slots) != len(self.data):
            raise ValueError(f"{len(self.slots)} slots do not match {len(self.data)} rows of data")
        if len(self.slots) and (self.slots[0] < 0 or not (self.slots[1:] > self.slots[:-1]).all()):
            raise ValueError("slots must be strictly increasing, none negative")

    @property
    def row_bytes(self) -> int:
        return int(self.data.shape[1])

    def pack(self) -> bytes:
        """The rows as records, one after the other: the slot (uint32, little-endian), then the row."""
        records = np.empty((len(self.slots), SLOT_BYTES + self.row_bytes), np.uint8)
        records[:, :SLOT_BYTES] = self.slots.astype("<u4").view(np.uint8).reshape(-1, SLOT_BYTES)
        records[:, SLOT_BYTES:] = self.data
        return records.tobytes()

    @classmethod
    def unpack(cls, packed: bytes, row_bytes: int) -> RowBatch:
        """Reads the records of `pack`, in any order."""
        records = np.frombuffer(packed, np.uint8).reshape(-1, SLOT_BYTES + row_bytes)
        slots = records[:, :SLOT_BYTES].copy().view("<u4").reshape(-1).astype(np.int32)
        order = np.argsort(slots)
        return cls(slots[order], records[order, SLOT_BYTES:])

    @classmethod
    def of_pages(cls, pages: Mapping[bytes, bytes], row_bytes: int) -> RowBatch:
        """Reads the pages of the store (pages.lua), in any order."""
        number = np.frombuffer(b"".join(pages), "<u4").astype(np.int64)
        order, values = number.argsort(), list(pages.values())
        packed = [values[at] for at in order.tolist()]
        counts, rest = np.divmod(np.fromiter(map(len, packed), np.int64, len(packed)) - PAGE_ROWS, row_bytes)
        if rest.any() or counts.min(initial=1) < 1:
            raise ValueError(f"a page must be {PAGE_ROWS} bytes and some rows of {row_bytes}")
        data = np.frombuffer(b"".join(packed), np.uint8)
        begins = np.arange(len(packed)) * PAGE_ROWS + (counts.cumsum() - counts) * row_bytes
        occupied = data[begins[:, None] + np.arange(PAGE_ROWS)]
        if occupied.max(initial=0) > 1 or (occupied.sum(1) != counts).any():
            raise ValueError("the flags of a page must be 0 or 1, and 1 for each of its rows")
        page, offset = occupied.nonzero()
        rows = np.empty((0, row_bytes), np.uint8)
        if len(page):
            starts = (page + 1) * PAGE_ROWS + np.arange(len(page)) * row_bytes
            rows = np.lib.stride_tricks.sliding_window_view(data, row_bytes)[starts]
        return cls((number[order][page] * PAGE_ROWS + offset).astype(np.int32), rows)


@dataclass(frozen=True, eq=False)
class StoredSession:
    """A session as one version of it stands in the store; `sites` maps a site's name to all its rows."""

    meta: SessionMeta
    sites: dict[str, RowBatch]


@dataclass(frozen=True)
class RetentionConfig:
    """What a store keeps beside the sessions' latest versions, and for how long.

    Attributes:
        versions: how many versions a session can go back.
        history_bytes: of what leads back to them, per session; the oldest go first.
        ttl_s: seconds after its last use at which a session is forgotten, unless its options say; 0 = never.
        lease_s: seconds for which a lease lasts without being renewed.
        wait_s: seconds for which a turn waits for a lease that somebody else holds.
    """

    versions: int = 32
    history_bytes: int = 16 * 2**20
    ttl_s: int = 0
    lease_s: float = 10.0
    wait_s: float = 12.0


@dataclass(frozen=True)
class Lease:
    """The right to write to a session; `value` is its owner and a fence, which only the newest commit gets past."""

    tenant: str
    sid: str
    value: str


@dataclass(frozen=True)
class TurnStart:
    """What a turn begins with; of a request that was answered before, `record` alone."""

    meta: SessionMeta | None
    lease: Lease | None = None
    record: bytes | None = None


@dataclass(frozen=True)
class IdempotencyRecord:
    """An answer to remember with a commit: under which name, for how many seconds, and the answer."""

    name: str
    ttl_s: int
    record: bytes


@dataclass(frozen=True)
class CommitMetadata:
    """What is kept along with a commit.

    Attributes:
        log: JSON of the log's entry; `version` is added to it.
        text: what unlearning needs to learn again; empty = not kept.
    """

    log: Mapping[str, Any] = field(default_factory=dict)
    text: bytes = b""
    idempotency_record: IdempotencyRecord | None = None


@dataclass(frozen=True, eq=False)
class UndoStep:
    """What leads from `version` back to the one before.

    Attributes:
        sites: the rows that it replaced. gone: `[n]`, the slots that were empty.
        meta: the values that it replaced, by `SessionMeta`'s names.
        text: of `CommitMetadata`.
    """

    version: int
    sites: dict[str, RowBatch]
    cleared_slots: dict[str, Slots]
    meta: dict[str, Any]
    text: bytes


@dataclass(frozen=True, eq=False)
class History:
    """A session, the newest entries of its log (oldest first), and the versions that can be undone, newest first."""

    meta: SessionMeta
    log: list[dict[str, Any]]
    undo: list[UndoStep]
