"""Read-only views of a session: its episodes, how full its memory is, the difference between two of its versions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.episodes import MEANINGS
from model.episodes import SITE as EPISODES
from model.memory.config import MemoryConfig, SiteConfig
from model.memory.episodic.layout import HEADER, LENGTH, MADE_BY_BYTES, OFFSET, ORDINAL, VERSION
from model.memory.episodic.search import cosines
from model.site_kind import SiteKind
from service.concurrency import run_off_loop
from service.engine.stored_rows import is_valid_site
from service.errors import Overloaded
from service.store.base import History, RowBatch, SessionMeta, Slots, StoredSession
from service.store.errors import damaged_session
from service.tenants import Tenant
from service.turns.session_gate import session_changed, session_not_found
from service.turns.sessions import Sessions
from service.turns.state_delta import state_delta_at
from service.versions.lineage import kept_tokens_of, lineages, with_text

MAX_BINS = 1024
MIN_COSINE = 0.3  # of a search's vector and an episode's: "pets" and "My cat is called Miso." have 0.42
MAX_READS = 3  # tries to read a session that another turn changes meanwhile
NO_SLOTS = np.zeros(0, np.int32)


@dataclass(frozen=True)
class SiteFill:
    """The fill of one site.

    Attributes:
        counts: number of rows in each of at most 1,024 bins of neighbouring cells, in the order of the cells.
        bin_cells: number of cells in a bin.
        bin_rows: number of rows for which a bin has room.
    """

    name: str
    kind: SiteKind
    rows: int
    cells: int
    bin_cells: int
    bin_rows: int
    counts: list[int]


@dataclass(frozen=True)
class RowChanges:
    """Numbers of rows of one site: only in the later version, only in the earlier, in both with other bytes."""

    added: int
    removed: int
    changed: int


@dataclass(frozen=True)
class VersionDiff:
    """The difference between two versions.

    Attributes:
        learned: log entries of the turns that only the later version consists of.
        forgotten: log entries of the turns that only the earlier version consists of.
        tokens_learned: how many more tokens the later version has learned; may be negative.
        rows: the changed rows, by site.
    """

    learned: list[dict[str, Any]]
    forgotten: list[dict[str, Any]]
    tokens_learned: int
    rows: dict[str, RowChanges]


@dataclass(frozen=True)
class EpisodeView:
    """An episode of a session.

    Attributes:
        ordinal: number of the episode in the session; later ones have higher numbers.
        version: the version that taught it.
        offset: number of tokens of its request before it.
        time: unix time in seconds of that version; None if the session's log has the version no longer.
        text: the episode.
        asks: whether it only asks, so that no reply reads it.
    """

    ordinal: int
    version: int
    offset: int
    time: float | None
    text: str
    asks: bool


@dataclass(frozen=True)
class EpisodeFilter:
    """The episodes to list: with each word of `query`, whatever its case, or of a like meaning; of a number below
    `before`; with that `asks`, and of that `version`, if they are not None."""

    query: str = ""
    before: int | None = None
    asks: bool | None = None
    version: int | None = None

    def selects(self, episode: EpisodeView, alike: Container[int]) -> bool:
        """Return whether an episode, whose number fits, is to be listed; `alike`: the numbers of those that mean it."""
        if self.asks not in (None, episode.asks) or self.version not in (None, episode.version):
            return False
        text = episode.text.casefold()
        return episode.ordinal in alike or all(word in text for word in self.query.casefold().split())


class Views:
    """Views of sessions. Every method raises NotFound for an unknown session, Conflict for other slow weights."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    async def cells(self, tenant: Tenant, session: str) -> tuple[SessionMeta, list[SiteFill]]:
        """Return the session's meta and the fill of each site; an episodic site only where the session has episodes."""
        stored = await self._sessions.store.load(tenant.name, session)
        if stored is None:
            raise session_not_found(session)
        meta, slots = stored.meta, {site: batch.slots for site, batch in stored.sites.items()}
        loaded_model = self._sessions.loaded_model
        sites = loaded_model.engine.memory_config(loaded_model.require_loaded_model(meta)).sites
        if any(site_slots[-1] >= site.slots for site in sites if len(site_slots := slots.get(site.name, NO_SLOTS))):
            raise damaged_session(session)
        return meta, [_fill(site, slots.get(site.name, NO_SLOTS)) for site in _shown_sites(sites, slots)]

    async def episodes(
        self, tenant: Tenant, session: str, wanted: EpisodeFilter, limit: int
    ) -> tuple[list[EpisodeView], int | None]:
        """Return up to `limit` episodes, the newest first, and the next page's `before`."""
        stored = await self._sessions.store.load(tenant.name, session)
        history = await self._sessions.store.history(tenant.name, session, undo=False)
        if stored is None or history is None:
            raise session_not_found(session)
        model = self._sessions.loaded_model
        model.require_loaded_model(stored.meta)
        batch = stored.sites.get(EPISODES)
        if batch is None:
            return [], None
        times = {entry["version"]: entry["time"] for entry in history.log}
        meaning = await self._meaning(wanted.query)

        def read() -> list[EpisodeView]:
            if not is_valid_site(EPISODES, batch, model.engine.memory_config(), model.row_vocab_size()):
                raise damaged_session(session)
            alike = _alike(stored.sites.get(MEANINGS), meaning)
            found = _episodes(batch, wanted.before, times, model.tokenizer.decode, model.engine.only_asks)
            return list(islice((one for one in found if wanted.selects(one, alike)), limit + 1))

        page = await run_off_loop(batch.data.nbytes, read)
        return page[:limit], page[limit - 1].ordinal if len(page) > limit else None

    async def _meaning(self, query: str) -> tuple[int, NDArray[np.int8]] | None:
        """Return the id of the server's encoder and its vector of a query; None without either.

        Return None if the queue is full, too: a search by words needs no place in it.
        """
        model = self._sessions.loaded_model
        encoder = model.encoder
        if encoder is None or not query.strip():
            return None
        with suppress(Overloaded):
            async with self._sessions.gate.admit():
                return encoder.id, await model.engine.run(partial(encoder, query))
        return None

    async def diff(self, tenant: Tenant, session: str, start: int, end: int) -> tuple[SessionMeta, VersionDiff]:
        """Return the difference between two kept versions. Raises Conflict for a version that is not kept."""
        history, stored = await self._load_consistent(tenant, session)
        loaded_model = self._sessions.loaded_model
        config = loaded_model.engine.memory_config(loaded_model.require_loaded_model(stored.meta))
        # A full memory has 50,000 rows: comparing them would stop the event loop.
        rows, tokens = await asyncio.to_thread(_row_changes, history, stored, start, end, config)
        lines, entries = lineages(history), {entry["version"]: entry for entry in history.log}
        kept_tokens, decode = kept_tokens_of(history), loaded_model.tokenizer.decode

        def only_in(version: int, other: int) -> list[dict[str, Any]]:
            versions = [v if v > 0 else ~v for v in lines[version] if v not in lines[other]]
            return [with_text(entries[v], kept_tokens, decode) for v in versions if v in entries]

        return stored.meta, VersionDiff(only_in(end, start), only_in(start, end), tokens, rows)

    async def _load_consistent(self, tenant: Tenant, session: str) -> tuple[History, StoredSession]:
        """Return a session's history and rows, both of the same version."""
        for _ in range(MAX_READS):
            history = await self._sessions.store.history(tenant.name, session, undo=True)
            stored = await self._sessions.store.load(tenant.name, session)
            if history is None or stored is None:
                raise session_not_found(session)
            if history.meta.state_id == stored.meta.state_id:
                return history, stored
        raise session_changed()


