"""A stream of images whose labels are permuted in each task, and may be permuted again on the way."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.scenarios.core import Curve, FloatArray, IntArray, LabellingTasks
from research.scenarios.measures import ClassificationEvaluation
from research.scenarios.scenario import PolicyTrainConfig, Recipe, Scenario

HELD_OUT_EVERY = 3  # every third image or class is never trained on


class LabelStream(LabellingTasks):
    """Images of `ways` classes in random order, whose labels are a permutation of the task.

    drift: probability, after each image, that two classes swap labels. held_out: whether images (digits) or classes
    (Omniglot) are those that are never trained on. turned: share of classes whose images are rotated and mirrored.
    source: "digits" (scikit-learn's, 8 × 8, 10 classes) or the path of an Omniglot file (14 × 14, its classes).
    """

    def __init__(
        self,
        batch: int,
        rng: np.random.Generator,
        *,
        ways: int = 10,
        drift: float = 0.0,
        held_out: bool = True,
        turned: float = 0.0,
        source: str = "digits",
    ) -> None:
        super().__init__(batch, rng)
        self.actions, self.drift, self.source = ways, drift, source
        self.images = load_digit_images(held_out) if source == "digits" else load_omniglot(Path(source), held_out)
        self.context = self.images[0].shape[1] ** 2
        self.classes = np.stack([rng.permutation(len(self.images))[:ways] for _ in range(batch)])
        self.rotations = rng.integers(8, size=(batch, ways)) * (rng.random((batch, ways)) < turned)
        self.labels = np.stack([rng.permutation(ways) for _ in range(batch)])
        self._draw()

    def observe(self) -> FloatArray:
        return self.current

    def targets(self) -> IntArray:
        targets: IntArray = self.labels[np.arange(self.batch), self.way]
        return targets

    def step(self, actions: IntArray) -> FloatArray:
        reward: FloatArray = (actions == self.targets()).astype(np.float32)
        for task in np.flatnonzero(self.rng.random(self.batch) < self.drift):
            one, other = self.rng.permutation(self.actions)[:2]
            self.labels[task, [one, other]] = self.labels[task, [other, one]]
        self._draw()
        return reward

    def _draw(self) -> None:
        self.way = self.rng.integers(self.actions, size=self.batch)
        current = []
        for task, way in enumerate(self.way):
            images = self.images[self.classes[task, way]]
            image = images[self.rng.integers(len(images))]
            rotation = self.rotations[task, way]
            image = np.rot90(image, rotation % 4)
            current.append((image.T if rotation >= 4 else image).flatten())
        self.current = np.stack(current).astype(np.float32)


class LabelStreamEvaluation(ClassificationEvaluation):
    """Classification, also beside a classifier that was trained offline."""

    def baselines(self, tasks: LabellingTasks, features: FloatArray, labels: IntArray) -> dict[str, Curve]:
        online = super().baselines(tasks, features, labels)
        assert isinstance(tasks, LabelStream)
        if tasks.drift or tasks.source != "digits":  # the offline classifier knows digits, and one set of labels a task
            return online
        return online | {"offline classifier": _offline_classifier(tasks, features, labels)}


def _offline_classifier(tasks: LabelStream, features: FloatArray, labels: IntArray) -> Curve:
    """Return whether a support vector machine predicts each label [B, T] of features [B, T, F].

    The classifier is trained on all images that are not held out, and is given the task's permutation of the labels.
    """
    from sklearn.svm import SVC  # slow to import

    images = load_digit_images(held_out=False)
    classes = np.repeat(np.arange(10), [len(one) for one in images])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = SVC(C=10).fit(np.concatenate(images).reshape(len(classes), -1), classes)
    correct = np.zeros(labels.shape)
    for task, (x, y) in enumerate(zip(features, labels, strict=True)):
        class_index = {int(digit): index for index, digit in enumerate(tasks.classes[task])}
        predicted = np.array([tasks.labels[task, class_index[int(digit)]] for digit in model.predict(x)])
        correct[task] = predicted == y
    return correct


def load_digit_images(held_out: bool) -> list[NDArray[Any]]:
    """Return images [m, 8, 8] of each digit, in 0…1: the held-out ones, or all others."""
    from sklearn.datasets import load_digits  # slow to import

    data = load_digits()
    chosen = (np.arange(len(data.target)) % HELD_OUT_EVERY == 0) == held_out
    return [data.images[chosen & (data.target == digit)] / 16 for digit in range(10)]


def load_omniglot(path: Path, held_out: bool) -> list[NDArray[Any]]:
    """Return images [20, 14, 14] of each character, in 0…1: the held-out characters, or all others."""
    with np.load(path) as file:
        images, labels = file["x"], file["y"]
    small = images.reshape(len(images), 14, 2, 14, 2).mean((2, 4)) / images.max()
    classes = [small[labels == label] for label in np.unique(labels)]
    return [images for number, images in enumerate(classes) if (number % HELD_OUT_EVERY == 0) == held_out]


SCENARIO = Scenario(
    LabelStream,
    env_steps=200,
    recipes={
        "digits": Recipe(
            LabelStream,
            PolicyTrainConfig(rounds=1500, batch=16, steps=120, span=120, lr=2e-3),
            steps=200,
            options={"drift": 0.01},
            training={"held_out": False, "turned": 0.5},
            slots=1024,
            cell=256,
            k=4,
            width=64,
            layer=96,
        )
    },
    evaluation=LabelStreamEvaluation(),
)
