"""The interfaces of a scenario: a batch of tasks, an actor that plays them, and one task as a `gymnasium` environment.

The module holds no world and no policy.

Shapes: B tasks, A actions, T steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]
Curve = NDArray[np.float64]


class Tasks(ABC):
    """A batch of B tasks of one kind, played step by step; each is drawn at random, and none ends by itself.

    context: number of observed values that all actions share. features: number of observed values of each action.
    actions: number of actions. An observation is the context, then the features of each action.
    """

    context: int = 0
    features: int = 0
    actions: int

    def __init__(self, batch: int, rng: np.random.Generator) -> None:
        self.batch = batch
        self.rng = rng

    @abstractmethod
    def observe(self) -> FloatArray:
        """Return the current observations [B, context + A·features]."""

    @abstractmethod
    def step(self, actions: IntArray) -> FloatArray:
        """Take an action [B] in each task, move on to the next observation and return the rewards [B]."""

    @abstractmethod
    def means(self) -> FloatArray:
        """Return the expected reward of each action [B, A] under the true parameters; regret is counted from it."""


class TeacherTasks(Tasks):
    """Tasks with a teacher: a solver that knows the distribution of tasks, but not the task at hand."""

    @abstractmethod
    def teacher_scores(self) -> FloatArray:
        """Return the teacher's score of each action [B, A]; the teacher takes the highest."""

    def expected_rewards(self) -> FloatArray:
        """Return the reward of each action [B, A] that the teacher expects."""
        return self.teacher_scores()


class LabellingTasks(Tasks):
    """Tasks in which an action is an answer and the correct answer is revealed after each step.

    regime_start [B]: first step from which on all answers of the task follow the current rule.
    """

    def __init__(self, batch: int, rng: np.random.Generator) -> None:
        super().__init__(batch, rng)
        self.regime_start = np.zeros(batch, np.int64)

    @abstractmethod
    def targets(self) -> IntArray:
        """Return the correct answers [B] to the current observations."""

    def read(self, steps: int) -> tuple[FloatArray, IntArray, IntArray]:
        """Play `steps` (T) steps with correct answers.

        Returns the observations [B, T, F], the correct answers [B, T] and the start of their regimes [B, T].
        """
        observations, targets, regime_start = [], [], []
        for _ in range(steps):
            observations.append(self.observe())
            targets.append(self.targets())
            regime_start.append(self.regime_start.copy())
            self.step(targets[-1])
        return np.stack(observations, 1), np.stack(targets, 1), np.stack(regime_start, 1)

    def means(self) -> FloatArray:
        return np.eye(self.actions, dtype=np.float32)[self.targets()]


class Actor(ABC):
    """A player of B tasks at once, which may learn from the rewards. An actor plays one batch of tasks."""

    @abstractmethod
    def act(self, tasks: Tasks) -> IntArray:
        """Return an action [B] for the current observation of each task."""

    def learn(self, actions: IntArray, rewards: FloatArray) -> None:  # noqa: B027 (learning is optional)
        """Learn from the rewards [B] of the last actions [B]; an actor that does not learn ignores them."""


def sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 1 / (1 + exp(−x)), any shape."""
    return 1 / (1 + np.exp(-x))


class TaskEnv(gymnasium.Env[FloatArray, np.int64]):
    """One task as an environment of `steps` steps; `info["regret"]` is the regret of the step."""

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
