"""The mixer: a small network that weighs readers by how well each did of late. It is the slow weights of a learner.

For reader e of E with probabilities p_e [L], losses of late ℓ_e at three horizons, and globals g (numbers of examples,
labels, columns, …):

    f_e = [ℓ_e − min ℓ, ℓ_e, posterior, entropy, largest probability, agreement, g]     inputs [F]
    h_e = relu(W f_e + b + embedding_e)                                                 one network for all readers
    (a_e, b_e, c_e) = A h_e + S f_e,   a_e ← softplus(a_e),   c = mean_e c_e
    p = σ(c) · norm(Π_e p_e^{a_e}) + (1 − σ(c)) · Σ_e softmax(b)_e p_e

The product is sharper than its readers where they agree for different reasons; the sum is safe where they disagree. The
posterior is the logarithm of a reader's share in a Bayesian mixture that forgets, at each horizon. No step depends on
the order of labels. Only readers have embeddings. `Mixer.forward` is the reference of `mix`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.numba_support import Array, as_arrays, cached_njit
from model.tabular.config import HORIZONS

GLOBALS = 7
INPUTS = 3 * len(HORIZONS) + 3 + GLOBALS
HIDDEN = 32
LEAST_PROB = np.float32(1e-4)
NOVELTY_INPUTS = 4
LEAST_POSTERIOR, POSTERIOR_SCALE = -20.0, 5.0  # logarithms; the scale divides them


class Mixer(nn.Module):
    """The slow weights of a learner with E readers."""

    def __init__(self, readers: int) -> None:
        super().__init__()
        self.inner = nn.Linear(INPUTS, HIDDEN)
        self.embedding = nn.Parameter(torch.zeros(readers, HIDDEN))
        self.outer = nn.Linear(HIDDEN, 3)
        self.skip = nn.Linear(INPUTS, 3, bias=False)
        self.novelty = nn.Linear(NOVELTY_INPUTS, 1)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight, size in ((self.embedding, 0.1), (self.inner.weight, 0.2), (self.outer.weight, 0.05)):
                weight.copy_(torch.randn(weight.shape, generator=generator) * size)
            self.inner.bias.zero_()
            self.skip.weight.zero_()
            self.skip.weight[1, 2 * len(HORIZONS) + 1] = POSTERIOR_SCALE  # a Bayesian mixture to begin with
            self.outer.bias.copy_(torch.tensor([-2.0, 0.0, 0.0]))
            self.novelty.weight.zero_()
            self.novelty.bias.fill_(-2.0)

    def forward(self, probs: Tensor, inputs: Tensor, present: Tensor) -> Tensor:
        """Return log p [n, L] of readers' probs [n, E, L] with inputs [n, E, F]; present [n, L] masks the labels."""
        power, share, gate = self._raw(inputs).unbind(-1)
        logs = probs.clamp_min(float(LEAST_PROB)).log()
        scores = torch.einsum("ne,nel->nl", F.softplus(power), logs)
        product = scores.masked_fill(~present, -math.inf).log_softmax(-1)
        mean = torch.einsum("ne,nel->nl", share.softmax(-1), probs)
        gate = gate.mean(-1, keepdim=True)
        return torch.logaddexp(product + F.logsigmoid(gate), mean.clamp_min(1e-9).log() + F.logsigmoid(-gate))

    def mean(self, means: Tensor, inputs: Tensor) -> Tensor:
        """Return the mixture's mean [n] of readers' means [n, E] with inputs [n, E, F]."""
        mean: Tensor = (self._raw(inputs)[..., 1].softmax(-1) * means).sum(-1)
        return mean

    def _raw(self, inputs: Tensor) -> Tensor:
        raw: Tensor = self.outer(torch.relu(self.inner(inputs) + self.embedding)) + self.skip(inputs)
        return raw


class MixerWeights(NamedTuple):
    """The weights of a mixer as arrays; matrices are [in, out]."""

    inner: Array  # [F, H]
    inner_bias: Array  # [E, H], the embeddings included
    outer: Array  # [H, 3]
    outer_bias: Array
    skip: Array  # [F, 3]
    novelty: Array  # [NOVELTY_INPUTS, 1]
    novelty_bias: Array

    @classmethod
    def of(cls, mixer: Mixer) -> MixerWeights:
        """Read a mixer's weights, which must not change afterwards."""
        bias = mixer.inner.bias + mixer.embedding
        parts = [mixer.inner.weight.T, bias, mixer.outer.weight.T, mixer.outer.bias, mixer.skip.weight.T]
        return cls(*as_arrays(*parts, mixer.novelty.weight.T, mixer.novelty.bias))


