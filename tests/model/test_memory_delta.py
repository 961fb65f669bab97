"""Law 2 for the delta memory: torch operators equal the reference, and the promises of the delta rule hold."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.memory.delta import reference, torch_ops
from tests.model.test_memory_lexical import DTYPES, assert_close, noise


@pytest.mark.parametrize(("n", "side", "k"), [(1, 1, 1), (7, 3, 3), (65, 8, 1), (65, 8, 3), (7, 8, 8), (7, 3, 9)])
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_an_address_is_the_top_of_all_slots(n: int, side: int, k: int, temperature: float) -> None:
    keys = torch.randn(n, 2, side, generator=noise(n + k))
    slots, w = torch_ops.address(keys, k, temperature)
    expected, scores = reference.product_key_topk(keys, k)
    assert torch.equal(slots, expected)
    assert all(len(set(row)) == k for row in slots.tolist())
    torch.testing.assert_close(torch_ops.product_key_topk(keys, k)[1], scores)
    torch.testing.assert_close(w, F.normalize(torch.softmax(temperature * scores, -1), dim=-1))
    torch.testing.assert_close(torch_ops.address(keys.double(), k, temperature)[1], w.double(), atol=1e-6, rtol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3), st.lists(st.lists(st.integers(-2, 2), min_size=6, max_size=6), min_size=1, max_size=5))
def test_among_ties_an_address_has_the_scores_of_the_top(k: int, scores: list[list[int]]) -> None:
    keys = torch.tensor(scores, dtype=torch.float32).view(-1, 2, 3)
    slots, found = torch_ops.product_key_topk(keys, k)
    every = (keys[:, 0, :, None] + keys[:, 1, None, :]).flatten(1)
    assert torch.equal(every.gather(1, slots), found)
    assert torch.equal(found, reference.product_key_topk(keys, k)[1])
    assert all(len(set(row)) == k for row in slots.tolist())


def random_weights(n: int, k: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(torch.rand(n, k, generator=noise(seed), dtype=dtype) + 0.05)


def random_slots(n: int, k: int, rows: int, seed: int) -> Tensor:
    """Return slots [n, k], distinct within a token."""
    return torch.rand(n, rows, generator=noise(seed)).argsort(-1)[:, :k]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "width"), [(1, 1, 1), (7, 3, 5), (65, 3, 4), (65, 1, 5)])
def test_a_read_equals_the_reference_and_has_unit_size(n: int, k: int, width: int, dtype: torch.dtype) -> None:
    rows = torch.randn(n, k, width, generator=noise(n), dtype=dtype)
    rows[::3] = 0.0
    w = random_weights(n, k, seed=n, dtype=dtype)
    o = torch_ops.read_delta(rows, w)
    assert_close(o, reference.read_delta(rows, w))
    assert not o[::3].any(), "norm(0) = 0"
    size = o.square().mean(-1).sqrt()
    torch.testing.assert_close(size, (torch.arange(n) % 3 != 0).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("decay", "cap"), [(1.0, 1e4), (0.0, 1e4), (0.5, 1.5)])
@pytest.mark.parametrize(("n", "k", "width"), [(1, 1, 1), (7, 3, 5), (65, 3, 4), (65, 1, 5)])
def test_a_write_equals_the_reference(n: int, k: int, width: int, decay: float, cap: float, dtype: torch.dtype) -> None:
    old = torch.randn(9, width, generator=noise(n), dtype=dtype)
    at, w = random_slots(n, k, 9, seed=n), random_weights(n, k, seed=n, dtype=dtype)
    beta, values = (
        torch.rand(n, generator=noise(n), dtype=dtype),
        torch.randn(n, width, generator=noise(1), dtype=dtype),
    )
    new = torch_ops.write_delta(old, at, w, beta, values, decay=decay, cap=cap)
    expected = reference.write_delta(old, at, w, beta, values, decay=decay, cap=cap)
    assert_close(new, expected)
    assert (new.norm(dim=-1) <= cap * (1 + 1e-6)).all()


def loss(M: Tensor, at: Tensor, w: Tensor, beta: Tensor, values: Tensor) -> Tensor:
    """Return ½ Σ_t β_t ‖v_t − Σ_i w_ti M_i‖²."""
    return (beta * (values - torch.einsum("nk,nkv->nv", w, M[at])).square().sum(-1)).sum() / 2


def test_the_delta_rule_is_a_step_down_the_gradient_where_addresses_are_disjoint() -> None:
    M = torch.randn(12, 5, generator=noise(0), dtype=torch.float64, requires_grad=True)
    at, w = torch.randperm(12, generator=noise(1)).view(4, 3), random_weights(4, 3, seed=2, dtype=torch.float64)
    beta, values = torch.rand(4, generator=noise(3)).double(), torch.randn(4, 5, generator=noise(4)).double()
    loss(M, at, w, beta, values).backward()
    assert M.grad is not None
    new = torch_ops.write_delta(M.detach(), at, w, beta, values, decay=1.0, cap=1e4)
    torch.testing.assert_close(new, M.detach() - M.grad)


def test_a_write_closes_the_share_beta_of_a_tokens_error() -> None:
    old, at, w = torch.randn(3, 5, generator=noise(0)), torch.tensor([[2, 0]]), random_weights(1, 2, seed=0)
    values = torch.randn(1, 5, generator=noise(1))
    new = torch_ops.write_delta(old, at, w, torch.tensor([0.7]), values, decay=1.0, cap=1e4)
    before, after = (values - torch.einsum("nk,nkv->nv", w, M[at]) for M in (old, new))
    torch.testing.assert_close(after, 0.3 * before)


@pytest.mark.parametrize("k", [1, 2, 3, 16])
@pytest.mark.parametrize("addresses", ["identical", "overlapping"])
def test_blocks_of_any_size_are_stable(k: int, addresses: str) -> None:
    """The error of a block that is written repeatedly only shrinks, however many tokens share an address."""
    n = 512
    at, w = random_slots(n, k, 20, seed=k), random_weights(n, k, seed=k)
    if addresses == "identical":
        at, w = at[:1].expand(n, k), w[:1].expand(n, k)
    beta, values = torch.full((n,), 0.95), torch.randn(n, 4, generator=noise(5)) + 1.0
    M, losses = torch.zeros(20, 4), []
    for _ in range(8):
        losses.append(float(loss(M, at, w, beta, values)))
        M = torch_ops.write_delta(M, at, w, beta, values, decay=1.0, cap=1e4)
    losses.append(float(loss(M, at, w, beta, values)))
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(losses))
    assert losses[-1] < losses[0]


def test_tokens_of_one_address_write_their_mean() -> None:
    values = torch.randn(512, 4, generator=noise(0))
    at, w = torch.tensor([[0, 1, 2]]).expand(512, 3), torch.full((512, 3), 3**-0.5)
    new = torch_ops.write_delta(torch.zeros(3, 4), at, w, torch.full((512,), 0.5), values, decay=1.0, cap=1e4)
    torch.testing.assert_close(w[0] @ new, 0.5 * values.mean(0), atol=1e-5, rtol=1e-4)
