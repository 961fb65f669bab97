"""A policy's steps on CPUs, compiled by Numba: some dozens of tiny operators become one pass over small arrays.

Letters as in `policy`: n sessions, A actions, F numbers of an action's input, D those of its state; k slots, d_v numbers
of a row.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from model.memory import Pool
from model.memory.pool import SHUT, SitePool
from model.native import Array, compiled
from model.policy import OUTCOME, Policy

HIGHEST_LOSS, TINY, FAINT = np.float32(8.0), np.finfo(np.float32).tiny, np.float32(1e-12)
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


class SwiftPolicy:
    """A policy that acts, as it is served on a CPU. Its twin is the `Policy` itself: what both compute differs by the
    rounding of fp32, since sums are taken in another order. Slow weights must not change any more."""

    def __init__(self, policy: Policy) -> None:
        config, site = policy.config, policy.site

        def matrix(layer: nn.Linear) -> tuple[Array, Array]:
            return _array(layer.weight.T), _array(layer.bias)

        size = policy.size if site.config.decay != 1.0 else policy.size[:0]
        self._weights = Weights(
            *matrix(policy.trunk),
            *map(_array, (site.address_weight, site.address_bias, site.temperature[None])),
            *map(_array, (site.out, site.gate, site.gate_hidden)),
            np.zeros((0, config.state), np.float32) if policy.product is None else _array(policy.product),
            _array(size),
            *matrix(policy.join),
            *matrix(policy.head),
            *matrix(policy.event),
            *map(_array, (site.value_hidden, site.value_error[:OUTCOME], site.write_gate)),
        )
        self._policy = policy
        start = config.context + config.features
        places = [*range(config.cue)] + config.by_features * [*range(config.context, start)]
        places += config.by_action * [*range(start, start + config.actions)]
        self._places = np.array(places, np.int64)

    def inputs(self, observation: Tensor, last: Tensor, reward: Tensor) -> Tensor:
        """Twin: `Policy.inputs`, of which it is equal to the last bit."""
        c, n = self._policy.config, len(observation)
        inputs = torch.zeros(n, c.actions, c.input)
        sizes = (c.context, c.features, c.identity)
        _inputs(*_arrays(observation, last, self._policy.scaled(reward).float(), inputs), sizes)
        return inputs

    def decide(self, inputs: Tensor, pool: Pool, session: Tensor) -> tuple[Tensor, Tensor]:
        """Twin: `Policy.decide`."""
        logits, expected = (torch.empty(inputs.shape[:2]) for _ in range(2))
        asked = _arrays(inputs, session, logits, expected)
        _decide(self._weights, self._places, *self._memory(pool), *asked, self._policy.site.config.k)
        return logits, expected

    def reward(
        self, inputs: Tensor, reward: Tensor, pool: Pool, session: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Twin: `Policy.reward`."""
        n, config = len(inputs), self._policy.site.config
        slots, rows = torch.empty(n, config.k, dtype=torch.long), torch.empty(n, config.k, config.width)
        loss, frozen = torch.empty(n), torch.empty(n)
        asked = _arrays(inputs, self._policy.scaled(reward), session, slots, rows, loss, frozen)
        _reward(self._weights, self._places, *self._memory(pool), *asked, np.float32(config.decay), np.float32(config.cap))
        return slots, rows, loss, frozen

    def _memory(self, pool: Pool) -> list[Array]:
        site: SitePool = pool.sites[self._policy.site.config.name]
        return _arrays(site.tables, site.fields[0], site.own)


def serving(policy: Policy, device: torch.device) -> Policy | SwiftPolicy:
    """What computes a policy's actions and their rewards on a device."""
    return SwiftPolicy(policy) if device.type == "cpu" and policy.config.task == "act" else policy


def _array(tensor: Tensor) -> Array:
    return np.ascontiguousarray(tensor.detach().numpy())


def _arrays(*tensors: Tensor) -> list[Array]:
    return [tensor.numpy() for tensor in tensors]


@compiled
def _inputs(observation: Array, last: Array, reward: Array, out: Array, sizes: tuple[int, int, bool]) -> None:
    context, features, identity = sizes
    n, A, F = out.shape
    for i in range(n):
        for a in range(A):
            own = context + a * features
            out[i, a, :context] = observation[i, :context]
            out[i, a, context : context + features] = observation[i, own : own + features]
            if identity:
                out[i, a, context + features + a] = 1
        if last[i] >= 0:
            out[i, last[i], F - 3] = 1
            if not math.isnan(reward[i]):
                out[i, last[i], F - 2] = reward[i]
                out[i, last[i], F - 1] = 1


@compiled
def _affine(x: Array, matrix: Array, bias: Array) -> Array:
    y = bias.copy()
    for i in range(len(x)):
        if x[i] != 0:  # as half of all rectified numbers are
            for j in range(len(y)):
                y[j] += x[i] * matrix[i, j]
    return y


@compiled
def _sigmoid(x: np.float32) -> np.float32:
    return ONE / (ONE + math.exp(-x))


