"""Law 2 for the kernels of CPUs: each equals its twin in torch's operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model import native
from model.memory import Draft, MemoryConfig, Pool, SiteConfig, naive, ops
from model.memory.config import RUNS

R, HEADS, VOCAB = len(RUNS), 2, 30
SIZES = [(1, 1), (3, 5), (8, 16), (50, 64)]  # rows a cell, numbers a key


def rows_of(n: int, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, fingerprints (few kinds, 0 among them) and tokens of n contexts."""
    g = torch.Generator().manual_seed(seed)
    keys = ops.quantise(torch.nn.functional.normalize(torch.randn(n, width, generator=g), dim=-1))
    return keys, torch.randint(0, 3, (n, R), generator=g).short(), torch.randint(0, VOCAB, (n,), generator=g)


def teach(draft: Draft, cells: list[int], seed: int) -> None:
    """Writes a row to each of some cells, which may come again."""
    touched, at = torch.unique(torch.tensor(cells), return_inverse=True)
    draft.write("words", touched, at, *rows_of(len(cells), draft.pool.config.sites[0].width, seed))


def pool_of(P: int, width: int, *, twin: bool = False) -> Pool:
    pool = Pool(
        MemoryConfig(8, (SiteConfig("words", "lexical", slots=7 * P, cell=P, k=3, width=width),)),
        rows=40 * P,
        sessions=6,
    )
    if twin:
        pool.sites["words"].kernels = None
    return pool


def asked_of(pool: Pool) -> tuple[Tensor, ...]:
    """Sessions in a batch, one of them without rows, and the empty one; cells, queries and contexts."""
    site, sessions = pool.sites["words"], [pool.open() for _ in range(3)]
    for session in sessions[:2]:
        draft = pool.draft(session)
        teach(draft, [3, 1, 3, 6, 1, 0, 3, 3], seed=session)
        draft.commit()
    g = torch.Generator().manual_seed(0)
    asked = torch.tensor([sessions[0], 0, sessions[1], sessions[2], sessions[0]])
    cells = torch.stack([torch.randperm(7, generator=g)[:3] for _ in asked])
    query = torch.nn.functional.normalize(torch.randn(len(asked), site.config.width, generator=g), dim=-1)
    return asked, cells, query, torch.randint(0, 3, (len(asked), R), generator=g).short()


@pytest.mark.parametrize(("P", "width"), SIZES)
def test_a_block_written_by_the_kernel_leaves_the_bits_of_its_twin(P: int, width: int) -> None:
    """New cells and copied ones, cells with room and cells whose oldest rows give way, in one draft and the next."""
    pools = [pool_of(P, width, twin=twin) for twin in (True, False)]
    for pool in pools:
        session = pool.open()
        for turn, blocks in enumerate([[[2, 5, 2, 2], [5], [6, 2, 5]], [[2, 0, 2]], [[2] * 9, [1, 2]]]):
            draft = pool.draft(session)
            for number, cells in enumerate(blocks):
                teach(draft, cells, seed=10 * turn + number)
            if turn == 1:
                draft.rollback()
            else:
                draft.commit()
    twins, ours = ([pool.sites["words"].tables, *pool.sites["words"].fields] for pool in pools)
    assert all(torch.equal(a, b) for a, b in zip(ours, twins, strict=True))
    assert pools[0].rows(session)["words"] > 0


@pytest.mark.parametrize(("P", "width"), SIZES)
def test_rows_are_compared_as_by_the_twin_to_the_last_bit(P: int, width: int) -> None:
    pool = pool_of(P, width)
    asked, cells, query, context = asked_of(pool)
    site = pool.sites["words"]
    ours, twin = site.compare(asked, cells, query, context), ops.Rows(*site.read(asked, cells))
    for name, one, other in zip(ops.Compared._fields, ours, ops.compare(twin, query, context), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other), name
    assert not ours.missing.all() and ours.missing[1].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("P", "width"), SIZES)
def test_rows_are_weighed_as_by_the_twins(P: int, width: int, dtype: torch.dtype) -> None:
    """Also where there is none; and each context as if it were alone, to the last bit."""
    pool = pool_of(P, width)
    asked, cells, query, context = asked_of(pool)
    site, g = pool.sites["words"], torch.Generator().manual_seed(1)
    base = ops.predict(3 * torch.randn(len(asked), VOCAB, generator=g, dtype=dtype))
    scales = torch.tensor([9.0, 2.0]), torch.tensor([0.5, -0.3]), torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.1, 0.0]])
    rows = site.compare(asked, cells, query, context)
    parts = (rows.tokens, rows.cosines, rows.repeats, base.log_prob(rows.tokens), rows.missing)
    asking: tuple[Tensor, ...] = (*parts, *scales)
    ours, twin = native.weigh(*asking), ops.weigh(*asking)
    exact = (scale.double() for scale in scales)
    loops = naive.read_lexical(
        ops.Rows(*site.read(asked, cells)), query.double(), context, ops.predict(base.logits.double()), *exact
    )
    assert torch.equal(ours.repeats, twin.repeats) and torch.equal(ours.tokens, twin.tokens)
    for name in ("shares", "evidence"):
        mine, its, slow = (getattr(found, name) for found in (ours, twin, loops))
        assert mine.dtype == its.dtype == dtype
        torch.testing.assert_close(mine, its, atol=1e-5, rtol=1e-5, msg=name)
        torch.testing.assert_close(mine.double(), slow, atol=2e-4, rtol=1e-4, msg=name)
    for n in range(len(asked)):
        asking = (*(part[n : n + 1] for part in parts), *scales)
        alone = native.weigh(*asking)
        assert torch.equal(alone.shares[0], ours.shares[n]) and torch.equal(alone.evidence[0], ours.evidence[n])
