"""The readers of labels together: the distributions that one query gets from the examples, in three windows.

The windows are all stored examples, those since the last change of the stream (`change.py`), and the latest ones. A
reader that looks at the middle window gives what it gives for the first one as long as no change was seen.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from model.numba_support import Array
from model.tabular import readers
from model.tabular.columns import standardise

LATE = 96  # examples of the latest window
TREES, LATE_TREES, TRIALS, SAMPLE = 20, 10, 10, 64
DISCRIMINANT_COLUMNS = 32
PRIOR, RECENT, TRANSITIONS = 0, 1, 2
READERS = (
    *("prior", "recent", "transitions"),
    *("nearest", "near", "nearest by relevance", "near by relevance", "nearest whitened", "near whitened"),
    *("gaussian bayes", "kernel bayes", "discriminant", "linear", "forest"),
    *("near by relevance, changed", "kernel bayes, changed", "discriminant, changed", "forest, changed"),
    *("near by relevance, late", "kernel bayes, late", "linear, late", "forest, late"),
)
E = len(READERS)
_INDEX = {name: i for i, name in enumerate(READERS)}
SHARP, BROAD, MIDDLE = 3, 12, 5


class Scaled(NamedTuple):
    """Examples and a query on one scale and in one order of columns; see `columns.standardise`."""

    z: Array  # [n, K]
    query: Array  # [K]
    columns: Array  # int64 [K]
    y: Array  # int64 [n]


class Readout(NamedTuple):
    """The readers' probabilities [E, L], and the nearest examples with their votes, nearest first."""

    probs: Array
    nearest: Array
    votes: Array


def scale(x: Array, query: Array, ordinals: Array, y: Array) -> Scaled:
    """Return the examples x [n, C] and the query [C] on one scale."""
    z, queries, columns = standardise(x, query[None], ordinals)
    return Scaled(z, queries[0], columns, y)


class _Window:
    """The examples from `first` on, with their sums by label."""

    def __init__(self, scaled: Scaled, first: int, num_labels: int) -> None:
        K = scaled.z.shape[1]
        self.scaled, self.first = scaled, first
        self.sums, self.squares = np.empty((num_labels, K), np.float32), np.empty((num_labels, K), np.float32)
        self.counts, self.relevance = np.empty(num_labels, np.float32), np.empty(K, np.float32)
        self.prior = np.empty(num_labels, np.float32)
        readers.tally(scaled.y, first, 1e9, self.prior)
        readers.class_moments(scaled.z, scaled.y, first, self.sums, self.squares, self.counts)
        readers.relevances(self.sums, self.squares, self.counts, self.relevance)

    def metric(self) -> Array:
        """Return the weight of each column in a distance: its relevance, and a little for all."""
        mean = self.relevance.mean(dtype=np.float32)
        metric: Array = self.relevance + np.float32(0.05) * mean + np.float32(1e-4)
        return metric


class _Reads:
    """The reads of one query, which fill the rows of `probs`."""

    def __init__(self, scaled: Scaled, num_labels: int) -> None:
        self.scaled = scaled
        self.probs = np.empty((E, num_labels), np.float32)
        self.indices = np.empty(readers.NEAREST, np.int64)
        self.distances = np.empty(readers.NEAREST, np.float32)
        self.size = 0

    def row(self, name: str) -> Array:
        row: Array = self.probs[_INDEX[name]]
        return row

    def search(self, z: Array, query: Array, metric: Array, first: int) -> None:
        self.size = readers.nearest(z, query, metric, first, self.indices, self.distances)

    def neighbours(self, name: str, sharpness: int, prior: Array) -> None:
        readers.neighbours(self.scaled.y, self.indices, self.distances, self.size, sharpness, prior, self.row(name))

    def discriminant(self, name: str, window: _Window) -> tuple[Array, Array]:
        """Fill the discriminant's row; return its columns [D] and its factor [D, D]."""
        K = len(window.relevance)
        chosen = np.arange(K)
        if K > DISCRIMINANT_COLUMNS:
            chosen = np.sort(np.argsort(-window.relevance, kind="stable")[:DISCRIMINANT_COLUMNS])
        factor = np.zeros((len(chosen), len(chosen)), np.float32)
        z, y, query = self.scaled.z, self.scaled.y, self.scaled.query
        readers.discriminant(
            z, y, window.first, window.sums, window.counts, chosen, window.prior, query, factor, self.row(name)
        )
        return chosen, factor


