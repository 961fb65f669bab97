"""Baselines that need no meta-training and fit more than one scenario: actors, and online classifiers.

A baseline of one scenario alone is in the file of its scenario.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.scenarios.core import Actor, Curve, FloatArray, IntArray, Tasks, TeacherTasks

NEIGHBOURS = (1, 3, 5)


class RandomActor(Actor):
    """An actor that draws actions uniformly."""

    def act(self, tasks: Tasks) -> IntArray:
        return tasks.rng.integers(tasks.actions, size=tasks.batch)


class TeacherActor(Actor):
    """An actor that takes the teacher's best action, ties broken at random."""

    def act(self, tasks: Tasks) -> IntArray:
        assert isinstance(tasks, TeacherTasks)
        scores = tasks.teacher_scores()
        best: IntArray = (scores + 1e-6 * tasks.rng.random(scores.shape)).argmax(1)
        return best


class LinearContextualBandit(Actor):
    """Ridge regression of the rewards, one model a task, on `_design`'s features.

    drawn = False: LinUCB, the highest upper confidence bound (Li et al. 2010, arXiv 1003.0146). drawn = True: linear
    Thompson sampling, the best action under weights drawn from the posterior. width: scale of the uncertainty.
    """

    def __init__(self, width: float = 0.5, *, drawn: bool = False) -> None:
        self._width, self._drawn = width, drawn
        self._sums: NDArray[np.float64] | None = None

    def act(self, tasks: Tasks) -> IntArray:
        x = self._x = _design(tasks)
        if self._sums is None:
            self._inverse = np.tile(np.eye(x.shape[-1]), (tasks.batch, 1, 1))
            self._sums = np.zeros((tasks.batch, x.shape[-1]))
        theta = np.einsum("bij,bj->bi", self._inverse, self._sums)
        if self._drawn:
            noise = tasks.rng.normal(size=theta.shape)
            theta += self._width * np.einsum("bij,bj->bi", np.linalg.cholesky(self._inverse), noise)
        value = np.einsum("bai,bi->ba", x, theta)
        if not self._drawn:
            value += self._width * np.sqrt((np.einsum("bai,bij->baj", x, self._inverse) * x).sum(-1))
        best: IntArray = value.argmax(1)
        return best

    def learn(self, actions: IntArray, rewards: FloatArray) -> None:
        """Update the inverse covariance by the Sherman–Morrison formula."""
        assert self._sums is not None
        x = self._x[np.arange(len(actions)), actions]
        gained = np.einsum("bij,bj->bi", self._inverse, x)
        scale = 1 + (x * gained).sum(1)
        self._inverse -= gained[:, :, None] * gained[:, None, :] / scale[:, None, None]
        self._sums += rewards[:, None] * x


def _design(tasks: Tasks) -> NDArray[np.float64]:
    """Return the features [B, A, m] of a linear model: an action's own, or the context in a block for each action."""
    observations = tasks.observe().astype(np.float64)
    context, features = observations[:, : tasks.context], observations[:, tasks.context :]
    one = np.ones((tasks.batch, tasks.actions, 1))
    if tasks.features:
        return np.concatenate([features.reshape(*one.shape[:2], -1), one], axis=2)
    block = np.concatenate([context, one[:, 0]], axis=1)
    x: NDArray[np.float64] = np.einsum("ac,bi->baci", np.eye(tasks.actions), block).reshape(*one.shape[:2], -1)
    return x


class VowpalWabbit(Actor):
    """Vowpal Wabbit's contextual bandit (SquareCB), one learner a task.

    An action's features are its index and its own features; the context's features are crossed with them.
    """

    SETTINGS = "--cb_explore_adf --squarecb -q sa -b 10 --quiet"

    def __init__(self) -> None:
        self._learners: list[Any] = []

    def act(self, tasks: Tasks) -> IntArray:
        import vowpalwabbit  # slow to import

        if not self._learners:
            self._learners = [vowpalwabbit.Workspace(self.SETTINGS) for _ in range(tasks.batch)]
        observations = tasks.observe()
        self._context = ["shared |s " + _vw_features(context) for context in observations[:, : tasks.context]]
        features = observations[:, tasks.context :].reshape(tasks.batch, tasks.actions, tasks.features)
        self._actions = [[f"|a n{n} {_vw_features(one)}" for n, one in enumerate(task)] for task in features]
        examples = zip(self._learners, self._context, self._actions, strict=True)
        self._probs = np.array([learner.predict("\n".join([shared, *lines])) for learner, shared, lines in examples])
        cumulated = self._probs.cumsum(1)
        drawn: IntArray = (cumulated < tasks.rng.random((tasks.batch, 1)) * cumulated[:, -1:]).sum(1)
        return drawn

    def learn(self, actions: IntArray, rewards: FloatArray) -> None:
        for task, (action, reward) in enumerate(zip(actions, rewards, strict=True)):
            lines = list(self._actions[task])
            lines[action] = f"0:{-reward}:{self._probs[task, action]} {lines[action]}"
            self._learners[task].learn("\n".join([self._context[task], *lines]))


def _vw_features(numbers: FloatArray) -> str:
    """Return numbers in Vowpal Wabbit's text format."""
    return " ".join(f"x{index}:{number:.5f}" for index, number in enumerate(numbers))


def online_classifiers(features: FloatArray, labels: IntArray, classes: int) -> dict[str, Curve]:
    """Return whether online classifiers predict each label [B, T] of streams of features [B, T, F], by their names."""
    correct = {f"{k}-nearest neighbours": np.zeros(labels.shape) for k in NEIGHBOURS}
    correct["online SGD"] = np.zeros(labels.shape)
    for task, (x, y) in enumerate(zip(features, labels, strict=True)):
        distances = ((x[:, None] - x[None]) ** 2).sum(-1)
        distances[np.triu_indices(len(x))] = np.inf
        nearest = distances.argsort(1, kind="stable")
        for k in NEIGHBOURS:
            for t in range(1, len(x)):
                votes = np.bincount(y[nearest[t, : min(k, t)]], minlength=classes)
                correct[f"{k}-nearest neighbours"][task, t] = votes.argmax() == y[t]
        correct["online SGD"][task] = _sgd(x, y, classes)
    return correct


def _sgd(x: FloatArray, y: IntArray, classes: int) -> Curve:
    from sklearn.linear_model import SGDClassifier  # slow to import

    model = SGDClassifier(loss="log_loss", learning_rate="constant", eta0=0.1, random_state=0)
    correct = np.zeros(len(x))
    for t in range(len(x)):
        if t:
            correct[t] = model.predict(x[t : t + 1])[0] == y[t]
        model.partial_fit(x[t : t + 1], y[t : t + 1], classes=np.arange(classes))
    return correct
