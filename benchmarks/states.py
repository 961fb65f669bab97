"""The scenario of loads and commits of whole states by size, on the embedded store: the cost of a cold session."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.scenarios import Result
from benchmarks.testbed import Testbed, Values
from benchmarks.texts import random_session
from model.memory import Pool, choose_backend
from model.memory.config import SESSION_SCALARS_SUFFIX
from service.engine.stored_rows import as_tensors, is_valid_site
from service.store import CommitMetadata, RetentionConfig, RowBatch, SessionMeta
from service.store.embedded import EmbeddedValkey
from service.store.redis.store import RedisStore

TOKENS = 64  # learned by a turn
TENANT = "bench"


async def states(testbed: Testbed) -> Result:
    """Measure the seconds to save a whole state, load it, copy its rows to the device, and commit a turn."""
    capacity = max(site.slots for site in testbed.config.sites)
    values: Values = {}
    with tempfile.TemporaryDirectory(prefix="imprint-bench-") as folder:
        embedded = EmbeddedValkey(Path(folder))
        store = RedisStore.from_url(embedded.start(), RetentionConfig(), exclusive=True)
        try:
            pool = Pool(testbed.config, rows=capacity, sessions=1, backend=choose_backend(torch.device("cpu")))
            min_rounds, max_rounds = testbed.sizes.rounds
            started = time.monotonic()
            for number in range(2 * max_rounds):
                if number >= min_rounds and time.monotonic() - started > testbed.budget_s:
                    break
                for share in testbed.sizes.states:
                    rows = int(capacity * share)
                    name, found = await _measure(testbed, store, pool, f"{rows}-{number}", rows)
                    for phase, seconds in found.items():
                        values.setdefault(name, {}).setdefault(phase, []).append(seconds)
                testbed.progress(min(1.0, (time.monotonic() - started) / testbed.budget_s))
        finally:
            await store.close()
            embedded.stop()
    title = f"A state in the embedded store: save, load, place on the device, commit a turn of {TOKENS} tokens"
    return {"title": title, "arms": values}


async def _measure(
    testbed: Testbed, store: RedisStore, pool: Pool, sid: str, rows: int
) -> tuple[str, dict[str, float]]:
    """Return the size of a session as text, and the seconds of each phase."""
    session = random_session(testbed.config, sid, "sha256:" + "ab" * 32, rows, testbed.vocab_size)
    turn = _turn(session.sites, np.random.default_rng(rows))
    timestamps = [time.perf_counter()]
    await store.commit(TENANT, session.meta, session.sites)
    timestamps.append(time.perf_counter())
    loaded = await store.load(TENANT, sid)
    timestamps.append(time.perf_counter())
    assert loaded is not None
    valid = all(is_valid_site(name, batch, testbed.config, testbed.vocab_size) for name, batch in loaded.sites.items())
    assert valid, "random rows are rows that a memory can write"
    index = pool.open(as_tensors(loaded.sites))
    timestamps.append(time.perf_counter())
    turn_start = await store.begin_turn(TENANT, sid, write="always")
    await store.commit(
        TENANT, _next(session.meta), turn, lease=turn_start.lease, commit_metadata=CommitMetadata({"kind": "learn"})
    )
    timestamps.append(time.perf_counter())
    pool.close(index)
    save, load, place, commit = np.diff(timestamps).tolist()
    size = f"{session.meta.bytes / 2**20:.2f} MB"
    return size, {
        "save_s": save,
        "load_s": load,
        "place_s": place,
        "commit_s": commit,
        "load_and_commit_s": load + place + commit,
    }


def _turn(sites: dict[str, RowBatch], rng: np.random.Generator) -> dict[str, RowBatch]:
    """Return the rows of a turn: one changed row for each token at each site, and the session scalars."""
    changed = {}
    for name, batch in sites.items():
        chosen = np.sort(rng.permutation(len(batch.slots))[: 1 if name.endswith(SESSION_SCALARS_SUFFIX) else TOKENS])
        changed[name] = RowBatch(batch.slots[chosen], batch.data[chosen])
    return changed


def _next(meta: SessionMeta) -> SessionMeta:
    return replace(meta, version=2, tokens_learned=meta.tokens_learned + TOKENS, updated=time.time())
