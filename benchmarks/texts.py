"""Prompts from English prose that every Python installation has, and sessions of random rows."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from model.memory import MemoryConfig, SiteConfig
from model.memory.config import SESSION_SCALARS_SUFFIX
from model.memory.lexical.types import KEY_SCALE, NGRAM_SIZES
from model.text.tokenizer import Tokenizer
from service.store.base import RowBatch, SessionMeta, StoredSession

CHARACTERS = 400_000


class PromptSource:
    """A source of prompts: token ids of the reference of the Python language, the same for each arm."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        from pydoc_data import topics

        self._ids = tokenizer.encode("\n\n".join(topics.topics.values())[:CHARACTERS])

    def cut(self, name: str, tokens: int) -> list[int]:
        """Return `tokens` token ids from a position that depends only on the name."""
        start = random.Random(name).randrange(max(1, len(self._ids) - tokens))
        return self._ids[start : start + tokens]

    def mixed_lengths(self, name: str, lengths: Sequence[int], count: int) -> list[list[int]]:
        """Return `count` prompts that cycle through the lengths, in an order that depends only on the name."""
        sizes = [lengths[i % len(lengths)] for i in range(count)]
        random.Random(name).shuffle(sizes)
        return [self.cut(f"{name}/{i}", size) for i, size in enumerate(sizes)]


def random_session(config: MemoryConfig, name: str, model: str, rows: int, vocab_size: int) -> StoredSession:
    """Return a session with `rows` random rows at each site, or as many as the site has slots.

    The number of rows equals that of a session that wrote a row for each of `rows` learned tokens. The cost of reads
    and writes depends on the number of rows, not on their content.
    """
    rng = np.random.default_rng(rows)
    sites = {site.name: random_rows(site, rng, rows, vocab_size) for site in config.sites}
    now = time.time()
    meta = SessionMeta(
        id=name,
        version=1,
        model=model,
        tokens_learned=rows,
        rows=sum(len(batch.slots) for batch in sites.values()),
        bytes=sum(batch.data.nbytes for batch in sites.values()),
        created=now,
        updated=now,
        proof_tokens=0,
        loss_sum=0.0,
        frozen_loss_sum=0.0,
        requests=1,
        options={},
        digests=(),
    )
    session_scalars = {
        site.name + SESSION_SCALARS_SUFFIX: initial_session_scalars() for site in config.sites if site.kind == "lexical"
    }
    return StoredSession(meta, sites | session_scalars)


def random_rows(site: SiteConfig, rng: np.random.Generator, rows: int, vocab_size: int) -> RowBatch:
    """Return random rows that the site could have written, in random slots."""
    count = min(rows, site.slots)
    slots = np.sort(rng.permutation(site.slots)[:count]).astype(np.int32)
    if site.kind == "hidden":
        return RowBatch(slots, _bytes(rng.standard_normal((count, site.width)).astype("<f4")))
    directions = rng.standard_normal((count, site.width))
    keys = KEY_SCALE * directions / np.linalg.norm(directions, axis=1, keepdims=True)
    parts = [
        np.arange(1, count + 1, dtype="<i4")[:, None],  # ages
        rng.integers(0, vocab_size, (count, 1)).astype("<i4"),
        rng.integers(-(2**15), 2**15, (count, len(NGRAM_SIZES))).astype("<i2"),
        np.clip(np.rint(keys), -127, 127).astype(np.int8),
    ]
    return RowBatch(slots, np.concatenate([_bytes(part) for part in parts], axis=1))


def initial_session_scalars() -> RowBatch:
    """Return the session scalars of a session with an open guard."""
    return RowBatch(np.zeros(1, np.int32), _bytes(np.zeros((1, 3 * (len(NGRAM_SIZES) + 1)), "<f4")))


def _bytes(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(values).view(np.uint8)
