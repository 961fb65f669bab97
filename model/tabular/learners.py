"""The learners of the three tasks."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np

from model.memory import Draft, Pool
from model.tabular.backend import Decision, Estimate, FloatArray, IntArray, Learned, Vote
from model.tabular.checkpoint import read_tabular
from model.tabular.config import TabularConfig, TabularError
from model.tabular.examples import CLASSES, COLUMNS, COUNT, read_examples, read_session, write_example, write_session
from model.tabular.label_learner import Labels
from model.tabular.label_readers import E
from model.tabular.mixer import Mixer

NEIGHBOURS, VOTES = 8, 5
INTERVAL = 1.645  # standard deviations around the mean that hold a normal number with probability 0.9


class _Learner:
    """What the learners of all tasks share."""

    def __init__(self, config: TabularConfig) -> None:
        self.config = config

    def fingerprint(self) -> str:
        """Return the identity of the slow weights; see `Learner.fingerprint`."""
        return f"sha256:{hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode()).hexdigest()}"

    def prepare(self, pool: Pool) -> None:
        """Warm up the steps; see `Learner.prepare`."""

    def _nearest(self, x: FloatArray, pool: Pool, session: int) -> tuple[FloatArray, ...]:
        """Return weights, values, extras and ordinals of the examples, weights falling with the distance to x."""
        columns = max(int(read_session(pool, session)[COLUMNS]), len(x))
        examples = read_examples(pool, session, columns)
        if not len(examples.ordinals):
            return examples.values, examples.values, examples.extra, examples.ordinals
        query = self._pad(x, columns)
        present = np.isfinite(examples.x)
        filled, count = np.where(present, examples.x, 0.0), present.sum(0) + 1e-9
        mean = filled.sum(0) / count
        deviation = np.sqrt((np.where(present, examples.x - mean, 0.0) ** 2).sum(0) / count) + 1e-6
        difference = np.clip((examples.x - query) / deviation, -4, 4) ** 2
        distances = np.where(np.isfinite(difference), difference, 2.0).sum(1)
        scale = np.partition(distances, min(NEIGHBOURS, len(distances)) - 1)[:NEIGHBOURS].max() + 1e-6
        weights = np.exp(-4.0 * distances / scale).astype(np.float32)
        return weights, examples.values, examples.extra, examples.ordinals

    def _pad(self, x: FloatArray, columns: int) -> FloatArray:
        if len(x) > self.config.columns:
            raise TabularError(f"x must have at most {self.config.columns} columns, got {len(x)}")
        padded = np.full(columns, np.nan, np.float32)
        padded[: len(x)] = x
        return padded

    def _write(self, x: FloatArray, value: float, extra: tuple[float, float], classes: int, draft: Draft) -> None:
        row = read_session(draft.pool, draft.index)
        row[COUNT] += 1
        row[COLUMNS], row[CLASSES] = max(int(row[COLUMNS]), len(x)), max(int(row[CLASSES]), classes)
        write_example(self._pad(x, int(row[COLUMNS])), value, extra, int(row[COUNT]), draft)
        write_session(row, draft)


def _votes(weights: FloatArray, ordinals: FloatArray) -> list[Vote]:
    best = np.argsort(-weights, kind="stable")[:VOTES]
    total = float(weights.sum())
    return [Vote(int(ordinals[i]), float(weights[i]) / total) for i in best]


class Regression(_Learner):
    """A learner of numbers; see `model.tabular.backend.NumberLearner`."""

    def predict(self, x: FloatArray, pool: Pool, session: int) -> Estimate:
        """Return the distribution of the target of an example [C]."""
        weights, targets, _, ordinals = self._nearest(x, pool, session)
        if not len(targets):
            return Estimate(0.0, -math.inf, math.inf, [])
        mean = float((weights * targets).sum() / weights.sum())
        spread = INTERVAL * float(np.sqrt((weights * (targets - mean) ** 2).sum() / weights.sum()) + targets.std() / 10)
        return Estimate(mean, mean - spread, mean + spread, _votes(weights, ordinals))

    def learn(self, x: FloatArray, target: float, draft: Draft) -> Learned:
        """Learn the target of an example [C]. Raises TabularError for a target that is not finite."""
        if not math.isfinite(target):
            raise TabularError(f"target must be finite, got {target}")
        mean = self.predict(x, draft.pool, draft.index).mean
        targets = read_examples(draft.pool, draft.index, 1).values
        variance, constant = (float(targets.var()) + 1e-9, float(targets.mean())) if len(targets) else (1.0, 0.0)
        self._write(x, target, (0.0, 0.0), 0, draft)
        return Learned((mean - target) ** 2 / variance, (constant - target) ** 2 / variance, 0.0)


class Bandit(_Learner):
    """A learner of rewards; see `model.tabular.backend.RewardLearner`."""

    def decide(
        self, context: FloatArray, arms: IntArray, features: FloatArray | None, pool: Pool, session: int
    ) -> Decision:
        """Return the decision among arms [A], in their order."""
        expected, width = np.zeros(len(arms)), np.zeros(len(arms))
        votes: list[Vote] = []
        for i, arm in enumerate(arms):
            own = context if features is None else np.concatenate([context, features[i]])
            weights, rewards, extra, _ = self._nearest(own, pool, session)
            weights = weights * (1.0 if features is not None else extra[:, 0] == arm)
            expected[i] = (weights @ rewards + 0.5 * (rewards.mean() if len(rewards) else 0)) / (weights.sum() + 0.5)
            width[i] = 1 / math.sqrt(weights.sum() + 0.5)
        scores = np.exp(8 * (expected + 0.1 * width - (expected + 0.1 * width).max()))
        return Decision((scores / scores.sum()).astype(np.float32), expected.astype(np.float32), votes)

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
        if not 0 <= arm < self.config.arms:
            raise TabularError(f"arm must be in 0..{self.config.arms - 1}, got {arm}")
        own = context if features is None else np.concatenate([context, features])
        given = None if features is None else features[None]
        expected = float(self.decide(context, np.array([arm]), given, draft.pool, draft.index).expected[0])
        rewards = read_examples(draft.pool, draft.index, 1).values
        constant = float(rewards.mean()) if len(rewards) else 0.0
        self._write(own, reward, (arm, propensity), 0, draft)
        return Learned((expected - reward) ** 2, (constant - reward) ** 2, 0.0)


Learners = Labels | Regression | Bandit


def new_learner(config: TabularConfig) -> Learners:
    """Return an untrained learner of a configuration."""
    if config.task == "labels":
        return Labels(config, Mixer(E))
    return Regression(config) if config.task == "regression" else Bandit(config)


def load_learner(path: Path) -> Learners:
    """Read a learner from a file of `save_tabular`. Raises TabularError."""
    config, mixer = read_tabular(path)
    return Labels(config, mixer) if config.task == "labels" else new_learner(config)
