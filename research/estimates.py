"""Statistics of repeated measurements: geometric means and ratios with confidence intervals, and percentiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Student's t, two-sided 95%, for 1, 2, … degrees of freedom. Beyond the table, the last value is close enough.
STUDENT_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class GeometricMeanEstimate:
    """A geometric mean over rounds and its 95% interval; `low` and `high` are None after a single round."""

    value: float
    low: float | None
    high: float | None
    rounds: int


def half_width(values: Sequence[float] | NDArray[np.float64]) -> float:
    """Return half the width of Student's 95% interval of the mean of two or more values."""
    n = len(values)
    return STUDENT_T[min(n - 1, len(STUDENT_T)) - 1] * float(np.std(values, ddof=1)) / math.sqrt(n)


def proportion(successes: int, n: int) -> tuple[float, float]:
    """Return the ends of Wilson's 95% interval (1927) of a share of `n` independent trials.

    Raises ValueError without trials, or for a share that is not between 0 and 1.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"successes must be between 0 and n, and n at least 1, got {successes} of {n}")
    z = 1.96
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean(values: Sequence[float]) -> GeometricMeanEstimate:
    """Return the geometric mean of positive values, with Student's interval of their logarithms.

    Raises ValueError without values, or for a value that is not positive.
    """
    if not values or min(values) <= 0:
        raise ValueError(f"positive values are needed, got {list(values)}")
    logs = np.log(values)
    centre = float(logs.mean())
    if len(logs) == 1:
        return GeometricMeanEstimate(math.exp(centre), None, None, 1)
    half = half_width(logs)
    return GeometricMeanEstimate(math.exp(centre), math.exp(centre - half), math.exp(centre + half), len(logs))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> GeometricMeanEstimate:
    """Return numerator ÷ denominator, paired by round: a disturbance of a round affects both and cancels.

    Raises ValueError if the two differ in length.
    """
    return mean([a / b for a, b in zip(numerators, denominators, strict=True)])


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return the 50th, 95th and 99th percentile as `p50`, `p95` and `p99`."""
    found = np.percentile(values, [50, 95, 99])
    return {name: float(value) for name, value in zip(("p50", "p95", "p99"), found, strict=True)}
