"""The baselines of the streams: River's learners, scikit-learn's SGD and Vowpal Wabbit, each with its defaults.

A baseline predicts, then learns, one example at a time. What its documentation asks for is given to it: linear models
and neighbours get scaled numbers and one-hot strings, trees get the features as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import numpy as np
from river import compose, forest, linear_model, multiclass, naive_bayes, neighbors, preprocessing, stats, tree
from sklearn.linear_model import SGDClassifier, SGDRegressor
from vowpalwabbit import Workspace

from research.streams.datasets import Features


class LabelBaseline(Protocol):
    """A classifier that learns from one example at a time."""

    def predict(self, x: Features) -> dict[Hashable, float]:
        """Return the probability of each label that the classifier knows; empty before the first label."""

    def learn(self, x: Features, label: Hashable) -> None:
        """Learn one example."""


class NumberBaseline(Protocol):
    """A regressor that learns from one example at a time."""

    def predict(self, x: Features) -> float:
        """Return the expected target."""

    def learn(self, x: Features, target: float) -> None:
        """Learn one example."""


class RiverLabels:
    """A classifier of River."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def predict(self, x: Features) -> dict[Hashable, float]:
        probs = self._model.predict_proba_one(x) or {}
        return {label: prob for label, prob in probs.items() if math.isfinite(prob)}

    def learn(self, x: Features, label: Hashable) -> None:
        self._model.learn_one(x, label)


class RiverNumbers:
    """A regressor of River."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def predict(self, x: Features) -> float:
        return float(self._model.predict_one(x))

    def learn(self, x: Features, target: float) -> None:
        self._model.learn_one(x, target)


class _Encoder:
    """Online standardisation of numbers and one-hot columns of strings, as an array that grows."""

    def __init__(self) -> None:
        self._columns: dict[str, int] = {}
        self._scaler = preprocessing.StandardScaler()

    def __call__(self, x: Features, *, learn: bool = False, size: int = 64) -> np.ndarray[Any, np.dtype[np.float64]]:
        numbers = {name: value for name, value in x.items() if not isinstance(value, str)}
        if learn:
            self._scaler.learn_one(numbers)
        flat = self._scaler.transform_one(numbers)
        flat |= {f"{name}={value}": 1.0 for name, value in x.items() if isinstance(value, str)}
        row = np.zeros((1, size))
        for name, value in flat.items():
            column = self._columns.setdefault(name, len(self._columns))
            if column < size:
                row[0, column] = value
        return row


class SgdLabels:
    """Logistic regression by scikit-learn's SGD; the labels are given beforehand, as `partial_fit` asks."""

    def __init__(self, labels: list[Hashable], columns: int) -> None:
        self._labels, self._size = labels, columns
        self._model, self._encoder = SGDClassifier(loss="log_loss"), _Encoder()
        self._fitted = False

    def predict(self, x: Features) -> dict[Hashable, float]:
        if not self._fitted:
            return {}
        probs = self._model.predict_proba(self._encoder(x, size=self._size))[0]
        return dict(zip(self._labels, probs.tolist(), strict=True))

    def learn(self, x: Features, label: Hashable) -> None:
        row = self._encoder(x, learn=True, size=self._size)
        self._model.partial_fit(row, [self._labels.index(label)], classes=range(len(self._labels)))
        self._fitted = True


class SgdNumbers:
    """Linear regression by scikit-learn's SGD."""

    def __init__(self, columns: int) -> None:
        self._size, self._model, self._encoder = columns, SGDRegressor(), _Encoder()
        self._fitted = False

    def predict(self, x: Features) -> float:
        return float(self._model.predict(self._encoder(x, size=self._size))[0]) if self._fitted else 0.0

    def learn(self, x: Features, target: float) -> None:
        self._model.partial_fit(self._encoder(x, learn=True, size=self._size), [target])
        self._fitted = True


def vw_features(x: Features, space: str = "") -> str:
    """Return features as a namespace of Vowpal Wabbit's text format."""
    parts = [
        f"{re.sub(r'[^0-9A-Za-z_]', '_', name)}={re.sub(r'[^0-9A-Za-z_]', '_', value)}"
        if isinstance(value, str)
        else f"{re.sub(r'[^0-9A-Za-z_]', '_', name)}:{value:.6g}"
        for name, value in x.items()
    ]
    return f"|{space} " + " ".join(parts)


