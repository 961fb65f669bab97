"""Estimators for scikit-learn whose memory is a session of an Imprint server; needs `pip install scikit-learn`.

    from imprint.sklearn import ImprintClassifier

    model = ImprintClassifier().fit(X, y)
    model.partial_fit(X_new, y_new).predict_proba(X_test)

`fit` erases the session and learns anew; `partial_fit` goes on. Rows of a data frame keep the names of their columns.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, ClassVar, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets, unique_labels
from sklearn.utils.validation import check_is_fitted, validate_data

from imprint import Client, NotFound
from model.tabular.limits import MAX_BATCH
from service.client.tables import plain_features


class _Estimator(BaseEstimator):  # type: ignore[misc]
    """The part that both estimators share: rows, batches and the session.

    Args:
        session: id of the session; none = a new one.
        url, api_key: as of `imprint.Client`.
    """

    task: ClassVar[str]

    def __init__(self, session: str | None = None, url: str | None = None, api_key: str | None = None) -> None:
        self.session = session
        self.url = url
        self.api_key = api_key

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.string = True
        return tags

    def _open(self, *, reset: bool) -> Client:
        client = Client(self.url, api_key=self.api_key)
        if not hasattr(self, "session_id_"):
            self.session_id_ = self.session or f"sklearn-{uuid.uuid4().hex}"
        if reset:
            with suppress(NotFound):
                client.delete(self.session_id_)
        return client

    def _checked(self, X: Any, y: Any = "no_validation", *, reset: bool = False, **options: Any) -> Any:
        """Return `X`, or `X` and `y`, as arrays; NaN is a missing value."""
        return validate_data(self, X, y, reset=reset, dtype=None, ensure_all_finite="allow-nan", **options)

    def _rows(self, X: Any) -> list[dict[str, Any]]:
        names = getattr(self, "feature_names_in_", range(X.shape[1]))
        return [plain_features(dict(zip(names, row, strict=True))) for row in X.tolist()]

    def _learn(self, client: Client, X: Any, truths: list[Any], truth: str) -> None:
        examples = [{"features": row, truth: value} for row, value in zip(self._rows(X), truths, strict=True)]
        for start in range(0, len(examples), MAX_BATCH):
            client.observe(self.session_id_, examples=examples[start : start + MAX_BATCH], model=self.task)

    def _predictions(self, X: Any) -> Iterator[Any]:
        check_is_fitted(self, "session_id_")
        rows = self._rows(self._checked(X))
        with self._open(reset=False) as client:
            for start in range(0, len(rows), MAX_BATCH):
                yield from client.predict_batch(self.session_id_, rows[start : start + MAX_BATCH], model=self.task).data


class ImprintClassifier(ClassifierMixin, _Estimator):  # type: ignore[misc]
    """A classifier of scikit-learn; see the module's head."""

    task = "labels"
    classes_: Any

    def fit(self, X: Any, y: Any) -> Self:
        """Erase what was learned, and learn the labels `y` of the rows `X`."""
        return self._fit(X, y, None, reset=True)

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> Self:
        """Learn the labels `y` of the rows `X`; classes: labels that may come later. New ones may come in any call."""
        return self._fit(X, y, classes, reset=not hasattr(self, "classes_"))

    def predict_proba(self, X: Any) -> Any:
        """Return the probability of each class, [n, classes]; what is left for unseen labels is shared equally."""
        check_is_fitted(self, "classes_")
        names = [str(label) for label in self.classes_.tolist()]
        found = [[one.probabilities.get(name, 0.0) for name in names] for one in self._predictions(X)]
        probs = np.array(found).reshape(-1, len(names))
        return probs + (1 - probs.sum(1, keepdims=True)) / len(names)

    def predict(self, X: Any) -> Any:
        """Return the likeliest class of each row."""
        check_is_fitted(self, "classes_")
        return self.classes_[self.predict_proba(X).argmax(1)]

    def _fit(self, X: Any, y: Any, classes: Any, *, reset: bool) -> Self:
        X, y = self._checked(X, y, reset=reset)
        check_classification_targets(y)
        known: list[Any] = [] if reset else [self.classes_]
        self.classes_ = unique_labels(*known, y, *([] if classes is None else [classes]))
        with self._open(reset=reset) as client:
            self._learn(client, X, [str(label) for label in y.tolist()], "label")
        return self


class ImprintRegressor(RegressorMixin, _Estimator):  # type: ignore[misc]
    """A regressor of scikit-learn; see the module's head."""

    task = "regression"

    def fit(self, X: Any, y: Any) -> Self:
        """Erase what was learned, and learn the targets `y` of the rows `X`."""
        return self._fit(X, y, reset=True)

    def partial_fit(self, X: Any, y: Any) -> Self:
        """Learn the targets `y` of the rows `X`."""
        return self._fit(X, y, reset=not hasattr(self, "session_id_"))

    def predict(self, X: Any) -> Any:
        """Return the expected target of each row."""
        return np.array([one.value or 0.0 for one in self._predictions(X)])

    def _fit(self, X: Any, y: Any, *, reset: bool) -> Self:
        X, y = self._checked(X, y, reset=reset, y_numeric=True)
        with self._open(reset=reset) as client:
            self._learn(client, X, y.astype(float).tolist(), "target")
        return self
