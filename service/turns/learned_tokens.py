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
VERSIONED = (
    "tokens_learned", "rows", "bytes", "proof_tokens", "loss_sum", "frozen_loss_sum", "requests", "digests",
)  # fmt: skip
BLANK = dict.fromkeys(VERSIONED, 0) | {"loss_sum": 0.0, "frozen_loss_sum": 0.0, "digests": ()}


@dataclass(frozen=True, eq=False)
class Content:
    """Another content for a session: its versioned meta values, the rows that differ, and the slots that are empty in
    it; `gone` has only sites that `sites` has."""

    meta: dict[str, Any]
    sites: dict[str, RowBatch]
    gone: dict[str, Slots]

    def applied_to(self, meta: SessionMeta) -> SessionMeta:
        return replace(meta, **self.meta)

    def overlaid(self, written: Mapping[str, RowBatch]) -> Content:
        """The same with rows that were written on top of it."""
        if not written:
            return self
        cells: Cells = {}
        for site, batch in self.sites.items():
            _lay(cells, site, batch, self.gone.get(site))
        widths = {site: batch.row_bytes for site, batch in [*self.sites.items(), *written.items()]}
        for site, batch in written.items():
            _lay(cells, site, batch, None)
        return Content(self.meta, *_batches(cells, widths))

    def rows_from(self, stored: Mapping[str, RowBatch]) -> dict[str, RowBatch]:
        """All rows of this content, given those of the version that it differs from."""
        whole = Content({}, dict(stored), {}).overlaid(self.sites)
        kept = {}
        for site, batch in whole.sites.items():
            stays = ~np.isin(batch.slots, self.gone.get(site, np.zeros(0, np.int32)))
            if stays.any():
                kept[site] = RowBatch(batch.slots[stays], batch.data[stays])
        return kept


Cells = dict[str, dict[int, Any]]


def _lay(cells: Cells, site: str, batch: RowBatch, gone: Slots | None) -> None:
    here = cells.setdefault(site, {})
    here.update(zip(batch.slots.tolist(), batch.data, strict=True))
    if gone is not None:
        here.update(dict.fromkeys(gone.tolist()))


def _batches(cells: Cells, widths: Mapping[str, int]) -> tuple[dict[str, RowBatch], dict[str, Slots]]:
    sites: dict[str, RowBatch] = {}
    gone: dict[str, Slots] = {}
    for site, here in cells.items():
        filled = sorted(slot for slot, row in here.items() if row is not None)
        data = np.stack([here[slot] for slot in filled]) if filled else np.zeros((0, widths[site]), np.uint8)
        sites[site] = RowBatch(np.array(filled, np.int32), data)
        gone[site] = np.array(sorted(slot for slot, row in here.items() if row is None), np.int32)
    return sites, gone


def content_at(history: History, version: int, param: str = "version") -> Content:
    """What leads from the latest version back to `version`, given as `param`. Raises Conflict if that is not kept."""
    oldest = history.undo[-1].version - 1 if history.undo else history.meta.version
    if not oldest <= version <= history.meta.version:
        raise Conflict(
            f"'{param}' must be in {oldest}..{history.meta.version}, the versions kept, got {version}.",
            param=param,
            code="version_not_kept",
        )
    meta, cells, widths = {name: getattr(history.meta, name) for name in VERSIONED}, Cells(), dict[str, int]()
    for undo in history.undo:
        if undo.version > version:
            meta |= {name: value for name, value in undo.meta.items() if name in VERSIONED}
            for site, batch in undo.sites.items():
                widths[site] = batch.row_bytes
                _lay(cells, site, batch, undo.gone[site])
    return Content(BLANK if version == 0 else meta, *_batches(cells, widths))


def whole_content(meta: Mapping[str, Any], sites: Mapping[str, RowBatch], replaced: Mapping[str, RowBatch]) -> Content:
    """A content that has these rows and none of `replaced`."""
    wanted = dict(sites) | {
        site: RowBatch(np.zeros(0, np.int32), np.zeros((0, batch.row_bytes), np.uint8))
        for site, batch in replaced.items()
        if site not in sites
    }
    gone = {site: np.setdiff1d(batch.slots, wanted[site].slots) for site, batch in replaced.items()}
    return Content({name: meta[name] for name in VERSIONED}, wanted, gone)


# --- lessons ----------------------------------------------------------------------------------------------------------


def pack_lesson(parts: Sequence[Segment], said: Mapping[int, Sequence[int]]) -> bytes:
    """The tokens of a turn that taught something: int32, how many parts, their lengths, then their tokens, each as
    itself if it was learned, else as its complement. said: what was generated and learned, by part."""
    kept = []
    for number, part in enumerate(parts):
        reply, learn = said.get(number, ()), part.learn or [False] * len(part.token_ids)
        if any(learn) or reply:
            tokens = [token if new else ~token for token, new in zip(part.token_ids, learn, strict=True)]
            kept.append([*tokens, *reply])
    numbers = [len(kept), *map(len, kept), *(token for part in kept for token in part)]
    return np.array(numbers, "<i4").tobytes()


def unpack_lesson(packed: bytes) -> list[Segment]:
    numbers = np.frombuffer(packed, "<i4")
    ends = 1 + numbers[0] + np.cumsum(numbers[1 : 1 + numbers[0]])
    segments = []
    for end, length in zip(ends.tolist(), numbers[1 : 1 + numbers[0]].tolist(), strict=True):
        tokens = numbers[end - length : end]
        segments.append(Segment(np.where(tokens < 0, ~tokens, tokens).tolist(), learn=(tokens >= 0).tolist()))
    return segments


def told(entry: Mapping[str, Any], lessons: Mapping[int, bytes], decode: Callable[[list[int]], str]) -> dict[str, Any]:
    """An entry of the log with the text that its version taught, without what only stood before that; None if it is not
    kept. lessons: of `lessons_of`."""
    packed = lessons.get(entry["version"])
    if packed is None:
        return {**entry, "text": None}
    parts = [(part.token_ids, part.learn or ()) for part in unpack_lesson(packed)]
    return {**entry, "text": "".join(decode([t for t, new in zip(*part, strict=True) if new]) for part in parts)}


def lessons_of(history: History) -> dict[int, bytes]:
    """The lessons that are kept, by version."""
    return {undo.version: undo.text for undo in history.undo if undo.text}


def prompt_of(history: History, answer: str) -> list[int]:
    """The prompt's tokens behind which a completion was generated; none if the session did not keep them. Raises
    NotFound for one that is not in its log."""
    for entry in history.log:
        name, length = entry.get("answer", ("", 0))
        if name == answer:
            lesson = lessons_of(history).get(entry["version"])
            return list(unpack_lesson(lesson)[0].token_ids[:length]) if lesson else []
    raise NotFound(
        f"'completion_id' names no completion of one prompt among the last commits of session {history.meta.id!r}.",
        param="completion_id",
        code="completion_not_found",
    )


def digest(packed: bytes) -> str:
    return hashlib.sha256(packed).hexdigest()[:32]


def without(history: History, version: int) -> tuple[int, list[bytes]]:
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
    lessons = []
    for one in wanted[len(lines[base]) :]:
        if not texts[one]:
            raise Conflict(
                f"'version' {version} can't be unlearned: the text of version {one}, learned later, was not kept "
                "(session option 'keep_text').",
                param="version",
                code="text_not_kept",
            )
        lessons.append(texts[one])
    return base, lessons


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
