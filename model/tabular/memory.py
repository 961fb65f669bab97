"""The memory of a stream: its rows in the pool, and the same as arrays.

    session    row 0: counts and what the learner keeps; the rows after it: the readers' losses of late
    examples   [ordinal, value, extra, extra, column 0, column 1, …] in segments of ROW numbers: segment s of the
               example in position i is the row s · MAX_EXAMPLES + i; a full memory overwrites the oldest example.
               The features of a bandit's arms are the columns from the last one down
    weights    of the linear readers of labels: [bias, columns, indicators of missing values] in segments of ROW
               numbers, for each table and each label

A missing value is stored as MISSING, because rows are finite. Only rows that differ are written.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from model.memory import Draft, Pool
from model.numba_support import Array, cached_njit
from model.tabular.columns import MISSING
from model.tabular.config import (
    EXAMPLES,
    HORIZONS,
    MAX_COLUMNS,
    MAX_EXAMPLES,
    MAX_LABELS,
    ROW,
    SESSION,
    TABLES,
    WEIGHT_SEGMENTS,
    WEIGHTS,
)

HEADER = 4  # numbers before the columns of an example
SEGMENTS = -(-(HEADER + MAX_COLUMNS) // ROW)  # of an example
COUNT, COLUMNS, LABELS, FEATURES = 0, 1, 2, 12  # numbers of the session's row; FEATURES: of a bandit


@dataclass
class StreamMemory:
    """The memory of a session as arrays.

    row [ROW]: the session's row. x [n, C + F], values [n], extra [n, 2], ordinals [n]: the examples, oldest first; a
    value is a label, a target or a reward. weights [TABLES, L, WEIGHT_SEGMENTS · ROW]; losses [E, horizons]: discounted
    sums.
    """

    row: Array
    x: Array
    values: Array
    extra: Array
    ordinals: Array
    weights: Array
    losses: Array

    @property
    def num_labels(self) -> int:
        """Return the number of labels."""
        return int(self.row[LABELS])

    @property
    def labels(self) -> Array:
        """Return the values as indices."""
        return self.values.astype(np.int64)

    def add_output(self) -> None:
        """Add a label to the linear readers."""
        self.weights = np.concatenate([self.weights, np.zeros_like(self.weights, shape=(TABLES, 1, WIDTH))], axis=1)

    def widen(self, columns: int, features: int = 0) -> None:
        """Make room for examples with so many columns and features: the memory has as many at least."""
        old_columns, old_features = int(self.row[COLUMNS]), int(self.row[FEATURES])
        columns, features = max(columns, old_columns), max(features, old_features)
        wide = np.full((len(self.values), columns + features), MISSING, np.float32)
        wide[:, :old_columns] = self.x[:, :old_columns]
        wide[:, columns : columns + old_features] = self.x[:, old_columns:]
        self.x = wide
        self.row[COLUMNS], self.row[FEATURES] = columns, features

    def pad(self, x: Array, features: Array | None = None) -> Array:
        """Return an example as wide as the memory's, MISSING where it has no finite value."""
        columns = int(self.row[COLUMNS])
        padded = np.full(columns + int(self.row[FEATURES]), MISSING, np.float32)
        padded[: len(x)] = np.where(np.isfinite(x), x, MISSING)
        if features is not None:
            padded[columns : columns + len(features)] = np.where(np.isfinite(features), features, MISSING)
        return padded


WIDTH = WEIGHT_SEGMENTS * ROW


def empty_memory(readers: int) -> StreamMemory:
    """Return the memory of an empty session with so many readers."""
    none = np.zeros(0, np.float32)
    losses = np.zeros((readers, len(HORIZONS)), np.float32)
    examples = (np.zeros((0, 0), np.float32), none, np.zeros((0, 2), np.float32), np.zeros(0, np.int64))
    return StreamMemory(np.zeros(ROW, np.float32), *examples, np.zeros((TABLES, 0, WIDTH), np.float32), losses)


