"""Loading and committing whole states, by size, on the embedded store: what a session costs that is not hot."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.scenarios import Result
from benchmarks.stage import Stage, Values
from benchmarks.texts import random_session
from model.memory import Pool
from model.memory.config import SESSION_SCALARS_SUFFIX
from service.store import CommitMetadata, RetentionConfig, RowBatch, SessionMeta
from service.store.embedded import EmbeddedValkey
from service.store.redis.store import RedisStore
from service.versions.export_file import as_tensors, is_valid_site

TOKENS = 64  # learned by a turn
TENANT = "bench"


async def states(stage: Stage) -> Result:
    """Seconds to save a whole state, to load it, to place its rows on the device, and to commit a turn on it."""
    capacity = max(site.slots for site in stage.config.sites)
    values: Values = {}
    with tempfile.TemporaryDirectory(prefix="imprint-bench-") as folder:
        embedded = EmbeddedValkey(Path(folder))
        store = RedisStore.from_url(embedded.start(), RetentionConfig(), exclusive=True)
        try:
            pool = Pool(stage.config, rows=capacity, sessions=1)
            least, most = stage.sizes.rounds
            begun = time.monotonic()
            for number in range(2 * most):
                if number >= least and time.monotonic() - begun > stage.budget_s:
                    break
                for share in stage.sizes.states:
                    rows = int(capacity * share)
                    name, found = await _measure(stage, store, pool, f"{rows}-{number}", rows)
                    for what, seconds in found.items():
                        values.setdefault(name, {}).setdefault(what, []).append(seconds)
                stage.progress(min(1.0, (time.monotonic() - begun) / stage.budget_s))
        finally:
            await store.close()
            embedded.stop()
    title = f"A state in the embedded store: save, load, place on the device, commit a turn of {TOKENS} tokens"
    return {"title": title, "arms": values}


async def _measure(stage: Stage, store: RedisStore, pool: Pool, sid: str, rows: int) -> tuple[str, dict[str, float]]:
    made = random_session(stage.config, sid, "sha256:" + "ab" * 32, rows, stage.vocab_size)
    turn = _turn(made.sites, np.random.default_rng(rows))
    timestamps = [time.perf_counter()]
    await store.commit(TENANT, made.meta, made.sites)
    timestamps.append(time.perf_counter())
    loaded = await store.load(TENANT, sid)
    timestamps.append(time.perf_counter())
    assert loaded is not None
    fit = all(is_valid_site(name, batch, stage.config, stage.vocab_size) for name, batch in loaded.sites.items())
    assert fit, "made rows are such as a memory writes"
    index = pool.open(as_tensors(loaded.sites))
    timestamps.append(time.perf_counter())
    turn_start = await store.begin_turn(TENANT, sid, write="always")
    await store.commit(
        TENANT, _next(made.meta), turn, lease=turn_start.lease, commit_metadata=CommitMetadata({"kind": "learn"})
    )
    timestamps.append(time.perf_counter())
    pool.close(index)
    save, load, place, commit = np.diff(timestamps).tolist()
    size = f"{made.meta.bytes / 2**20:.2f} MB"
    return size, {
        "save_s": save,
        "load_s": load,
        "place_s": place,
        "commit_s": commit,
        "load_and_commit_s": load + place + commit,
    }


def _turn(sites: dict[str, RowBatch], rng: np.random.Generator) -> dict[str, RowBatch]:
    """One changed row a token, at each site; and the own numbers."""
    changed = {}
    for name, batch in sites.items():
        chosen = np.sort(rng.permutation(len(batch.slots))[: 1 if name.endswith(SESSION_SCALARS_SUFFIX) else TOKENS])
        changed[name] = RowBatch(batch.slots[chosen], batch.data[chosen])
    return changed


def _next(meta: SessionMeta) -> SessionMeta:
    return replace(meta, version=2, tokens_learned=meta.tokens_learned + TOKENS, updated=time.time())
