"""Models for River whose memory is a session of an Imprint server; needs `pip install river`.

    from river import datasets, evaluate, metrics
    from imprint.river import ImprintClassifier

    evaluate.progressive_val_score(datasets.Phishing(), ImprintClassifier(), metrics.Accuracy())

A model without a session's name begins a new session with its first example, and so does each clone of it.
"""

from __future__ import annotations

import uuid
from typing import Any, ClassVar

from river import base

from imprint import Client
from service.client.tables import plain_features


class _Session:
    """The part that both models share: the client, and the session's name."""

    task: ClassVar[str]

    def __init__(self, session: str | None = None, url: str | None = None, api_key: str | None = None) -> None:
        self.session = session
        self.url = url
        self.api_key = api_key
        self._client = Client(url, api_key=api_key)
        self._name = session or f"river-{uuid.uuid4().hex}"

    @property
    def session_id(self) -> str:
        """The id of the session, which the server keeps until it is erased."""
        return self._name


class ImprintClassifier(_Session, base.Classifier):
    """A classifier of River. Labels may be of any type that `str` tells apart.

    Args:
        session: id of the session; none = a new one.
        url, api_key: as of `imprint.Client`.
    """

    def __init__(self, session: str | None = None, url: str | None = None, api_key: str | None = None) -> None:
        super().__init__(session, url, api_key)
        self._labels: dict[str, Any] = {}

    @property
    def _multiclass(self) -> bool:
        return True

    def learn_one(self, x: dict[Any, Any], y: Any) -> None:
        """Learn the label `y` of the features `x`."""
        self._labels[str(y)] = y
        self._client.observe(self._name, features=plain_features(x), label=str(y), model="labels")

    def predict_proba_one(self, x: dict[Any, Any], **_: Any) -> dict[Any, float]:
        """Return the probability of each label; they sum to less than 1, for a label may be new."""
        found = self._client.predict(self._name, plain_features(x), model="labels").probabilities
        assert isinstance(found, dict)
        return {self._labels.get(label, label): prob for label, prob in found.items()}


class ImprintRegressor(_Session, base.Regressor):
    """A regressor of River.

    Args:
        session: id of the session; none = a new one.
        url, api_key: as of `imprint.Client`.
    """

    def learn_one(self, x: dict[Any, Any], y: float) -> None:
        """Learn the target `y` of the features `x`."""
        self._client.observe(self._name, features=plain_features(x), target=float(y), model="regression")

    def predict_one(self, x: dict[Any, Any], **_: Any) -> float:
        """Return the expected target; 0 before the first example."""
        return self._client.estimate(self._name, plain_features(x), model="regression").value or 0.0
