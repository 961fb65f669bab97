"""Law 2 for the lexical memory: torch operators equal the reference, and the promises of the equations hold (law 5)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.memory.guard import GUARD_DECAY_TOKENS, GUARD_LIMIT_NATS, guard_step
from model.memory.lexical import ops, reference
from model.memory.lexical.types import KEY_SCALE, NGRAM_SIZES, Candidates, LexicalRows
from model.memory.numerics import rowwise_matmul
from model.memory.prediction import Prediction, base_prediction

VOCAB = 13
SIZES = [(1, 1, 1, 1), (7, 3, 4, 5), (7, 5, 1, 8), (65, 2, 3, 6)]  # n tokens, k cells a token, P rows a cell, d_k
R = len(NGRAM_SIZES)
SHARPNESS, PRIOR = torch.tensor([9.0, 2.0]), torch.tensor([0.2, 1.1])
BONUS = torch.tensor([[1.1, 0.4, 2.0], [0.1, 0.9, 0.3]])
DTYPES = [torch.float32, torch.float64]


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Assert equality up to the rounding of fp32, and closer in fp64."""
    bound = 1e-5 if actual.dtype == torch.float32 else 1e-10
    torch.testing.assert_close(actual, expected, atol=bound, rtol=bound)


def random_rows(*shape: int, width: int, seed: int) -> LexicalRows:
    """Return cells from empty to full, whose rows are in no order of age; tokens are few, so that they repeat."""
    g, P = noise(seed), shape[-1]
    filled = torch.arange(P) < torch.randint(0, P + 1, (*shape[:-1], 1), generator=g)
    ages = (
        torch.rand(*shape, generator=g).argsort(-1) + 1 + torch.randint(0, 9, (*shape[:-1], 1), generator=g)
    ) * filled
    tokens = torch.randint(0, 5, shape, generator=g) * filled
    ngram_hashes = torch.randint(0, 3, (*shape, R), generator=g) * filled[..., None]
    keys = torch.randint(-127, 128, (*shape, width), generator=g) * filled[..., None]
    return LexicalRows(ages.int(), tokens.int(), ngram_hashes.to(torch.int16), keys.to(torch.int8))


def random_keys(n: int, width: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(n, width, generator=noise(seed)), dim=-1)


def random_context(n: int, seed: int) -> Tensor:
    """Return n-gram hashes [n, R] of few kinds, so that they repeat; 0 stands for no n-gram."""
    return torch.randint(0, 3, (n, R), generator=noise(seed)).to(torch.int16)


def random_base(n: int, seed: int, dtype: torch.dtype = torch.float32, spread: float = 2.0) -> Prediction:
    return base_prediction(spread * torch.randn(n, VOCAB, generator=noise(seed), dtype=dtype))


def random_mixture(dtype: torch.dtype, spread: float) -> tuple[Prediction, Tensor, Tensor, Tensor]:
    """Return a prediction, tokens of candidates that repeat, their shares, and γ, for 65 contexts; in some, nothing was
    found."""
    tokens = torch.randint(0, VOCAB, (65, 12), generator=noise(1))
    shares = torch.softmax(3 * torch.randn(65, 12, generator=noise(2), dtype=dtype), -1)
    gamma = torch.sigmoid(torch.linspace(-9, 9, 65, dtype=dtype))
    shares[::5], gamma[::5] = 0.0, 0.0
    return random_base(65, 3, dtype, spread), tokens, shares, gamma


def read_lexical(
    rows: LexicalRows, query: Tensor, context: Tensor, base: Prediction, sharpness: Tensor, prior: Tensor, bonus: Tensor
) -> Candidates:
    """Return the candidates among rows that were gathered (equations L3 and L4)."""
    seen = ops.match_rows(rows, query, context)
    return ops.score_candidates(*seen[:3], base.log_prob(seen.tokens), seen.missing, sharpness, prior, bonus)


def rows_equal(a: LexicalRows, b: LexicalRows) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Cells and predictions.


