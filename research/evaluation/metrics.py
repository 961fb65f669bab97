"""Metrics of arms, computed from log-probabilities alone: pure functions of arrays.

Letters: n targets of a stream, S streams, R requests. A gain is frozen loss − adapted loss in nats per token. A ratio
is a perplexity ÷ a perplexity, exp(−gain). Means are taken over kinds of streams, and within a kind over streams.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from research.evaluation.tuning import shares

RESAMPLES = 2000
NOVELTY = ("in window", "seen before", "novel")


@dataclass(frozen=True)
class BootstrapEstimate:
    """A mean and its 95% interval, by bootstrap over streams (Efron 1979)."""

    value: float
    low: float
    high: float

    def exp(self, sign: float = 1.0) -> BootstrapEstimate:
        """Return exp(sign · estimate), with the ends of the interval in order."""
        low, high = sorted((math.exp(sign * self.low), math.exp(sign * self.high)))
        return BootstrapEstimate(math.exp(sign * self.value), low, high)


def gain(adapted: Tensor, frozen: Tensor, mask: Tensor | None = None) -> float:
    """Return the mean of log p_adapted − log p_frozen [n], in nats per token; NaN without targets.

    The mean is over the targets that the arm predicts and that `mask` [n] selects.
    """
    scored = adapted.isfinite() if mask is None else adapted.isfinite() & mask
    return float((adapted[scored].double() - frozen[scored].double()).mean())


def over_kinds(values: Sequence[float], kinds: Sequence[str], *, seed: int = 0) -> BootstrapEstimate | None:
    """Return the mean over kinds of the means over streams, with its interval.

    NaN values are left out. The result is None without other values.
    """
    known = [(value, kind) for value, kind in zip(values, kinds, strict=True) if not math.isnan(value)]
    if not known:
        return None
    data, names = np.array([value for value, _ in known]), [kind for _, kind in known]

    def mean(chosen: np.ndarray) -> float:
        return float(np.dot(data[chosen], shares([names[i] for i in chosen])))

    draws = np.random.default_rng(seed).integers(len(data), size=(RESAMPLES, len(data)))
    low, high = np.percentile([mean(draw) for draw in draws], [2.5, 97.5])
    return BootstrapEstimate(mean(np.arange(len(data))), float(low), float(high))


def by_request(adapted: Tensor, frozen: Tensor, lengths: Sequence[int]) -> list[float]:
    """Return the gain [R] of each request."""
    parts = zip(adapted.split(list(lengths)), frozen.split(list(lengths)), strict=True)
    return [gain(adapted_part, frozen_part) for adapted_part, frozen_part in parts]


def slope(gains: Sequence[float], lengths: Sequence[int]) -> float:
    """Return the gain per 1,000 tokens observed: the slope of the least-squares line through the gains of requests."""
    observed = np.concatenate([[0], np.cumsum(lengths)[:-1]]) / 1000
    known = np.isfinite(gains)
    if known.sum() < 2:
        return math.nan
    return float(np.polyfit(observed[known], np.array(gains)[known], 1)[0])


def novelty(targets: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return for each target [n] an index into NOVELTY: the first of these that contains the token earlier.

    0: the same request; 1: an earlier request; 2: neither
    """
    before: set[int] = set()
    found = []
    for request in targets.split(list(lengths)):
        window: set[int] = set()
        for token in request.tolist():
            found.append(0 if token in window else 1 if token in before else 2)
            window.add(token)
        before |= window
    return torch.tensor(found)


def perplexity(log_probs: Tensor, widths: Tensor) -> tuple[float, float]:
    """Return perplexity per token and per byte over the targets that the arm predicts; NaN without such targets.

    widths [n]: bytes of each target
    """
    scored = log_probs.isfinite()
    if not bool(scored.any()):
        return math.nan, math.nan
    nats = -float(log_probs[scored].double().sum())
    return math.exp(nats / int(scored.sum())), math.exp(nats / int(widths[scored].sum()))


def summary(
    gains: Mapping[str, float], kinds: Mapping[str, str], tuning: set[str]
) -> dict[str, BootstrapEstimate | None]:
    """Return the ratio of all kinds, of the kinds tuned on and of the kinds held out, from the gain of each stream."""
    groups = {
        "all": list(gains),
        "tuned": [name for name in gains if kinds[name] in tuning],
        "held_out": [name for name in gains if kinds[name] not in tuning],
    }
    found = {}
    for group, names in groups.items():
        estimate = over_kinds([gains[name] for name in names], [kinds[name] for name in names])
        found[group] = None if estimate is None else estimate.exp(-1)
    return found


def each_kind(gains: Mapping[str, float], kinds: Mapping[str, str]) -> dict[str, float]:
    """Return the ratio of each kind, from the gain of each stream."""
    known = {name: value for name, value in gains.items() if not math.isnan(value)}
    by_kind = {kind: [v for name, v in known.items() if kinds[name] == kind] for kind in sorted(set(kinds.values()))}
    return {kind: math.exp(-sum(values) / len(values)) for kind, values in by_kind.items() if values}
