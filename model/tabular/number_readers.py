"""The readers of numbers together: the expected targets that one query gets from the examples, in three windows.

Targets are standardised. Some readers predict what ridge regression leaves over (residuals), and one sees the two
targets before as columns, so that a series in time is read as one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from model.numba_support import Array
from model.tabular import number_kernels as kernels
from model.tabular import readers
from model.tabular.columns import standardise

LATE = 96  # examples of the latest window
TREES, LATE_TREES, TRIALS, SAMPLE = 20, 10, 10, 48
LINEAR_COLUMNS, LAGS, PENALTY = 32, 2, 1.0
SHARP, BROAD, MIDDLE = 3, 12, 5
LARGEST_TARGET = 10.0  # in standard deviations
READERS = (
    *("mean", "last", "recent"),
    *("nearest", "near", "nearest by relevance", "near by relevance", "near line"),
    *("ridge", "forest", "ridge and forest", "ridge and near"),
    *("ridge, changed", "forest, changed", "ridge and forest, changed", "near by relevance, changed"),
    *("ridge, late", "forest, late", "ridge and forest, late", "near by relevance, late"),
    *("lags", "lags and forest"),
)
E = len(READERS)
_INDEX = {name: i for i, name in enumerate(READERS)}


class Scaled(NamedTuple):
    """Examples, a query and targets, standardised; see `columns.standardise`. target = centre + scale · t."""

    z: Array  # [n, K]
    query: Array  # [K]
    t: Array  # [n]
    centre: float
    scale: float


class Readout(NamedTuple):
    """The readers' expected targets [E], and the nearest examples with their votes, nearest first."""

    means: Array
    nearest: Array
    votes: Array


def scale(x: Array, query: Array, ordinals: Array, targets: Array) -> Scaled:
    """Return the examples x [n, C], the query [C] and the targets [n] on one scale."""
    z, queries, _ = standardise(x, query[None], ordinals)
    wide = targets.astype(np.float64)
    centre, deviation = float(wide.mean()), float(wide.std())
    deviation = deviation if deviation > 1e-12 * max(1.0, abs(centre)) else max(abs(centre), 1.0)
    t = np.clip((wide - centre) / deviation, -LARGEST_TARGET, LARGEST_TARGET).astype(np.float32)
    return Scaled(z, queries[0], t, centre, deviation)


class _Reads:
    """The reads of one query, which fill `means`."""

    def __init__(self, scaled: Scaled) -> None:
        self.scaled = scaled
        self.means = np.zeros(E, np.float32)
        self.indices = np.empty(readers.NEAREST, np.int64)
        self.distances = np.empty(readers.NEAREST, np.float32)
        self.size = 0

    def put(self, name: str, value: float) -> None:
        self.means[_INDEX[name]] = value

    def metric(self, first: int) -> Array:
        relevance = np.empty(len(self.scaled.query), np.float32)
        kernels.correlations(self.scaled.z, self.scaled.t, first, relevance)
        metric: Array = relevance + np.float32(0.05) * relevance.mean(dtype=np.float32) + np.float32(1e-4)
        return metric

    def search(self, metric: Array, first: int) -> None:
        z, query = self.scaled.z, self.scaled.query
        self.size = readers.nearest(z, query, metric, first, self.indices, self.distances)

    def near(self, t: Array, sharpness: int, mean: float) -> float:
        return kernels.near_mean(t, self.indices, self.distances, self.size, sharpness, mean)

    def ridge(self, z: Array, query: Array, chosen: Array, first: int) -> tuple[float, Array]:
        """Return ridge regression's value at the query, and what it leaves over of the targets [n]."""
        coefficients = np.zeros(len(chosen) + 1, np.float32)
        kernels.ridge(z, self.scaled.t, first, chosen, PENALTY, coefficients)
        fitted, at_query = np.empty(len(z), np.float32), np.empty(1, np.float32)
        kernels.apply_linear(z, chosen, coefficients, fitted)
        kernels.apply_linear(query[None], chosen, coefficients, at_query)
        limit = float(np.abs(self.scaled.t).max()) + 1.0
        return min(max(float(at_query[0]), -limit), limit), self.scaled.t - fitted