@pytest.mark.parametrize(("n", "cells", "k"), [(1, 1, 1), (7, 5, 2), (20, 9, 9)])
def test_the_nearest_cells_are_those_of_the_reference(n: int, cells: int, k: int) -> None:
    keys, centres = random_keys(n, 4, seed=n), random_keys(cells, 4, seed=cells)
    assert torch.equal(ops.nearest_cells(keys, centres, k), reference.nearest_cells(keys, centres, k))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [0.0, 300.0, -300.0])
def test_a_prediction_is_the_softmax_of_its_logits(dtype: torch.dtype, shift: float) -> None:
    base = random_base(7, 0, dtype, spread=4.0)
    log_p = base.logits.log_softmax(-1)
    moved, bound = base_prediction(base.logits + shift), 1e-4 if dtype == torch.float32 else 1e-10
    tokens = torch.randint(0, VOCAB, (7, 3), generator=noise(1))
    torch.testing.assert_close(moved.entropy, -(log_p.exp() * log_p).sum(-1), atol=bound, rtol=bound)
    torch.testing.assert_close(moved.log_prob(tokens), log_p.gather(1, tokens), atol=bound, rtol=bound)
    assert torch.equal(moved.log_prob(tokens[:, 0]), moved.log_prob(tokens)[:, 0])
    mask = torch.arange(7) % 2 == 0
    assert all(torch.equal(part, whole[mask]) for part, whole in zip(moved.select(mask), moved, strict=True))


# What is done for a token does not depend on the others of its batch: law 4 rests on it.


@pytest.mark.parametrize("n", [1, 2, 5, 16, 64])
def test_a_row_of_a_product_is_rounded_as_if_it_were_alone(n: int) -> None:
    x, weight = torch.randn(n, 96), torch.randn(96, 48)
    together = rowwise_matmul(x, weight)
    assert torch.equal(together, torch.cat([rowwise_matmul(row[None], weight) for row in x]))
    torch.testing.assert_close(together, x @ weight)
    transposed = weight.T.contiguous().T
    assert torch.equal(
        rowwise_matmul(x, transposed),
        torch.cat([rowwise_matmul(row[None], transposed) for row in x]),
    )
    weight.requires_grad_()
    rowwise_matmul(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0)[:, None].expand_as(weight))


@pytest.mark.parametrize(("k", "P", "width", "vocab"), [(32, 54, 64, 40_000), (4, 8, 16, 101), (1, 1, 1, 1)])
def test_a_token_is_read_and_mixed_as_if_it_were_alone(k: int, P: int, width: int, vocab: int) -> None:
    n = 5
    rows, query = random_rows(n, k, P, width=width, seed=0), random_keys(n, width, seed=1)
    rows = rows._replace(tokens=rows.tokens.clamp_max(vocab - 1))
    logits, context = 3 * torch.randn(n, vocab, generator=noise(2)), random_context(n, seed=3)

    def run(part: slice) -> list[Tensor]:
        base = base_prediction(logits[part].clone())
        some_rows = LexicalRows(*(field[part].clone() for field in rows))
        found = read_lexical(some_rows, query[part].clone(), context[part].clone(), base, SHARPNESS, PRIOR, BONUS)
        shares = found.shares.mean(1)
        gamma = torch.sigmoid(found.gate_features[:, 0]) * shares.any(-1)
        return [base.log_z, base.entropy, *found, ops.mix(base, found.tokens, shares, gamma)]

    alone = [torch.cat(parts) for parts in zip(*(run(slice(t, t + 1)) for t in range(n)), strict=True)]
    for size in (2, 3, n):
        assert all(torch.equal(x[:size], y[:size]) for x, y in zip(run(slice(0, size)), alone, strict=True))


# Reading lexical rows.


@pytest.mark.parametrize(("n", "k", "P", "width"), SIZES)
def test_a_read_equals_the_reference(n: int, k: int, P: int, width: int) -> None:
    rows, query, base = random_rows(n, k, P, width=width, seed=n), random_keys(n, width, seed=n), random_base(n, seed=n)
    context = random_context(n, seed=n)
    found = read_lexical(rows, query, context, base, SHARPNESS, PRIOR, BONUS)
    exact, head_params = (
        Prediction(*(part.double() for part in base)),
        (SHARPNESS.double(), PRIOR.double(), BONUS.double()),
    )
    expected = reference.read_lexical(rows, query.double(), context, exact, *head_params)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.ngram_matches, expected.ngram_matches)
    assert_close(found.shares, expected.shares.float())
    assert_close(found.gate_features, expected.gate_features.float())


