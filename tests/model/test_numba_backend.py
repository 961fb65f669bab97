"""Law 2 for the Numba backend: it computes what torch operators and the reference compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.memory import LexicalSite, Pool
from model.memory.config import GATE_CLOSED, TRUST
from model.memory.lexical import reference
from model.memory.lexical.numba_backend import NumbaBackend
from model.memory.lexical.ops import hash_last_ngrams, score_row_matches
from model.memory.lexical.torch_backend import TorchBackend
from model.memory.lexical.types import NGRAM_SIZES, GatedMixture, HeadParams, LexicalRows
from model.memory.prediction import Prediction, base_prediction
from model.numba_support import MIN_ROWS_PER_THREAD
from tests.model.memory_cases import SIZES, VOCAB, build_pool, build_queries, pool_bits_after_writes

HIDDEN = 6
NUMBA, TORCH = NumbaBackend(), TorchBackend()


@pytest.mark.parametrize(("P", "width"), SIZES)
def test_a_written_block_leaves_the_bits_that_torch_leaves(P: int, width: int) -> None:
    found, expected = (pool_bits_after_writes(build_pool(P, width, backend)) for backend in (NUMBA, TORCH))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("P", "width"), SIZES)
def test_similarity_and_ngram_matches_have_the_bits_of_torch(P: int, width: int) -> None:
    """One head counts the similarity alone, the other the n-gram matches alone."""
    site, (session, cells, query, context) = (pool := build_pool(P, width, NUMBA)).sites["words"], build_queries(pool)
    base = base_prediction(torch.zeros(len(session), VOCAB))
    rows = TORCH.match_rows(site.tables, site.fields, session, cells, query, context)
    similarity = HeadParams(torch.ones(1), torch.zeros(1), torch.zeros(1, len(NGRAM_SIZES)))
    ngram_matches = HeadParams(torch.zeros(1), torch.zeros(1), torch.ones(1, len(NGRAM_SIZES)))
    for head_params, best in ((similarity, rows.cosines), (ngram_matches, rows.ngram_matches)):
        found, num_empty_rows = NUMBA.find_candidates(
            site.tables, site.fields, session, cells, query, context, base, head_params
        )
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
def test_candidates_are_those_of_torch_and_of_the_reference(
    P: int, width: int, dtype: torch.dtype, steep: float
) -> None:
    """Cases without rows, and with one row far above the others, are among them; each context has the bits that it has
    alone."""
    site, (session, cells, query, context) = (pool := build_pool(P, width, NUMBA)).sites["words"], build_queries(pool)
    base = random_prediction(len(session), dtype)
    head_params = HeadParams(*(steep * scale for scale in HEAD_PARAMS))
    found, _ = NUMBA.find_candidates(site.tables, site.fields, session, cells, query, context, base, head_params)
    matches = TORCH.match_rows(site.tables, site.fields, session, cells, query, context)
    in_torch = score_row_matches(matches, base, head_params)
    expected = reference.read_lexical(
        LexicalRows(*site.read(session, cells)),
        query.double(),
        context,
        base_prediction(base.logits.double()),
        *(scale.double() for scale in head_params),
    )
    assert torch.equal(found.ngram_matches, in_torch.ngram_matches) and torch.equal(found.tokens, in_torch.tokens)
    for name in ("shares", "gate_features"):
        by_numba, by_torch, by_reference = (getattr(each, name) for each in (found, in_torch, expected))
        assert by_numba.dtype == by_torch.dtype == dtype
        torch.testing.assert_close(by_numba, by_torch, atol=1e-5, rtol=1e-5, msg=name)
        torch.testing.assert_close(by_numba.double(), by_reference, atol=2e-4, rtol=1e-4, msg=name)
    for n in range(len(session)):
        one = torch.arange(len(session)) == n
        alone, _ = NUMBA.find_candidates(
            site.tables, site.fields, session[one], cells[one], query[one], context[one], base.select(one), head_params
        )
        assert torch.equal(alone.shares[0], found.shares[n])
        assert torch.equal(alone.gate_features[0], found.gate_features[n])


def random_site(width: int) -> LexicalSite:
    """Return a site with random slow weights, over the cells of `build_pool`."""
    g, config = torch.Generator().manual_seed(7), build_pool(3, width, TORCH).config.sites[0]
    site = LexicalSite(config, HIDDEN).requires_grad_(False)
    for weight in site.parameters():
        weight.copy_(torch.randn(weight.shape, generator=g))
    site.gate_out.mul_(0.2)  # if γ is almost 1, 1 − γ has few digits
    return site


def random_queries(pool: Pool, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return sessions, hidden states, last tokens (some of requests that just began), trust and logits of n requests.
    One session has rows and a closed gate, one has rows, one has none."""
    g, session_scalars = torch.Generator().manual_seed(n), pool.sites["words"].session_scalars
    sessions = sorted({*build_queries(pool)[0].tolist()})
    session_scalars[1:, TRUST] = torch.randn(session_scalars[1:, TRUST].shape, generator=g)
    session_scalars[sessions[1], GATE_CLOSED] = 1.0
    last_tokens = torch.randint(0, 2**17, (n, max(NGRAM_SIZES)), generator=g)
    for began in range(min(n, max(NGRAM_SIZES))):
        last_tokens[began, :began] = -1
    query_sessions = torch.tensor(sessions)[torch.randint(0, len(sessions), (n,), generator=g)]
    hidden, trust = torch.randn(n, HIDDEN, generator=g), torch.randn(n, len(NGRAM_SIZES) + 1, generator=g)
    return query_sessions, hidden, last_tokens, trust, 3 * torch.randn(n, VOCAB, generator=g)