@cached_njit
def log_posterior(losses: Array, out: Array) -> None:
    """Fill the scaled logarithms of the shares [E] of a Bayesian mixture with losses [E]."""
    least, total = losses.min(), np.float32(0)
    for e in range(len(losses)):
        total += math.exp(least - losses[e])
    for e in range(len(losses)):
        log_share = max(least - losses[e] - math.log(total), LEAST_POSTERIOR)
        out[e] = log_share / POSTERIOR_SCALE


@cached_njit
def _raw(inner: Array, inner_bias: Array, outer: Array, outer_bias: Array, skip: Array, inputs: Array) -> Array:
    """Return [a, b, c] before any activation [E, 3] for inputs [E, F]."""
    E, H = len(inputs), inner.shape[1]
    raw, hidden = np.empty((E, 3), np.float32), np.empty(H, np.float32)
    for e in range(E):
        for i in range(H):
            hidden[i] = inner_bias[e, i]
        for o in range(3):
            raw[e, o] = outer_bias[o]
        for f in range(inputs.shape[1]):
            for i in range(H):
                hidden[i] += inputs[e, f] * inner[f, i]
            for o in range(3):
                raw[e, o] += inputs[e, f] * skip[f, o]
        for i in range(H):
            for o in range(3):
                raw[e, o] += max(hidden[i], np.float32(0)) * outer[i, o]
    return raw


@cached_njit
def mixer_inputs(probs: Array, losses: Array, weights: Array, globals_: Array) -> Array:
    """Return the inputs [E, F]; losses [E, H] are discounted sums, weights [H] the sums of the discounts."""
    E, L = probs.shape
    H = losses.shape[1]
    inputs = np.empty((E, INPUTS), np.float32)
    mean = np.zeros(L, np.float32)
    for e in range(E):
        for j in range(L):
            mean[j] += probs[e, j]
    likeliest = mean.argmax()
    for h in range(H):
        least = np.float32(1e9)
        for e in range(E):
            least = min(least, losses[e, h])
        for e in range(E):
            inputs[e, h] = math.log1p((losses[e, h] - least) / (weights[h] + np.float32(1)))
            inputs[e, H + h] = losses[e, h] / (weights[h] + np.float32(1))
        log_posterior(losses[:, h], inputs[:, 2 * H + h])
    for e in range(E):
        entropy, top = np.float32(0), np.float32(0)
        for j in range(L):
            p = max(probs[e, j], LEAST_PROB)
            entropy -= p * math.log(p)
            top = max(top, p)
        inputs[e, 3 * H], inputs[e, 3 * H + 1], inputs[e, 3 * H + 2] = entropy, top, probs[e, likeliest]
        for g in range(GLOBALS):
            inputs[e, 3 * H + 3 + g] = globals_[g]
    return inputs


@cached_njit
def mix(
    inner: Array,
    inner_bias: Array,
    outer: Array,
    outer_bias: Array,
    skip: Array,
    probs: Array,
    inputs: Array,
    out: Array,
) -> None:
    """Fill out [L] with the mixture's probabilities; probs [E, L], inputs [E, F]."""
    E, L = probs.shape
    raw = _raw(inner, inner_bias, outer, outer_bias, skip, inputs)
    gate = raw[:, 2].mean()
    top = raw[0, 1]
    for e in range(E):
        top = max(top, raw[e, 1])
    total = np.float32(0)
    for e in range(E):
        raw[e, 1] = math.exp(raw[e, 1] - top)
        total += raw[e, 1]
        raw[e, 0] = math.log1p(math.exp(min(raw[e, 0], np.float32(20))))
    product = np.zeros(L, np.float32)
    for e in range(E):
        for j in range(L):
            product[j] += raw[e, 0] * math.log(max(probs[e, j], LEAST_PROB))
    best, whole = product.max(), np.float32(0)
    for j in range(L):
        product[j] = math.exp(product[j] - best)
        whole += product[j]
    g = 1 / (1 + math.exp(-gate))
    for j in range(L):
        mean = np.float32(0)
        for e in range(E):
            mean += raw[e, 1] / total * probs[e, j]
        out[j] = g * product[j] / whole + (1 - g) * mean
    out /= out.sum()


@cached_njit
def novelty(weights: Array, bias: Array, inputs: Array) -> float:
    """Return the probability that the next label is a new one."""
    total = bias[0]
    for i in range(len(inputs)):
        total += inputs[i] * weights[i, 0]
    return 1 / (1 + math.exp(-total))


@cached_njit
def mixer_shares(inner: Array, inner_bias: Array, outer: Array, outer_bias: Array, skip: Array, inputs: Array) -> Array:
    """Return the shares [E] of the readers in a mean: softmax(b); inputs [E, F]."""
    raw = _raw(inner, inner_bias, outer, outer_bias, skip, inputs)
    shares, top = np.empty(len(raw), np.float32), raw[:, 1].max()
    for e in range(len(raw)):
        shares[e] = math.exp(raw[e, 1] - top)
    shares /= shares.sum()
    return shares
