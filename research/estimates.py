"""What is told of repeated measurements: means and ratios with their intervals, and percentiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Student's t, two-sided 95%, for 1, 2, … degrees of freedom; more than the last have (nearly) the last one's.
STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """A geometric mean over rounds and its 95% interval; low and high are None after a single round."""

    value: float
    low: float | None
    high: float | None
    rounds: int


def half_width(values: Sequence[float] | NDArray[np.float64]) -> float:
    """Half of Student's 95% interval of the mean of two or more values."""
    n = len(values)
    return STUDENT[min(n - 1, len(STUDENT)) - 1] * float(np.std(values, ddof=1)) / math.sqrt(n)


def mean(values: Sequence[float]) -> Estimate:
    """The geometric mean of positive values, with Student's interval of their logarithms. Raises ValueError."""
    if not values or min(values) <= 0:
        raise ValueError(f"positive values are needed, got {list(values)}")
    logs = np.log(values)
    centre = float(logs.mean())
    if len(logs) == 1:
        return Estimate(math.exp(centre), None, None, 1)
    half = half_width(logs)
    return Estimate(math.exp(centre), math.exp(centre - half), math.exp(centre + half), len(logs))


def ratio(over: Sequence[float], under: Sequence[float]) -> Estimate:
    """Over ÷ under, round by round: what slows a round slows both. Raises ValueError if they differ in number."""
    return mean([a / b for a, b in zip(over, under, strict=True)])


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The 50th, 95th and 99th percentile."""
    found = np.percentile(values, [50, 95, 99])
    return {name: float(value) for name, value in zip(("p50", "p95", "p99"), found, strict=True)}
