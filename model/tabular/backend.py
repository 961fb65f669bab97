"""The contract of the tabular learners: the protocol between the memory of a stream and the engine.

A learner reads and writes rows of one session through a pool and a draft, and keeps no other state. A caller names a
session by its index in the pool (`session`; `draft.index` reads what a draft has written); session 0 is the empty one.

- An example is `x`, float32 [C] with 1 ≤ C ≤ `config.columns`; NaN is a missing value, and so is a column that a
  shorter example lacks. The meaning of column c never changes within a session; new columns are appended. Categories
  come as columns of 0 and 1. Infinite values count as missing. Neither order nor scale of the columns matters.
- A label is an index 0, 1, …; the first example of a new label has the next free index. The caller keeps the names.
- The ordinal of an example is its number in the session: 1 for the first that was learned. A caller that knows how
  many examples each version has learned can tell the version of an ordinal.
- The same calls in the same order give the same bits, whatever other sessions do. `predict` and `decide` change no
  state. `learn` raises PoolFullError if the pool has no room: roll the draft back.
- `loss` is what the learner lost on the example before it learned the example, in nats for labels and rewards in 0…1,
  else as a squared error in units of the targets' variance; `frozen_loss` is the same for the best constant so far.
  `hit` is 1 if the learner would have been right (labels), else 0.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from model.memory import Draft, Pool
from model.tabular.config import TabularConfig

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


class Vote(NamedTuple):
    """A learned example that spoke for a prediction: its ordinal, and its share of all votes."""

    ordinal: int
    weight: float


class Prediction(NamedTuple):
    """The distribution of a label.

    probs [L]: probability of each label that the session has seen, in the order of the labels' indices.
    unknown: probability of a label never seen; probs and unknown sum to 1. An empty session has unknown = 1.
    votes: the nearest examples, the heaviest first.
    """

    probs: FloatArray
    unknown: float
    votes: list[Vote]


class Estimate(NamedTuple):
    """The distribution of a number: its mean, and an interval that holds the number with probability 0.9.

    An empty session has mean 0 and an infinite interval.
    """

    mean: float
    lower: float
    upper: float
    votes: list[Vote]


class Decision(NamedTuple):
    """The decision among A arms.

    probs [A]: probability with which each arm is to be drawn; the caller draws. expected [A]: expected reward of each
    arm, in the units of the rewards.
    """

    probs: FloatArray
    expected: FloatArray
    votes: list[Vote]


class Learned(NamedTuple):
    """The outcome of learning one example; see the module's head."""

    loss: float
    frozen_loss: float
    hit: float


class Learner(Protocol):
    """The methods that the learners of all tasks have."""

    @property
    def config(self) -> TabularConfig:
        """Return the configuration; `config.memory` is what a pool for its sessions needs."""

    def fingerprint(self) -> str:
        """Return the identity of the slow weights, to which a stored session is bound."""

    def prepare(self, pool: Pool) -> None:
        """Compile and warm up whatever the steps need, once, before sessions are served. Changes no state."""


class LabelLearner(Learner, Protocol):
    """A learner of labels."""

    def num_labels(self, pool: Pool, session: int) -> int:
        """Return the number of labels that the session has seen."""

    def predict(self, x: FloatArray, pool: Pool, session: int) -> Prediction:
        """Return the distribution of the label of an example [C]."""

    def learn(self, x: FloatArray, label: int, draft: Draft) -> Learned:
        """Learn the label of an example [C]. Raises TabularError for a label that skips an index or is too high."""


class NumberLearner(Learner, Protocol):
    """A learner of numbers."""

    def predict(self, x: FloatArray, pool: Pool, session: int) -> Estimate:
        """Return the distribution of the target of an example [C]."""

    def learn(self, x: FloatArray, target: float, draft: Draft) -> Learned:
        """Learn the target of an example [C]. Raises TabularError for a target that is not finite."""


class RewardLearner(Learner, Protocol):
    """A learner of rewards, which chooses arms. An arm is an index in 0…`config.arms` − 1 that the caller gives.

    context: float32 [C], C may be 0. features: float32 [A, F] of the arms of a decision, or None. An arm that was never
    seen is judged by its features and by what new arms brought.
    """

    def decide(
        self, context: FloatArray, arms: IntArray, features: FloatArray | None, pool: Pool, session: int
    ) -> Decision:
        """Return the decision among arms [A], in their order."""

    def learn(
        self,
        context: FloatArray,
        arm: int,
        features: FloatArray | None,
        reward: float,
        propensity: float,
        draft: Draft,
    ) -> Learned:
        """Learn the reward of an arm that was drawn with probability `propensity`; features [F] are the arm's own."""
