"""The detection of a change of the stream: a cumulative sum (Page 1954, CUSUM) of what the latest window has won.

For each example the detector adds how much less the readers of the latest window lost than those of the window since
the last change, and never falls below 0. When the sum passes a threshold, the stream changed when the sum was last 0.
"""

from __future__ import annotations

from model.numba_support import Array

THRESHOLD_NATS = 8.0
LARGEST_GAIN_NATS = 2.0  # no single example counts for more
START, SUM, ORIGIN = 3, 4, 5  # numbers of the session's row; ordinals of examples, and the sum


def update_change(row: Array, ordinal: int, gain: float) -> None:
    """Add the gain (nats) of an example to the session's row; set START to the first example after a change seen."""
    total = float(row[SUM]) + min(max(gain, -LARGEST_GAIN_NATS), LARGEST_GAIN_NATS)
    if total <= 0:
        row[SUM], row[ORIGIN] = 0.0, ordinal
    elif total > THRESHOLD_NATS:
        row[START] = row[ORIGIN] + 1
        row[SUM], row[ORIGIN] = 0.0, ordinal
    else:
        row[SUM] = total
