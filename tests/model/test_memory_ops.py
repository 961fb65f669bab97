"""Law 2 for the memory's operations: each equals its naive twin; and what their formulas promise holds (law 5)."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.memory import naive, ops
from model.memory.ops import Candidates, Rows

VOCAB = 13
SIZES = [(1, 1, 1), (7, 3, 4), (7, 1, 4), (65, 3, 1), (65, 3, 4)]  # n tokens, k slots a token, P pairs a row
DTYPES = [torch.float32, torch.float64]


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of fp32, and closer in fp64."""
    bound = 1e-5 if actual.dtype == torch.float32 else 1e-10
    torch.testing.assert_close(actual, expected, atol=bound, rtol=bound)


def random_rows(*shape: int, pairs: int, seed: int, dtype: torch.dtype = torch.float32) -> Rows:
    """Rows of every fill, from empty to full, with distinct tokens each, token 0 among them."""
    g = noise(seed)
    tokens = torch.rand(*shape, VOCAB, generator=g).argsort(-1)[..., :pairs]
    strengths = torch.rand(*shape, pairs, generator=g, dtype=dtype) * 5
    filled = torch.arange(pairs) < torch.randint(0, pairs + 1, (*shape, 1), generator=g)
    return Rows((tokens * filled).int(), strengths * filled)


def random_weights(n: int, k: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(torch.rand(n, k, generator=noise(seed), dtype=dtype) + 0.05)


def random_places(n: int, k: int, rows: int, seed: int) -> Tensor:
    """at [n, k]: distinct within a token, as addresses are."""
    return torch.rand(n, rows, generator=noise(seed)).argsort(-1)[:, :k]


def random_candidates(n: int, seed: int, dtype: torch.dtype = torch.float32) -> Candidates:
    found = ops.read_lexical(
        random_rows(n, 3, pairs=4, seed=seed, dtype=dtype), random_weights(n, 3, seed, dtype=dtype)
    )
    found.scores[::5] = 0.0
    return found


def dense(found: Candidates) -> Tensor:
    """Scores over the whole vocabulary [n, V]."""
    return torch.zeros(len(found.tokens), VOCAB, dtype=found.scores.dtype).scatter_add(1, found.tokens, found.scores)


# Addresses.


@pytest.mark.parametrize(("n", "side", "k"), [(1, 1, 1), (7, 3, 3), (65, 8, 1), (65, 8, 3), (7, 8, 8)])
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_an_address_is_the_top_of_all_slots(n: int, side: int, k: int, temperature: float) -> None:
    keys = torch.randn(n, 2, side, generator=noise(n + k))
    slots, w = ops.address(keys, k, temperature)
    twin_slots, twin_w = naive.address(keys, k, temperature)
    assert torch.equal(slots, twin_slots)
    torch.testing.assert_close(w, twin_w)
    assert all(len(set(row)) == k for row in slots.tolist())
    torch.testing.assert_close(w.norm(dim=-1), torch.ones(n))
    torch.testing.assert_close(ops.address(keys.double(), k, temperature)[1], w.double(), atol=1e-6, rtol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3), st.lists(st.lists(st.integers(-2, 2), min_size=6, max_size=6), min_size=1, max_size=5))
def test_among_ties_an_address_has_the_scores_and_weights_of_the_top(k: int, scores: list[list[int]]) -> None:
    keys = torch.tensor(scores, dtype=torch.float32).view(-1, 2, 3)
    slots, w = ops.address(keys, k, 1.0)
    twin_slots, twin_w = naive.address(keys, k, 1.0)
    every = (keys[:, 0, :, None] + keys[:, 1, None, :]).flatten(1)
    assert torch.equal(every.gather(1, slots), every.gather(1, twin_slots))
    assert all(len(set(row)) == k for row in slots.tolist())
    torch.testing.assert_close(w, twin_w)


