"""The learner of numbers: what it computes for an example from the memory of its session."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from model.numba_support import Array
from model.tabular.change import START, update_change
from model.tabular.config import HORIZONS
from model.tabular.memory import COUNT, StreamMemory
from model.tabular.mixer import GLOBALS, INPUTS, MixerWeights, log_posterior, mixer_shares
from model.tabular.number_readers import READERS, Readout, Scaled, read, scale

HORIZON_WEIGHTS = 8  # first of the numbers of the session's row that are the sums of the discounts
SPREAD = 7  # number of the session's row: mean absolute error of late, in standard deviations of the target
CHANGED = [i for i, name in enumerate(READERS) if name.endswith(", changed")]
LATEST = [i for i, name in enumerate(READERS) if name.endswith(", late")]
LARGEST_LOSS = 4.0
ERROR_SCALE = 2.0  # of an absolute error, in mean absolute errors, as a negative log-likelihood
ERRORS = 256  # latest errors that make the interval
COVERAGE = 0.9


class QueryReadout(NamedTuple):
    """The readout of a query, before the mixer."""

    scaled: Scaled
    readout: Readout
    inputs: Array  # [E, F] of the mixer


def read_query(memory: StreamMemory, query: Array) -> QueryReadout:
    """Return what the readers say of a query [C], which has as many columns as the memory's examples."""
    n, row = len(memory.values), memory.row
    scaled = scale(memory.x, query, memory.ordinals, memory.values)
    first = min(max(0, int(row[START]) - int(memory.ordinals[0])), n - 1)
    readout = read(scaled, first)
    globals_ = [
        math.log1p(n) / 7,
        math.log1p(len(scaled.query)) / 5,
        math.log1p(n - first) / 7,
        (n - first) / n,
        float(row[SPREAD]),
        float(np.std(readout.means)),
        n / (n + 20),
    ]
    assert len(globals_) == GLOBALS
    discounts = row[HORIZON_WEIGHTS : HORIZON_WEIGHTS + len(HORIZONS)]
    return QueryReadout(scaled, readout, number_inputs(readout.means, memory.losses, discounts, globals_))


def number_inputs(means: Array, losses: Array, weights: Array, globals_: list[float]) -> Array:
    """Return the mixer's inputs [E, F]; losses [E, H] are discounted sums of absolute errors."""
    H = len(HORIZONS)
    inputs = np.zeros((len(means), INPUTS), np.float32)
    average = losses / (weights + np.float32(0.3))
    relative = average / (average.min(0) + np.float32(0.02))
    inputs[:, :H], inputs[:, H : 2 * H] = np.log(np.maximum(relative, np.float32(0.1))), average
    median = np.median(means)
    for h in range(H):
        log_posterior(losses[:, h] * np.float32(ERROR_SCALE / (globals_[4] + 0.05)), inputs[:, 2 * H + h])
    inputs[:, 3 * H] = np.minimum(np.abs(means - median), 3)
    inputs[:, 3 * H + 1] = np.minimum(np.abs(means - means.mean()), 3)
    inputs[:, 3 * H + 3 :] = globals_
    return inputs


def mixture(reading: QueryReadout, mixer: MixerWeights) -> float:
    """Return the expected target."""
    shares = mixer_shares(*mixer[:5], reading.inputs)
    return reading.scaled.centre + reading.scaled.scale * float(shares @ reading.readout.means)


def interval(memory: StreamMemory, mean: float, scale: float) -> tuple[float, float]:
    """Return the interval around a mean that held COVERAGE of the latest targets (split conformal prediction).

    The first `extra` of an example is the absolute error with which its target was predicted.
    """
    errors = np.sort(memory.extra[-ERRORS:, 0][memory.ordinals[-ERRORS:] > 1])
    n = len(errors)
    rank = math.ceil(COVERAGE * (n + 1))
    reach = float(errors[rank - 1]) if rank <= n else max(2.0 * scale, 1.5 * float(errors.max(initial=0.0)))
    return mean - reach, mean + reach


def learn_number(memory: StreamMemory, reading: QueryReadout | None, mean: float, target: float) -> None:
    """Change the session's row and losses by a target; reading and mean: of the example, None for the first one."""
    row = memory.row
    row[COUNT] += 1
    if reading is None:
        return
    scaled = reading.scaled
    t = (target - scaled.centre) / scaled.scale
    errors = np.minimum(np.abs(reading.readout.means - np.float32(t)), np.float32(LARGEST_LOSS))
    discounts = np.array(HORIZONS, np.float32)
    memory.losses = memory.losses * discounts + errors[:, None]
    row[HORIZON_WEIGHTS : HORIZON_WEIGHTS + len(HORIZONS)] *= discounts
    row[HORIZON_WEIGHTS : HORIZON_WEIGHTS + len(HORIZONS)] += 1
    error = min(abs(mean - target) / scaled.scale, LARGEST_LOSS)
    row[SPREAD] += (error - row[SPREAD]) * max(0.03, 1 / float(row[COUNT]))
    gain = float(errors[CHANGED].mean() - errors[LATEST].mean()) / (float(row[SPREAD]) + 0.02)
    update_change(row, int(row[COUNT]), gain)
