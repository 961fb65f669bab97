"""Pools of few cells, and what is written to and asked of them: on these, kernels are compared with their twins."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from model.memory import Draft, MemoryConfig, Pool, SiteConfig
from model.memory.config import NGRAM_SIZES
from model.memory.lexical import torch_backend

SIZES = [(1, 1), (3, 5), (8, 16), (50, 64)]  # rows a cell, numbers a key
VOCAB = 30


def build_pool(P: int, width: int, kernels: ModuleType | None, device: torch.device | str = "cpu") -> Pool:
    """A pool of one site, "words", that uses these kernels, or torch's operators."""
    config = MemoryConfig(8, (SiteConfig("words", "lexical", slots=7 * P, cell=P, k=3, width=width),))
    pool = Pool(config, rows=40 * P, sessions=6, device=device)
    pool.sites["words"].kernels = kernels
    return pool


def write_rows(draft: Draft, cells: list[int], seed: int) -> None:
    """Writes a row to each of some cells, which may come again; its fingerprints are of few kinds, 0 among them."""
    g, n, device = torch.Generator().manual_seed(seed), len(cells), draft.pool.device
    directions = torch.randn(n, draft.pool.config.sites[0].width, generator=g)
    keys = torch_backend.quantise_keys(torch.nn.functional.normalize(directions, dim=-1))
    rows = (
        keys,
        torch.randint(0, 3, (n, len(NGRAM_SIZES)), generator=g).short(),
        torch.randint(0, VOCAB, (n,), generator=g),
    )
    touched, at = torch.unique(torch.tensor(cells, device=device), return_inverse=True)
    draft.write("words", touched, at, *(part.to(device) for part in rows))


def pool_bits_after_writes(pool: Pool) -> list[Tensor]:
    """Everything that the pool holds, unused places included, after new cells and copied ones, cells with room and
    cells whose oldest rows give way, in one draft and the next."""
    session = pool.open()
    for turn, blocks in enumerate([[[2, 5, 2, 2], [5], [6, 2, 5]], [[2, 0, 2]], [[2] * 9, [1, 2]]]):
        draft = pool.draft(session)
        for number, cells in enumerate(blocks):
            write_rows(draft, cells, seed=10 * turn + number)
        if turn == 1:
            draft.rollback()
        else:
            draft.commit()
    assert pool.rows(session)["words"] > 0
    return [pool.sites["words"].tables, *pool.sites["words"].fields]


def build_queries(pool: Pool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sessions in a batch, one of them without rows, and the empty one; cells, queries and contexts."""
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