# Lexical rows.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "pairs"), SIZES)
def test_lexical_read_equals_its_twin(n: int, k: int, pairs: int, dtype: torch.dtype) -> None:
    rows, w = random_rows(n, k, pairs=pairs, seed=n, dtype=dtype), random_weights(n, k, seed=n, dtype=dtype)
    found = ops.read_lexical(rows, w)
    assert found.tokens.shape == found.scores.shape == (n, k * pairs)
    assert_close(dense(found), dense(naive.read_lexical(rows, w)))
    for tokens, scores in zip(found.tokens, found.scores, strict=True):
        named = tokens[scores > 0].tolist()
        assert len(set(named)) == len(named), "candidates are distinct"


def test_what_several_rows_say_of_a_token_is_summed_before_it_is_squared() -> None:
    rows = Rows(torch.tensor([[[3, 0], [0, 3]]], dtype=torch.int32), torch.tensor([[[2.0, 1.0], [4.0, 0.0]]]))
    found = ops.read_lexical(rows, torch.tensor([[0.5, 0.25]]))
    assert dense(found)[0, [0, 3]].tolist() == [(0.5 * 1 + 0.25 * 4) ** 2, (0.5 * 2) ** 2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("decay", "cap"), [(0.0, 1e4), (0.3, 1e4), (1.0, 1e4), (0.1, 2.0)])
@pytest.mark.parametrize(("n", "k", "pairs"), SIZES)
def test_lexical_write_equals_its_twin(
    n: int, k: int, pairs: int, decay: float, cap: float, dtype: torch.dtype
) -> None:
    U = 9
    old = random_rows(U, pairs=pairs, seed=n, dtype=dtype)
    at, w = random_places(n, k, U, seed=n), random_weights(n, k, seed=n, dtype=dtype)
    beta = torch.rand(n, generator=noise(n), dtype=dtype) * (torch.arange(n) % 4 != 3)
    targets = torch.randint(0, VOCAB, (n,), generator=noise(n))
    new = ops.write_lexical(old, at, w, beta, targets, decay=decay, cap=cap)
    twin = naive.write_lexical(old, at, w, beta, targets, decay=decay, cap=cap)
    assert torch.equal(new.tokens, twin.tokens)
    torch.testing.assert_close(new.strengths, twin.strengths.float(), atol=1e-5, rtol=1e-5)
    assert (new.strengths.sum(-1) <= cap * (1 + 1e-6)).all()
    assert (new.tokens.dtype, new.strengths.dtype) == (torch.int32, torch.float32)


@st.composite
def dyadic_writes(draw: st.DrawFn) -> tuple[Rows, Tensor, Tensor, Tensor, Tensor, float]:
    """Writes whose numbers add up exactly in fp32: ties are ties for both twins."""
    U, pairs, n = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 7))
    k = draw(st.integers(1, U))
    tokens, strengths = torch.zeros(U, pairs, dtype=torch.int32), torch.zeros(U, pairs)
    for u in range(U):
        row = draw(st.lists(st.integers(0, 4), max_size=pairs, unique=True))
        tokens[u, : len(row)] = torch.tensor(row, dtype=torch.int32)
        strengths[u, : len(row)] = torch.tensor([draw(st.sampled_from([0.25, 0.5, 1.0])) for _ in row])

    def column(values: list[float], size: int) -> Tensor:
        return torch.tensor(draw(st.lists(st.sampled_from(values), min_size=size, max_size=size)))

    at = torch.tensor([draw(st.permutations(range(U)))[:k] for _ in range(n)])
    w, beta = column([0.25, 0.5, 1.0], n * k).view(n, k), column([0.0, 0.5, 1.0], n)
    targets = column([0, 1, 2, 3, 4], n).long()
    return Rows(tokens, strengths), at, w, beta, targets, draw(st.sampled_from([0.0, 0.5, 1.0]))


