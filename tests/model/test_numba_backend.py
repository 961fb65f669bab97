"""Law 2 for the kernels of CPUs: each equals its twin in torch's operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.memory import LexicalSite, Pool
from model.memory.config import RUNS, SHUT, TRUST
from model.memory.lexical import numba_backend, reference, torch_backend
from model.numba_support import ROWS_A_THREAD
from tests.model.memory_cases import SIZES, VOCAB, asked_of, bits_after_lessons, pool_of

HIDDEN = 6


@pytest.mark.parametrize(("P", "width"), SIZES)
def test_a_block_written_by_the_kernel_leaves_the_bits_of_its_twin(P: int, width: int) -> None:
    ours, twins = (bits_after_lessons(pool_of(P, width, which)) for which in (numba_backend, None))
    assert all(torch.equal(a, b) for a, b in zip(ours, twins, strict=True))


@pytest.mark.parametrize(("P", "width"), SIZES)
def test_likeness_and_repeated_runs_are_those_of_the_twin_to_the_last_bit(P: int, width: int) -> None:
    """Seen through heads of which one counts nothing but likeness, another one's best row the longest run."""
    pool = pool_of(P, width, numba_backend)
    asked, cells, query, context = asked_of(pool)
    site, base = pool.sites["words"], torch_backend.predict(torch.zeros(len(asked), VOCAB))
    rows = torch_backend.compare(torch_backend.Rows(*site.read(asked, cells)), query, context)
    likeness = torch_backend.Scales(torch.ones(1), torch.zeros(1), torch.zeros(1, len(RUNS)))
    runs = torch_backend.Scales(torch.zeros(1), torch.zeros(1), torch.ones(1, len(RUNS)))
    for scales, best in ((likeness, rows.cosines), (runs, rows.repeats)):
        found, room = site.find(asked, cells, query, context, base, scales)
        at = best.masked_fill(rows.missing, -9).argmax(1, keepdim=True)
        known = ~rows.missing.all(1)
        assert known[0] and not known[1]
        assert torch.equal(found.evidence[known, 1], rows.cosines.gather(1, at)[known, 0])
        assert torch.equal(found.repeats[known], rows.repeats.gather(1, at)[known, 0])
        assert torch.equal(found.tokens, rows.tokens)
        assert torch.equal(room, rows.missing.view(*cells.shape, P).sum(-1))


SCALES = torch_backend.Scales(
    torch.tensor([9.0, 2.0]), torch.tensor([0.5, -0.3]), torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.1, 0.0]])
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("P", "width"), SIZES)
@pytest.mark.parametrize("steep", [1.0, 50.0])
def test_rows_are_weighed_as_by_the_twins(P: int, width: int, dtype: torch.dtype, steep: float) -> None:
    """Also where there is none, and where one is beyond compare; and each context as if it were alone, to the last
    bit."""
    pool = pool_of(P, width, numba_backend)
    asked, cells, query, context = asked_of(pool)
    site, base = pool.sites["words"], said(len(asked), dtype)
    scales = torch_backend.Scales(*(steep * scale for scale in SCALES))
    ours, _ = site.find(asked, cells, query, context, base, scales)
    rows = torch_backend.Rows(*site.read(asked, cells))
    twin = torch_backend.weigh_rows(torch_backend.compare(rows, query, context), base, scales)
    exact = (scale.double() for scale in scales)
    loops = reference.read_lexical(rows, query.double(), context, torch_backend.predict(base.logits.double()), *exact)
    assert torch.equal(ours.repeats, twin.repeats) and torch.equal(ours.tokens, twin.tokens)
    for name in ("shares", "evidence"):
        mine, its, slow = (getattr(found, name) for found in (ours, twin, loops))
        assert mine.dtype == its.dtype == dtype
        torch.testing.assert_close(mine, its, atol=1e-5, rtol=1e-5, msg=name)
        torch.testing.assert_close(mine.double(), slow, atol=2e-4, rtol=1e-4, msg=name)
    for n in range(len(asked)):
        one = torch.arange(len(asked)) == n
        alone, _ = site.find(asked[one], cells[one], query[one], context[one], base.pick(one), scales)
        assert torch.equal(alone.shares[0], ours.shares[n]) and torch.equal(alone.evidence[0], ours.evidence[n])