@pytest.mark.parametrize(("n", "k", "P", "width"), SIZES)
@pytest.mark.parametrize("sharpness", [0.0, 5.0, 300.0])
def test_shares_sum_to_one_where_anything_is_known(n: int, k: int, P: int, width: int, sharpness: float) -> None:
    rows, query, base = random_rows(n, k, P, width=width, seed=n), random_keys(n, width, seed=n), random_base(n, seed=n)
    found = read_lexical(rows, query, random_context(n, n), base, torch.tensor([sharpness, 1.0]), PRIOR, BONUS)
    known = (rows.ages > 0).any(-1).any(-1)
    torch.testing.assert_close(found.shares.sum(-1), known.float()[:, None].expand(n, 2))
    assert not found.shares.masked_select((rows.ages == 0).flatten(1)[:, None]).any(), "an empty row has no share"
    assert found.gate_features.isfinite().all()


def test_the_contents_of_an_empty_row_are_not_read() -> None:
    rows, query, base = random_rows(7, 3, 4, width=5, seed=0), random_keys(7, 5, seed=0), random_base(7, seed=0)
    empty = rows.ages == 0
    full, context = empty[..., None], random_context(7, seed=0)
    junk = LexicalRows(
        rows.ages,
        rows.tokens.masked_fill(empty, 7),
        rows.ngram_hashes.masked_fill(full, 1),
        rows.keys.masked_fill(full, 127),
    )
    plain, other = (read_lexical(r, query, context, base, SHARPNESS, PRIOR, BONUS) for r in (rows, junk))
    assert empty.any()
    assert torch.equal(plain.shares, other.shares)
    assert torch.equal(plain.gate_features, other.gate_features)


def test_rows_of_one_token_add_up() -> None:
    """Agreement is the share of the best match's token over all rows of this token."""
    tokens, log_probs = torch.tensor([[3, 8, 3, 3]]), torch.tensor([[-1.0, -2.0, -1.0, -1.0]])
    cosines, missing = torch.tensor([[0.9, 0.8, 0.1, 0.5]]), torch.tensor([[False, False, False, True]])
    ngram_matches, head_params = torch.tensor([[1, 0, 3, 3]]), (torch.tensor([2.0]), torch.tensor([0.5]))
    bonus = torch.tensor([[0.3, 0.2, 0.1]])
    found = ops.score_candidates(tokens, cosines, ngram_matches, log_probs, missing, *head_params, bonus)
    weights = [math.exp(2 * c + 0.5 * p + b) for c, p, b in ((0.9, -1, 0.3), (0.8, -2, 0.0), (0.1, -1, 0.6))]
    agreement, total = (weights[0] + weights[2]) / sum(weights), sum(weights)
    torch.testing.assert_close(found.shares[0, 0], torch.tensor([*(w / total for w in weights), 0.0]))
    torch.testing.assert_close(
        ops.memory_prob(torch.tensor([3]), tokens, found.shares[:, 0]), torch.tensor([agreement])
    )
    expected = [math.log(total) / 10, 0.9, agreement, math.log(agreement + 1e-4) / 3, 1.0, 0.0, 0.0]
    torch.testing.assert_close(found.gate_features, torch.tensor([expected]))
    assert found.ngram_matches.tolist() == [1]