def read(scaled: Scaled, first_changed: int) -> Readout:
    """Return what the readers say of the query. first_changed: the oldest example since the last change."""
    query, t = scaled.query, scaled.t
    n, reads = len(t), _Reads(scaled)
    ages = np.arange(n - 1, -1, -1)
    recent = 0.5 ** (ages / 8.0)
    for name in READERS[3:]:
        reads.put(name, t.mean())
    reads.put("mean", t.mean())
    reads.put("last", t[-1])
    reads.put("recent", float((recent * t).sum() / recent.sum()))
    if not len(query) or n < 2:
        late = ages[: readers.NEAREST]
        return Readout(reads.means, late, np.ones(len(late), np.float32))
    chosen = np.arange(len(query))
    metric = reads.metric(0)
    if len(chosen) > LINEAR_COLUMNS:
        chosen = np.sort(np.argsort(-metric, kind="stable")[:LINEAR_COLUMNS])
    _read_all(reads, metric, chosen)
    if first_changed > 0:
        _read_window(reads, ", changed", first_changed, chosen, TREES)
    else:
        for name in ("ridge", "forest", "ridge and forest", "near by relevance"):
            reads.put(f"{name}, changed", reads.means[_INDEX[name]])
    _read_window(reads, ", late", max(0, n - LATE), chosen, LATE_TREES)
    _read_lags(reads, chosen, first_changed)
    reads.search(metric, first_changed)
    votes = np.empty(readers.NEAREST, np.float32)
    readers.vote_weights(reads.distances, reads.size, MIDDLE, votes)
    return Readout(reads.means, reads.indices[: reads.size], votes[: reads.size])


def _read_all(reads: _Reads, metric: Array, chosen: Array) -> None:
    z, query, t, _, _ = reads.scaled
    mean = float(t.mean())
    reads.search(np.ones(len(query), np.float32), 0)
    reads.put("nearest", reads.near(t, SHARP, mean))
    reads.put("near", reads.near(t, BROAD, mean))
    value, left = reads.ridge(z, query, chosen, 0)
    reads.search(metric, 0)
    reads.put("nearest by relevance", reads.near(t, SHARP, mean))
    reads.put("near by relevance", reads.near(t, MIDDLE, mean))
    line = kernels.near_line(z, t, query, metric, reads.indices, reads.distances, reads.size, mean)
    reads.put("near line", min(max(line, float(t.min())), float(t.max())))
    reads.put("ridge", value)
    reads.put("ridge and near", value + reads.near(left, BROAD, 0.0))
    reads.put("forest", kernels.forest_mean(z, t, 0, query, mean, TREES, TRIALS, SAMPLE))
    reads.put("ridge and forest", value + kernels.forest_mean(z, left, 0, query, 0.0, TREES, TRIALS, SAMPLE))


def _read_window(reads: _Reads, window: str, first: int, chosen: Array, trees: int) -> None:
    z, query, t, _, _ = reads.scaled
    mean = float(t[first:].mean())
    value, left = reads.ridge(z, query, chosen, first)
    reads.put(f"ridge{window}", value)
    reads.put(f"forest{window}", kernels.forest_mean(z, t, first, query, mean, trees, TRIALS, SAMPLE))
    residual = kernels.forest_mean(z, left, first, query, 0.0, trees, TRIALS, SAMPLE)
    reads.put(f"ridge and forest{window}", value + residual)
    reads.search(reads.metric(first), first)
    reads.put(f"near by relevance{window}", reads.near(t, MIDDLE, mean))


def _read_lags(reads: _Reads, chosen: Array, first: int) -> None:
    """Read with the targets before as columns; the first examples, which have none before, see the mean."""
    z, query, t, _, _ = reads.scaled
    n, K = z.shape
    wide, wide_query = np.zeros((n, K + LAGS), np.float32), np.zeros(K + LAGS, np.float32)
    wide[:, :K], wide_query[:K] = z, query
    for lag in range(1, min(LAGS, n - 1) + 1):
        wide[lag:, K + lag - 1], wide_query[K + lag - 1] = t[:-lag], t[-lag]
    columns = np.concatenate([chosen, np.arange(K, K + LAGS)])
    value, left = reads.ridge(wide, wide_query, columns, first)
    reads.put("lags", value)
    residual = kernels.forest_mean(wide, left, first, wide_query, 0.0, LATE_TREES, TRIALS, SAMPLE)
    reads.put("lags and forest", value + residual)
