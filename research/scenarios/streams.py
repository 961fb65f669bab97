"""Streams of examples whose answers follow each: labels that are dealt anew in each task, functions that change."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.scenarios.core import FloatArray, IntArray, Tasks

HELD_OUT_EVERY = 3  # one image in so many is never trained on


class LabellingTasks(Tasks):
    """Tasks in which an action is an answer, and the right one is told after each.

    began [B]: the step since which all answers follow the same law.
    """

    def __init__(self, batch: int, rng: np.random.Generator) -> None:
        super().__init__(batch, rng)
        self.regime_start = np.zeros(batch, np.int64)

    @abstractmethod
    def targets(self) -> IntArray:
        """The right answers [B] to what can be seen now."""

    def read(self, steps: int) -> tuple[FloatArray, IntArray, IntArray]:
        """The next steps, whatever is answered: what could be seen [B, steps, F], the right answers [B, steps] and
        when what they follow began [B, steps]."""
        seen, targets, regime_start = [], [], []
        for _ in range(steps):
            seen.append(self.observe())
            targets.append(self.targets())
            regime_start.append(self.regime_start.copy())
            self.step(targets[-1])
        return np.stack(seen, 1), np.stack(targets, 1), np.stack(regime_start, 1)

    def means(self) -> FloatArray:
        return np.eye(self.actions, dtype=np.float32)[self.targets()]


class LabelStream(LabellingTasks):
    """Images of `ways` classes that come in any order, and whose labels are a permutation of the task's own.

    drift: the chance, after each image, that two classes change labels. held_out: images (digits) or classes
    (Omniglot) that are never trained on. turned: the share of classes whose images are turned and mirrored.
    source: "digits" (scikit-learn's, 8 × 8, 10 classes) or an Omniglot file (14 × 14, its classes).
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
        self.images = load_digit_images(held_out) if source == "digits" else _load_omniglot(Path(source), held_out)
        self.context = self.images[0].shape[1] ** 2
        self.classes = np.stack([rng.permutation(len(self.images))[:ways] for _ in range(batch)])
        self.rotations = rng.integers(8, size=(batch, ways)) * (rng.random((batch, ways)) < turned)
        self.labels = np.stack([rng.permutation(ways) for _ in range(batch)])
        self._draw()

    def observe(self) -> FloatArray:
        return self.current

    def targets(self) -> IntArray:
        targets: IntArray = self.labels[np.arange(self.batch), self.which]
        return targets

    def step(self, actions: IntArray) -> FloatArray:
        reward: FloatArray = (actions == self.targets()).astype(np.float32)
        for task in np.flatnonzero(self.rng.random(self.batch) < self.drift):
            one, other = self.rng.permutation(self.actions)[:2]
            self.labels[task, [one, other]] = self.labels[task, [other, one]]
        self._draw()
        return reward

    def _draw(self) -> None:
        self.which = self.rng.integers(self.actions, size=self.batch)
        shown = []
        for task, which in enumerate(self.which):
            images = self.images[self.classes[task, which]]
            image = images[self.rng.integers(len(images))]
            rotation = self.rotations[task, which]
            image = np.rot90(image, rotation % 4)
            shown.append((image.T if rotation >= 4 else image).flatten())
        self.current = np.stack(shown).astype(np.float32)


class FunctionStream(LabellingTasks):
    """Sequential regression: x is uniform in −1…1 in `dims` dimensions, y a sum of waves of the task's own, seen with
    noise. The answer is the bin of y among `bins` in −1…1. The function changes at each step with a chance of `moves`.
    """

    def __init__(
        self,
        batch: int,
        rng: np.random.Generator,
        *,
        dims: int = 2,
        waves: int = 3,
        noise: float = 0.05,
        bins: int = 24,
        moves: float = 0.005,
    ) -> None:
        super().__init__(batch, rng)
        self.context, self.actions, self.waves, self.noise, self.moves = dims, bins, waves, noise, moves
        self.edges = np.linspace(-1, 1, bins + 1)[1:-1]
        self.centres = (np.linspace(-1, 1, bins + 1)[1:] + np.linspace(-1, 1, bins + 1)[:-1]) / 2
        self.frequencies, self.phases, self.amplitudes = self._functions(batch)
        self.done = 0
        self._draw()

    def observe(self) -> FloatArray:
        return self.current

    def targets(self) -> IntArray:
        return np.digitize(self.values(), self.edges)

    def values(self) -> NDArray[np.float64]:
        """y of what can be seen now [B], with its noise."""
        values: NDArray[np.float64] = self._values + self.noises
        return values

    def step(self, actions: IntArray) -> FloatArray:
        reward: FloatArray = (actions == self.targets()).astype(np.float32)
        new = self.rng.random(self.batch) < self.moves
        for old, fresh in zip(
            (self.frequencies, self.phases, self.amplitudes), self._functions(int(new.sum())), strict=True
        ):
            old[new] = fresh
        self.done += 1
        self.regime_start[new] = self.done
        self._draw()
        return reward

    def _functions(self, batch: int) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        frequencies = self.rng.normal(size=(batch, self.waves, self.context)) * 2.0
        phases = self.rng.uniform(0, 2 * np.pi, size=(batch, self.waves))
        amplitudes = self.rng.dirichlet(np.ones(self.waves), size=batch) * 0.9
        return frequencies, phases, amplitudes

    def _draw(self) -> None:
        self.current = self.rng.uniform(-1, 1, size=(self.batch, self.context)).astype(np.float32)
        self.noises = self.rng.normal(size=self.batch) * self.noise
        angles = np.einsum("bwd,bd->bw", self.frequencies, self.current) + self.phases
        self._values = (self.amplitudes * np.sin(angles)).sum(1)


def load_digit_images(held_out: bool) -> list[NDArray[Any]]:
    """Images [n, 8, 8] of each digit, in 0…1: those never trained on, or the others."""

    from sklearn.datasets import load_digits  # slow to import, and needed here alone

    data = load_digits()
    chosen = (np.arange(len(data.target)) % HELD_OUT_EVERY == 0) == held_out
    return [data.images[chosen & (data.target == digit)] / 16 for digit in range(10)]


def _load_omniglot(path: Path, held_out: bool) -> list[NDArray[Any]]:
    """Images [20, 14, 14] of each character, in 0…1."""
    with np.load(path) as file:
        images, labels = file["x"], file["y"]
    small = images.reshape(len(images), 14, 2, 14, 2).mean((2, 4)) / images.max()
    classes = [small[labels == label] for label in np.unique(labels)]
    return [images for number, images in enumerate(classes) if (number % HELD_OUT_EVERY == 0) == held_out]
