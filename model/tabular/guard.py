"""The guard of a stream of labels (law 12): the best constant answer stands beside what the readers say.

Each of the two gets the share of the answer that its predictions deserved of late (a Bayesian mixture that forgets). So
a session whose memory does harm answers with the shares of the labels, until the memory helps again.
"""

from __future__ import annotations

import math

from model.numba_support import Array

GAIN = 14  # number of the session's row: nats that the readers have won of late over the shares of the labels
KEEP, LIMIT = 0.99, 4.0  # what an example leaves of the gain before it; neither harm nor help counts for more
FIRST = 1.0  # nats that the readers have ahead


def trust(row: Array) -> float:
    """Return the readers' share of the answer of a session with a row."""
    return 1 / (1 + math.exp(-float(row[GAIN]) - FIRST))


def update_guard(row: Array, gain: float) -> None:
    """Add to the session's row what the readers won on a label (nats) over the shares of the labels."""
    row[GAIN] = min(max(KEEP * float(row[GAIN]) + gain, -LIMIT), LIMIT)
