"""The content of a commit: rows to write, slots to clear, meta values; and the packed tokens that were learned."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.episodes import MEANINGS
from model.episodes import SITE as EPISODES
from model.memory.episodic.borrowed import LEARNED, REPLY
from model.memory.episodic.layout import learned_at
from service.engine import LearnedCompletion, Segment
from service.errors import Conflict
from service.store.base import History, RowBatch, SessionMeta, Slots

EPISODIC_SITES = (EPISODES, MEANINGS)

# The meta values that belong to a version; the other values belong to the session.
VERSIONED_FIELDS = (
    "tokens_learned", "rows", "bytes", "proof_tokens", "loss_sum", "frozen_loss_sum", "requests", "digests",
    "action_tags",
)  # fmt: skip
EMPTY_FIELDS = dict.fromkeys(VERSIONED_FIELDS, 0) | {
    "loss_sum": 0.0,
    "frozen_loss_sum": 0.0,
    "digests": (),
    "action_tags": (),
}


@dataclass(frozen=True, eq=False)
class StateDelta:
    """A change of a session's content.

    Attributes:
        meta: the versioned meta values of the new content.
        sites: the rows to write, by site.
        cleared_slots: the slots to clear, for sites that `sites` has.
    """

    meta: dict[str, Any]
    sites: dict[str, RowBatch]
    cleared_slots: dict[str, Slots]

    def apply_to_meta(self, meta: SessionMeta) -> SessionMeta:
        """Return the meta with the values of the new content."""
        return replace(meta, **self.meta)

    def with_rows(self, written: Mapping[str, RowBatch]) -> StateDelta:
        """Return the delta with rows written on top."""
        if not written:
            return self
        rows_by_slot: RowsBySlot = {}
        for site, batch in self.sites.items():
            _write_rows(rows_by_slot, site, batch, self.cleared_slots.get(site))
        widths = {site: batch.row_bytes for site, batch in [*self.sites.items(), *written.items()]}
        for site, batch in written.items():
            _write_rows(rows_by_slot, site, batch, None)
        return StateDelta(self.meta, *_batches(rows_by_slot, widths))

    def apply_to_rows(self, stored: Mapping[str, RowBatch]) -> dict[str, RowBatch]:
        """Return all rows of the new content, from the rows of the version that the delta starts from."""
        whole = StateDelta({}, dict(stored), {}).with_rows(self.sites)
        kept = {}
        for site, batch in whole.sites.items():
            stays = ~np.isin(batch.slots, self.cleared_slots.get(site, np.zeros(0, np.int32)))
            if stays.any():
                kept[site] = RowBatch(batch.slots[stays], batch.data[stays])
        return kept


RowsBySlot = dict[str, dict[int, Any]]
REPLY_BIT = 1 << 30  # of a packed token; no vocabulary is that large


def _write_rows(rows_by_slot: RowsBySlot, site: str, batch: RowBatch, cleared_slots: Slots | None) -> None:
    site_rows = rows_by_slot.setdefault(site, {})
    site_rows.update(zip(batch.slots.tolist(), batch.data, strict=True))
    if cleared_slots is not None:
        site_rows.update(dict.fromkeys(cleared_slots.tolist()))


def _batches(rows_by_slot: RowsBySlot, widths: Mapping[str, int]) -> tuple[dict[str, RowBatch], dict[str, Slots]]:
    sites: dict[str, RowBatch] = {}
    cleared_slots: dict[str, Slots] = {}
    for site, site_rows in rows_by_slot.items():
        filled = sorted(slot for slot, row in site_rows.items() if row is not None)
        data = np.stack([site_rows[slot] for slot in filled]) if filled else np.zeros((0, widths[site]), np.uint8)
        sites[site] = RowBatch(np.array(filled, np.int32), data)
        cleared_slots[site] = np.array(sorted(slot for slot, row in site_rows.items() if row is None), np.int32)
    return sites, cleared_slots


def state_delta_at(history: History, version: int, param: str = "version") -> StateDelta:
    """Return the delta from the latest version back to `version`.

    Raises Conflict, naming the request's field `param`, for a version that is not kept.
    """
    oldest = history.undo[-1].version - 1 if history.undo else history.meta.version
    if not oldest <= version <= history.meta.version:
        raise Conflict(
            f"'{param}' must be in {oldest}..{history.meta.version}, the versions kept, got {version}.",
            param=param,
            code="version_not_kept",
        )
    meta = {name: getattr(history.meta, name) for name in VERSIONED_FIELDS}
    rows_by_slot, widths = RowsBySlot(), dict[str, int]()
    for undo in history.undo:
        if undo.version > version:
            meta |= {name: value for name, value in undo.meta.items() if name in VERSIONED_FIELDS}
            for site, batch in undo.sites.items():
                widths[site] = batch.row_bytes
                _write_rows(rows_by_slot, site, batch, undo.cleared_slots[site])
    return StateDelta(EMPTY_FIELDS if version == 0 else meta, *_batches(rows_by_slot, widths))


def full_state_delta(
    meta: Mapping[str, Any], sites: Mapping[str, RowBatch], replaced: Mapping[str, RowBatch], version: int
) -> StateDelta:
    """Return the delta to a content that has the rows `sites` and none of the rows `replaced`.

    version: the version that this makes. The rows' own versions are those of another session, so that episodes get it.
    """
    wanted = dict(sites) | {site: no_rows(batch.row_bytes) for site, batch in replaced.items() if site not in sites}
    cleared_slots = {site: np.setdiff1d(batch.slots, wanted[site].slots) for site, batch in replaced.items()}
    if EPISODES in sites:
        wanted[EPISODES] = RowBatch(sites[EPISODES].slots, learned_at(sites[EPISODES].data, version))
    return StateDelta({name: meta[name] for name in VERSIONED_FIELDS}, wanted, cleared_slots)


def no_rows(row_bytes: int) -> RowBatch:
    """Return the batch without rows of a site whose rows have so many bytes."""
    return RowBatch(np.zeros(0, np.int32), np.zeros((0, row_bytes), np.uint8))


def without_episodes(
    meta: Mapping[str, Any], sites: Mapping[str, RowBatch]
) -> tuple[dict[str, Any], dict[str, RowBatch]]:
    """Return a content without its episodes: its meta values, and its rows by site."""
    kept = {name: batch for name, batch in sites.items() if name not in EPISODIC_SITES}
    left_out = {name: batch.data for name, batch in sites.items() if name in EPISODIC_SITES}
    rows, size = len(left_out.get(EPISODES, ())), sum(data.nbytes for data in left_out.values())
    return {**meta, "rows": meta["rows"] - rows, "bytes": meta["bytes"] - size}, kept


def pack_learned_tokens(parts: Sequence[Segment], learned_completions: Mapping[int, LearnedCompletion]) -> bytes:
    """Pack the segments of a turn that learned something, as little-endian int32.

    The numbers are: the number of packed segments, the length of each, then all tokens; a token that was not learned
    is stored as its complement, one of a reply with the bit `REPLY_BIT`. learned_completions: by segment.
    """
    kept = []
    for number, part in enumerate(parts):
        reply, learn = learned_completions.get(number), part.learn or bytearray(len(part.token_ids))
        if any(learn) or reply is not None:
            tokens = [*part.token_ids, *(reply.token_ids if reply else ())]
            kept.append(_with_marks(np.array(tokens, "<i4"), np.array([*learn, *(reply.learn if reply else ())])))
    head = np.array([len(kept), *map(len, kept)], "<i4")
    return np.concatenate([head, *kept]).tobytes()


def unpack_learned_tokens(packed: bytes) -> list[Segment]:
    """Return the segments that `pack_learned_tokens` packed, ready to be learned again."""
    numbers = np.frombuffer(packed, "<i4")
    ends = 1 + numbers[0] + np.cumsum(numbers[1 : 1 + numbers[0]])
    segments = []
    for end, length in zip(ends.tolist(), numbers[1 : 1 + numbers[0]].tolist(), strict=True):
        tokens = numbers[end - length : end]
        marks = np.where(tokens < 0, 0, np.where(tokens & REPLY_BIT, REPLY, LEARNED))
        token_ids = array("i", (np.where(tokens < 0, ~tokens, tokens) & ~REPLY_BIT).astype("i").tobytes())
        segments.append(Segment(token_ids, learn=bytearray(marks.astype(np.uint8).tobytes())))
    return segments


def _with_marks(tokens: NDArray[np.int32], marks: NDArray[np.int64]) -> NDArray[np.int32]:
    marked: NDArray[np.int32] = np.where(marks == 0, ~tokens, np.where(marks == REPLY, tokens | REPLY_BIT, tokens))
    return marked.astype("<i4")


def digest(packed: bytes) -> str:
    """Return the digest of packed tokens: 32 hexadecimal digits of their SHA-256."""
    return hashlib.sha256(packed).hexdigest()[:32]
