"""What a scenario is: many tasks of one kind at once, and any of them as a `gymnasium` environment."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


class Tasks(ABC):
    """B tasks that go on step by step; each is drawn anew, none ends by itself.

    context: numbers of an observation that all actions share; features: numbers of each action's own; actions: how many
    there are. An observation is the context's numbers and then each action's.
    """

    context: int = 0
    features: int = 0
    actions: int

    def __init__(self, batch: int, rng: np.random.Generator) -> None:
        self.batch = batch
        self.rng = rng

    @abstractmethod
    def observe(self) -> FloatArray:
        """What can be seen now [B, context + actions · features]."""

    @abstractmethod
    def step(self, actions: IntArray) -> FloatArray:
        """Takes an action [B] in each task, and returns the rewards [B]; the next observation is another."""

    @abstractmethod
    def means(self) -> FloatArray:
        """The expected reward of each action [B, A], as only the world knows it: what regret is counted from."""


class TeacherTasks(Tasks):
    """Tasks of a kind that somebody knows."""

    @abstractmethod
    def teacher_scores(self) -> FloatArray:
        """How good each action is [B, A] in the eyes of somebody who knows the kind of task, but not the task."""

    def expected_rewards(self) -> FloatArray:
        """The reward of each action [B, A] that the same one expects."""
        return self.teacher_scores()


class TaskEnv(gymnasium.Env[FloatArray, np.int64]):
    """One task as an environment of `steps` steps; `info` bears the regret of each."""

    metadata = {"render_modes": []}  # noqa: RUF012 (gymnasium's own name)

    def __init__(self, tasks: type[Tasks], steps: int, **options: Any) -> None:
        super().__init__()
        self._make = lambda rng: tasks(1, rng, **options)
        self._steps = steps
        self._task = self._make(np.random.default_rng(0))
        size = self._task.context + self._task.actions * self._task.features
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(self._task.actions)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[FloatArray, dict[str, Any]]:
        super().reset(seed=seed)
        self._task, self._done = self._make(self.np_random), 0
        return self._task.observe()[0], {}

    def step(self, action: np.int64) -> tuple[FloatArray, float, bool, bool, dict[str, Any]]:
        if not self.action_space.contains(action):
            raise ValueError(f"action must be in 0..{self._task.actions - 1}, got {action}")
        means = self._task.means()[0]
        reward = float(self._task.step(np.array([action]))[0])
        self._done += 1
        info = {"regret": float(means.max() - means[action])}
        return self._task.observe()[0], reward, False, self._done >= self._steps, info
