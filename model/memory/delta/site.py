"""The delta site: slow weights that read rows of d_v numbers into the residual stream.

The equations D1–D3 are in model/memory/README.md; `delta/torch_ops.py` computes them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from model.memory.config import SiteConfig
from model.memory.delta import torch_ops
from model.memory.numerics import rowwise_matmul
from model.memory.pool import Draft, Pool
from model.memory.site import ResidualSite


class DeltaSite(ResidualSite):
    """Rows of d_v numbers, read into the residual stream: h ← h + g·W_o·norm(o), g = σ(g_0 + u·h).

    The address is s = Norm(W_a h + b_a); the write gate is β = σ(b_0 + b_1·surprise).
    """

    def __init__(self, config: SiteConfig, hidden_size: int) -> None:
        super().__init__(config)
        side = math.isqrt(config.slots)
        self.address_weight = nn.Parameter(torch.zeros(hidden_size, 2 * side))
        self.address_bias = nn.Parameter(torch.zeros(2 * side))
        self.temperature = nn.Parameter(torch.ones(()))
        self.write_gate = nn.Parameter(torch.zeros(2))
        self.value_hidden = nn.Parameter(torch.zeros(hidden_size, config.width))
        self.value_error = nn.Parameter(torch.zeros(hidden_size, config.width))
        self.out = nn.Parameter(torch.zeros(config.width, hidden_size))
        self.gate = nn.Parameter(torch.zeros(1))
        self.gate_hidden = nn.Parameter(torch.zeros(hidden_size))

    def address(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the slots [n, k] long and their weights w [n, k] for hidden states [n, d] (equation D1)."""
        s = rowwise_matmul(hidden.float(), self.address_weight) + self.address_bias
        s = s * torch.rsqrt(s.square().mean(-1, keepdim=True) + 1e-12)
        return torch_ops.address(s.unflatten(1, (2, -1)), self.config.k, self.temperature)

    def beta(self, surprise: Tensor) -> Tensor:
        """Return the write gate β [n], below 1, for a surprise [n] in nats."""
        return torch.sigmoid(self.write_gate[0] + self.write_gate[1] * surprise)

    def value(self, following: Tensor, error: Tensor) -> Tensor:
        """Return v_t = W_v [h_{t+1} ; ε_t] [n, d_v] for the following hidden states and the errors, both [n, d]."""
        return following.float() @ self.value_hidden + error @ self.value_error

    def read(self, pool: Pool, session: Tensor, hidden: Tensor) -> Tensor:
        slots, w = self.address(hidden)
        (rows,) = pool.sites[self.config.name].read(session, slots)
        return self.join(hidden, rows, w)

    def join(self, hidden: Tensor, rows: Tensor, w: Tensor) -> Tensor:
        """Return the residual stream [n, d] with rows [n, k, d_v] of weights w [n, k] added (equation D2)."""
        o = torch_ops.read_delta(rows, w)
        g = torch.sigmoid((hidden.float() * self.gate_hidden).sum(-1) + self.gate)
        changed = hidden + (g[:, None] * rowwise_matmul(o, self.out)).to(hidden.dtype)
        return torch.where(o.any(-1, keepdim=True), changed, hidden)

    def learn(self, draft: Draft, hidden: Tensor, following: Tensor, error: Tensor, adapted: Tensor) -> None:
        slots, w = self.address(hidden)
        touched, at = torch.unique(slots, return_inverse=True)
        (old,) = draft.get(self.config.name, touched)
        values, beta = self.value(following, error), self.beta(-adapted)
        new = torch_ops.write_delta(old, at, w, beta, values, decay=self.config.decay, cap=self.config.cap)
        draft.put(self.config.name, touched, [new])