def loss_rows(readers: int) -> int:
    """Return the number of rows of the losses of so many readers."""
    return -(-readers * len(HORIZONS) // ROW)


def stored_columns(columns: int, features: int) -> Array:
    """Return where the columns and the features of an example are stored, int64 [C + F]."""
    return np.concatenate([np.arange(columns), MAX_COLUMNS - 1 - np.arange(features)])


def read_memory(pool: Pool, session: int, readers: int) -> StreamMemory:
    """Return the memory of a session."""
    memory, site = empty_memory(readers), pool.sites[SESSION]
    rows = site.fields[0].numpy()[site.physical_cells[session, : 1 + loss_rows(readers)]]
    memory.row = rows[0].copy()
    memory.losses = rows[1:].reshape(-1)[: memory.losses.size].reshape(memory.losses.shape).copy()
    count = int(memory.row[COUNT])
    if count:
        columns = stored_columns(int(memory.row[COLUMNS]), int(memory.row[FEATURES]))
        n, site = min(count, MAX_EXAMPLES), pool.sites[EXAMPLES]
        memory.x, heads = np.empty((n, len(columns)), np.float32), np.empty((n, HEADER), np.float32)
        _gather(site.physical_cells[session], site.fields[0].numpy(), count, columns, memory.x, heads)
        memory.ordinals, memory.values, memory.extra = heads[:, 0].astype(np.int64), heads[:, 1], heads[:, 2:]
    if WEIGHTS in pool.sites and memory.num_labels:
        site = pool.sites[WEIGHTS]
        table = site.physical_cells[session].reshape(TABLES, MAX_LABELS, WEIGHT_SEGMENTS)[:, : memory.num_labels]
        memory.weights = site.fields[0].numpy()[table].reshape(TABLES, memory.num_labels, WIDTH)
    return memory


@cached_njit
def _gather(table: Array, field: Array, count: int, columns: Array, x: Array, heads: Array) -> None:
    """Fill x [n, K] and heads [n, HEADER] with the examples up to ordinal `count`, oldest first."""
    n = len(x)
    for i in range(n):
        position = (count - n + i) % MAX_EXAMPLES
        first = table[position]
        for j in range(HEADER):
            heads[i, j] = field[first, j]
        for k in range(len(columns)):
            number = HEADER + columns[k]
            physical_row = table[number // ROW * MAX_EXAMPLES + position]
            x[i, k] = field[physical_row, number % ROW] if physical_row > 0 else MISSING


def unpack_examples(slots: Array, rows: Array) -> Array:
    """Return the examples [MAX_EXAMPLES, SEGMENTS · ROW] of a session's stored rows [n, ROW], by position."""
    table = np.full((SEGMENTS * MAX_EXAMPLES, ROW), MISSING, np.float32)
    table[slots] = rows
    return table.reshape(SEGMENTS, MAX_EXAMPLES, ROW).swapaxes(0, 1).reshape(MAX_EXAMPLES, -1)


def write_memory(
    draft: Draft, before: StreamMemory, after: StreamMemory, x: Array, value: float, extra: tuple[float, float]
) -> None:
    """Write an example x [C + F], and what differs between two memories of the draft's session; the example's ordinal
    is the count of `after`. Raises PoolFullError."""
    losses = np.zeros(loss_rows(len(after.losses)) * ROW, np.float32)
    losses[: after.losses.size] = after.losses.reshape(-1)
    _put(draft, SESSION, np.arange(1 + loss_rows(len(after.losses))), np.concatenate([after.row, losses]))
    ordinal = int(after.row[COUNT])
    rows = np.full(SEGMENTS * ROW, MISSING, np.float32)
    rows[HEADER + stored_columns(int(after.row[COLUMNS]), int(after.row[FEATURES]))] = x
    rows[:HEADER] = ordinal, value, *extra
    slots = np.arange(SEGMENTS) * MAX_EXAMPLES + (ordinal - 1) % MAX_EXAMPLES
    by_segment = rows.reshape(SEGMENTS, ROW)
    needed = (by_segment != MISSING).any(1) | (draft.pool.sites[EXAMPLES].physical_cells[draft.index, slots] > 0)
    _put(draft, EXAMPLES, slots[needed], by_segment[needed])
    old = np.zeros_like(after.weights)
    old[:, : before.weights.shape[1]] = before.weights
    new, shape = after.weights, (*after.weights.shape[:2], WEIGHT_SEGMENTS, ROW)
    table, output, segment = (new != old).reshape(shape).any(-1).nonzero()
    if len(table):
        places = (table * MAX_LABELS + output) * WEIGHT_SEGMENTS + segment
        _put(draft, WEIGHTS, places, new.reshape(shape)[table, output, segment])


def _put(draft: Draft, site: str, slots: Array, rows: Array) -> None:
    draft.put(site, torch.from_numpy(slots), [torch.from_numpy(rows.reshape(len(slots), ROW))])