@settings(max_examples=150, deadline=None)
@given(dyadic_writes())
def test_lexical_write_resolves_ties_and_full_rows_as_its_twin(
    write: tuple[Rows, Tensor, Tensor, Tensor, Tensor, float],
) -> None:
    old, at, w, beta, targets, decay = write
    new = ops.write_lexical(old, at, w, beta, targets, decay=decay, cap=1e4)
    twin = naive.write_lexical(old, at, w, beta, targets, decay=decay, cap=1e4)
    assert torch.equal(new.tokens, twin.tokens)
    assert torch.equal(new.strengths, twin.strengths)


def test_a_full_row_keeps_its_strongest_pairs_and_the_smaller_token_of_equals() -> None:
    old = Rows(torch.tensor([[7, 5]], dtype=torch.int32), torch.tensor([[3.0, 1.0]]))
    targets, ones = torch.tensor([4, 0]), torch.ones(2)
    new = ops.write_lexical(old, torch.zeros(2, 1).long(), ones[:, None], ones, targets, decay=0.0, cap=1e4)
    assert new.tokens.tolist() == [[7, 0]]
    assert new.strengths.tolist() == [[3.0, 1.0]]


def test_one_write_of_full_strength_forgets_the_share_that_decay_says() -> None:
    old = Rows(torch.tensor([[7, 0]], dtype=torch.int32), torch.tensor([[2.0, 0.0]]))
    at, w, targets = torch.zeros(3, 1).long(), torch.ones(3, 1), torch.tensor([1, 1, 1])
    for beta, left in [([1.0, 0.0, 0.0], 1.5), ([0.5, 0.0, 0.0], 1.75), ([1.0, 1.0, 1.0], 1.5)]:
        new = ops.write_lexical(old, at, w, torch.tensor(beta), targets, decay=0.25, cap=1e4)
        assert dict(zip(new.tokens[0].tolist(), new.strengths[0].tolist(), strict=True)) == {7: left, 1: sum(beta)}


def test_a_write_of_no_strength_changes_no_bit() -> None:
    old = random_rows(9, pairs=4, seed=3)
    order = old.strengths.argsort(descending=True, stable=True)
    old = Rows(old.tokens.gather(1, order), old.strengths.gather(1, order))
    at, w, targets = random_places(7, 3, 9, seed=3), random_weights(7, 3, seed=3), torch.arange(7)
    new = ops.write_lexical(old, at, w, torch.zeros(7), targets, decay=0.5, cap=1e4)
    assert torch.equal(new.tokens, old.tokens)
    assert torch.equal(new.strengths, old.strengths)


# The mixture (law 5: probabilities sum to 1).


def random_mixture(dtype: torch.dtype, spread: float) -> tuple[Tensor, Candidates, Tensor]:
    found = random_candidates(65, seed=1, dtype=dtype)
    logits = spread * torch.randn(65, VOCAB, generator=noise(2), dtype=dtype)
    gamma = ops.mixing_weight(
        found, torch.tensor([-1.0, 0.5, 1.0], dtype=dtype), torch.linspace(-6, 6, 65, dtype=dtype)
    )
    return logits, found, gamma


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_mix_is_the_naive_mixture_and_sums_to_one(dtype: torch.dtype, spread: float) -> None:
    logits, found, gamma = random_mixture(dtype, spread)
    known = gamma > 0
    assert 0 < known.sum() < len(known)
    mixed = ops.mix(logits, found, gamma)
    torch.testing.assert_close(mixed[known].exp().sum(-1), torch.ones(int(known.sum()), dtype=dtype))
    twin = naive.mix(logits.double(), found, gamma.double())
    assert_close(mixed[known], twin[known].to(dtype))
    assert torch.equal(mixed[~known], logits[~known]), "γ = 0 keeps the logits, bit for bit"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_probability_of_a_target_is_that_of_the_mixture(dtype: torch.dtype) -> None:
    logits, found, gamma = random_mixture(dtype, 3.0)
    frozen = logits.log_softmax(-1)
    p_mem = dense(found) / dense(found).sum(-1, keepdim=True).clamp_min(1e-30)
    for token in range(VOCAB):
        targets = torch.full((65,), token)
        adapted = ops.target_log_prob(frozen[:, token], targets, found, gamma)
        mixed = ops.mix(logits, found, gamma).log_softmax(-1)[:, token]
        assert_close(adapted, mixed)
        assert torch.equal(adapted[gamma == 0], frozen[gamma == 0, token])
        assert_close(ops.memory_prob(targets, found), p_mem[:, token])


