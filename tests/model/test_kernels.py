"""Law 2 for the Triton kernels: each equals its twin in torch's operators. Here in Triton's interpreter, on a CPU; on a
GPU as they are compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.memory import Draft, MemoryConfig, Pool, SiteConfig, ops
from model.memory.config import RUNS
from model.memory.pool import SitePool

pytest.importorskip("triton", reason="Triton is not installed: the kernels' twins are all that runs here")
from model import kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
R = len(RUNS)


def rows_of(n: int, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, fingerprints (few kinds, 0 among them) and tokens of n contexts."""
    g = torch.Generator().manual_seed(seed)
    keys = torch.randint(-127, 128, (n, width), generator=g).to(torch.int8)
    prints = torch.randint(0, 3, (n, R), generator=g).to(torch.int16)
    return keys.to(DEVICE), prints.to(DEVICE), torch.randint(0, 99, (n,), generator=g).to(DEVICE)


def learn(draft: Draft, cells: list[int], seed: int) -> None:
    """Writes a row to each of some cells, which may come again."""
    touched, at = torch.unique(torch.tensor(cells, device=DEVICE), return_inverse=True)
    draft.write("words", touched, at, *rows_of(len(cells), draft.pool.config.sites[0].width, seed))


def pool_of(P: int, width: int, *, twin: bool) -> Pool:
    config = MemoryConfig(8, (SiteConfig("words", "lexical", slots=7 * P, cell=P, k=3, width=width),))
    pool = Pool(config, rows=40 * P, sessions=6, device=DEVICE)
    pool.sites["words"].kernels = None if twin else kernels
    return pool


def image(site: SitePool) -> list[Tensor]:
    """Everything that a site holds, the places that nobody uses included."""
    return [site.tables, *site.fields]


SIZES = [(1, 1), (3, 5), (8, 16), (50, 64)]  # rows a cell, numbers a key


@pytest.mark.parametrize(("P", "width"), SIZES)
def test_a_block_written_by_the_kernel_leaves_the_bits_of_its_twin(P: int, width: int) -> None:
    """New cells and copied ones, cells with room and cells whose oldest rows give way, in one draft and the next."""
    pools = [pool_of(P, width, twin=twin) for twin in (True, False)]
    for pool in pools:
        session = pool.open()
        for turn, blocks in enumerate([[[2, 5, 2, 2], [5], [6, 2, 5]], [[2, 0, 2]], [[2] * 9, [1, 2]]]):
            draft = pool.draft(session)
            for number, cells in enumerate(blocks):
                learn(draft, cells, seed=10 * turn + number)
            if turn == 1:
                draft.rollback()
            else:
                draft.commit()
    ours, twins = (image(pool.sites["words"]) for pool in pools)
    assert all(torch.equal(a, b) for a, b in zip(ours, twins, strict=True))
    assert pools[0].rows(session)["words"] > 0


@pytest.mark.parametrize(("P", "width"), SIZES)
def test_rows_compared_by_the_kernel_are_compared_as_by_its_twin(P: int, width: int) -> None:
    """Sessions in a batch, one of them without rows, and the empty one."""
    pool = pool_of(P, width, twin=False)
    site, sessions = pool.sites["words"], [pool.open() for _ in range(3)]
    for session in sessions[:2]:
        draft = pool.draft(session)
        learn(draft, [3, 1, 3, 6, 1, 0, 3, 3], seed=session)
        draft.commit()
    g = torch.Generator().manual_seed(0)
    asked = torch.tensor([sessions[0], 0, sessions[1], sessions[2], sessions[0]], device=DEVICE)
    cells = torch.stack([torch.randperm(7, generator=g)[:3] for _ in asked]).to(DEVICE)
    query = torch.nn.functional.normalize(torch.randn(len(asked), width, generator=g), dim=-1).to(DEVICE)
    context = torch.randint(0, 3, (len(asked), R), generator=g).to(torch.int16).to(DEVICE)
    ours = site.compare(asked, cells, query, context)
    twin = ops.compare(ops.Rows(*site.read(asked, cells)), query, context)
    for name, one, other in zip(ops.Compared._fields, ours, twin, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), name
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5, msg=name)
    assert not ours.missing.all() and ours.missing[1].all()
