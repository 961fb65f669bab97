"""Law 2 for the kernels of CPUs: each equals its twin in torch's operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.memory import LexicalSite, Pool
from model.memory.config import GATE_CLOSED, NGRAM_SIZES, TRUST
from model.memory.lexical import numba_backend, reference, torch_backend
from model.memory.lexical.types import GatedMixture, HeadParams, LexicalRows
from model.memory.prediction import Prediction, base_prediction
from model.numba_support import MIN_ROWS_PER_THREAD
from tests.model.memory_cases import SIZES, VOCAB, build_pool, build_queries, pool_bits_after_writes

HIDDEN = 6


@pytest.mark.parametrize(("P", "width"), SIZES)
def test_a_block_written_by_the_kernel_leaves_the_bits_of_its_twin(P: int, width: int) -> None:
    ours, twins = (pool_bits_after_writes(build_pool(P, width, which)) for which in (numba_backend, None))
    assert all(torch.equal(a, b) for a, b in zip(ours, twins, strict=True))


@pytest.mark.parametrize(("P", "width"), SIZES)
def test_likeness_and_repeated_runs_are_those_of_the_twin_to_the_last_bit(P: int, width: int) -> None:
    """Seen through heads of which one counts nothing but likeness, another one's best row the longest run."""
    pool = build_pool(P, width, numba_backend)
    query_sessions, cells, query, context = build_queries(pool)
    site, base = pool.sites["words"], base_prediction(torch.zeros(len(query_sessions), VOCAB))
    rows = torch_backend.match_rows(LexicalRows(*site.read(query_sessions, cells)), query, context)
    similarity = HeadParams(torch.ones(1), torch.zeros(1), torch.zeros(1, len(NGRAM_SIZES)))
    runs = HeadParams(torch.zeros(1), torch.zeros(1), torch.ones(1, len(NGRAM_SIZES)))
    for head_params, best in ((similarity, rows.cosines), (runs, rows.ngram_matches)):
        found, num_empty_rows = site.find_candidates(query_sessions, cells, query, context, base, head_params)
        at = best.masked_fill(rows.missing, -9).argmax(1, keepdim=True)
        known = ~rows.missing.all(1)
        assert known[0] and not known[1]
        assert torch.equal(found.gate_features[known, 1], rows.cosines.gather(1, at)[known, 0])
        assert torch.equal(found.ngram_matches[known], rows.ngram_matches.gather(1, at)[known, 0])
        assert torch.equal(found.tokens, rows.tokens)
        assert torch.equal(num_empty_rows, rows.missing.view(*cells.shape, P).sum(-1))


HEAD_PARAMS = HeadParams(
    torch.tensor([9.0, 2.0]), torch.tensor([0.5, -0.3]), torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.1, 0.0]])
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("P", "width"), SIZES)
@pytest.mark.parametrize("steep", [1.0, 50.0])
def test_rows_are_weighed_as_by_the_twins(P: int, width: int, dtype: torch.dtype, steep: float) -> None:
    """Also where there is none, and where one is beyond compare; and each context as if it were alone, to the last
    bit."""
    pool = build_pool(P, width, numba_backend)
    query_sessions, cells, query, context = build_queries(pool)
    site, base = pool.sites["words"], random_logits(len(query_sessions), dtype)
    head_params = HeadParams(*(steep * scale for scale in HEAD_PARAMS))
    ours, _ = site.find_candidates(query_sessions, cells, query, context, base, head_params)
    rows = LexicalRows(*site.read(query_sessions, cells))
    batched = torch_backend.score_row_matches(torch_backend.match_rows(rows, query, context), base, head_params)
    exact = (scale.double() for scale in head_params)
    loops = reference.read_lexical(rows, query.double(), context, base_prediction(base.logits.double()), *exact)
    assert torch.equal(ours.ngram_matches, batched.ngram_matches) and torch.equal(ours.tokens, batched.tokens)
    for name in ("shares", "gate_features"):
        mine, its, slow = (getattr(found, name) for found in (ours, batched, loops))
        assert mine.dtype == its.dtype == dtype
        torch.testing.assert_close(mine, its, atol=1e-5, rtol=1e-5, msg=name)
        torch.testing.assert_close(mine.double(), slow, atol=2e-4, rtol=1e-4, msg=name)
    for n in range(len(query_sessions)):
        one = torch.arange(len(query_sessions)) == n
        alone, _ = site.find_candidates(
            query_sessions[one], cells[one], query[one], context[one], base.select(one), head_params
        )
        assert torch.equal(alone.shares[0], ours.shares[n]) and torch.equal(
            alone.gate_features[0], ours.gate_features[n]
        )