def test_the_gate_opens_by_its_formula_and_only_where_something_was_found() -> None:
    found = Candidates(torch.tensor([[4, 0], [0, 0]]), torch.tensor([[3.0, 1.0], [0.0, 0.0]]))
    gamma = ops.mixing_weight(found, torch.tensor([-1.0, 0.5, 2.0]), torch.tensor([0.25, 9.0]))
    expected = torch.sigmoid(-1.0 + 0.5 * torch.tensor(4.0).log() + 2.0 * 0.75 + 0.25)
    torch.testing.assert_close(gamma, torch.stack([expected, torch.zeros(())]))


@pytest.mark.parametrize("scale", [1e-41, 1e-30, 1e9])
@pytest.mark.parametrize("bias", [0.0, 40.0])
def test_even_the_weakest_and_the_surest_memory_leaves_probabilities(scale: float, bias: float) -> None:
    found = Candidates(torch.tensor([[4, 0]]), torch.tensor([[3.0, 1.0]]) * scale)
    gamma = ops.mixing_weight(found, torch.zeros(3), torch.tensor([bias]))
    mixed = ops.mix(torch.randn(1, VOCAB, generator=noise(0)), found, gamma)
    assert mixed.isfinite().all(), "no token becomes impossible"
    assert bool(gamma > 0) == (scale > 1e-38), "what is too weak to be normalised is nothing"
    if gamma > 0:
        torch.testing.assert_close(mixed.exp().sum(), torch.tensor(1.0))


def test_a_step_of_trust_is_the_gradient_of_the_log_probability() -> None:
    logits, found, _ = random_mixture(torch.float64, 2.0)
    targets = torch.randint(0, VOCAB, (65,), generator=noise(4))
    frozen = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    bias = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    gamma = ops.mixing_weight(found, torch.tensor([-1.0, 0.5, 1.0], dtype=torch.float64), bias.expand(65))
    p_mem = ops.memory_prob(targets, found)
    log_p = ((1 - gamma) * frozen.exp() + gamma * p_mem).log()
    log_p.sum().backward()
    step = ops.trust_step(frozen, log_p.detach(), targets, found, gamma.detach())
    assert bias.grad is not None
    torch.testing.assert_close(step, bias.grad)


# Hidden rows.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "width"), [(1, 1, 1), (7, 3, 5), (65, 3, 4), (65, 1, 5)])
def test_hidden_read_equals_its_twin_and_has_unit_size(n: int, k: int, width: int, dtype: torch.dtype) -> None:
    rows = torch.randn(n, k, width, generator=noise(n), dtype=dtype)
    rows[::3] = 0.0
    w = random_weights(n, k, seed=n, dtype=dtype)
    o = ops.read_hidden(rows, w)
    assert_close(o, naive.read_hidden(rows, w))
    assert not o[::3].any(), "norm(0) = 0"
    size = o.square().mean(-1).sqrt()
    torch.testing.assert_close(size, (torch.arange(n) % 3 != 0).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("decay", "cap"), [(1.0, 1e4), (0.0, 1e4), (0.5, 1.5)])
@pytest.mark.parametrize(("n", "k", "width"), [(1, 1, 1), (7, 3, 5), (65, 3, 4), (65, 1, 5)])
def test_hidden_write_equals_its_twin(n: int, k: int, width: int, decay: float, cap: float, dtype: torch.dtype) -> None:
    old = torch.randn(9, width, generator=noise(n), dtype=dtype)
    at, w = random_places(n, k, 9, seed=n), random_weights(n, k, seed=n, dtype=dtype)
    beta, values = (
        torch.rand(n, generator=noise(n), dtype=dtype),
        torch.randn(n, width, generator=noise(1), dtype=dtype),
    )
    new = ops.write_hidden(old, at, w, beta, values, decay=decay, cap=cap)
    twin = naive.write_hidden(old, at, w, beta, values, decay=decay, cap=cap)
    assert_close(new, twin)
    assert (new.norm(dim=-1) <= cap * (1 + 1e-6)).all()


