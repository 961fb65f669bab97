"""The learned examples of a session, as rows of the site `examples`, and the session's counts, the row of `session`.

An example has a row for each ROW numbers: [ordinal, value, extra, extra, column 0, column 1, …], in segments: segment
s of the example in position i is the row s · MAX_EXAMPLES + i. A missing value is stored as MISSING, because rows are
finite. When all positions are taken, an example takes the position of the oldest one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from model.memory import Draft, Pool
from model.tabular.backend import FloatArray
from model.tabular.config import EXAMPLES, MAX_EXAMPLES, ROW, SESSION

HEADER = 4  # numbers before the columns of an example
ORDINAL, VALUE, EXTRA = 0, 1, 2
MISSING = np.finfo(np.float32).min
COUNT, COLUMNS, CLASSES = 0, 1, 2  # numbers of the session's row


class Examples(NamedTuple):
    """The examples of a session, [n] each: ordinals, values (label or target), extra [n, 2], and x [n, C]."""

    ordinals: FloatArray
    values: FloatArray
    extra: FloatArray
    x: FloatArray


def read_session(pool: Pool, session: int) -> FloatArray:
    """Return the session's row: [examples learned, columns, labels, 0 …]."""
    site = pool.sites[SESSION]
    row: FloatArray = site.fields[0][int(site.physical_cells[session, 0])].numpy()
    return row.copy()


def segments_of(columns: int) -> int:
    """Return the number of rows of an example."""
    return -(-(HEADER + columns) // ROW)


def read_examples(pool: Pool, session: int, columns: int) -> Examples:
    """Return the examples of a session in the order of their positions; missing values are NaN."""
    site, segments = pool.sites[EXAMPLES], segments_of(columns)
    table = site.physical_cells[session].reshape(-1, MAX_EXAMPLES)[:segments]
    table = table[:, : int((table[0] > 0).sum())]
    parts = [site.fields[0].numpy()[physical_rows] for physical_rows in table]
    rows = np.concatenate(parts, axis=1)
    x = rows[:, HEADER : HEADER + columns]
    absent = np.repeat(table.T == 0, ROW, axis=1)[:, HEADER : HEADER + columns]
    missing = (x == MISSING) | absent
    x = np.where(missing, np.float32(np.nan), x)
    return Examples(rows[:, ORDINAL], rows[:, VALUE], rows[:, EXTRA:HEADER], x)


def write_example(x: FloatArray, value: float, extra: tuple[float, float], ordinal: int, draft: Draft) -> None:
    """Write an example to its position. Raises PoolFullError."""
    segments, position = segments_of(len(x)), (ordinal - 1) % MAX_EXAMPLES
    rows = np.zeros(segments * ROW, np.float32)
    rows[:HEADER] = ordinal, value, *extra
    rows[HEADER : HEADER + len(x)] = np.where(np.isfinite(x), x, MISSING)
    slots = torch.arange(segments) * MAX_EXAMPLES + position
    draft.put(EXAMPLES, slots, [torch.from_numpy(rows.reshape(segments, ROW))])


def write_session(row: FloatArray, draft: Draft) -> None:
    """Write the session's row. Raises PoolFullError."""
    draft.put(SESSION, torch.zeros(1, dtype=torch.long), [torch.from_numpy(row)[None]])
