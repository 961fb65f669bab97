"""Unlearning a version too old to be learned around: the rows that came from its texts are cleared from the session."""

from __future__ import annotations

from collections.abc import Iterator, Set

import numpy as np
from numpy.typing import NDArray

from model.episodes import MEANINGS
from model.episodes import SITE as EPISODES
from model.memory import MemoryConfig
from model.memory.episodic.layout import HEADER, LENGTH, OFFSET, ORDINAL, VERSION
from model.memory.lexical.origin import rows_of_texts
from service.store.base import StoredSession
from service.turns.state_delta import VERSIONED_FIELDS, StateDelta, no_rows

KIND = "lexical"  # of the rows that hold tokens of texts, besides the episodes themselves


def removal_delta(stored: StoredSession, config: MemoryConfig, versions: Set[int]) -> StateDelta | None:
    """Return the delta to a session without the episodes of some versions and without the rows that their texts taught.

    Return None if the session has no episode of one of the versions.
    """
    episodes = stored.sites.get(EPISODES)
    if episodes is None:
        return None
    rows = np.ascontiguousarray(episodes.data).view("<i4")
    if not versions <= set(rows[:, VERSION].tolist()):
        return None
    is_gone = np.isin(rows[:, VERSION], list(versions))
    gone = {EPISODES: is_gone}
    if meanings := stored.sites.get(MEANINGS):
        gone[MEANINGS] = np.isin(meanings.slots, episodes.slots[is_gone])
    for site in config.sites:
        if site.kind == KIND and (batch := stored.sites.get(site.name)):
            gone[site.name] = rows_of_texts(batch.data, _texts(rows[is_gone]), _texts(rows[~is_gone]))
    meta = {name: getattr(stored.meta, name) for name in VERSIONED_FIELDS}
    meta["rows"] -= sum(int(mask.sum()) for site, mask in gone.items() if site != MEANINGS)
    meta["bytes"] -= sum(int(mask.sum()) * stored.sites[site].row_bytes for site, mask in gone.items())
    nothing = {site: no_rows(stored.sites[site].row_bytes) for site in gone}
    return StateDelta(meta, nothing, {site: stored.sites[site].slots[mask] for site, mask in gone.items()})


def _texts(rows: NDArray[np.int32]) -> Iterator[list[int]]:
    """Yield the token ids of episodes [n, HEADER + width]; those that follow one another in a request are one text."""
    text, end = list[int](), (-1, -1)
    for row in rows[np.argsort(rows[:, ORDINAL])]:
        version, offset, length = (int(row[at]) for at in (VERSION, OFFSET, LENGTH))
        if text and (version, offset) != end:
            yield text
            text = []
        text += row[HEADER : HEADER + length].tolist()
        end = version, offset + length
    if text:
        yield text