def site_of(width: int) -> LexicalSite:
    """A site with random slow weights, over the cells of `pool_of`."""
    g, config = torch.Generator().manual_seed(7), pool_of(3, width, None).config.sites[0]
    site = LexicalSite(config, HIDDEN).requires_grad_(False)
    for weight in site.parameters():
        weight.copy_(torch.randn(weight.shape, generator=g))
    site.gate_out.mul_(0.2)  # where γ is almost 1, what is left of it has few digits
    return site


def asking(pool: Pool, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """n requests: sessions, hidden states, trails (some of which just began), trust and logits. One session has rows
    and a shut guard, one has rows, one none."""
    g, own = torch.Generator().manual_seed(n), pool.sites["words"].own
    sessions = sorted({*asked_of(pool)[0].tolist()})
    own[1:, TRUST] = torch.randn(own[1:, TRUST].shape, generator=g)
    own[sessions[1], SHUT] = 1.0
    trails = torch.randint(0, 2**17, (n, max(RUNS)), generator=g)
    for began in range(min(n, max(RUNS))):
        trails[began, :began] = -1
    asked = torch.tensor(sessions)[torch.randint(0, len(sessions), (n,), generator=g)]
    hidden, trust = torch.randn(n, HIDDEN, generator=g), torch.randn(n, len(RUNS) + 1, generator=g)
    return asked, hidden, trails, trust, 3 * torch.randn(n, VOCAB, generator=g)


@pytest.mark.parametrize("n", [1, 2 * ROWS_A_THREAD + 1])
def test_what_is_found_is_believed_as_by_the_twin(n: int) -> None:
    """In one thread and in several, with open and shut guards."""
    site, pool = site_of(5), pool_of(3, 5, numba_backend)
    asked, hidden, trails, trust, logits = asking(pool, n)
    base, keys = torch_backend.predict(logits), site.keys(hidden)
    found = site.find(pool, asked, hidden, torch_backend.trail_fingerprints(trails), base).candidates
    own = pool.sites["words"].own
    judged = [
        part.believe(found, base.entropy, keys, site.network, own, asked, trust)
        for part in (numba_backend, torch_backend)
    ]
    for name, mine, its in zip(torch_backend.Belief._fields, *judged, strict=True):
        torch.testing.assert_close(mine, its, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("n", [1, 4, 20 * ROWS_A_THREAD + 1])
@pytest.mark.parametrize("width", [1, 5, 64])
def test_a_whole_read_is_that_of_the_twins(n: int, width: int) -> None:
    """Where nothing is found or a guard is shut the logits keep their bits, and each row is as if it were alone."""
    site, pool, twins = site_of(width), pool_of(3, width, numba_backend), pool_of(3, width, None)
    asked, hidden, trails, trust, logits = asking(pool, n)
    asking(twins, n)
    mine = site.mixture(pool, asked, hidden, trails, logits.clone(), trust)
    twin = site.mixture(twins, asked, hidden, trails, logits.clone(), trust)
    torch.testing.assert_close(mine, twin, atol=2e-5, rtol=1e-4)
    silent = (twin == logits).all(1)
    assert torch.equal(mine[silent], logits[silent])
    assert n < 9 or (silent.any() and not silent.all())
    for t in range(min(n, 20)):
        one = slice(t, t + 1)
        alone = site.mixture(pool, asked[one], hidden[one], trails[one], logits[one].clone(), trust[one])
        assert torch.equal(alone[0], mine[t])


def said(n: int, dtype: torch.dtype) -> torch_backend.Prediction:
    g = torch.Generator().manual_seed(1)
    return torch_backend.predict(3 * torch.randn(n, VOCAB, generator=g, dtype=dtype))