def random_site(width: int) -> LexicalSite:
    """A site with random slow weights, over the cells of `build_pool`."""
    g, config = torch.Generator().manual_seed(7), build_pool(3, width, None).config.sites[0]
    site = LexicalSite(config, HIDDEN).requires_grad_(False)
    for weight in site.parameters():
        weight.copy_(torch.randn(weight.shape, generator=g))
    site.gate_out.mul_(0.2)  # where γ is almost 1, what is left of it has few digits
    return site


def random_queries(pool: Pool, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """n requests: sessions, hidden states, trails (some of which just began), trust and logits. One session has rows
    and a shut guard, one has rows, one none."""
    g, session_scalars = torch.Generator().manual_seed(n), pool.sites["words"].session_scalars
    sessions = sorted({*build_queries(pool)[0].tolist()})
    session_scalars[1:, TRUST] = torch.randn(session_scalars[1:, TRUST].shape, generator=g)
    session_scalars[sessions[1], GATE_CLOSED] = 1.0
    last_tokens_batch = torch.randint(0, 2**17, (n, max(NGRAM_SIZES)), generator=g)
    for began in range(min(n, max(NGRAM_SIZES))):
        last_tokens_batch[began, :began] = -1
    query_sessions = torch.tensor(sessions)[torch.randint(0, len(sessions), (n,), generator=g)]
    hidden, trust = torch.randn(n, HIDDEN, generator=g), torch.randn(n, len(NGRAM_SIZES) + 1, generator=g)
    return query_sessions, hidden, last_tokens_batch, trust, 3 * torch.randn(n, VOCAB, generator=g)


@pytest.mark.parametrize("n", [1, 2 * MIN_ROWS_PER_THREAD + 1])
def test_what_is_found_is_believed_as_by_the_twin(n: int) -> None:
    """In one thread and in several, with open and shut guards."""
    site, pool = random_site(5), build_pool(3, 5, numba_backend)
    query_sessions, hidden, last_tokens_batch, trust, logits = random_queries(pool, n)
    base, keys = base_prediction(logits), site.keys(hidden)
    found = site.find_candidates(
        pool, query_sessions, hidden, torch_backend.hash_last_ngrams(last_tokens_batch), base
    ).candidates
    session_scalars = pool.sites["words"].session_scalars
    gated = [
        part.gate_mixture(found, base.entropy, keys, site.gate_weights, session_scalars, query_sessions, trust)
        for part in (numba_backend, torch_backend)
    ]
    for name, mine, its in zip(GatedMixture._fields, *gated, strict=True):
        torch.testing.assert_close(mine, its, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("n", [1, 4, 20 * MIN_ROWS_PER_THREAD + 1])
@pytest.mark.parametrize("width", [1, 5, 64])
def test_a_whole_read_is_that_of_the_twins(n: int, width: int) -> None:
    """Where nothing is found or a guard is shut the logits keep their bits, and each row is as if it were alone."""
    site, pool, twins = random_site(width), build_pool(3, width, numba_backend), build_pool(3, width, None)
    query_sessions, hidden, last_tokens_batch, trust, logits = random_queries(pool, n)
    random_queries(twins, n)
    mine = site.mixture(pool, query_sessions, hidden, last_tokens_batch, logits.clone(), trust)
    reference = site.mixture(twins, query_sessions, hidden, last_tokens_batch, logits.clone(), trust)
    torch.testing.assert_close(mine, reference, atol=2e-5, rtol=1e-4)
    silent = (reference == logits).all(1)
    assert torch.equal(mine[silent], logits[silent])
    assert n < 9 or (silent.any() and not silent.all())
    for t in range(min(n, 20)):
        one = slice(t, t + 1)
        alone = site.mixture(
            pool, query_sessions[one], hidden[one], last_tokens_batch[one], logits[one].clone(), trust[one]
        )
        assert torch.equal(alone[0], mine[t])


def random_logits(n: int, dtype: torch.dtype) -> Prediction:
    g = torch.Generator().manual_seed(1)
    return base_prediction(3 * torch.randn(n, VOCAB, generator=g, dtype=dtype))
