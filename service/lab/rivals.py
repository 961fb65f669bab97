"""What needs no meta-training: those who know how the world was made, and online learners from well-kept libraries."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from model.scenarios.bandits import BernoulliBandit, Choices
from model.scenarios.card_sorting import CardSorting
from model.scenarios.core import Indices, Numbers, Tasks, Taught
from model.scenarios.streams import LabelStream, Streams, digits_of

NEIGHBOURS = (1, 3, 5)
Curve = NDArray[np.float64]
Choose = Callable[[Tasks], Indices]


def follow(tasks: Tasks) -> dict[str, Callable[[], Choose]]:
    """Ways to act that fit the scenario: what makes a player of new tasks."""
    if isinstance(tasks, CardSorting):
        return {"ideal observer": lambda: _teacher, "random": lambda: _random}
    if isinstance(tasks, BernoulliBandit):
        return {"Gittins index": lambda: _teacher, "Thompson sampling": lambda: _thompson, "random": lambda: _random}
    if isinstance(tasks, Choices):
        return {"LinUCB on traits": _LinUcb, "Thompson sampling, items apart": _Thompson, "random": lambda: _random}
    return {"random": lambda: _random}


def _random(tasks: Tasks) -> Indices:
    return tasks.rng.integers(tasks.actions, size=tasks.batch)


def _teacher(tasks: Tasks) -> Indices:
    assert isinstance(tasks, Taught)
    told = tasks.teacher()
    best: Indices = (told + 1e-6 * tasks.rng.random(told.shape)).argmax(1)
    return best


def _thompson(tasks: Tasks) -> Indices:
    assert isinstance(tasks, BernoulliBandit)
    best: Indices = tasks.rng.beta(1 + tasks.counts[..., 1], 1 + tasks.counts[..., 0]).argmax(1)
    return best


class _Thompson:
    """Counts of each item, and a prior with the population's mean."""

    def __init__(self) -> None:
        self._counts: NDArray[np.float64] | None = None

    def __call__(self, tasks: Tasks) -> Indices:
        if self._counts is None or len(self._counts) != tasks.batch:
            self._counts = np.zeros((tasks.batch, tasks.actions, 2))
        ones, zeros = self._counts[..., 1], self._counts[..., 0]
        best: Indices = tasks.rng.beta(0.6 + ones, 1.4 + zeros).argmax(1)
        return best

    def tell(self, action: object, reward: object) -> None:
        assert self._counts is not None
        taken, told = np.asarray(action), np.asarray(reward).astype(int)
        self._counts[np.arange(len(taken)), taken, told] += 1


class _LinUcb:
    """Ridge regression on the items' traits, one a task, and the width of its interval (Li et al. 2010)."""

    def __init__(self, width: float = 0.5) -> None:
        self._width = width
        self._sums: NDArray[np.float64] | None = None

    def __call__(self, tasks: Tasks) -> Indices:
        assert isinstance(tasks, Choices)
        x = np.concatenate([tasks.traits, np.ones((tasks.actions, 1))], axis=1)
        if self._sums is None:
            self._inverse = np.tile(np.eye(x.shape[1]), (tasks.batch, 1, 1))
            self._sums = np.zeros((tasks.batch, x.shape[1]))
        theta = np.einsum("bij,bj->bi", self._inverse, self._sums)
        spread = np.sqrt(np.einsum("ai,bij,aj->ba", x, self._inverse, x))
        self._x = x
        best: Indices = (theta @ x.T + self._width * spread).argmax(1)
        return best

    def tell(self, action: object, reward: object) -> None:
        assert self._sums is not None
        x, told = self._x[np.asarray(action)], np.asarray(reward)
        gained = np.einsum("bij,bj->bi", self._inverse, x)
        scale = 1 + (x * gained).sum(1)
        self._inverse -= gained[:, :, None] * gained[:, None, :] / scale[:, None, None]
        self._sums += told[:, None] * x


def label_stream(features: Numbers, labels: Indices, classes: int) -> dict[str, Curve]:
    """Whether online learners foresee each label [B, T] of streams of features [B, T, F]."""
    found = {f"{k}-nearest neighbours": np.zeros(labels.shape) for k in NEIGHBOURS}
    found["online SGD"] = np.zeros(labels.shape)
    for task, (x, y) in enumerate(zip(features, labels, strict=True)):
        order = ((x[:, None] - x[None]) ** 2).sum(-1)
        order[np.triu_indices(len(x))] = np.inf
        nearest = order.argsort(1, kind="stable")
        for k in NEIGHBOURS:
            for t in range(1, len(x)):
                votes = np.bincount(y[nearest[t, : min(k, t)]], minlength=classes)
                found[f"{k}-nearest neighbours"][task, t] = votes.argmax() == y[t]
        found["online SGD"][task] = _sgd(x, y, classes)
    return found


def _sgd(x: Numbers, y: Indices, classes: int) -> Curve:
    from sklearn.linear_model import SGDClassifier

    model = SGDClassifier(loss="log_loss", learning_rate="constant", eta0=0.1, random_state=0)
    right = np.zeros(len(x))
    for t in range(len(x)):
        if t:
            right[t] = model.predict(x[t : t + 1])[0] == y[t]
        model.partial_fit(x[t : t + 1], y[t : t + 1], classes=np.arange(classes))
    return right


def offline(tasks: Streams, features: Numbers, labels: Indices) -> dict[str, Curve]:
    """A classifier that was trained on all images that are not held out, and is told each task's labels: digits
    alone, and only where labels do not drift."""
    if not isinstance(tasks, LabelStream) or tasks.drift or tasks.source != "digits":
        return {}
    from sklearn.svm import SVC

    images = digits_of(held_out=False)
    classes = np.repeat(np.arange(10), [len(one) for one in images])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = SVC(C=10).fit(np.concatenate(images).reshape(len(classes), -1), classes)
    right = np.zeros(labels.shape)
    for task, (x, y) in enumerate(zip(features, labels, strict=True)):
        place = {int(one): number for number, one in enumerate(tasks.classes[task])}
        said = np.array([tasks.labels[task, place[int(one)]] for one in model.predict(x)])
        right[task] = said == y
    return {"offline classifier": right}
