"""The steps of a policy that acts, compiled by Numba for CPUs: one pass instead of hundreds of small torch operators.

The reference of each function is the method of `model.policies.network.Policy` with the same name. Both compute the
same equations; sums run in another order, so results differ by the rounding of fp32. For an action with inputs x [F]:

    h = [x_address ; relu(W_trunk x + b)]                     state [D]
    s = norm(W_a h + b_a), slots = top-k of s1_i + s2_j       product keys (Lample et al. 2019, arXiv 1907.05242)
    w = softmax(temperature · s) / ‖·‖₂, o = Σ_i w_i M_i      weights [k], readout [d_v]
    h' = h + σ(g_0 + u·h) · W_out norm(o) (+ h ⊙ W_product norm(o)) (+ log(1 + rms(o)) · size)
    (logit, σ⁻¹(expected)) = W_head relu(W_join h' + b) + b

and for the action's reward r, scaled to 0…1, with e = [1, r, (r − expected)₊, (expected − r)₊], the delta rule:

    v = W_v tanh(W_event [h' ; e] + b) + W_e e,   β = σ(b_0 + b_1 · min(loss, 8)),   loss = BCE(expected, r)
    M_i ← M_i + β / max(1, ‖w‖²) · w_i (v − decay · o), then ‖M_i‖ ≤ cap

Shapes: n sessions, A actions, F inputs of an action, D state size, W units of a hidden layer, k slots of an address,
d_v width of a row.
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
from model.policies.config import NUM_HISTORY_INPUTS, NUM_OUTCOME_INPUTS, PolicyError
from model.policies.network import MAX_LOSS_NATS, Policy, RewardUpdate

MAX_LOSS, TINY, EPSILON = np.float32(MAX_LOSS_NATS), np.finfo(np.float32).tiny, np.float32(1e-12)
ONE, ZERO = np.float32(1.0), np.float32(0.0)


class Weights(NamedTuple):
    """The slow weights as arrays; matrices are [in, out], and a part that the policy does not have has no rows."""

    trunk: Array  # [F, W]
    trunk_bias: Array
    address: Array  # [D, 2·√slots]
    address_bias: Array
    temperature: Array  # [1]
    out: Array  # [d_v, D]
    gate: Array  # [1]
    gate_hidden: Array  # [D]
    product: Array  # [d_v, D] or [0, D]
    size: Array  # [D] or [0]
    join: Array  # [D, W]
    join_bias: Array
    head: Array  # [W, 2]
    head_bias: Array
    event: Array  # [D + NUM_OUTCOME_INPUTS, D]
    event_bias: Array
    value: Array  # [D, d_v]
    outcome: Array  # [NUM_OUTCOME_INPUTS, d_v]
    write_gate: Array  # [2]


class NumbaPolicy:
    """A policy that acts, served on a CPU by compiled steps. The reference is the `Policy` that it wraps.

    `NumbaPolicy` satisfies `model.policies.backend.PolicyBackend`, whose docstrings are the contract of the steps. The
    slow weights are read once and must not change afterwards.
    """

    def __init__(self, policy: Policy) -> None:
        """Raises PolicyError for a policy that labels, for which no step is compiled."""
        if policy.config.task != "act":
            raise PolicyError(f"task must be 'act' for compiled steps, got {policy.config.task!r}")
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
        """Run every step once on the empty session, so that the kernels are compiled; see `PolicyBackend.prepare`."""
        last, reward, session = torch.tensor([-1]), torch.tensor([self.config.lowest]), torch.tensor([EMPTY_SESSION])
        inputs = self.inputs(torch.zeros(1, self.config.observation_size), last, reward)
        self.decide(inputs, pool, session)
        self.reward(inputs[:, 0], reward, pool, session)

    def inputs(self, observation: Tensor, last: Tensor, reward: Tensor) -> Tensor:
        """Return the inputs [n, A, F] of all actions, equal to those of `Policy.inputs` bit for bit."""
        c, n, action = self.config, len(observation), np.arange(self.config.actions)
        inputs, identity_start = np.zeros((n, c.actions, c.input_size), np.float32), c.context + c.features
        observations, last_actions, scaled_reward = observation.numpy(), last.numpy(), self._scaled(reward).numpy()
        inputs[:, :, : c.context] = observations[:, None, : c.context]
        inputs[:, :, c.context : identity_start] = observations[:, c.context :].reshape(n, c.actions, c.features)
        if c.identity:
            inputs[:, action, identity_start + action] = 1.0
        for i in range(n):
            if last_actions[i] >= 0:
                known = not math.isnan(scaled_reward[i])
                inputs[i, last_actions[i], -NUM_HISTORY_INPUTS:] = 1.0, scaled_reward[i] if known else 0.0, known
        return torch.from_numpy(inputs)

    def decide(self, inputs: Tensor, pool: Pool, session: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [n, A] and the expected rewards [n, A], scaled to 0…1; see `PolicyBackend.decide`."""
        logits, expected = (torch.empty(inputs.shape[:2]) for _ in range(2))
        buffers = as_arrays(inputs, session, logits, expected)
        _decide(self._weights, self._address_inputs, *self._memory(pool), *buffers, self.site.config.k)
        return logits, expected

    def reward(self, inputs: Tensor, reward: Tensor, pool: Pool, session: Tensor) -> RewardUpdate:
        """Return the writes of rewards [n] of actions with inputs [n, F]; see `PolicyBackend.reward`."""
        n, config = len(inputs), self.site.config
        slots, rows = torch.empty(n, config.k, dtype=torch.long), torch.empty(n, config.k, config.width)
        loss, frozen_loss = torch.empty(n), torch.empty(n)
        buffers = as_arrays(inputs, self._scaled(reward), session, slots, rows, loss, frozen_loss)
        _reward(
            self._weights,
            self._address_inputs,
            *self._memory(pool),
            *buffers,
            np.float32(config.decay),
            np.float32(config.cap),
        )
        return RewardUpdate(slots, rows, loss, frozen_loss)

    def guard_step(self, draft: Draft, gain: float) -> bool:
        """Count a reward's gain (nats) in the session's guard, equal to `Policy.guard_step` bit for bit."""
        session_scalars = draft.pool.sites[self.site.config.name].session_scalars[draft.index].numpy()
        balance, closed = session_scalars[BALANCE, 0], session_scalars[GATE_CLOSED, 0]
        decayed = balance * np.float32(1.0 - 1.0 / GUARD_DECAY_TOKENS)
        balance = min(
            decayed + np.float32(min(max(gain, -GUARD_LIMIT_NATS), GUARD_LIMIT_NATS)), np.float32(GUARD_LIMIT_NATS)
        )
        session_scalars[BALANCE, 0] = balance
        session_scalars[GATE_CLOSED, 0] = 1.0 if balance < -GUARD_LIMIT_NATS else closed * (balance <= 0)
        return not closed

    def _scaled(self, reward: Tensor) -> Tensor:
        return (reward - self.config.lowest) / (self.config.highest - self.config.lowest)

    def _memory(self, pool: Pool) -> list[Array]:
        site: SitePool = pool.sites[self.site.config.name]
        return as_arrays(site.tables, site.fields[0], site.session_scalars)


