"""Walks over the states of tasks of several steps: to a goal that is not seen, and how far away it is."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from research.scenarios.core import FloatArray, IntArray, TeacherTasks


class GoalTasks(TeacherTasks):
    """Walks in which entering the goal pays 1 and puts the agent into a random state; any other step pays 0.

    moves: probability that a goal which was found moves to another state. next: the state [B, S, A] that each action
    leads to. goal, state: [B]. believed: the state where the goal was last found, [B]; −1: nowhere since it was missed.
    missed: states that were entered without a goal since then, [B, S].
    """

    def __init__(self, batch: int, rng: np.random.Generator, moves: float) -> None:
        super().__init__(batch, rng)
        self.moves = moves

    def begin(self, following: IntArray) -> None:
        """Take the states that actions lead to [B, S, A], and draw goals and first states."""
        self.next, self.num_states = following, following.shape[1]
        self.goal, self.state = self.rng.integers(self.num_states, size=(2, self.batch))
        self.believed = np.full(self.batch, -1)
        self.missed = np.zeros((self.batch, self.num_states), bool)

    def step(self, actions: IntArray) -> FloatArray:
        task = np.arange(self.batch)
        self.state = self.next[task, self.state, actions]
        found = self.state == self.goal
        self.missed[task, self.state] = True
        self.missed[found] = False
        lost = ~found & (self.state == self.believed)
        self.believed = np.where(found, self.goal, np.where(lost, -1, self.believed))
        self.goal = np.where(found & (self.rng.random(self.batch) < self.moves), self._random_states(), self.goal)
        self.state = np.where(found, self._random_states(), self.state)
        reward: FloatArray = found.astype(np.float32)
        return reward

    def means(self) -> FloatArray:
        """Return minus the number of steps to the goal [B, A] after each action: the regret is in steps."""
        return -steps_after(self.next, self.state, np.equal(np.arange(self.num_states), self.goal[:, None]))

    def wanted(self) -> NDArray[np.bool_]:
        """Return the states [B, S] where a teacher looks for the goal: where it was last found, or not yet missed."""
        believed = np.equal(np.arange(self.num_states), self.believed[:, None])
        looked_for: NDArray[np.bool_] = np.where(self.believed[:, None] < 0, ~self.missed, believed)
        return looked_for

    def _random_states(self) -> IntArray:
        return self.rng.integers(self.num_states, size=self.batch)


def steps_after(following: IntArray, state: IntArray, wanted: NDArray[np.bool_]) -> FloatArray:
    """Return the number of steps [B, A] from a state [B] to the nearest wanted one, that of each first action included.

    following [B, S, A]: the state that each action leads to; −1 = nowhere. wanted [B, S]. A state without a way counts
    as S steps away.
    """
    (B, S, _), task = following.shape, np.arange(len(state))
    steps = np.where(wanted, 0, S)
    steps = np.concatenate([steps, np.full((B, 1), S)], 1)  # the last one is nowhere
    for _ in range(S):
        nearer = np.minimum(steps[:, :S], 1 + steps[task[:, None, None], following].min(2))
        if (nearer == steps[:, :S]).all():
            break
        steps[:, :S] = nearer
    return (1 + steps[task[:, None], following[task, state]]).astype(np.float32)