def _shown_sites(sites: Iterable[SiteConfig], with_rows: Container[str]) -> list[SiteConfig]:
    """Return the sites to show: an episodic site only if it is among those `with_rows`, by name. The vectors of the
    episodes' meaning are a part of the episodes."""
    shown = (site for site in sites if site.kind != "meaning")
    return [site for site in shown if site.kind != "episodic" or site.name in with_rows]


def _episodes(
    batch: RowBatch,
    before: int | None,
    times: Mapping[int, float],
    decode: Callable[[Sequence[int]], str],
    only_asks: Callable[[Sequence[int]], bool],
) -> Iterator[EpisodeView]:
    """Yield the episodes of a session whose number is below `before`, the newest first."""
    numbers = np.ascontiguousarray(batch.data).view("<i4")
    numbers = numbers if before is None else numbers[numbers[:, ORDINAL] < before]
    for row in numbers[np.argsort(-numbers[:, ORDINAL])]:
        ordinal, length, version, offset = row[[ORDINAL, LENGTH, VERSION, OFFSET]].tolist()
        tokens = row[HEADER : HEADER + length].tolist()
        yield EpisodeView(ordinal, version, offset, times.get(version), decode(tokens), only_asks(tokens))


def _alike(batch: RowBatch | None, meaning: tuple[int, NDArray[np.int8]] | None) -> set[int]:
    """Return the numbers of the episodes whose vectors are near a vector of the same encoder."""
    if batch is None or meaning is None:
        return set()
    encoder, vector = meaning
    made_by, vectors = batch.data[:, :MADE_BY_BYTES], batch.data[:, MADE_BY_BYTES:]
    ordinals, encoders = np.ascontiguousarray(made_by).view("<i4").T
    near = cosines(np.ascontiguousarray(vectors).view(np.int8), vector) >= MIN_COSINE
    return set(ordinals[near & (encoders == encoder)].tolist())


def _fill(site: SiteConfig, slots: Slots) -> SiteFill:
    bin_cells = -(-site.cells // MAX_BINS)
    bin_rows, bins = bin_cells * site.cell, -(-site.cells // bin_cells)
    counts = np.bincount(slots // bin_rows, minlength=bins).tolist()
    return SiteFill(site.name, site.kind, len(slots), site.cells, bin_cells, bin_rows, counts)


def _row_changes(
    history: History, stored: StoredSession, start: int, end: int, config: MemoryConfig
) -> tuple[dict[str, RowChanges], int]:
    """Return the changed rows from one version to the other, by site, and the change of the learned tokens."""
    old, new = state_delta_at(history, start, "from"), state_delta_at(history, end, "to")
    before, after = old.apply_to_rows(stored.sites), new.apply_to_rows(stored.sites)
    names = [site.name for site in _shown_sites(config.sites, before.keys() | after.keys())]
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