def loss(M: Tensor, at: Tensor, w: Tensor, beta: Tensor, values: Tensor) -> Tensor:
    """½ Σ_t β_t ‖v_t − Σ_i w_ti M_i‖²."""
    return (beta * (values - torch.einsum("nk,nkv->nv", w, M[at])).square().sum(-1)).sum() / 2


def test_the_delta_rule_is_a_step_down_the_gradient_where_addresses_do_not_meet() -> None:
    M = torch.randn(12, 5, generator=noise(0), dtype=torch.float64, requires_grad=True)
    at, w = torch.randperm(12, generator=noise(1)).view(4, 3), random_weights(4, 3, seed=2, dtype=torch.float64)
    beta, values = torch.rand(4, generator=noise(3)).double(), torch.randn(4, 5, generator=noise(4)).double()
    loss(M, at, w, beta, values).backward()
    assert M.grad is not None
    new = ops.write_hidden(M.detach(), at, w, beta, values, decay=1.0, cap=1e4)
    torch.testing.assert_close(new, M.detach() - M.grad)


def test_a_write_closes_the_share_beta_of_a_tokens_error() -> None:
    old, at, w = torch.randn(3, 5, generator=noise(0)), torch.tensor([[2, 0]]), random_weights(1, 2, seed=0)
    values = torch.randn(1, 5, generator=noise(1))
    new = ops.write_hidden(old, at, w, torch.tensor([0.7]), values, decay=1.0, cap=1e4)
    before, after = (values - torch.einsum("nk,nkv->nv", w, M[at]) for M in (old, new))
    torch.testing.assert_close(after, 0.3 * before)


@pytest.mark.parametrize("k", [1, 2, 3, 16])
@pytest.mark.parametrize("addresses", ["identical", "overlapping"])
def test_blocks_of_any_size_are_stable(k: int, addresses: str) -> None:
    """The error of a block that is written again and again only shrinks, however its addresses crowd."""
    n = 512
    at, w = random_places(n, k, 20, seed=k), random_weights(n, k, seed=k)
    if addresses == "identical":
        at, w = at[:1].expand(n, k), w[:1].expand(n, k)
    beta, values = torch.full((n,), 0.95), torch.randn(n, 4, generator=noise(5)) + 1.0
    M, losses = torch.zeros(20, 4), []
    for _ in range(8):
        losses.append(float(loss(M, at, w, beta, values)))
        M = ops.write_hidden(M, at, w, beta, values, decay=1.0, cap=1e4)
    losses.append(float(loss(M, at, w, beta, values)))
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(losses))
    assert losses[-1] < losses[0]


def test_tokens_of_one_address_write_their_mean() -> None:
    values = torch.randn(512, 4, generator=noise(0))
    at, w = torch.tensor([[0, 1, 2]]).expand(512, 3), torch.full((512, 3), 3**-0.5)
    new = ops.write_hidden(torch.zeros(3, 4), at, w, torch.full((512,), 0.5), values, decay=1.0, cap=1e4)
    torch.testing.assert_close(w[0] @ new, 0.5 * values.mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 5, 16, 65])
def test_a_row_of_a_product_is_rounded_as_if_it_were_alone(n: int) -> None:
    """Law 4 rests on it: what a token addresses does not depend on the batch that it is decoded in."""
    x, weight = torch.randn(n, 96), torch.randn(96, 48)
    together = ops.rowwise(x, weight)
    assert torch.equal(together, torch.cat([ops.rowwise(row[None], weight) for row in x]))
    torch.testing.assert_close(together, x @ weight)
    weight.requires_grad_()
    ops.rowwise(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0)[:, None].expand_as(weight))
