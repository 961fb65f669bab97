"""Agents that are trained to act: a policy with its memory, and meta-learned baselines with other kinds of memory.

An agent plays B tasks at once through an ask-and-tell interface. Gradients pass through the agent's memory until
`detach`. Baselines see the last action, its features and its reward with each observation, as in RL²
(arXiv 1611.02779).

Shapes: B tasks, A actions, W units of a layer, D state size, k slots of an address, d_v width of a row, P stored rows,
T steps so far, H heads.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.policies.network import Policy, update_guard
from research.scenarios.core import Tasks


class Agent(ABC):
    """A player of B tasks. network: the module that is trained."""

    network: nn.Module

    @abstractmethod
    def reset(self, batch: int) -> None:
        """Forget everything and begin `batch` (B) new tasks."""

    @abstractmethod
    def ask(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [B, A] of the actions and their expected rewards [B, A], scaled to 0…1.

        observation [B, context + A·features].
        """

    @abstractmethod
    def tell(self, action: Tensor, reward: Tensor) -> None:
        """Learn from the rewards [B] of the actions [B] long that were taken."""

    @abstractmethod
    def detach(self) -> None:
        """Stop gradients at the current state of the memory."""


class RowStore:
    """The memory rows of B tasks in training, `rows` [B, P, d_v], which gradients pass through.

    Each slot that any task addresses gets one of the P rows in every task.
    """

    def __init__(self, batch: int, slots: int, width: int) -> None:
        self.rows = torch.zeros(batch, 0, width)
        self._row_ids = torch.full((slots,), -1)

    def row_ids(self, slots: Tensor) -> Tensor:
        """Return the row index of each slot, any shape; slots that are new get a row of zeros."""
        new = torch.unique(slots[self._row_ids[slots] < 0])
        if len(new):
            batch, num_rows, width = self.rows.shape
            self._row_ids[new] = num_rows + torch.arange(len(new))
            self.rows = torch.cat([self.rows, self.rows.new_zeros(batch, len(new), width)], dim=1)
        return self._row_ids[slots]

    def read(self, row_ids: Tensor) -> Tensor:
        """Return rows [B, m, d_v] at indices [B, m]."""
        return self.rows.gather(1, row_ids[:, :, None].expand(-1, -1, self.rows.shape[2]))

    def write(self, row_ids: Tensor, rows: Tensor) -> None:
        """Replace the rows at indices [B, k] by rows [B, k, d_v]."""
        self.rows = self.rows.scatter(1, row_ids[:, :, None].expand_as(rows), rows)


