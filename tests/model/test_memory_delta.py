"""Law 2 for hidden rows: reading and writing them equal their naive twins; and what the delta rule promises holds."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.memory.delta import reference as delta_reference
from model.memory.delta import torch_ops
from tests.model.test_memory_lexical import DTYPES, assert_close, noise


def random_weights(n: int, k: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(torch.rand(n, k, generator=noise(seed), dtype=dtype) + 0.05)


def random_places(n: int, k: int, rows: int, seed: int) -> Tensor:
    """at [n, k]: distinct within a token, as addresses are."""
    return torch.rand(n, rows, generator=noise(seed)).argsort(-1)[:, :k]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "width"), [(1, 1, 1), (7, 3, 5), (65, 3, 4), (65, 1, 5)])
def test_hidden_read_equals_its_twin_and_has_unit_size(n: int, k: int, width: int, dtype: torch.dtype) -> None:
    rows = torch.randn(n, k, width, generator=noise(n), dtype=dtype)
    rows[::3] = 0.0
    w = random_weights(n, k, seed=n, dtype=dtype)
    o = torch_ops.read_delta(rows, w)
    assert_close(o, delta_reference.read_delta(rows, w))
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
    new = torch_ops.write_delta(old, at, w, beta, values, decay=decay, cap=cap)
    expected = delta_reference.write_delta(old, at, w, beta, values, decay=decay, cap=cap)
    assert_close(new, expected)
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
    """The error of a block that is written again and again only shrinks, however its addresses crowd."""
    n = 512
    at, w = random_places(n, k, 20, seed=k), random_weights(n, k, seed=k)
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
