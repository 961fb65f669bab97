"""The learner of labels: what it computes for an example from the memory of its session."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from model.numba_support import Array
from model.tabular import readers
from model.tabular.change import START, update_change
from model.tabular.label_readers import LATE, READERS, Readout, Scaled, read, scale
from model.tabular.memory import COUNT, LABELS, StreamMemory
from model.tabular.mixer import (
    GLOBALS,
    HORIZONS,
    LEAST_PROB,
    MixerWeights,
    mix,
    mixer_inputs,
    novelty,
)

NEWEST = 6  # number of the session's row: ordinal of the example with the newest label
HORIZON_WEIGHTS = 8  # first of the numbers of the session's row that are the sums of the discounts
CHANGED = np.array([i for i, name in enumerate(READERS) if name.endswith(", changed")])
LATEST = np.array([READERS.index(READERS[i].replace("changed", "late")) for i in CHANGED if "disc" not in READERS[i]])


class Reading(NamedTuple):
    """What the readers say of a query, before the mixer: all that learning its label needs as well."""

    scaled: Scaled
    readout: Readout
    inputs: Array  # [E, F] of the mixer
    novelty_inputs: Array
    weights: Array  # [TABLES, L, K + 1] of the linear readers, in the order of the scaled columns


def read_query(memory: StreamMemory, query: Array) -> Reading:
    """Return what the readers say of a query [C], which has as many columns as the memory's examples."""
    L, row, n = memory.num_labels, memory.row, len(memory.values)
    scaled = scale(memory.x, query, memory.ordinals, memory.labels)
    indices = np.concatenate([[0], 1 + scaled.columns])
    weights = np.ascontiguousarray(memory.weights[:, :, indices])
    first = max(0, int(row[START]) - int(memory.ordinals[0]))
    readout = read(scaled, L, min(first, n - 1), weights)
    globals_ = np.array(
        [
            math.log1p(n) / 7,
            math.log(L) / 4,
            math.log1p(len(scaled.query)) / 5,
            math.log1p(n - first) / 7,
            (n - first) / n,
            float((readout.probs.argmax(1) == readout.probs.mean(0).argmax()).mean()),
            n / (n + 10 * L),
        ],
        np.float32,
    )
    assert len(globals_) == GLOBALS
    discounts = row[HORIZON_WEIGHTS : HORIZON_WEIGHTS + len(HORIZONS)]
    inputs = mixer_inputs(readout.probs, memory.losses, discounts, globals_)
    singles = int((np.bincount(scaled.y, minlength=L) == 1).sum())
    count = float(row[COUNT])
    return Reading(scaled, readout, inputs, novelty_inputs(count, L, singles, count - float(row[NEWEST])), weights)


def novelty_inputs(count: float, num_labels: int, singles: int, age: float) -> Array:
    """Return the inputs of the chance of a new label: examples, labels, labels seen once, examples since a new one."""
    return np.array(
        [math.log1p(count), math.log1p(age), math.log((singles + 0.5) / (count + 1)), math.log(num_labels)], np.float32
    )


def mixture(reading: Reading, mixer: MixerWeights) -> tuple[Array, float]:
    """Return the probabilities [L] of the known labels, and that of a new one."""
    probs = np.empty(reading.readout.probs.shape[1], np.float32)
    mix(mixer.inner, mixer.inner_bias, mixer.outer, mixer.outer_bias, reading.readout.probs, reading.inputs, probs)
    unknown = float(novelty(mixer.novelty, mixer.novelty_bias, reading.novelty_inputs))
    return probs * np.float32(1 - unknown), unknown


def learn_label(memory: StreamMemory, reading: Reading | None, label: int) -> None:
    """Change all of the memory but its examples by a label; reading: of the example, None for the first one."""
    row, new = memory.row, label == memory.num_labels
    row[COUNT] += 1
    ordinal = int(row[COUNT])
    if new:
        row[LABELS], row[NEWEST] = label + 1, ordinal
        memory.add_output()
    if reading is None:
        return
    if not new:
        losses = -np.log(np.maximum(reading.readout.probs[:, label], LEAST_PROB))
        discounts = np.array(HORIZONS, np.float32)
        memory.losses = memory.losses * discounts + losses[:, None]
        row[HORIZON_WEIGHTS : HORIZON_WEIGHTS + len(HORIZONS)] *= discounts
        row[HORIZON_WEIGHTS : HORIZON_WEIGHTS + len(HORIZONS)] += 1
        update_change(row, ordinal, _window_loss(reading, CHANGED, label) - _window_loss(reading, LATEST, label))
    _learn_linear(memory, reading, label, ordinal)


def _window_loss(reading: Reading, which: Array, label: int) -> float:
    return -math.log(max(float(reading.readout.probs[which, label].mean()), float(LEAST_PROB)))


def _learn_linear(memory: StreamMemory, reading: Reading, label: int, ordinal: int) -> None:
    scaled, n, L = reading.scaled, len(reading.scaled.y), memory.num_labels
    weights = np.zeros((len(memory.weights), L, len(scaled.query) + 1), np.float32)
    weights[:, : reading.weights.shape[1]] = reading.weights
    changed = min(n, max(LATE, ordinal - int(memory.row[START])))
    spans = np.array([changed, min(n, LATE)], np.int64)
    readers.linear_steps(weights, scaled.z, scaled.y, scaled.query, label, spans, ordinal)
    memory.weights[:, :, np.concatenate([[0], 1 + scaled.columns])] = weights
