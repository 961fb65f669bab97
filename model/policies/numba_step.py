"""A policy's steps on CPUs, compiled by Numba: one pass instead of hundreds of tiny operators.

Letters as in `policy`: n sessions, A actions, F numbers of an action's input, D those of its state; k slots.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.adaptive_lm import EMPTY_SESSION
from model.memory import Draft, Pool
from model.memory.config import BALANCE, GATE_CLOSED
from model.memory.guard import GUARD_DECAY_TOKENS, GUARD_LIMIT_NATS
from model.memory.pool import SitePool
from model.numba_support import Array, as_arrays, cached_njit
from model.policies.network import NUM_HISTORY_INPUTS, NUM_OUTCOME_INPUTS, Policy

MAX_LOSS, TINY, EPSILON = np.float32(8.0), np.finfo(np.float32).tiny, np.float32(1e-12)
ONE, ZERO = np.float32(1.0), np.float32(0.0)


class Weights(NamedTuple):
    """A policy's slow weights; matrices are [in, out], where what is skipped has no rows."""

    trunk: Array
    trunk_bias: Array
    address: Array
    address_bias: Array
    temperature: Array
    out: Array
    gate: Array
    gate_hidden: Array
    product: Array
    size: Array
    join: Array
    join_bias: Array
    head: Array
    head_bias: Array
    event: Array
    event_bias: Array
    value: Array
    outcome: Array
    write_gate: Array


