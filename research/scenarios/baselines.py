"""What needs no meta-training: those who know how the world was made, and online learners from well-kept libraries."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.scenarios.bandits import BernoulliBandit, Choices, LinearBandit
from research.scenarios.card_sorting import CardSorting
from research.scenarios.core import FloatArray, IntArray, Tasks, TeacherTasks
from research.scenarios.streams import FunctionStream, LabellingTasks, LabelStream, load_digit_images

NEIGHBOURS = (1, 3, 5)
WAVES = 100
Curve = NDArray[np.float64]
Choose = Callable[[Tasks], IntArray]


def acting_baselines(tasks: Tasks) -> dict[str, Callable[[], Choose]]:
    """Ways to act that fit the scenario: what makes a player of new tasks."""
    if isinstance(tasks, CardSorting):
        return {"ideal observer": lambda: _teacher, "random": lambda: _random}
    others: dict[str, Callable[[], Choose]] = {"Vowpal Wabbit, SquareCB": _VowpalWabbit, "random": lambda: _random}
    if isinstance(tasks, BernoulliBandit):
        return {"Gittins index": lambda: _teacher, "Thompson sampling": lambda: _thompson, **others}
    if isinstance(tasks, Choices):
        return {"LinUCB on traits": _LinearContextualBandit, "Thompson sampling, items apart": _Thompson, **others}
    if isinstance(tasks, LinearBandit):
        return {
            "LinUCB": _LinearContextualBandit,
            "linear Thompson sampling": lambda: _LinearContextualBandit(drawn=True),
            **others,
        }
    return {"random": lambda: _random}


def _random(tasks: Tasks) -> IntArray:
    return tasks.rng.integers(tasks.actions, size=tasks.batch)


def _teacher(tasks: Tasks) -> IntArray:
    assert isinstance(tasks, TeacherTasks)
    told = tasks.teacher_scores()
    best: IntArray = (told + 1e-6 * tasks.rng.random(told.shape)).argmax(1)
    return best


def _thompson(tasks: Tasks) -> IntArray:
    assert isinstance(tasks, BernoulliBandit)
    best: IntArray = tasks.rng.beta(1 + tasks.counts[..., 1], 1 + tasks.counts[..., 0]).argmax(1)
    return best


class _Thompson:
    """Counts of each item, and a prior with the population's mean."""

    def __init__(self) -> None:
        self._counts: NDArray[np.float64] | None = None

    def __call__(self, tasks: Tasks) -> IntArray:
        if self._counts is None or len(self._counts) != tasks.batch:
            self._counts = np.zeros((tasks.batch, tasks.actions, 2))
        ones, zeros = self._counts[..., 1], self._counts[..., 0]
        best: IntArray = tasks.rng.beta(0.6 + ones, 1.4 + zeros).argmax(1)
        return best

    def tell(self, action: object, reward: object) -> None:
        assert self._counts is not None
        taken, told = np.asarray(action), np.asarray(reward).astype(int)
        self._counts[np.arange(len(taken)), taken, told] += 1


class _LinearContextualBandit:
    """Ridge regression of the rewards, one a task: on the items' traits, or on the context for each arm. It takes the
    action whose upper bound is highest (Li et al. 2010), or that is best by weights drawn from the posterior."""

    def __init__(self, width: float = 0.5, *, drawn: bool = False) -> None:
        self._width, self._drawn = width, drawn
        self._sums: NDArray[np.float64] | None = None

    def __call__(self, tasks: Tasks) -> IntArray:
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

    def tell(self, action: object, reward: object) -> None:
        assert self._sums is not None
        taken, told = np.asarray(action), np.asarray(reward)
        x = self._x[np.arange(len(taken)), taken]
        gained = np.einsum("bij,bj->bi", self._inverse, x)
        scale = 1 + (x * gained).sum(1)
        self._inverse -= gained[:, :, None] * gained[:, None, :] / scale[:, None, None]
        self._sums += told[:, None] * x


def _design(tasks: Tasks) -> NDArray[np.float64]:
    """What a linear learner sees of each action [B, A, n]: its features, or the context in a place of the arm's own."""
    seen = tasks.observe().astype(np.float64)
    context, features = seen[:, : tasks.context], seen[:, tasks.context :]
    one = np.ones((tasks.batch, tasks.actions, 1))
    if tasks.features:
        return np.concatenate([features.reshape(*one.shape[:2], -1), one], axis=2)
    here = np.concatenate([context, one[:, 0]], axis=1)
    x: NDArray[np.float64] = np.einsum("ac,bi->baci", np.eye(tasks.actions), here).reshape(*one.shape[:2], -1)
    return x


