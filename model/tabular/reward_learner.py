"""The learner of rewards between a pool and the arrays of `arms`."""

from __future__ import annotations

import copy
import math

import numpy as np

from model.memory import Draft, Pool
from model.tabular.arm_readers import E
from model.tabular.arms import decide, learn_reward, read_decision
from model.tabular.backend import Decision, FloatArray, IntArray, Learned, Vote
from model.tabular.checkpoint import TabularModel
from model.tabular.config import TabularError
from model.tabular.memory import FEATURES, StreamMemory, read_memory, write_memory

VOTES = 5


class Bandit(TabularModel):
    """A learner of rewards; see `model.tabular.backend.RewardLearner`."""

    def prepare(self, pool: Pool) -> None:
        """Compile the steps on a draft that is dropped; see `Learner.prepare`."""
        draft = pool.draft(0)
        for arm in (0, 1, 0, 1):
            x = np.array([arm, 1.0], np.float32)
            self.decide(x, np.arange(2), np.eye(2, dtype=np.float32), pool, draft.index)
            self.learn(x, arm, x, 1.0, 0.5, draft)
        draft.rollback()

    def decide(
        self, context: FloatArray, arms: IntArray, features: FloatArray | None, pool: Pool, session: int
    ) -> Decision:
        """Return the decision among arms [A], in their order. Raises TabularError for arms out of range or repeated."""
        arms = np.asarray(arms, np.int64)
        if not len(arms) or len(set(arms.tolist())) < len(arms):
            raise TabularError(f"arms must be distinct, and one at least, got {arms.tolist()[:20]}")
        for arm in (int(arms.min()), int(arms.max())):
            self._check_arm(arm)
        memory = self._memory(pool, session, context, features)
        queries = np.stack([memory.pad(context, None if features is None else features[i]) for i in range(len(arms))])
        reading = read_decision(memory, queries, arms, bool(memory.row[FEATURES]))
        probs = decide(reading)
        return Decision(probs, reading.mean, _latest(memory, int(arms[probs.argmax()])))

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
        self._check_arm(arm)
        if not math.isfinite(reward) or abs(reward) > float(np.finfo(np.float32).max):
            raise TabularError(f"reward must be a finite float32, got {reward}")
        reward = float(np.float32(reward))  # as it is stored, so that learning it again leaves the same bits
        own = None if features is None else features[None]
        before = self._memory(draft.pool, draft.index, context, own)
        padded, after = before.pad(context, features), copy.copy(before)
        reading = read_decision(before, padded[None], np.array([arm]), bool(before.row[FEATURES]))
        after.row = before.row.copy()
        learn_reward(after, reading, reward)
        write_memory(draft, before, after, padded, reward, (arm, propensity))
        if not len(before.values):
            return Learned(0.0, 0.0, 0.0)
        expected, constant = float(reading.mean[0]), float(before.values.mean(dtype=np.float64))
        return Learned(((expected - reward) / reading.scale) ** 2, ((constant - reward) / reading.scale) ** 2, 0.0)

    def _check_arm(self, arm: int) -> None:
        if not 0 <= arm < self.config.arms:
            raise TabularError(f"arm must be in 0..{self.config.arms - 1}, got {arm}")

    def _memory(self, pool: Pool, session: int, context: FloatArray, features: FloatArray | None) -> StreamMemory:
        memory = read_memory(pool, session, E)
        memory.widen(len(context), 0 if features is None else features.shape[1])
        self.check_columns(memory.x.shape[1])
        return memory


def _latest(memory: StreamMemory, arm: int) -> list[Vote]:
    """Return the latest examples of an arm, with equal votes."""
    own = memory.ordinals[memory.extra[:, 0] == arm][::-1][:VOTES]
    return [Vote(int(ordinal), 1.0 / len(own)) for ordinal in own]