@compiled
def _rectified(x: Array) -> Array:
    return np.maximum(x, ZERO)


@compiled
def _state(weights: Weights, places: Array, inputs: Array) -> Array:
    return np.concatenate((inputs[places], _rectified(_affine(inputs, weights.trunk, weights.trunk_bias))))


@compiled
def _best(scores: Array, k: int) -> Array:
    """Where the k highest are, the highest first."""
    left, best = scores.copy(), np.empty(k, np.int64)
    for i in range(k):
        best[i] = left.argmax()
        left[best[i]] = -np.inf
    return best


@compiled
def _address(weights: Weights, state: Array, slots: Array, w: Array) -> None:
    k = len(slots)
    s = _affine(state, weights.address, weights.address_bias)
    side = len(s) // 2
    square = ZERO
    for value in s:
        square += value * value
    s *= ONE / np.sqrt(square / np.float32(len(s)) + FAINT)
    first, second = _best(s[:side], min(k, side)), _best(s[side:], min(k, side))
    m = len(first)
    scores = np.empty(m * m, np.float32)
    for i in range(m):
        for j in range(m):
            scores[i * m + j] = s[first[i]] + s[side + second[j]]
    best = _best(scores, k)
    length = ZERO
    for i in range(k):
        slots[i] = first[best[i] // m] * side + second[best[i] % m]
        w[i] = math.exp(weights.temperature[0] * (scores[best[i]] - scores[best[0]]))
        length += w[i] * w[i]
    w /= np.sqrt(length)


@compiled
def _sum(rows: Array, w: Array) -> Array:
    said = np.zeros(rows.shape[1], np.float32)
    for i in range(len(w)):
        for j in range(len(said)):
            said[j] += w[i] * rows[i, j]
    return said


@compiled
def _recall(weights: Weights, state: Array, said: Array) -> Array:
    """The state with what the rows said."""
    square = ZERO
    for value in said:
        square += value * value
    square /= np.float32(len(said))
    if square == 0:
        return state
    said = said / np.sqrt(max(square, FAINT))
    gate = ZERO
    for i in range(len(state)):
        gate += state[i] * weights.gate_hidden[i]
    gate = _sigmoid(gate + weights.gate[0])
    nothing = np.zeros_like(state)
    recalled = state + gate * _affine(said, weights.out, nothing)
    if len(weights.product):
        recalled += state * _affine(said, weights.product, nothing)
    if len(weights.size):
        recalled += np.float32(math.log1p(np.sqrt(square))) * weights.size
    return recalled


@compiled
def _judge(weights: Weights, recalled: Array) -> Array:
    """How good it is to act so, and the reward that is expected."""
    said = _affine(_rectified(_affine(recalled, weights.join, weights.join_bias)), weights.head, weights.head_bias)
    said[1] = _sigmoid(said[1])
    return said


@compiled
def _loss(reward: np.float32, expected: np.float32) -> np.float32:
    return -(reward * math.log(max(expected, TINY)) + (ONE - reward) * math.log(max(ONE - expected, TINY)))


@compiled
def _decide(
    weights: Weights,
    places: Array,
    tables: Array,
    field: Array,
    own: Array,
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
        shut = own[session[i], SHUT, 0] != 0
        for a in range(A):
            state = _state(weights, places, inputs[i, a])
            if not shut:
                _address(weights, state, slots, w)
                for j in range(k):
                    rows[j] = field[tables[session[i], slots[j]]]
                state = _recall(weights, state, _sum(rows, w))
            out_logits[i, a], out_expected[i, a] = _judge(weights, state)


@compiled
def _reward(
    weights: Weights,
    places: Array,
    tables: Array,
    field: Array,
    own: Array,
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
        slots, rows, told = out_slots[i], out_rows[i], reward[i]
        state = _state(weights, places, inputs[i])
        _address(weights, state, slots, w)
        for j in range(k):
            rows[j] = field[tables[session[i], slots[j]]]
        said = _sum(rows, w)
        recalled = _recall(weights, state, said)
        expected = _judge(weights, recalled)[1]
        out_loss[i], out_frozen[i] = _loss(told, expected), _loss(told, _judge(weights, state)[1])
        outcome[0], outcome[1] = ONE, told
        outcome[2], outcome[3] = max(told - expected, ZERO), max(expected - told, ZERO)
        following = np.tanh(_affine(np.concatenate((recalled, outcome)), weights.event, weights.event_bias))
        error = _affine(outcome, weights.outcome, _affine(following, weights.value, np.zeros_like(said))) - decay * said
        beta = _sigmoid(weights.write_gate[0] + weights.write_gate[1] * min(out_loss[i], HIGHEST_LOSS))
        crowd = ZERO
        for j in range(k):
            crowd += w[j] * w[j]
        for j in range(k):
            rows[j] += beta / max(crowd, ONE) * w[j] * error
            square = ZERO
            for value in rows[j]:
                square += value * value
            rows[j] *= cap / max(np.sqrt(square), cap)