@cached_njit
def _affine(x: Array, matrix: Array, bias: Array) -> Array:
    """Return x @ matrix + bias [out]; x [in], matrix [in, out], bias [out]."""
    y = bias.copy()
    for i in range(len(x)):
        if x[i] != 0:  # half of all outputs of a relu are 0
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
    """Return the state h [D] of inputs x [F]; address_inputs: indices of the inputs that are copied into the state."""
    return _concat(inputs[address_inputs], _relu(_affine(inputs, weights.trunk, weights.trunk_bias)))


@cached_njit
def _top_k(scores: Array, k: int) -> Array:
    """Return the indices [k] of the highest scores, the highest first."""
    remaining, best = scores.copy(), np.empty(k, np.int64)
    for i in range(k):
        best[i] = remaining.argmax()
        remaining[best[i]] = -np.inf
    return best


@cached_njit
def _address(weights: Weights, state: Array, slots: Array, w: Array) -> None:
    """Fill slots [k] and their weights w [k] by product-key top-k of a state [D]."""
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
    """Copy the rows [k, d_v] of slots [k] out of the pool; table [slots]: the session's row index of each slot."""
    for i in range(len(slots)):
        for j in range(rows.shape[1]):
            rows[i, j] = field[table[slots[i]], j]


@cached_njit
def _weighted_sum(rows: Array, w: Array) -> Array:
    """Return the readout o = Σ_i w_i M_i [d_v] of rows [k, d_v]."""
    output = np.zeros(rows.shape[1], np.float32)
    for i in range(len(w)):
        for j in range(len(output)):
            output[j] += w[i] * rows[i, j]
    return output


@cached_njit
def _recall(weights: Weights, state: Array, output: Array) -> Array:
    """Return the recalled state h' [D] of a state [D] and a readout o [d_v]; o = 0 changes no bit."""
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
    """Return [logit, expected reward scaled to 0…1] of a recalled state [D]."""
    output = _affine(_relu(_affine(recalled, weights.join, weights.join_bias)), weights.head, weights.head_bias)
    output[1] = _sigmoid(output[1])
    return output


@cached_njit
def _loss(reward: np.float32, expected: np.float32) -> np.float32:
    """Return the binary cross-entropy (nats) of a reward and its expectation, both in 0…1."""
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
    """Fill out_logits and out_expected [n, A] for inputs [n, A, F] of sessions [n]."""
    n, A, _ = inputs.shape
    slots, w = np.empty(k, np.int64), np.empty(k, np.float32)
    rows = np.empty((k, field.shape[1]), np.float32)
    for i in range(n):
        closed = session_scalars[session[i], GATE_CLOSED, 0] != 0
        for a in range(A):
            state = _state(weights, address_inputs, inputs[i, a])
            if not closed:
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
    """Fill out_slots [n, k], out_rows [n, k, d_v], out_loss and out_frozen [n] for rewards [n] of inputs [n, F]."""
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
        collisions = max(_sum_squares(w), ONE)
        for j in range(k):
            rows[j] += beta / collisions * w[j] * error
            rows[j] *= cap / max(np.sqrt(_sum_squares(rows[j])), cap)
