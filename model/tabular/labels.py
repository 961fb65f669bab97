"""The learner of labels: what it computes for an example from the memory of its session."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from model.numba_support import Array
from model.tabular import readers
from model.tabular.change import START, update_change
from model.tabular.config import HORIZONS, TABLES
from model.tabular.guard import trust, update_guard
from model.tabular.label_readers import LATE, PRIOR, READERS, Readout, Scaled, read, scale
from model.tabular.memory import COUNT, LABELS, StreamMemory
from model.tabular.mixer import (
    GLOBALS,
    LEAST_PROB,
    POSTERIOR_SCALE,
    MixerWeights,
    mix,
    mixer_inputs,
    novelty,
)

NEWEST = 6  # number of the session's row: ordinal of the example with the newest label
SHARPNESS = 7  # number of the session's row: logarithm of the exponent of the mixture's probabilities
ADVANTAGE = 13  # number of the session's row: nats that the Bayesian mixture has won of late over the learned mixer
ADVANTAGE_KEEP, FIRST_ADVANTAGE = 0.99, 1.0
POSTERIORS = [2 * len(HORIZONS) + 1, 2 * len(HORIZONS) + 2]  # inputs of the mixer
SHARPNESS_RATE, SHARPNESS_LIMIT = 0.02, 1.0
HORIZON_WEIGHTS = 8  # first of the numbers of the session's row that are the sums of the discounts
CHANGED = np.array([i for i, name in enumerate(READERS) if name.endswith(", changed")])
LATEST = np.array([READERS.index(READERS[i].replace("changed", "late")) for i in CHANGED if "disc" not in READERS[i]])


class Mixture(NamedTuple):
    """The mixture of the readers: probs [L] of the known labels, that of a new label, and the probs without the guard:
    sharpened, and before that, of the learned mixer and the Bayesian mixture together and of each."""

    probs: Array
    unknown: float
    unguarded: Array
    raw: Array
    learned: Array
    bayes: Array


class QueryReadout(NamedTuple):
    """The readout of a query, before the mixer: all that learning its label needs as well."""

    scaled: Scaled
    readout: Readout
    inputs: Array  # [E, F] of the mixer
    novelty_inputs: Array
    weights: Array  # [TABLES, L, K + 1] of the linear readers, in the order of the scaled columns


def read_query(memory: StreamMemory, query: Array) -> QueryReadout:
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
    return QueryReadout(scaled, readout, inputs, novelty_inputs(count, L, singles, count - float(row[NEWEST])), weights)


def novelty_inputs(count: float, num_labels: int, singles: int, age: float) -> Array:
    """Return the inputs of the chance of a new label: examples, labels, labels seen once, examples since a new one."""
    return np.array(
        [math.log1p(count), math.log1p(age), math.log((singles + 0.5) / (count + 1)), math.log(num_labels)], np.float32
    )


def mixture(reading: QueryReadout, mixer: MixerWeights, row: Array) -> Mixture:
    """Return the distribution of the label, in a session with a row."""
    learned = np.empty(reading.readout.probs.shape[1], np.float32)
    mix(*mixer[:5], reading.readout.probs, reading.inputs, learned)
    shares = np.exp(reading.inputs[:, POSTERIORS] * np.float32(POSTERIOR_SCALE)).mean(1)
    bayes = (shares @ np.maximum(reading.readout.probs, LEAST_PROB)).astype(np.float32)
    share = 1 / (1 + math.exp(float(row[ADVANTAGE]) - FIRST_ADVANTAGE))
    raw = np.float32(share) * learned + np.float32(1 - share) * bayes / bayes.sum()
    probs = raw.astype(np.float64) ** math.exp(float(row[SHARPNESS]))
    unguarded, trusted = probs / probs.sum(), trust(row)
    guarded = trusted * unguarded + (1 - trusted) * reading.readout.probs[PRIOR]
    unknown = float(novelty(mixer.novelty, mixer.novelty_bias, reading.novelty_inputs))
    return Mixture((guarded * (1 - unknown)).astype(np.float32), unknown, unguarded, raw, learned, bayes)


def learn_label(memory: StreamMemory, reading: QueryReadout | None, label: int, mixed: Mixture | None) -> None:
    """Change all of the memory but its examples by a label; reading: of the example, None for the first one; mixed: of
    the same reading, None to leave the sharpness as it is."""
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
        if mixed is not None:
            _sharpen(row, mixed, label)
            loss = _log_ratio(mixed.bayes[label], mixed.learned[label])
            row[ADVANTAGE] = min(max(ADVANTAGE_KEEP * float(row[ADVANTAGE]) + loss, -8.0), 8.0)
            update_guard(row, _log_ratio(mixed.unguarded[label], reading.readout.probs[PRIOR, label]))
    _learn_linear(memory, reading, label, ordinal)


def _log_ratio(one: float, other: float) -> float:
    return math.log(max(float(one), 1e-6)) - math.log(max(float(other), 1e-6))


def _sharpen(row: Array, mixed: Mixture, label: int) -> None:
    """Move the exponent of the mixture's probabilities by one gradient step of the label's log-probability."""
    power = math.exp(float(row[SHARPNESS]))
    logs = np.log(np.maximum(mixed.raw.astype(np.float64), 1e-6))
    probs = np.exp(power * (logs - logs.max()))
    slope = power * (logs[label] - float((probs / probs.sum() * logs).sum()))
    step = SHARPNESS_RATE * min(max(slope, -1.0), 1.0)
    row[SHARPNESS] = min(max(float(row[SHARPNESS]) + step, -SHARPNESS_LIMIT), SHARPNESS_LIMIT)


def _window_loss(reading: QueryReadout, which: Array, label: int) -> float:
    return -math.log(max(float(reading.readout.probs[which, label].mean()), float(LEAST_PROB)))


def _learn_linear(memory: StreamMemory, reading: QueryReadout, label: int, ordinal: int) -> None:
    scaled, n, L = reading.scaled, len(reading.scaled.y), memory.num_labels
    weights = np.zeros((TABLES, L, len(scaled.query) + 1), np.float32)
    weights[:, : reading.weights.shape[1]] = reading.weights
    changed = min(n, max(LATE, ordinal - int(memory.row[START])))
    spans = np.array([changed, min(n, LATE)], np.int64)
    readers.linear_steps(weights, scaled.z, scaled.y, scaled.query, label, spans, ordinal)
    memory.weights[:, :, np.concatenate([[0], 1 + scaled.columns])] = weights