class MemoryAgent(Agent):
    """A policy with its memory in a `RowStore`.

    read_only: whether rewards write nothing. guarded: whether the guard applies, as in serving; training has no guard.
    """

    def __init__(self, policy: Policy, *, read_only: bool = False, guarded: bool = False) -> None:
        self.network = self.policy = policy
        self._read_only, self._guarded = read_only, guarded

    def reset(self, batch: int) -> None:
        site = self.policy.site.config
        self.row_store = RowStore(batch, site.slots, site.width)
        self.balance, self.closed = torch.zeros(batch), torch.zeros(batch)
        self._last = torch.full((batch,), -1)
        self._reward = torch.full((batch,), math.nan)

    def ask(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        policy, A = self.policy, self.policy.config.actions
        B = len(observation)
        state = policy.state(policy.inputs(observation, self._last, self._reward).flatten(0, 1))
        # With k = 1 the weight is 1 whatever the address, so the address has no gradient.
        with torch.set_grad_enabled(torch.is_grad_enabled() and policy.site.config.k > 1):
            self._slots, self._w = policy.site.address(state)
        row_ids = self.row_store.row_ids(self._slots).view(B, -1)
        self._rows = self.row_store.read(row_ids).view(B * A, *self._slots.shape[1:], -1)
        self._state, self._recalled = state, policy.recall(state, self._rows, self._w)
        logits, self._expected = policy.logit_and_value(self._recalled)
        if not self._guarded:
            return logits.view(B, A), self._expected.view(B, A)
        closed = self.closed.repeat_interleave(A)[:, None] != 0
        logits, expected = policy.logit_and_value(torch.where(closed, state, self._recalled))
        return logits.view(B, A), expected.view(B, A)

    def tell(self, action: Tensor, reward: Tensor) -> None:
        policy = self.policy
        taken = torch.arange(len(action)) * policy.config.actions + action
        if not self._read_only:
            value, beta, loss = policy.reward_update(
                self._recalled[taken], policy.scaled(reward), self._expected[taken]
            )
            new = policy.write(self._rows[taken], self._w[taken], beta, value)
            self.row_store.write(self.row_store.row_ids(self._slots[taken]), new)
            if self._guarded:
                alone = self._state[taken]
                frozen = policy.reward_update(alone, policy.scaled(reward), policy.logit_and_value(alone)[1])[2]
                self.balance, self.closed = update_guard(self.balance, self.closed, frozen - loss)
        self._last, self._reward = action, reward

    def detach(self) -> None:
        self.row_store.rows = self.row_store.rows.detach()


class _BaselineNetwork(nn.Module):
    """The first and last layer of a baseline.

    The input is the observation, then the history: the last action, its features, its reward, and whether it exists.
    """

    def __init__(self, tasks: Tasks, width: int) -> None:
        super().__init__()
        self.context, self.features, self.actions = tasks.context, tasks.features, tasks.actions
        self.enter = nn.Linear(tasks.context + tasks.actions * tasks.features + self.history_size, width)
        self.leave = nn.Linear(width, 2 * tasks.actions)

    @property
    def history_size(self) -> int:
        """Return the number of inputs about the last action."""
        return self.actions + self.features + 2

    def action_outputs(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits and the expected rewards [B, A] for the last hidden layer [B, W]."""
        logits, expected = self.leave(hidden).chunk(2, dim=-1)
        return logits, torch.sigmoid(expected)


class MetaBaseline(Agent):
    """The common part of meta-learned baselines: encodes the observation with the history."""

    network: _BaselineNetwork

    def reset(self, batch: int) -> None:
        self._history = torch.zeros(batch, self.network.history_size)

    def tell(self, action: Tensor, reward: Tensor) -> None:
        net, task = self.network, torch.arange(len(action))
        features = self._observed[:, net.context :].view(len(action), net.actions, net.features)[task, action]
        reward_inputs = torch.stack([reward, torch.ones_like(reward)], dim=1)
        self._history = torch.cat([F.one_hot(action, net.actions).float(), features, reward_inputs], dim=1)

    def _encode(self, observation: Tensor) -> Tensor:
        self._observed = observation
        return torch.relu(self.network.enter(torch.cat([observation, self._history], dim=1)))


class RecurrentAgent(MetaBaseline):
    """RL² (arXiv 1611.02779): a GRU or an LSTM whose state is the memory of the task."""

    def __init__(self, tasks: Tasks, width: int, *, cell: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.network = _BaselineNetwork(tasks, width)
        self.network.cell = nn.LSTMCell(width, width) if cell == "lstm" else nn.GRUCell(width, width)

    def reset(self, batch: int) -> None:
        super().reset(batch)
        width = self.network.enter.out_features
        self._state = [torch.zeros(batch, width) for _ in range(1 + isinstance(self.network.cell, nn.LSTMCell))]

    def ask(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        encoded = self._encode(observation)
        if isinstance(self.network.cell, nn.LSTMCell):
            self._state = list(self.network.get_submodule("cell")(encoded, tuple(self._state)))
        else:
            self._state = [self.network.get_submodule("cell")(encoded, self._state[0])]
        return self.network.action_outputs(self._state[0])

    def detach(self) -> None:
        self._state = [part.detach() for part in self._state]


class _TransformerLayer(nn.Module):
    """A transformer layer that reads one step at a time and attends to all steps so far.

    Positions enter as a learned linear bias for each head (ALiBi, arXiv 2108.12409, with learned slopes).
    """

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.ask, self.answer = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.slope = nn.Parameter(torch.logspace(-1, -8, heads, base=2).log())

    def forward(self, x: Tensor, kv_cache: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the output [B, W] of a step x [B, W] and the extended cache: keys and values [B, H, T, W / H]."""
        heads = len(self.slope)
        query, key, value = self.ask(self.before(x)).view(len(x), 3, heads, 1, -1).unbind(1)
        key, value = torch.cat([kv_cache[0], key], dim=2), torch.cat([kv_cache[1], value], dim=2)
        distance = torch.arange(key.shape[2] - 1, -1, -1)
        attention_bias = (-self.slope.exp()[:, None, None] * distance).expand(len(x), -1, -1, -1)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_bias)
        x = x + self.answer(attended.flatten(1))
        return x + self.narrow(torch.relu(self.widen(self.between(x)))), (key, value)


class ContextAgent(MetaBaseline):
    """A transformer of two layers with the whole task in context."""

    def __init__(self, tasks: Tasks, width: int, *, seed: int) -> None:
        torch.manual_seed(seed)
        self.network = _BaselineNetwork(tasks, width)
        self.network.layers = nn.ModuleList([_TransformerLayer(width), _TransformerLayer(width)])

    @property
    def _layers(self) -> list[_TransformerLayer]:
        return [
            layer for layer in self.network.get_submodule("layers").children() if isinstance(layer, _TransformerLayer)
        ]

    def reset(self, batch: int) -> None:
        super().reset(batch)
        heads = len(self._layers[0].slope)
        nothing = torch.zeros(batch, heads, 0, self.network.enter.out_features // heads)
        self._kv_cache = [(nothing, nothing) for _ in self._layers]

    def ask(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self._encode(observation)
        for number, layer in enumerate(self._layers):
            hidden, self._kv_cache[number] = layer(hidden, self._kv_cache[number])
        return self.network.action_outputs(hidden)

    def detach(self) -> None:
        self._kv_cache = [(keys.detach(), values.detach()) for keys, values in self._kv_cache]


class DenseAgent(MetaBaseline):
    """A dense delta memory: M ← M + β (v − M k) kᵀ in each step, read as M q (delta rule, arXiv 2102.11174).

    M [B, W, W]; k and q are unit vectors.
    """

    def __init__(self, tasks: Tasks, width: int, *, seed: int) -> None:
        torch.manual_seed(seed)
        self.network = _BaselineNetwork(tasks, width)
        self.network.project = nn.Linear(width, 3 * width + 1)
        self.network.mix = nn.Linear(2 * width, width)

    def reset(self, batch: int) -> None:
        super().reset(batch)
        width = self.network.enter.out_features
        self._matrix = torch.zeros(batch, width, width)

    def ask(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        encoded, width = self._encode(observation), self.network.enter.out_features
        query, key, value, beta = self.network.get_submodule("project")(encoded).split([width, width, width, 1], dim=1)
        query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
        retrieved = torch.einsum("bvk,bk->bv", self._matrix, key)
        change = torch.sigmoid(beta) * (torch.tanh(value) - retrieved)
        self._matrix = self._matrix + change[:, :, None] * key[:, None, :]
        read = torch.einsum("bvk,bk->bv", self._matrix, query)
        return self.network.action_outputs(
            torch.relu(self.network.get_submodule("mix")(torch.cat([encoded, read], dim=1)))
        )

    def detach(self) -> None:
        self._matrix = self._matrix.detach()