@pytest.mark.parametrize("shared", [False, True], ids=["tokens of each", "tokens of all"])
def test_the_gradients_of_a_read_are_right_even_where_nothing_is_known(shared: bool) -> None:
    g, n, K = noise(0), 4, 6
    tokens = torch.randint(0, 3, (1 if shared else n, K), generator=g)
    missing = torch.rand(n, K, generator=g) < 0.4
    missing[1] = True
    inputs = (
        torch.rand(n, K, generator=g, dtype=torch.float64),
        -torch.rand(n, K, generator=g, dtype=torch.float64),
        SHARPNESS.double(),
        PRIOR.double(),
        BONUS.double(),
    )
    ngram_matches = torch.randint(0, R + 1, (n, K), generator=g)

    def read(cosines: Tensor, log_probs: Tensor, *head_params: Tensor) -> tuple[Tensor, Tensor]:
        found = ops.score_candidates(tokens, cosines, ngram_matches, log_probs, missing, *head_params)
        return found.shares, found.gate_features

    assert torch.autograd.gradcheck(read, [x.clone().requires_grad_() for x in inputs])


# Writing lexical rows.


def test_a_key_is_stored_up_to_half_a_step() -> None:
    keys = random_keys(99, 64, seed=0)
    stored = ops.quantise_keys(keys)
    assert stored.dtype == torch.int8
    assert float((stored.float() / KEY_SCALE - keys).abs().max()) <= 0.5 / KEY_SCALE + 1e-6
    assert ops.quantise_keys(torch.tensor([1.0, -1.0, 0.5, -0.5, 0.0])).tolist() == [127, -127, 127, -127, 0]


@pytest.mark.parametrize(
    ("n", "k", "cells", "most"), [(0, 2, 3, 4), (1, 1, 1, 0), (7, 3, 5, 2), (65, 4, 6, 9), (65, 3, 9, 0)]
)
def test_assigned_cells_are_those_of_the_reference(n: int, k: int, cells: int, most: int) -> None:
    near = torch.rand(n, cells, generator=noise(n)).argsort(-1)[:, :k]
    num_empty_rows = torch.randint(0, most + 1, (cells,), generator=noise(1))[near]
    assert torch.equal(ops.assign_cells(near, num_empty_rows), reference.assign_cells(near, num_empty_rows))


def test_a_full_cell_passes_on_to_the_next_nearest_and_forgets_only_when_all_are_full() -> None:
    near = torch.tensor([[4, 2], [4, 2], [2, 4], [4, 2], [4, 2]])
    num_empty_rows = torch.tensor([[1, 2], [1, 2], [2, 1], [1, 2], [1, 2]])
    assert ops.assign_cells(near, num_empty_rows).tolist() == [4, 2, 2, 4, 4]


@pytest.mark.parametrize(
    ("n", "U", "P"), [(0, 3, 2), (1, 1, 1), (7, 9, 4), (65, 9, 1), (65, 9, 4), (65, 2, 7), (65, 1, 65)]
)
def test_a_write_equals_the_reference(n: int, U: int, P: int) -> None:
    old, at = random_rows(U, P, width=3, seed=n), torch.randint(0, U, (n,), generator=noise(n))
    keys = torch.randint(-127, 128, (n, 3), generator=noise(1)).to(torch.int8)
    targets = torch.randint(0, VOCAB, (n,), generator=noise(2))
    before, ngram_hashes = LexicalRows(*(field.clone() for field in old)), random_context(n, seed=4)
    new = ops.write_lexical(old, at, keys, ngram_hashes, targets)
    assert rows_equal(new, reference.write_lexical(old, at, keys, ngram_hashes, targets))
    assert rows_equal(old, before), "what was read stays as it was"


@st.composite
def writes(draw: st.DrawFn) -> tuple[LexicalRows, Tensor, Tensor, Tensor, list[int]]:
    """Draw cells, writes that crowd and repeat in them, and the sizes of the blocks of these writes."""
    U, P, n = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 12))
    at, targets = (torch.tensor(draw(st.lists(st.integers(0, most), min_size=n, max_size=n))) for most in (U - 1, 3))
    sizes = draw(st.lists(st.integers(1, n), min_size=n, max_size=n))
    return random_rows(U, P, width=2, seed=draw(st.integers(0, 99))), at, torch.arange(2 * n).view(n, 2), targets, sizes


