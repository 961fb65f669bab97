"""The guard of a stream of labels (law 12): the best constant answer stands in for readers that are behind it.

Readers that are not behind have all of the answer. If they are, they and the shares of the labels get what each
deserved of late, so a session whose memory does harm answers with the shares, until the memory helps again.
"""

from __future__ import annotations

import math

from model.numba_support import Array

GAIN = 14  # number of the session's row: nats that the readers have won of late over the shares of the labels
KEEP, LIMIT = 0.99, 6.0  # what an example leaves of the gain before it; neither harm nor help counts for more
MARGIN = 3.0  # nats by which the readers may be behind


def trust(row: Array) -> float:
    """Return the readers' share of the answer of a session with a row."""
    return min(1.0, 2 / (1 + math.exp(-float(row[GAIN]) - MARGIN)))


def update_guard(row: Array, gain: float) -> None:
    """Add to the session's row what the readers won on a label (nats) over the shares of the labels."""
    row[GAIN] = min(max(KEEP * float(row[GAIN]) + gain, -LIMIT), LIMIT)
