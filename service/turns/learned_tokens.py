"""What a session was taught, as it is kept to be learned again; and what leads from one version to another."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from service.engine import Segment
from service.errors import Conflict, NotFound
from service.store.base import History, RowBatch, SessionMeta, Slots

# What of a session's meta belongs to a version; the rest belongs to the session.
VERSIONED_FIELDS = (
    "tokens_learned", "rows", "bytes", "proof_tokens", "loss_sum", "frozen_loss_sum", "requests", "digests",
)  # fmt: skip
EMPTY_FIELDS = dict.fromkeys(VERSIONED_FIELDS, 0) | {"loss_sum": 0.0, "frozen_loss_sum": 0.0, "digests": ()}


@dataclass(frozen=True, eq=False)
class StateDelta:
    """Another content for a session: its versioned meta values, the rows that differ, and the slots that are empty in
    it; `cleared_slots` has only sites that `sites` has."""

    meta: dict[str, Any]
    sites: dict[str, RowBatch]
    cleared_slots: dict[str, Slots]

    def apply_to_meta(self, meta: SessionMeta) -> SessionMeta:
        return replace(meta, **self.meta)

    def with_rows(self, written: Mapping[str, RowBatch]) -> StateDelta:
        """The same with rows that were written on top of it."""
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
        """All rows of this content, given those of the version that it differs from."""
        whole = StateDelta({}, dict(stored), {}).with_rows(self.sites)
        kept = {}
        for site, batch in whole.sites.items():
            stays = ~np.isin(batch.slots, self.cleared_slots.get(site, np.zeros(0, np.int32)))
            if stays.any():
                kept[site] = RowBatch(batch.slots[stays], batch.data[stays])
        return kept


RowsBySlot = dict[str, dict[int, Any]]


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
    """What leads from the latest version back to `version`, given as `param`. Raises Conflict if that is not kept."""
    oldest = history.undo[-1].version - 1 if history.undo else history.meta.version
    if not oldest <= version <= history.meta.version:
        raise Conflict(
            f"'{param}' must be in {oldest}..{history.meta.version}, the versions kept, got {version}.",
            param=param,
            code="version_not_kept",
        )
    meta, rows_by_slot, widths = (
        {name: getattr(history.meta, name) for name in VERSIONED_FIELDS},
        RowsBySlot(),
        dict[str, int](),
    )
    for undo in history.undo:
        if undo.version > version:
            meta |= {name: value for name, value in undo.meta.items() if name in VERSIONED_FIELDS}
            for site, batch in undo.sites.items():
                widths[site] = batch.row_bytes
                _write_rows(rows_by_slot, site, batch, undo.cleared_slots[site])
    return StateDelta(EMPTY_FIELDS if version == 0 else meta, *_batches(rows_by_slot, widths))


def full_state_delta(
    meta: Mapping[str, Any], sites: Mapping[str, RowBatch], replaced: Mapping[str, RowBatch]
) -> StateDelta:
    """A content that has these rows and none of `replaced`."""
    wanted = dict(sites) | {
        site: RowBatch(np.zeros(0, np.int32), np.zeros((0, batch.row_bytes), np.uint8))
        for site, batch in replaced.items()
        if site not in sites
    }
    cleared_slots = {site: np.setdiff1d(batch.slots, wanted[site].slots) for site, batch in replaced.items()}
    return StateDelta({name: meta[name] for name in VERSIONED_FIELDS}, wanted, cleared_slots)


# --- lessons ----------------------------------------------------------------------------------------------------------


def pack_learned_tokens(parts: Sequence[Segment], learned_completions: Mapping[int, Sequence[int]]) -> bytes:
    """The tokens of a turn that taught something: int32, how many parts, their lengths, then their tokens, each as
    itself if it was learned, else as its complement. said: what was generated and learned, by part."""
    kept = []
    for number, part in enumerate(parts):
        reply, learn = learned_completions.get(number, ()), part.learn or [False] * len(part.token_ids)
        if any(learn) or reply:
            tokens = [token if new else ~token for token, new in zip(part.token_ids, learn, strict=True)]
            kept.append([*tokens, *reply])
    numbers = [len(kept), *map(len, kept), *(token for part in kept for token in part)]
    return np.array(numbers, "<i4").tobytes()


def unpack_learned_tokens(packed: bytes) -> list[Segment]:
    numbers = np.frombuffer(packed, "<i4")
    ends = 1 + numbers[0] + np.cumsum(numbers[1 : 1 + numbers[0]])
    segments = []
    for end, length in zip(ends.tolist(), numbers[1 : 1 + numbers[0]].tolist(), strict=True):
        tokens = numbers[end - length : end]
        segments.append(Segment(np.where(tokens < 0, ~tokens, tokens).tolist(), learn=(tokens >= 0).tolist()))
    return segments


def with_text(
    entry: Mapping[str, Any], kept_tokens: Mapping[int, bytes], decode: Callable[[list[int]], str]
) -> dict[str, Any]:
    """An entry of the log with the text that its version taught, without what only stood before that; None if it is not
    kept. lessons: of `kept_tokens_of`."""
    packed = kept_tokens.get(entry["version"])
    if packed is None:
        return {**entry, "text": None}
    parts = [(part.token_ids, part.learn or ()) for part in unpack_learned_tokens(packed)]
    return {**entry, "text": "".join(decode([t for t, new in zip(*part, strict=True) if new]) for part in parts)}


def kept_tokens_of(history: History) -> dict[int, bytes]:
    """The lessons that are kept, by version."""
    return {undo.version: undo.text for undo in history.undo if undo.text}


def prompt_tokens_of(history: History, completion_key: str) -> list[int]:
    """The prompt's tokens behind which a completion was generated; none if the session did not keep them. Raises
    NotFound for one that is not in its log."""
    for entry in history.log:
        name, length = entry.get("answer", ("", 0))
        if name == completion_key:
            learned_tokens = kept_tokens_of(history).get(entry["version"])
            return list(unpack_learned_tokens(learned_tokens)[0].token_ids[:length]) if learned_tokens else []
    raise NotFound(
        f"'completion_id' names no completion of one prompt among the last commits of session {history.meta.id!r}.",
        param="completion_id",
        code="completion_not_found",
    )


def digest(packed: bytes) -> str:
    return hashlib.sha256(packed).hexdigest()[:32]


def plan_unlearn(history: History, version: int) -> tuple[int, list[bytes]]:
    """How to unlearn what a version learned: from which kept version to go on, and which lessons to learn again.

    Raises:
        Conflict: it is not among the lessons that the session consists of, or something that this needs is not kept.
    """
    lines = lineages(history)
    now = lines[history.meta.version]
    if version not in now:
        raise Conflict(
            f"'version' must be one that learned, is kept and has not been undone, got {version}.",
            param="version",
            code="version_not_kept",
        )
    wanted = [one for one in now if one != version]
    base = max((v for v, line in lines.items() if line == wanted[: len(line)]), key=lambda v: (len(lines[v]), v))
    texts = {undo.version: undo.text for undo in history.undo}
    kept_tokens = []
    for one in wanted[len(lines[base]) :]:
        if not texts[one]:
            raise Conflict(
                f"'version' {version} can't be unlearned: the text of version {one}, learned later, was not kept "
                "(session option 'keep_text').",
                param="version",
                code="text_not_kept",
            )
        kept_tokens.append(texts[one])
    return base, kept_tokens


def lineages(history: History) -> dict[int, list[int]]:
    """For each kept version, the versions whose lessons it consists of, in order; a negative one stands for all that
    its session was at that version."""
    entries = {entry["version"]: entry for entry in history.log}
    first = history.undo[-1].version - 1 if history.undo else history.meta.version
    lines = {first: [~first]}
    for version in range(first + 1, history.meta.version + 1):
        entry, before = entries.get(version, {}), lines[version - 1]
        match entry.get("kind"), entry.get("of"):
            case "learn", _:
                lines[version] = [*before, version]
            case "rollback", int(of) if of in lines:
                lines[version] = lines[of]
            case "unlearn", int(of) if of in before:
                lines[version] = [one for one in before if one != of]
            case _:
                lines[version] = [~version]
    return lines
