"""Small pools, and blocks and queries for them: the cases on which backends are compared with their reference."""

from __future__ import annotations

import torch
from torch import Tensor

from model.memory import Draft, MemoryBackend, MemoryConfig, Pool, SiteConfig
from model.memory.lexical.ops import quantise_keys
from model.memory.lexical.types import NGRAM_SIZES

SIZES = [(1, 1), (3, 5), (8, 16), (50, 64)]  # rows a cell, numbers a key
VOCAB = 30


def build_pool(P: int, width: int, backend: MemoryBackend, device: torch.device | str = "cpu") -> Pool:
    """Return a pool of one lexical site, "words", of 7 cells."""
    config = MemoryConfig(8, (SiteConfig("words", "lexical", slots=7 * P, cell=P, k=3, width=width),))
    return Pool(config, rows=40 * P, sessions=6, device=device, backend=backend)


def write_rows(draft: Draft, cells: list[int], seed: int) -> None:
    """Write a row to each of some cells, which may repeat; the n-gram hashes are of few kinds, 0 among them."""
    g, n, device = torch.Generator().manual_seed(seed), len(cells), draft.pool.device
    site = draft.pool.sites["words"]
    directions = torch.randn(n, site.config.width, generator=g)
    rows = (
        quantise_keys(torch.nn.functional.normalize(directions, dim=-1)),
        torch.randint(0, 3, (n, len(NGRAM_SIZES)), generator=g).short(),
        torch.randint(0, VOCAB, (n,), generator=g),
    )
    touched, at = torch.unique(torch.tensor(cells, device=device), return_inverse=True)
    old, new = draft.copy_on_write("words", touched)
    site.backend.write(site.fields, old, new, at, *(part.to(device) for part in rows))


def pool_bits_after_writes(pool: Pool) -> list[Tensor]:
    """Return everything that the pool holds, unused cells included, after three drafts. The drafts write to new cells
    and copied cells, to cells with empty rows and cells whose oldest rows are overwritten."""
    session = pool.open()
    for turn, blocks in enumerate([[[2, 5, 2, 2], [5], [6, 2, 5]], [[2, 0, 2]], [[2] * 9, [1, 2]]]):
        draft = pool.draft(session)
        for number, cells in enumerate(blocks):
            write_rows(draft, cells, seed=10 * turn + number)
        if turn == 1:
            draft.rollback()
        else:
            draft.commit()
    assert pool.num_rows(session)["words"] > 0
    return [pool.sites["words"].tables, *pool.sites["words"].fields]


def build_queries(pool: Pool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return sessions [n], cells [n, 3], queries [n, d_k] and contexts [n, R] of a batch; one session has no rows, and
    one is the empty session."""
    site, sessions = pool.sites["words"], [pool.open() for _ in range(3)]
    for session in sessions[:2]:
        draft = pool.draft(session)
        write_rows(draft, [3, 1, 3, 6, 1, 0, 3, 3], seed=session)
        draft.commit()
    g = torch.Generator().manual_seed(0)
    query_sessions = torch.tensor([sessions[0], 0, sessions[1], sessions[2], sessions[0]])
    cells = torch.stack([torch.randperm(7, generator=g)[:3] for _ in query_sessions])
    query = torch.nn.functional.normalize(torch.randn(len(query_sessions), site.config.width, generator=g), dim=-1)
    context = torch.randint(0, 3, (len(query_sessions), len(NGRAM_SIZES)), generator=g).short()
    return query_sessions.to(pool.device), cells.to(pool.device), query.to(pool.device), context.to(pool.device)
