"""A session's rows as the store keeps them and as the model takes them, and the check between the two."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from model.memory import MemoryConfig, SiteRows
from model.memory.config import SESSION_SCALARS_SUFFIX
from model.memory.lexical.types import NGRAM_SIZES
from service.store.base import RowBatch

SESSION_SCALARS_BYTES = 4 * 3 * (1 + len(NGRAM_SIZES))  # trust, balance, guard state: per number of n-gram matches


def as_tensors(sites: Mapping[str, RowBatch]) -> dict[str, SiteRows]:
    """Return a session's rows as the model takes them, without a copy."""
    return {
        name: SiteRows(torch.from_numpy(batch.slots), torch.from_numpy(batch.data)) for name, batch in sites.items()
    }


def as_batches(sites: Mapping[str, SiteRows]) -> dict[str, RowBatch]:
    """Return a session's rows as the store takes them, without a copy."""
    return {name: RowBatch(rows.slots.numpy(), rows.data.numpy()) for name, rows in sites.items()}


def is_valid_site(name: str, batch: RowBatch, config: MemoryConfig, vocab_size: int) -> bool:
    """Return whether the memory has the site, has room for the rows, and could have written them."""
    site = next((site for site in config.sites if site.name == name.removesuffix(SESSION_SCALARS_SUFFIX)), None)
    if site is None:
        return False
    is_scalars = name.endswith(SESSION_SCALARS_SUFFIX)
    max_slots, row_bytes = (1, SESSION_SCALARS_BYTES) if is_scalars else (site.slots, site.row_bytes)
    if batch.row_bytes != row_bytes or not len(batch.slots) >= 1 or batch.slots[-1] >= max_slots:
        return False
    return _is_finite(batch) if is_scalars else site.layout.are_valid_rows(batch.data, vocab_size=vocab_size)


def _is_finite(batch: RowBatch) -> bool:
    return bool(np.isfinite(np.ascontiguousarray(batch.data).view("<f4")).all())
