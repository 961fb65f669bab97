"""Law 2 for the kernels of CPUs: each equals its twin in torch's operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model import native
from model.memory import naive, ops
from tests.model.cells import SIZES, VOCAB, asked_of, bits_after_lessons, pool_of


@pytest.mark.parametrize(("P", "width"), SIZES)
def test_a_block_written_by_the_kernel_leaves_the_bits_of_its_twin(P: int, width: int) -> None:
    ours, twins = (bits_after_lessons(pool_of(P, width, which)) for which in (native, None))
    assert all(torch.equal(a, b) for a, b in zip(ours, twins, strict=True))


@pytest.mark.parametrize(("P", "width"), SIZES)
def test_rows_are_compared_as_by_the_twin_to_the_last_bit(P: int, width: int) -> None:
    pool = pool_of(P, width, native)
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
    pool = pool_of(P, width, native)
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