def read(scaled: Scaled, num_labels: int, first_changed: int, weights: Array) -> Readout:
    """Return what the readers say of the query.

    first_changed: the oldest example since the last change. weights: [TABLES, L, K + 1] of the linear readers.
    """
    z, query, _, y = scaled
    reads = _Reads(scaled, num_labels)
    everything = _Window(scaled, 0, num_labels)
    reads.row("prior")[:] = everything.prior
    readers.tally(y, 0, 20.0, reads.row("recent"))
    readers.transitions(y, everything.prior, reads.row("transitions"))
    if not len(query):
        reads.probs[3:] = everything.prior
        late = np.arange(len(y) - 1, max(-1, len(y) - 1 - readers.NEAREST), -1)
        return Readout(reads.probs, late, np.ones(len(late), np.float32))
    _read_all(reads, everything)
    if first_changed > 0:
        _read_changed(reads, _Window(scaled, first_changed, num_labels))
    else:
        for name in ("near by relevance", "kernel bayes", "discriminant", "forest"):
            reads.row(f"{name}, changed")[:] = reads.row(name)
    _read_late(reads, _Window(scaled, max(0, len(y) - LATE), num_labels))
    for table, name in enumerate(("linear", "linear, late")):
        readers.linear(weights[table], query, reads.row(name))
    reads.search(z, query, everything.metric(), first_changed)
    votes = np.empty(readers.NEAREST, np.float32)
    readers.vote_weights(reads.distances, reads.size, MIDDLE, votes)
    return Readout(reads.probs, reads.indices[: reads.size], votes[: reads.size])


def _read_all(reads: _Reads, window: _Window) -> None:
    z, query, _, y = reads.scaled
    prior = window.prior
    reads.search(z, query, np.ones(len(query), np.float32), 0)
    reads.neighbours("nearest", SHARP, prior)
    reads.neighbours("near", BROAD, prior)
    reads.search(z, query, window.metric(), 0)
    reads.neighbours("nearest by relevance", SHARP, prior)
    reads.neighbours("near by relevance", BROAD, prior)
    chosen, factor = reads.discriminant("discriminant", window)
    whitened, whitened_query = readers.whiten(z, query, chosen, factor)
    reads.search(whitened, whitened_query, np.ones(len(chosen), np.float32), 0)
    reads.neighbours("nearest whitened", SHARP, prior)
    reads.neighbours("near whitened", BROAD, prior)
    readers.gaussian_bayes(window.sums, window.squares, window.counts, prior, query, reads.row("gaussian bayes"))
    readers.kernel_bayes(z, y, 0, window.counts, prior, query, reads.row("kernel bayes"))
    readers.forest(z, y, 0, query, prior, TREES, TRIALS, SAMPLE, reads.row("forest"))


def _read_changed(reads: _Reads, window: _Window) -> None:
    z, query, _, y = reads.scaled
    prior, first = window.prior, window.first
    reads.search(z, query, window.metric(), first)
    reads.neighbours("near by relevance, changed", MIDDLE, prior)
    readers.kernel_bayes(z, y, first, window.counts, prior, query, reads.row("kernel bayes, changed"))
    reads.discriminant("discriminant, changed", window)
    readers.forest(z, y, first, query, prior, TREES, TRIALS, SAMPLE, reads.row("forest, changed"))


def _read_late(reads: _Reads, window: _Window) -> None:
    z, query, _, y = reads.scaled
    prior, first = window.prior, window.first
    reads.search(z, query, window.metric(), first)
    reads.neighbours("near by relevance, late", MIDDLE, prior)
    readers.kernel_bayes(z, y, first, window.counts, prior, query, reads.row("kernel bayes, late"))
    readers.forest(z, y, first, query, prior, LATE_TREES, TRIALS, SAMPLE, reads.row("forest, late"))