class _VowpalWabbit:
    """Vowpal Wabbit's contextual bandit, one a task; an action's features are its number and its traits, and those of
    the context are crossed with them."""

    SETTINGS = "--cb_explore_adf --squarecb -q sa -b 10 --quiet"

    def __init__(self) -> None:
        self._learners: list[Any] = []

    def __call__(self, tasks: Tasks) -> IntArray:
        import vowpalwabbit

        if not self._learners:
            self._learners = [vowpalwabbit.Workspace(self.SETTINGS) for _ in range(tasks.batch)]
        seen = tasks.observe()
        self._context = ["shared |s " + _vw_features(one) for one in seen[:, : tasks.context]]
        features = seen[:, tasks.context :].reshape(tasks.batch, tasks.actions, tasks.features)
        self._actions = [[f"|a n{n} {_vw_features(one)}" for n, one in enumerate(mine)] for mine in features]
        examples = zip(self._learners, self._context, self._actions, strict=True)
        self._chances = np.array([learner.predict("\n".join([shared, *mine])) for learner, shared, mine in examples])
        cumulated = self._chances.cumsum(1)
        drawn: IntArray = (cumulated < tasks.rng.random((tasks.batch, 1)) * cumulated[:, -1:]).sum(1)
        return drawn

    def tell(self, action: object, reward: object) -> None:
        for task, (taken, told) in enumerate(zip(np.asarray(action), np.asarray(reward), strict=True)):
            lines = list(self._actions[task])
            lines[taken] = f"0:{-told}:{self._chances[task, taken]} {lines[taken]}"
            self._learners[task].learn("\n".join([self._context[task], *lines]))


def _vw_features(numbers: FloatArray) -> str:
    """Numbers as the text that Vowpal Wabbit reads."""
    return " ".join(f"x{place}:{number:.5f}" for place, number in enumerate(numbers))


def label_stream(features: FloatArray, labels: IntArray, classes: int) -> dict[str, Curve]:
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


def _sgd(x: FloatArray, y: IntArray, classes: int) -> Curve:
    from sklearn.linear_model import SGDClassifier

    model = SGDClassifier(loss="log_loss", learning_rate="constant", eta0=0.1, random_state=0)
    correct = np.zeros(len(x))
    for t in range(len(x)):
        if t:
            correct[t] = model.predict(x[t : t + 1])[0] == y[t]
        model.partial_fit(x[t : t + 1], y[t : t + 1], classes=np.arange(classes))
    return correct


def offline_classifier(tasks: LabellingTasks, features: FloatArray, labels: IntArray) -> dict[str, Curve]:
    """A classifier that was trained on all images that are not held out, and is told each task's labels: digits
    alone, and only where labels do not drift."""
    if not isinstance(tasks, LabelStream) or tasks.drift or tasks.source != "digits":
        return {}
    from sklearn.svm import SVC

    images = load_digit_images(held_out=False)
    classes = np.repeat(np.arange(10), [len(one) for one in images])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = SVC(C=10).fit(np.concatenate(images).reshape(len(classes), -1), classes)
    correct = np.zeros(labels.shape)
    for task, (x, y) in enumerate(zip(features, labels, strict=True)):
        place = {int(one): number for number, one in enumerate(tasks.classes[task])}
        predicted = np.array([tasks.labels[task, place[int(one)]] for one in model.predict(x)])
        correct[task] = predicted == y
    return {"offline classifier": correct}


def function_stream(tasks: FunctionStream, features: FloatArray, values: Curve) -> dict[str, Curve]:
    """What online learners foresee of each value [B, T] of streams of features [B, T, F]: the mean of the nearest of
    the last 100, linear models of 100 random Fourier features, which are the same for all, and a forest."""
    rng = np.random.default_rng(7)
    frequencies, phases = rng.normal(size=(tasks.context, WAVES)) * 2.0, rng.uniform(0, 2 * np.pi, WAVES)
    seen = np.cos(features @ frequencies + phases) * np.sqrt(2 / WAVES)
    return {
        "5-nearest neighbours": np.stack([_nearest(x, y) for x, y in zip(features, values, strict=True)]),
        "online SGD": np.stack([_sgd_regression(x, y) for x, y in zip(seen, values, strict=True)]),
        "recursive least squares": np.stack([_least_squares(x, y) for x, y in zip(seen, values, strict=True)]),
        "River, adaptive random forest": np.stack([_forest(x, y) for x, y in zip(features, values, strict=True)]),
    }


def _nearest(x: FloatArray, y: Curve) -> Curve:
    predicted = np.zeros(len(x))
    for t in range(1, len(x)):
        window = slice(max(0, t - 100), t)
        near = ((x[window] - x[t]) ** 2).sum(1).argsort()[:5]
        predicted[t] = y[window][near].mean()
    return predicted


def _sgd_regression(x: Curve, y: Curve) -> Curve:
    from sklearn.linear_model import SGDRegressor

    model = SGDRegressor(learning_rate="constant", eta0=0.5, alpha=1e-4, random_state=0)
    predicted = np.zeros(len(x))
    for t in range(len(x)):
        if t:
            predicted[t] = model.predict(x[t : t + 1])[0]
        model.partial_fit(x[t : t + 1], y[t : t + 1])
    return predicted


def _forest(x: FloatArray, y: Curve) -> Curve:
    """As it comes: each tree watches its own error for drift, and is then replaced."""
    from river.forest import ARFRegressor

    model, predicted = ARFRegressor(seed=0), np.zeros(len(x))
    for t, one in enumerate(x):
        named = dict(enumerate(one.tolist()))
        predicted[t] = model.predict_one(named)
        model.learn_one(named, float(y[t]))
    return predicted


def _least_squares(x: Curve, y: Curve, ridge: float = 0.05, forgets: float = 0.99) -> Curve:
    weights, inverse, predicted = np.zeros(x.shape[1]), np.eye(x.shape[1]) / ridge, np.zeros(len(x))
    for t, one in enumerate(x):
        predicted[t] = weights @ one
        gain = inverse @ one / (forgets + one @ inverse @ one)
        weights += gain * (y[t] - predicted[t])
        inverse = (inverse - np.outer(gain, one @ inverse)) / forgets
    return predicted