@settings(max_examples=150, deadline=None)
@given(writes())
def test_blocks_of_any_size_leave_the_rows_that_token_by_token_leaves(
    write: tuple[LexicalRows, Tensor, Tensor, Tensor, list[int]],
) -> None:
    old, at, keys, targets, sizes = write
    keys, ngram_hashes, blocks, start = keys.to(torch.int8), random_context(len(at), seed=0), old, 0
    for size in sizes:
        part = slice(start, start + size)
        blocks = ops.write_lexical(blocks, at[part], keys[part], ngram_hashes[part], targets[part])
        start += size
    assert rows_equal(blocks, reference.write_lexical(old, at, keys, ngram_hashes, targets))


def test_a_write_takes_an_empty_row_or_the_oldest_and_no_other_bit() -> None:
    ages = torch.tensor([[4, 2, 3], [5, 0, 6], [1, 2, 3]], dtype=torch.int32)
    old = LexicalRows(
        ages,
        torch.full((3, 3), 9, dtype=torch.int32),
        torch.full((3, 3, R), 8, dtype=torch.int16),
        torch.full((3, 3, 2), 7, dtype=torch.int8),
    )
    keys = torch.tensor([[1, 1], [2, 2], [3, 3]], dtype=torch.int8)
    ngram_hashes = torch.tensor([[4] * R, [5] * R, [6] * R], dtype=torch.int16)
    new = ops.write_lexical(old, torch.tensor([0, 1, 0]), keys, ngram_hashes, torch.tensor([10, 11, 12]))
    assert new.ages.tolist() == [[4, 5, 6], [5, 7, 6], [1, 2, 3]]
    assert new.tokens.tolist() == [[9, 10, 12], [9, 11, 9], [9, 9, 9]]
    assert new.ngram_hashes[..., 0].tolist() == [[8, 4, 6], [8, 5, 8], [8, 8, 8]]
    assert new.keys[..., 0].tolist() == [[7, 1, 3], [7, 2, 7], [7, 7, 7]]


@pytest.mark.parametrize("n", [1, 5, 40])
def test_a_token_takes_at_most_one_row(n: int) -> None:
    """A cell keeps its youngest rows, in order (law 6)."""
    old, at = random_rows(4, 6, width=3, seed=1), torch.randint(0, 4, (n,), generator=noise(3))
    targets = torch.arange(100, 100 + n)
    new = ops.write_lexical(old, at, torch.zeros(n, 3, dtype=torch.int8), random_context(n, seed=5), targets)
    changed = torch.stack([(x != y).flatten(2).any(-1) for x, y in zip(_deep(new), _deep(old), strict=True)]).any(0)
    assert int(changed.sum()) == sum(min(6, int((at == u).sum())) for u in range(4)) <= n
    for u in range(4):
        youngest = new.tokens[u][new.ages[u].argsort()]
        written = targets[at == u][-6:]
        assert youngest[6 - len(written) :].tolist() == written.tolist()
        held = new.ages[u][new.ages[u] > 0].tolist()
        assert len(set(held)) == len(held), "no two rows of a cell are of one age"


def _deep(rows: LexicalRows) -> list[Tensor]:
    return [field.view(4, 6, -1) for field in rows]


# The mixture (law 5: probabilities sum to 1).


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_the_mixture_equals_the_reference_and_sums_to_one(dtype: torch.dtype, spread: float) -> None:
    base, tokens, shares, gamma = random_mixture(dtype, spread)
    known = gamma > 0
    assert 0 < known.sum() < len(known)
    mixed = ops.mix(base, tokens, shares, gamma)
    expected = reference.mix(base_prediction(base.logits.double()), tokens, shares.double(), gamma.double())
    torch.testing.assert_close(expected[known].exp().sum(-1), torch.ones(int(known.sum()), dtype=torch.float64))
    assert_close(mixed[known].log_softmax(-1), expected[known].to(dtype))
    assert torch.equal(mixed[~known], base.logits[~known]), "γ = 0 keeps the logits, bit for bit"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_probability_of_a_target_is_that_of_the_mixture(dtype: torch.dtype) -> None:
    base, tokens, shares, gamma = random_mixture(dtype, 3.0)
    mixed, p_mem = ops.mix(base, tokens, shares, gamma).log_softmax(-1), torch.zeros(65, VOCAB, dtype=dtype)
    p_mem.scatter_add_(1, tokens, shares)
    for token in range(VOCAB):
        targets = torch.full((65,), token)
        frozen, memory_probs = base.log_prob(targets), ops.memory_prob(targets, tokens, shares)
        adapted = ops.target_log_prob(frozen, memory_probs, gamma)
        assert_close(memory_probs, p_mem[:, token])
        assert_close(adapted, mixed[:, token])
        assert torch.equal(adapted[gamma == 0], frozen[gamma == 0])


