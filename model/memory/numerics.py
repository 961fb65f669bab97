"""Numeric helpers that every kind of memory uses. The equations of a kind are in its own package."""

from __future__ import annotations

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny


def rowwise_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight [n, b] for x [n, a] and weight [a, b], with each row rounded as if the row were alone.

    The result of a row then does not depend on the batch (law 4). If gradients must reach the weight, this is the plain
    product, whose backward pass does not need n copies of the weight.
    """
    if weight.requires_grad and torch.is_grad_enabled():
        return x @ weight
    return torch.bmm(x[:, None], weight.expand(len(x), -1, -1))[:, 0]
