"""What can be seen of a session: how full its memory is, and what lies between two of its versions."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from model.memory.config import MemoryConfig, SiteConfig, SiteKind
from service.store.base import History, RowBatch, SessionMeta, Slots, StoredSession
from service.store.errors import damaged_session
from service.tenants import Tenant
from service.turns.learned_tokens import kept_tokens_of, lineages, state_delta_at, with_text
from service.turns.session_gate import session_changed, session_not_found
from service.turns.sessions import Sessions

MAX_BINS = 1024
MAX_READS = 3  # of a session that somebody teaches meanwhile
NO_SLOTS = np.zeros(0, np.int32)


@dataclass(frozen=True)
class SiteFill:
    """How full a site is. counts: rows held in each of at most 1,024 bins of neighbouring cells, in their order;
    bin_cells, bin_rows: cells in a bin, and rows that it has room for."""

    name: str
    kind: SiteKind
    rows: int
    cells: int
    bin_cells: int
    bin_rows: int
    counts: list[int]


@dataclass(frozen=True)
class RowChanges:
    """How many rows of a site one version has and the other has not, and how many both have, but not the same."""

    added: int
    removed: int
    changed: int


@dataclass(frozen=True)
class VersionDiff:
    """What lies between two versions. learned, forgotten: entries of the log for what the one consists of and the other
    does not. tokens_learned: how many more the second one has learned. rows: what changed, by site."""

    learned: list[dict[str, Any]]
    forgotten: list[dict[str, Any]]
    tokens_learned: int
    rows: dict[str, RowChanges]


class Views:
    """What can be seen of sessions. Every method raises NotFound for a session that is not there, and Conflict for one
    of other slow weights."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    async def cells(self, tenant: Tenant, session: str) -> tuple[SessionMeta, list[SiteFill]]:
        """How full each site is."""
        stored = await self._sessions.store.load(tenant.name, session)
        if stored is None:
            raise session_not_found(session)
        meta, slots = stored.meta, {site: batch.slots for site, batch in stored.sites.items()}
        loaded_model = self._sessions.loaded_model
        sites = loaded_model.engine.memory_config(loaded_model.require_loaded_model(meta)).sites
        if any(site_slots[-1] >= site.slots for site in sites if len(site_slots := slots.get(site.name, NO_SLOTS))):
            raise damaged_session(session)
        return meta, [_fill(site, slots.get(site.name, NO_SLOTS)) for site in sites]

    async def diff(self, tenant: Tenant, session: str, start: int, end: int) -> tuple[SessionMeta, VersionDiff]:
        """What lies between two versions that are kept. Raises Conflict for one that is not."""
        history, stored = await self._load_consistent(tenant, session)
        loaded_model = self._sessions.loaded_model
        config = loaded_model.engine.memory_config(loaded_model.require_loaded_model(stored.meta))
        # A full memory has 50,000 rows: that much is not for the event loop's thread.
        rows, tokens = await asyncio.to_thread(_row_changes, history, stored, start, end, config)
        lines, entries = lineages(history), {entry["version"]: entry for entry in history.log}
        kept_tokens, decode = kept_tokens_of(history), loaded_model.tokenizer.decode

        def only(one: int, other: int) -> list[dict[str, Any]]:
            versions = [v if v > 0 else ~v for v in lines[one] if v not in lines[other]]
            return [with_text(entries[v], kept_tokens, decode) for v in versions if v in entries]

        return stored.meta, VersionDiff(only(end, start), only(start, end), tokens, rows)

    async def _load_consistent(self, tenant: Tenant, session: str) -> tuple[History, StoredSession]:
        """A session's history and its rows, both of the same version."""
        for _ in range(MAX_READS):
            history = await self._sessions.store.history(tenant.name, session, undo=True)
            stored = await self._sessions.store.load(tenant.name, session)
            if history is None or stored is None:
                raise session_not_found(session)
            if history.meta.state_id == stored.meta.state_id:
                return history, stored
        raise session_changed()


def _fill(site: SiteConfig, slots: Slots) -> SiteFill:
    bin_cells = -(-site.cells // MAX_BINS)
    bin_rows, bins = bin_cells * site.cell, -(-site.cells // bin_cells)
    counts = np.bincount(slots // bin_rows, minlength=bins).tolist()
    return SiteFill(site.name, site.kind, len(slots), site.cells, bin_cells, bin_rows, counts)


def _row_changes(
    history: History, stored: StoredSession, start: int, end: int, config: MemoryConfig
) -> tuple[dict[str, RowChanges], int]:
    """What changed in the rows from one version to the other, by site, and in the number of learned tokens."""
    old, new = state_delta_at(history, start, "from"), state_delta_at(history, end, "to")
    before, after = old.apply_to_rows(stored.sites), new.apply_to_rows(stored.sites)
    names = [site.name for site in config.sites]
    tokens: int = new.meta["tokens_learned"] - old.meta["tokens_learned"]
    return {name: _changes(name, before, after) for name in names}, tokens


def _changes(name: str, before: Mapping[str, RowBatch], after: Mapping[str, RowBatch]) -> RowChanges:
    if name not in before or name not in after:
        added, removed = (len(rows[name].slots) if name in rows else 0 for rows in (after, before))
        return RowChanges(added, removed, 0)
    old, new = before[name], after[name]
    _, at_old, at_new = np.intersect1d(old.slots, new.slots, assume_unique=True, return_indices=True)
    changed = (old.data[at_old] != new.data[at_new]).any(axis=1).sum()
    return RowChanges(len(new.slots) - len(at_new), len(old.slots) - len(at_old), int(changed))
