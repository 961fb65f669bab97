"""The learner of labels between a pool and the arrays of `labels`."""

from __future__ import annotations

import copy
import math

import numpy as np

from model.memory import Draft, Pool
from model.numba_support import Array
from model.tabular.backend import FloatArray, Learned, Prediction, Vote
from model.tabular.checkpoint import TabularModel
from model.tabular.config import TabularError
from model.tabular.label_readers import PRIOR, E
from model.tabular.labels import learn_label, mixture, read_query
from model.tabular.memory import COUNT, LABELS, write_memory

VOTES = 5
LEAST_PROB = 1e-6


class Labels(TabularModel):
    """A learner of labels; see `model.tabular.backend.LabelLearner`."""

    def num_labels(self, pool: Pool, session: int) -> int:
        """Return the number of labels that the session has seen."""
        return int(self.session_row(pool, session)[LABELS])

    def prepare(self, pool: Pool) -> None:
        """Compile the steps on a draft that is dropped; see `Learner.prepare`."""
        draft = pool.draft(0)
        for label in (0, 1, 0, 1):
            self.learn(np.array([label, 1.0], np.float32), label, draft)
        draft.rollback()

    def predict(self, x: FloatArray, pool: Pool, session: int) -> Prediction:
        """Return the distribution of the label of an example [C]."""
        memory = self.wide_memory(pool, session, len(x), E)
        if not memory.row[COUNT]:
            return Prediction(np.zeros(0, np.float32), 1.0, [])
        reading = read_query(memory, memory.pad(x))
        mixed = mixture(reading, self.mixer_weights, memory.row)
        return Prediction(
            mixed.probs, mixed.unknown, votes(reading.readout.nearest, reading.readout.votes, memory.ordinals)
        )

    def learn(self, x: FloatArray, label: int, draft: Draft) -> Learned:
        """Learn the label of an example [C]. Raises TabularError for a label that skips an index or is too high."""
        before = self.wide_memory(draft.pool, draft.index, len(x), E)
        limit = min(before.num_labels, self.config.labels - 1)
        if not 0 <= label <= limit:
            raise TabularError(f"label must be in 0..{limit}, got {label}")
        padded, after, reading, mixed, outcome = before.pad(x), copy.copy(before), None, None, Learned(0.0, 0.0, 0.0)
        if before.row[COUNT]:
            reading = read_query(before, padded)
            mixed = mixture(reading, self.mixer_weights, before.row)
            probs, unknown = mixed.probs, mixed.unknown
            known = label < before.num_labels
            prior = reading.readout.probs[PRIOR, label] * (1 - unknown) if known else unknown
            outcome = Learned(
                -math.log(max(float(probs[label]) if known else unknown, LEAST_PROB)),
                -math.log(max(float(prior), LEAST_PROB)),
                float(known and int(probs.argmax()) == label),
            )
        after.row, after.weights = before.row.copy(), before.weights.copy()
        learn_label(after, reading, label, mixed)
        write_memory(draft, before, after, padded, label, (0.0, 0.0))
        return outcome


def votes(nearest: Array, weights: Array, ordinals: Array) -> list[Vote]:
    """Return the votes of the nearest examples, the heaviest first; ordinals [n] of all examples."""
    total = max(float(weights.sum()), 1e-9)
    pairs = zip(nearest[:VOTES].tolist(), weights[:VOTES].tolist(), strict=True)
    return [Vote(int(ordinals[i]), weight / total) for i, weight in pairs]
