"""The learner of numbers between a pool and the arrays of `numbers`."""

from __future__ import annotations

import copy
import math

import numpy as np

from model.memory import Draft, Pool
from model.tabular.backend import Estimate, FloatArray, Learned
from model.tabular.checkpoint import TabularModel
from model.tabular.config import TabularError
from model.tabular.label_learner import votes
from model.tabular.memory import COUNT, write_memory
from model.tabular.number_readers import E
from model.tabular.numbers import interval, learn_number, mixture, read_query


class Regression(TabularModel):
    """A learner of numbers; see `model.tabular.backend.NumberLearner`."""

    def prepare(self, pool: Pool) -> None:
        """Compile the steps on a draft that is dropped; see `Learner.prepare`."""
        draft = pool.draft(0)
        for target in (0.0, 1.0, 0.0, 1.0):
            self.learn(np.array([target, 1.0], np.float32), target, draft)
        draft.rollback()

    def predict(self, x: FloatArray, pool: Pool, session: int) -> Estimate:
        """Return the distribution of the target of an example [C]."""
        memory = self.wide_memory(pool, session, len(x), E)
        if not memory.row[COUNT]:
            return Estimate(0.0, -math.inf, math.inf, [])
        reading = read_query(memory, memory.pad(x))
        mean = mixture(reading, self.mixer_weights)
        lower, upper = interval(memory, mean, reading.scaled.scale)
        return Estimate(mean, lower, upper, votes(reading.readout.nearest, reading.readout.votes, memory.ordinals))

    def learn(self, x: FloatArray, target: float, draft: Draft) -> Learned:
        """Learn the target of an example [C]. Raises TabularError for a target that is not finite."""
        if not math.isfinite(target) or abs(target) > float(np.finfo(np.float32).max):
            raise TabularError(f"target must be a finite float32, got {target}")
        target = float(np.float32(target))  # as it is stored, so that learning it again leaves the same bits
        before = self.wide_memory(draft.pool, draft.index, len(x), E)
        padded, after, reading, mean, outcome = before.pad(x), copy.copy(before), None, 0.0, Learned(0.0, 0.0, 0.0)
        if before.row[COUNT]:
            reading = read_query(before, padded)
            mean = mixture(reading, self.mixer_weights)
            centre, scale = reading.scaled.centre, reading.scaled.scale
            outcome = Learned(((mean - target) / scale) ** 2, ((centre - target) / scale) ** 2, 0.0)
        after.row = before.row.copy()
        learn_number(after, reading, mean, target)
        write_memory(draft, before, after, padded, target, (abs(mean - target), 0.0))
        return outcome
