"""The memory of a stream: its rows in the pool, and the same as arrays.

    session    row 0: counts and what `change` keeps; the rows after it: the readers' losses of late
    examples   [ordinal, value, extra, extra, column 0, column 1, …] in segments of ROW numbers: segment s of the
               example in position i is the row s · MAX_EXAMPLES + i; a full memory overwrites the oldest example
    weights    of the linear readers: [bias, 256 columns, 256 indicators of missing values] in segments of ROW numbers,
               for each table and each label or arm

A missing value is stored as MISSING, because rows are finite. Only rows that differ are written.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from model.memory import Draft, Pool
from model.numba_support import Array, cached_njit
from model.tabular.columns import MISSING
from model.tabular.config import EXAMPLES, LINEAR_READERS, MAX_EXAMPLES, ROW, SESSION, WEIGHT_SEGMENTS, WEIGHTS, Task
from model.tabular.mixer import HORIZONS

HEADER = 4  # numbers before the columns of an example
COUNT, COLUMNS, LABELS = 0, 1, 2  # numbers of the session's row


@dataclass
class StreamMemory:
    """The memory of a session as arrays.

    row [ROW]: the session's row. x [n, C], values [n], extra [n, 2], ordinals [n]: the examples, oldest first; a value
    is a label, a target or a reward. weights [TABLES, L, WEIGHT_SEGMENTS · ROW]. losses [E, horizons]: discounted sums.
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
        """Return the number of labels, or of arms."""
        return int(self.row[LABELS])

    @property
    def labels(self) -> Array:
        """Return the values as indices."""
        return self.values.astype(np.int64)

    def add_output(self) -> None:
        """Add a label or an arm to the linear readers."""
        new = np.zeros((len(self.weights), 1, self.weights.shape[2]), np.float32)
        self.weights = np.concatenate([self.weights, new], axis=1)

    def pad(self, x: Array) -> Array:
        """Return an example with as many columns as the memory's, MISSING where it has no finite value."""
        padded = np.full(max(self.x.shape[1], len(x)), MISSING, np.float32)
        padded[: len(x)] = np.where(np.isfinite(x), x, MISSING)
        return padded

    def widen(self, columns: int) -> None:
        """Give the examples so many columns at least."""
        if columns > self.x.shape[1]:
            wide = np.full((len(self.x), columns), MISSING, np.float32)
            wide[:, : self.x.shape[1]] = self.x
            self.x = wide


def empty_memory(task: Task, readers: int) -> StreamMemory:
    """Return the memory of an empty session of a task with so many readers."""
    none = np.zeros(0, np.float32)
    weights = np.zeros((LINEAR_READERS[task][0], 0, WEIGHT_SEGMENTS * ROW), np.float32)
    losses = np.zeros((readers, len(HORIZONS)), np.float32)
    examples = (np.zeros((0, 0), np.float32), none, np.zeros((0, 2), np.float32), np.zeros(0, np.int64))
    return StreamMemory(np.zeros(ROW, np.float32), *examples, weights, losses)


def loss_rows(readers: int) -> int:
    """Return the number of rows of the losses of so many readers."""
    return -(-readers * len(HORIZONS) // ROW)


def read_memory(pool: Pool, session: int, task: Task, readers: int) -> StreamMemory:
    """Return the memory of a session."""
    memory = empty_memory(task, readers)
    site = pool.sites[SESSION]
    rows = site.fields[0].numpy()[site.physical_cells[session, : 1 + loss_rows(readers)]]
    memory.row = rows[0].copy()
    memory.losses = rows[1:].reshape(-1)[: memory.losses.size].reshape(memory.losses.shape).copy()
    n, columns = min(int(memory.row[COUNT]), MAX_EXAMPLES), int(memory.row[COLUMNS])
    if n:
        site = pool.sites[EXAMPLES]
        memory.x = np.empty((n, columns), np.float32)
        heads = np.empty((n, HEADER), np.float32)
        _gather(site.physical_cells[session], site.fields[0].numpy(), int(memory.row[COUNT]), memory.x, heads)
        memory.ordinals, memory.values, memory.extra = heads[:, 0].astype(np.int64), heads[:, 1], heads[:, 2:]
    site, outputs = pool.sites[WEIGHTS], memory.num_labels
    table = site.physical_cells[session].reshape(*LINEAR_READERS[task], WEIGHT_SEGMENTS)[:, :outputs]
    memory.weights = site.fields[0].numpy()[table].reshape(len(table), outputs, WEIGHT_SEGMENTS * ROW)
    return memory


@cached_njit
def _gather(table: Array, field: Array, count: int, x: Array, heads: Array) -> None:
    """Fill x [n, C] and heads [n, HEADER] with the examples up to ordinal `count`, oldest first."""
    n, C = x.shape
    for i in range(n):
        position = (count - n + i) % MAX_EXAMPLES
        first = table[position]
        for j in range(HEADER):
            heads[i, j] = field[first, j]
        for c in range(C):
            segment, j = (HEADER + c) // ROW, (HEADER + c) % ROW
            physical_row = table[segment * MAX_EXAMPLES + position]
            x[i, c] = field[physical_row, j] if physical_row > 0 else MISSING


def write_memory(draft: Draft, before: StreamMemory, after: StreamMemory, x: Array, value: float, extra: Array) -> None:
    """Write an example x [C] and what else differs between two memories of the draft's session; `after.row` has the
    example's ordinal as its count. Raises PoolFullError."""
    after.row[COLUMNS] = max(after.row[COLUMNS], len(x))
    losses = np.zeros(loss_rows(len(after.losses)) * ROW, np.float32)
    losses[: after.losses.size] = after.losses.reshape(-1)
    _put(draft, SESSION, np.arange(1 + loss_rows(len(after.losses))), np.concatenate([after.row, losses]))
    ordinal, segments = int(after.row[COUNT]), -(-(HEADER + len(x)) // ROW)
    rows = np.zeros(segments * ROW, np.float32)
    rows[:HEADER] = ordinal, value, *extra
    rows[HEADER : HEADER + len(x)] = x
    _put(draft, EXAMPLES, np.arange(segments) * MAX_EXAMPLES + (ordinal - 1) % MAX_EXAMPLES, rows)
    old = np.zeros_like(after.weights)
    old[:, : before.weights.shape[1]] = before.weights
    new = after.weights.reshape(*after.weights.shape[:2], WEIGHT_SEGMENTS, ROW)
    table, output, segment = (new != old.reshape(new.shape)).any(-1).nonzero()
    if len(table):
        outputs = draft.pool.sites[WEIGHTS].config.slots // WEIGHT_SEGMENTS // len(new)
        _put(draft, WEIGHTS, (table * outputs + output) * WEIGHT_SEGMENTS + segment, new[table, output, segment])


def _put(draft: Draft, site: str, slots: Array, rows: Array) -> None:
    draft.put(site, torch.from_numpy(slots), [torch.from_numpy(rows.reshape(len(slots), ROW))])
