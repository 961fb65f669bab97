"""Law 2 for the kernels of CPUs: each equals its twin in torch's operators."""

from __future__ import annotations

import pytest
import torch

from model import native
from model.memory import naive, ops
from model.memory.config import RUNS, SHUT
from tests.model.cells import SIZES, VOCAB, asked_of, bits_after_lessons, pool_of


@pytest.mark.parametrize(("P", "width"), SIZES)
def test_a_block_written_by_the_kernel_leaves_the_bits_of_its_twin(P: int, width: int) -> None:
    ours, twins = (bits_after_lessons(pool_of(P, width, which)) for which in (native, None))
    assert all(torch.equal(a, b) for a, b in zip(ours, twins, strict=True))


@pytest.mark.parametrize(("P", "width"), SIZES)
def test_likeness_and_repeated_runs_are_those_of_the_twin_to_the_last_bit(P: int, width: int) -> None:
    """Seen through heads of which one counts nothing but likeness, another one's best row the longest run."""
    pool = pool_of(P, width, native)
    asked, cells, query, context = asked_of(pool)
    site, base = pool.sites["words"], ops.predict(torch.zeros(len(asked), VOCAB))
    rows = ops.compare(ops.Rows(*site.read(asked, cells)), query, context)
    likeness = ops.Scales(torch.ones(1), torch.zeros(1), torch.zeros(1, len(RUNS)))
    runs = ops.Scales(torch.zeros(1), torch.zeros(1), torch.ones(1, len(RUNS)))
    for scales, best in ((likeness, rows.cosines), (runs, rows.repeats)):
        found, room = site.find(asked, cells, query, context, base, scales)
        at = best.masked_fill(rows.missing, -9).argmax(1, keepdim=True)
        known = ~rows.missing.all(1)
        assert known[0] and not known[1]
        assert torch.equal(found.evidence[known, 1], rows.cosines.gather(1, at)[known, 0])
        assert torch.equal(found.repeats[known], rows.repeats.gather(1, at)[known, 0])
        assert torch.equal(found.tokens, rows.tokens)
        assert torch.equal(room, rows.missing.view(*cells.shape, P).sum(-1))


SCALES = ops.Scales(
    torch.tensor([9.0, 2.0]), torch.tensor([0.5, -0.3]), torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.1, 0.0]])
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("P", "width"), SIZES)
def test_rows_are_weighed_as_by_the_twins(P: int, width: int, dtype: torch.dtype) -> None:
    """Also where there is none; and each context as if it were alone, to the last bit."""
    pool = pool_of(P, width, native)
    asked, cells, query, context = asked_of(pool)
    site, base = pool.sites["words"], said(len(asked), dtype)
    ours, _ = site.find(asked, cells, query, context, base, SCALES)
    rows = ops.Rows(*site.read(asked, cells))
    twin = ops.weigh_rows(ops.compare(rows, query, context), base, SCALES)
    exact = (scale.double() for scale in SCALES)
    loops = naive.read_lexical(rows, query.double(), context, ops.predict(base.logits.double()), *exact)
    assert torch.equal(ours.repeats, twin.repeats) and torch.equal(ours.tokens, twin.tokens)
    for name in ("shares", "evidence"):
        mine, its, slow = (getattr(found, name) for found in (ours, twin, loops))
        assert mine.dtype == its.dtype == dtype
        torch.testing.assert_close(mine, its, atol=1e-5, rtol=1e-5, msg=name)
        torch.testing.assert_close(mine.double(), slow, atol=2e-4, rtol=1e-4, msg=name)
    for n in range(len(asked)):
        one = torch.arange(len(asked)) == n
        alone, _ = site.find(asked[one], cells[one], query[one], context[one], base.pick(one), SCALES)
        assert torch.equal(alone.shares[0], ours.shares[n]) and torch.equal(alone.evidence[0], ours.evidence[n])


@pytest.mark.parametrize("n", [1, 2 * native.ROWS_A_THREAD + 1])
@pytest.mark.parametrize("K", [1, 7, 40])
def test_what_is_found_is_believed_and_mixed_as_by_the_twins(n: int, K: int) -> None:
    """In one thread and in several, with an open and a shut guard, with nothing found, and with tokens twice."""
    g, R = torch.Generator().manual_seed(n + K), len(RUNS)
    shares = torch.softmax(2 * torch.randn(n, 2, K, generator=g), -1)
    shares[0] = 0.0
    found = ops.Candidates(
        torch.randint(0, VOCAB, (n, K), generator=g),
        shares,
        torch.randn(n, 2 * (4 + R), generator=g),
        torch.randint(0, R + 1, (n,), generator=g),
    )
    keys, trust = torch.randn(n, 5, generator=g), torch.randn(n, R + 1, generator=g)
    sizes = ((2 * (4 + R) + 6, 32), (32,), (32, 3), (3,))
    gate, base = ops.Gate(*(torch.randn(*size, generator=g) for size in sizes)), said(n, torch.float32)
    own, session = torch.randn(3, 3, R + 1, generator=g), torch.randint(0, 3, (n,), generator=g)
    own[:, SHUT] = (own[:, SHUT] > 0).float()
    judged = [part.believe(found, base.entropy, keys, gate, own, session, trust) for part in (native, ops)]
    for name, mine, its in zip(ops.Belief._fields, *judged, strict=True):
        torch.testing.assert_close(mine, its, atol=1e-6, rtol=1e-5, msg=name)
    belief = judged[1]
    kept = base.logits.clone()
    for inplace in (False, True):
        mixed, twin = (
            part.mix(base._replace(logits=kept.clone()), found.tokens, belief.shares, belief.gamma, inplace=inplace)
            for part in (native, ops)
        )
        torch.testing.assert_close(mixed, twin, atol=2e-6, rtol=1e-5)
        unread = belief.gamma == 0
        assert unread[0] and torch.equal(mixed[unread], kept[unread])
    assert torch.equal(base.logits, kept)


def test_trails_have_the_fingerprints_of_the_twin() -> None:
    trails = torch.randint(0, 2**17, (999, max(RUNS)), generator=torch.Generator().manual_seed(0))
    for began in range(max(RUNS)):
        trails[began, :began] = -1
    assert torch.equal(native.trail_fingerprints(trails), ops.trail_fingerprints(trails))


def said(n: int, dtype: torch.dtype) -> ops.Prediction:
    g = torch.Generator().manual_seed(1)
    return ops.predict(3 * torch.randn(n, VOCAB, generator=g, dtype=dtype))