class VwLabels:
    """Vowpal Wabbit's one-against-all with probabilities; the labels are given beforehand, as the option asks."""

    def __init__(self, labels: list[Hashable]) -> None:
        self._labels = labels
        self._model = Workspace(f"--oaa {len(labels)} --loss_function logistic --probabilities --quiet")

    def predict(self, x: Features) -> dict[Hashable, float]:
        probs = self._model.predict(vw_features(x))
        return dict(zip(self._labels, map(float, probs), strict=True))

    def learn(self, x: Features, label: Hashable) -> None:
        self._model.learn(f"{self._labels.index(label) + 1} {vw_features(x)}")


class VwNumbers:
    """Vowpal Wabbit's regression."""

    def __init__(self) -> None:
        self._model = Workspace("--quiet")

    def predict(self, x: Features) -> float:
        return float(self._model.predict(vw_features(x)))

    def learn(self, x: Features, target: float) -> None:
        self._model.learn(f"{target:.8g} {vw_features(x)}")


def _one_hot(model: Any) -> Any:
    """Return a model of River behind one-hot strings, for trees with linear leaves, which refuse strings."""
    numbers: Any = compose.SelectType(float)
    return (numbers + (compose.SelectType(str) | preprocessing.OneHotEncoder())) | model


def _scaled(model: Any) -> Any:
    """Return a model of River behind a scaler of numbers and one-hot strings."""
    numbers = compose.SelectType(float) | preprocessing.StandardScaler()
    return (numbers + (compose.SelectType(str) | preprocessing.OneHotEncoder())) | model


LABEL_BASELINES: dict[str, Callable[[int, list[Hashable], int], LabelBaseline]] = {
    "adaptive random forest": lambda seed, labels, columns: RiverLabels(forest.ARFClassifier(seed=seed)),
    "hoeffding adaptive tree": lambda seed, labels, columns: RiverLabels(
        tree.HoeffdingAdaptiveTreeClassifier(seed=seed)
    ),
    "logistic regression": lambda seed, labels, columns: RiverLabels(
        _scaled(
            linear_model.LogisticRegression()
            if len(labels) <= 2
            else multiclass.OneVsRestClassifier(linear_model.LogisticRegression())
        )
    ),
    "nearest neighbours": lambda seed, labels, columns: RiverLabels(_scaled(neighbors.KNNClassifier())),
    "naive bayes": lambda seed, labels, columns: RiverLabels(naive_bayes.GaussianNB()),
    "sgd (scikit-learn)": lambda seed, labels, columns: SgdLabels(labels, columns),
    "vowpal wabbit": lambda seed, labels, columns: VwLabels(labels),
}
NUMBER_BASELINES: dict[str, Callable[[int, int], NumberBaseline]] = {
    "adaptive random forest": lambda seed, columns: RiverNumbers(_one_hot(forest.ARFRegressor(seed=seed))),
    "hoeffding adaptive tree": lambda seed, columns: RiverNumbers(
        _one_hot(tree.HoeffdingAdaptiveTreeRegressor(seed=seed))
    ),
    "linear regression": lambda seed, columns: RiverNumbers(
        _scaled(preprocessing.TargetStandardScaler(linear_model.LinearRegression()))
    ),
    "nearest neighbours": lambda seed, columns: RiverNumbers(_scaled(neighbors.KNNRegressor())),
    "mean": lambda seed, columns: RiverNumbers(_Mean()),
    "sgd (scikit-learn)": lambda seed, columns: SgdNumbers(columns),
    "vowpal wabbit": lambda seed, columns: VwNumbers(),
}
RIVER_LABELS = (
    *("adaptive random forest", "hoeffding adaptive tree", "logistic regression", "nearest neighbours"),
    "naive bayes",
)
RIVER_NUMBERS = ("adaptive random forest", "hoeffding adaptive tree", "linear regression", "nearest neighbours", "mean")


class _Mean:
    """The mean of all targets so far."""

    def __init__(self) -> None:
        self._mean = stats.Mean()

    def predict_one(self, x: Features) -> float:
        return float(self._mean.get() or 0.0)

    def learn_one(self, x: Features, target: float) -> None:
        self._mean.update(target)
