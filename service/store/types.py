"""What the store keeps of a session, as plain values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SLOT_BYTES = 4


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
        digests: hex digests of the chat prefixes already learned, newest last.
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
    options: dict[str, str]
    digests: tuple[str, ...]


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
        if len(self.slots) and (self.slots[0] < 0 or not (np.diff(self.slots) > 0).all()):
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


@dataclass(frozen=True, eq=False)
class StoredSession:
    """A session as one version of it stands in the store; `sites` maps a site's name to all its rows."""

    meta: SessionMeta
    sites: dict[str, RowBatch]