class NumbaPolicy:
    """A policy that acts, as it is served on a CPU. Its twin is the `Policy` itself: what both compute differs by the
    rounding of fp32, since sums are taken in another order. Slow weights must not change any more."""

    def __init__(self, policy: Policy) -> None:
        config, site = policy.config, policy.site

        product = site.out[:0] if policy.product is None else policy.product
        size = policy.size if site.config.decay != 1.0 else policy.size[:0]
        slow = [policy.trunk.weight.T, policy.trunk.bias]
        slow += [site.address_weight, site.address_bias, site.temperature[None], site.out, site.gate, site.gate_hidden]
        slow += [product, size]
        slow += [part for layer in (policy.join, policy.head, policy.event) for part in (layer.weight.T, layer.bias)]
        slow += [site.value_hidden, site.value_error[:NUM_OUTCOME_INPUTS], site.write_gate]
        self._weights = Weights(*as_arrays(*slow))
        self.config, self.site = config, site
        start = config.context + config.features
        address_inputs = [*range(config.cue)] + config.by_features * [*range(config.context, start)]
        address_inputs += config.by_action * [*range(start, start + config.actions)]
        self._address_inputs = np.array(address_inputs, np.int64)

    def prepare(self, pool: Pool) -> None:
        """Does everything once: kernels are compiled when they are called."""
        last, reward, session = torch.tensor([-1]), torch.tensor([self.config.lowest]), torch.tensor([EMPTY_SESSION])
        inputs = self.inputs(torch.zeros(1, self.config.observation), last, reward)
        self.decide(inputs, pool, session)
        self.reward(inputs[:, 0], reward, pool, session)

    def inputs(self, observation: Tensor, last: Tensor, reward: Tensor) -> Tensor:
        """Twin: `Policy.inputs`, of which it is equal to the last bit."""
        c, n, action = self.config, len(observation), np.arange(self.config.actions)
        inputs, action_start = np.zeros((n, c.actions, c.input_size), np.float32), c.context + c.features
        observations, last_actions, scaled_reward = observation.numpy(), last.numpy(), self._scaled(reward).numpy()
        inputs[:, :, : c.context] = observations[:, None, : c.context]
        inputs[:, :, c.context : action_start] = observations[:, c.context :].reshape(n, c.actions, c.features)
        if c.identity:
            inputs[:, action, action_start + action] = 1.0
        for i in range(n):
            if last_actions[i] >= 0:
                known = not math.isnan(scaled_reward[i])
                inputs[i, last_actions[i], -NUM_HISTORY_INPUTS:] = 1.0, scaled_reward[i] if known else 0.0, known
        return torch.from_numpy(inputs)

    def decide(self, inputs: Tensor, pool: Pool, session: Tensor) -> tuple[Tensor, Tensor]:
        """Twin: `Policy.decide`."""
        logits, expected = (torch.empty(inputs.shape[:2]) for _ in range(2))
        buffers = as_arrays(inputs, session, logits, expected)
        _decide(self._weights, self._address_inputs, *self._memory(pool), *buffers, self.site.config.k)
        return logits, expected

    def reward(
        self, inputs: Tensor, reward: Tensor, pool: Pool, session: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Twin: `Policy.reward`."""
        n, config = len(inputs), self.site.config
        slots, rows = torch.empty(n, config.k, dtype=torch.long), torch.empty(n, config.k, config.width)
        loss, frozen = torch.empty(n), torch.empty(n)
        buffers = as_arrays(inputs, self._scaled(reward), session, slots, rows, loss, frozen)
        _reward(
            self._weights,
            self._address_inputs,
            *self._memory(pool),
            *buffers,
            np.float32(config.decay),
            np.float32(config.cap),
        )
        return slots, rows, loss, frozen

    def guard_step(self, draft: Draft, gain: float) -> bool:
        """Twin: `Policy.guard_step`, of which it is equal to the last bit."""
        session_scalars = draft.pool.sites[self.site.config.name].session_scalars[draft.index].numpy()
        balance, shut = session_scalars[BALANCE, 0], session_scalars[GATE_CLOSED, 0]
        decayed = balance * np.float32(1.0 - 1.0 / GUARD_DECAY_TOKENS)
        balance = min(
            decayed + np.float32(min(max(gain, -GUARD_LIMIT_NATS), GUARD_LIMIT_NATS)), np.float32(GUARD_LIMIT_NATS)
        )
        session_scalars[BALANCE, 0] = balance
        session_scalars[GATE_CLOSED, 0] = 1.0 if balance < -GUARD_LIMIT_NATS else shut * (balance <= 0)
        return not shut

    def _scaled(self, reward: Tensor) -> Tensor:
        return (reward - self.config.lowest) / (self.config.highest - self.config.lowest)

    def _memory(self, pool: Pool) -> list[Array]:
        site: SitePool = pool.sites[self.site.config.name]
        return as_arrays(site.tables, site.fields[0], site.session_scalars)


def serving_policy(policy: Policy, device: torch.device) -> Policy | NumbaPolicy:
    """What computes a policy's actions and their rewards on a device."""
    return NumbaPolicy(policy) if device.type == "cpu" and policy.config.task == "act" else policy


@cached_njit
def _affine(x: Array, matrix: Array, bias: Array) -> Array:
    y = bias.copy()
    for i in range(len(x)):
        if x[i] != 0:  # as half of all rectified numbers are
            for j in range(len(y)):
                y[j] += x[i] * matrix[i, j]
    return y


@cached_njit
def _sum_squares(x: Array) -> np.float32:
    total = ZERO
    for value in x:
        total += value * value
    return total


@cached_njit
def _sigmoid(x: np.float32) -> np.float32:
    return ONE / (ONE + math.exp(-x))


@cached_njit
def _relu(x: Array) -> Array:
    for j in range(len(x)):
        x[j] = max(x[j], ZERO)
    return x


@cached_njit
def _concat(first: Array, second: Array) -> Array:
    both = np.empty(len(first) + len(second), np.float32)
    for i in range(len(first)):
        both[i] = first[i]
    for i in range(len(second)):
        both[len(first) + i] = second[i]
    return both


@cached_njit
def _state(weights: Weights, address_inputs: Array, inputs: Array) -> Array:
    return _concat(inputs[address_inputs], _relu(_affine(inputs, weights.trunk, weights.trunk_bias)))


@cached_njit
def _top_k(scores: Array, k: int) -> Array:
    """Where the k highest are, the highest first."""
    left, best = scores.copy(), np.empty(k, np.int64)
    for i in range(k):
        best[i] = left.argmax()
        left[best[i]] = -np.inf
    return best


@cached_njit
def _address(weights: Weights, state: Array, slots: Array, w: Array) -> None:
    k = len(slots)
    s = _affine(state, weights.address, weights.address_bias)
    side = len(s) // 2
    s *= ONE / np.sqrt(_sum_squares(s) / np.float32(len(s)) + EPSILON)
    first, second = _top_k(s[:side], min(k, side)), _top_k(s[side:], min(k, side))
    m = len(first)
    scores = np.empty(m * m, np.float32)
    for i in range(m):
        for j in range(m):
            scores[i * m + j] = s[first[i]] + s[side + second[j]]
    best = _top_k(scores, k)
    for i in range(k):
        slots[i] = first[best[i] // m] * side + second[best[i] % m]
        w[i] = math.exp(weights.temperature[0] * (scores[best[i]] - scores[best[0]]))
    w /= np.sqrt(_sum_squares(w))


@cached_njit
def _read(table: Array, field: Array, slots: Array, rows: Array) -> None:
    for i in range(len(slots)):
        for j in range(rows.shape[1]):
            rows[i, j] = field[table[slots[i]], j]


@cached_njit
def _weighted_sum(rows: Array, w: Array) -> Array:
    output = np.zeros(rows.shape[1], np.float32)
    for i in range(len(w)):
        for j in range(len(output)):
            output[j] += w[i] * rows[i, j]
    return output


@cached_njit
def _recall(weights: Weights, state: Array, output: Array) -> Array:
    """The state with what the rows said."""
    square = _sum_squares(output) / np.float32(len(output))
    if square == 0:
        return state
    output = output / np.sqrt(max(square, EPSILON))
    gate = ZERO
    for i in range(len(state)):
        gate += state[i] * weights.gate_hidden[i]
    gate = _sigmoid(gate + weights.gate[0])
    nothing = np.zeros_like(state)
    recalled = state + gate * _affine(output, weights.out, nothing)
    if len(weights.product):
        recalled += state * _affine(output, weights.product, nothing)
    if len(weights.size):
        recalled += np.float32(math.log1p(np.sqrt(square))) * weights.size
    return recalled


@cached_njit
def _logit_and_value(weights: Weights, recalled: Array) -> Array:
    """How good it is to act so, and the reward that is expected."""
    output = _affine(_relu(_affine(recalled, weights.join, weights.join_bias)), weights.head, weights.head_bias)
    output[1] = _sigmoid(output[1])
    return output


@cached_njit
def _loss(reward: np.float32, expected: np.float32) -> np.float32:
    return -(reward * math.log(max(expected, TINY)) + (ONE - reward) * math.log(max(ONE - expected, TINY)))


@cached_njit
def _decide(
    weights: Weights,
    address_inputs: Array,
    tables: Array,
    field: Array,
    session_scalars: Array,
    inputs: Array,
    session: Array,
    out_logits: Array,
    out_expected: Array,
    k: int,
) -> None:
    n, A, _ = inputs.shape
    slots, w = np.empty(k, np.int64), np.empty(k, np.float32)
    rows = np.empty((k, field.shape[1]), np.float32)
    for i in range(n):
        shut = session_scalars[session[i], GATE_CLOSED, 0] != 0
        for a in range(A):
            state = _state(weights, address_inputs, inputs[i, a])
            if not shut:
                _address(weights, state, slots, w)
                _read(tables[session[i]], field, slots, rows)
                state = _recall(weights, state, _weighted_sum(rows, w))
            output = _logit_and_value(weights, state)
            out_logits[i, a], out_expected[i, a] = output[0], output[1]


@cached_njit
def _reward(
    weights: Weights,
    address_inputs: Array,
    tables: Array,
    field: Array,
    session_scalars: Array,
    inputs: Array,
    reward: Array,
    session: Array,
    out_slots: Array,
    out_rows: Array,
    out_loss: Array,
    out_frozen: Array,
    decay: np.float32,
    cap: np.float32,
) -> None:
    k = out_slots.shape[1]
    w, outcome = np.empty(k, np.float32), np.empty(len(weights.outcome), np.float32)
    for i in range(len(inputs)):
        slots, rows, scaled_reward = out_slots[i], out_rows[i], reward[i]
        state = _state(weights, address_inputs, inputs[i])
        _address(weights, state, slots, w)
        _read(tables[session[i]], field, slots, rows)
        output = _weighted_sum(rows, w)
        recalled = _recall(weights, state, output)
        expected = _logit_and_value(weights, recalled)[1]
        out_loss[i], out_frozen[i] = (
            _loss(scaled_reward, expected),
            _loss(scaled_reward, _logit_and_value(weights, state)[1]),
        )
        outcome[0], outcome[1] = ONE, scaled_reward
        outcome[2], outcome[3] = max(scaled_reward - expected, ZERO), max(expected - scaled_reward, ZERO)
        following = np.tanh(_affine(_concat(recalled, outcome), weights.event, weights.event_bias))
        error = (
            _affine(outcome, weights.outcome, _affine(following, weights.value, np.zeros_like(output))) - decay * output
        )
        beta = _sigmoid(weights.write_gate[0] + weights.write_gate[1] * min(out_loss[i], MAX_LOSS))
        crowd = max(_sum_squares(w), ONE)
        for j in range(k):
            rows[j] += beta / crowd * w[j] * error
            rows[j] *= cap / max(np.sqrt(_sum_squares(rows[j])), cap)