@pytest.mark.parametrize("n", [1, 2 * MIN_ROWS_PER_THREAD + 1])
def test_the_gate_is_that_of_torch_and_of_the_reference(n: int) -> None:
    """In one thread and in several, with open and closed gates."""
    site, pool = random_site(5), build_pool(3, 5, NUMBA)
    session, hidden, last_tokens, trust, logits = random_queries(pool, n)
    base, keys = base_prediction(logits), site.keys(hidden)
    found = site.find_candidates(pool, session, hidden, hash_last_ngrams(last_tokens), base).candidates
    scalars = pool.sites["words"].session_scalars
    by_numba, by_torch, by_reference = (
        gate_mixture(found, base.entropy, keys, site.gate_weights, scalars, session, trust)
        for gate_mixture in (NUMBA.gate_mixture, TORCH.gate_mixture, reference.gate_mixture)
    )
    for name, one, other, expected in zip(GatedMixture._fields, by_numba, by_torch, by_reference, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5, msg=name)
        torch.testing.assert_close(one, expected, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("n", [1, 4, 20 * MIN_ROWS_PER_THREAD + 1])
@pytest.mark.parametrize("width", [1, 5, 64])
def test_a_whole_read_is_that_of_torch(n: int, width: int) -> None:
    """Logits keep their bits if nothing is found or the gate is closed; each row has the bits that it has alone."""
    site, pool, torch_pool = random_site(width), build_pool(3, width, NUMBA), build_pool(3, width, TORCH)
    session, hidden, last_tokens, trust, logits = random_queries(pool, n)
    random_queries(torch_pool, n)
    found = site.mixture(pool, session, hidden, last_tokens, logits.clone(), trust)
    expected = site.mixture(torch_pool, session, hidden, last_tokens, logits.clone(), trust)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    silent = (expected == logits).all(1)
    assert torch.equal(found[silent], logits[silent])
    assert n < 9 or (silent.any() and not silent.all())
    for t in range(min(n, 20)):
        one = slice(t, t + 1)
        alone = site.mixture(pool, session[one], hidden[one], last_tokens[one], logits[one].clone(), trust[one])
        assert torch.equal(alone[0], found[t])


def random_prediction(n: int, dtype: torch.dtype) -> Prediction:
    g = torch.Generator().manual_seed(1)
    return base_prediction(3 * torch.randn(n, VOCAB, generator=g, dtype=dtype))