@pytest.mark.parametrize("gamma", [1e-30, 1 - 1e-6])
@pytest.mark.parametrize("share", [1.0, 1e-30])
def test_a_memory_of_any_strength_leaves_probabilities(gamma: float, share: float) -> None:
    tokens, shares = torch.tensor([[4, 0]]), torch.tensor([[share, 1.0 - share]])
    base = random_base(1, 0, spread=30.0)
    mixed = ops.mix(base, tokens, shares, torch.tensor([gamma]))
    assert mixed.isfinite().all(), "no token becomes impossible"
    adapted = ops.target_log_prob(base.log_prob(tokens[:, 0]), shares[:, 0], torch.tensor([gamma]))
    assert_close(mixed.log_softmax(-1)[:, 4], adapted)


def test_a_step_of_trust_is_the_gradient_of_the_log_probability() -> None:
    base, tokens, shares, _ = random_mixture(torch.float64, 2.0)
    targets = torch.randint(0, VOCAB, (65,), generator=noise(4))
    frozen, memory_probs = base.log_prob(targets), ops.memory_prob(targets, tokens, shares)
    bias = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    gamma = torch.sigmoid(torch.linspace(-4, 4, 65).double() + bias)
    log_p = ((1 - gamma) * frozen.exp() + gamma * memory_probs).log()
    log_p.sum().backward()
    assert bias.grad is not None
    step = ops.trust_gradient(frozen, log_p.detach(), memory_probs, gamma.detach())
    torch.testing.assert_close(step.sum(), bias.grad)


# The guard (law 12).


def run_guard(gains: list[tuple[float, int]]) -> tuple[list[float], list[bool]]:
    """Return the balance and whether the gate is closed after each block of (gain, tokens)."""
    balance, closed = torch.zeros(()), torch.zeros(())
    balances, states = [], []
    for gain, tokens in gains:
        balance, closed = guard_step(balance, closed, torch.tensor(gain), torch.tensor(tokens))
        balances.append(float(balance))
        states.append(bool(closed))
    return balances, states


def test_the_gate_shuts_below_the_limit_and_opens_above_zero() -> None:
    _, closed = run_guard(
        [(0.1 - GUARD_LIMIT_NATS, 1), (-0.2, 1), (GUARD_LIMIT_NATS - 0.1, 1), (0.5, 1), (-GUARD_LIMIT_NATS - 0.3, 1)]
    )
    assert closed == [False, True, True, False, False]


def test_losses_and_gains_fade() -> None:
    balances, closed = run_guard(
        [(-0.9 * GUARD_LIMIT_NATS, 1), (0.0, GUARD_DECAY_TOKENS), (-0.9 * GUARD_LIMIT_NATS, 1)]
    )
    assert balances[1] == pytest.approx(-0.9 * GUARD_LIMIT_NATS / math.e, rel=1e-2)
    assert not any(closed[:2])
    assert closed[2]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-30, 30), min_size=1, max_size=50))
def test_the_loss_of_an_open_gate_is_bounded_for_any_gain_before(gains: list[float]) -> None:
    """Between two closings a gate loses its credit, the limit, and the last loss; in 50 tokens little fades."""
    was_open, lost = True, 0.0
    for gain, closed in zip(gains, run_guard([(gain, 1) for gain in gains])[1], strict=True):
        lost = max(0.0, lost - gain) if was_open else 0.0
        assert lost <= 2 * GUARD_LIMIT_NATS + 30.0 + 1.0
        was_open = not closed
