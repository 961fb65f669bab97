"""The project's learners as they stand beside the baselines: features as a dictionary, memory as arrays.

They compute what the served learners compute (a test compares the two); a step reads its query once, not twice.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.tabular import arm_readers, arms, label_readers, labels, number_readers, numbers
from model.tabular.config import MAX_EXAMPLES
from model.tabular.loading import shipped_mixer
from model.tabular.memory import StreamMemory, empty_memory
from model.tabular.mixer import Mixer, MixerWeights

Array = NDArray[Any]
Columns = Mapping[str, float | str]  # `datasets.Features` is one; River and its data are slow to import


class Encoder:
    """Columns of features: numbers as they are, a column of 0 and 1 for each string that was seen."""

    def __init__(self) -> None:
        self._columns: dict[tuple[str, str | None], int] = {}

    def __call__(self, x: Columns) -> Array:
        for name, value in x.items():
            self._columns.setdefault((name, value if isinstance(value, str) else None), len(self._columns))
        row = np.full(len(self._columns), np.nan, np.float32)
        for (name, text), column in self._columns.items():
            if name in x:
                value = x[name]
                row[column] = value if not isinstance(value, str) and text is None else float(value == text)
        return row


class ArrayMemory:
    """A stream's memory as arrays that grow, of which the learners see the latest examples."""

    def __init__(self, readers: int) -> None:
        self.memory = empty_memory(readers)

    def before(self, x: Array, features: Array | None = None) -> tuple[StreamMemory, Array]:
        """Return the memory, and an example as wide as the memory's examples."""
        self.memory.widen(len(x), 0 if features is None else features.shape[1])
        return self.memory, self.memory.pad(x)

    def append(self, x: Array, value: float, extra: tuple[float, float]) -> None:
        """Add an example; `memory.row` counts it already."""
        memory, keep = self.memory, slice(-MAX_EXAMPLES, None)
        memory.x = np.concatenate([memory.x, x[None]])[keep]
        memory.values = np.append(memory.values, np.float32(value))[keep]
        memory.extra = np.concatenate([memory.extra, np.array([extra], np.float32)])[keep]
        memory.ordinals = np.append(memory.ordinals, int(memory.row[0]))[keep]


class ImprintLabels(ArrayMemory):
    """The learner of labels."""

    def __init__(self, mixer: Mixer | None = None) -> None:
        super().__init__(label_readers.E)
        self.mixer = MixerWeights.of(mixer or shipped_mixer("labels"))
        self.names: list[Hashable] = []
        self._encode = Encoder()
        self._read: tuple[labels.QueryReadout, labels.Mixture] | None = None

    def predict(self, x: Columns) -> dict[Hashable, float]:
        """Return the probability of each label seen so far."""
        memory, self._x = self.before(self._encode(x))
        self._read = None
        if not len(memory.values):
            return {}
        reading = labels.read_query(memory, self._x)
        self._read = reading, labels.mixture(reading, self.mixer, memory.row)
        return dict(zip(self.names, self._read[1].probs.tolist(), strict=True))

    def shares(self) -> dict[Hashable, float]:
        """Return what the shares of the labels alone would have said of the example that was predicted last."""
        if self._read is None:
            return {}
        reading, mixed = self._read
        shares = reading.readout.probs[label_readers.PRIOR] * (1 - mixed.unknown)
        return dict(zip(self.names, shares.tolist(), strict=True))

    def learn(self, x: Columns, label: Hashable) -> None:
        """Learn the example that was predicted last."""
        if label not in self.names:
            self.names.append(label)
        index = self.names.index(label)
        reading, mixed = self._read or (None, None)
        labels.learn_label(self.memory, reading, index, mixed)
        self.append(self._x, index, (0.0, 0.0))


class ImprintNumbers(ArrayMemory):
    """The learner of numbers. covered: for each learned target, whether the interval held it."""

    def __init__(self, mixer: Mixer | None = None) -> None:
        super().__init__(number_readers.E)
        self.mixer = MixerWeights.of(mixer or shipped_mixer("regression"))
        self.covered: list[bool] = []
        self._encode = Encoder()
        self._read: tuple[numbers.QueryReadout, float] | None = None

    def predict(self, x: Columns) -> float:
        """Return the expected target."""
        memory, self._x = self.before(self._encode(x))
        self._read = None
        if not len(memory.values):
            return 0.0
        reading = numbers.read_query(memory, self._x)
        self._read = reading, numbers.mixture(reading, self.mixer)
        return self._read[1]

    def learn(self, x: Columns, target: float) -> None:
        """Learn the example that was predicted last."""
        reading, mean = self._read or (None, 0.0)
        if reading is not None:
            lower, upper = numbers.interval(self.memory, mean, reading.scaled.scale)
            self.covered.append(lower <= target <= upper)
        numbers.learn_number(self.memory, reading, mean, target)
        self.append(self._x, target, (abs(mean - target), 0.0))


class ImprintArms(ArrayMemory):
    """The learner of rewards, among the arms 0 … A − 1."""

    def __init__(self, num_arms: int) -> None:
        super().__init__(arm_readers.E)
        self._arms, self._encode = np.arange(num_arms), Encoder()

    def choose(self, x: Columns, rng: np.random.Generator) -> int:
        """Draw an arm."""
        return self.draw(self._encode(x), None, rng)

    def draw(self, context: Array, features: Array | None, rng: np.random.Generator) -> int:
        """Draw an arm for a context [C] and the features [A, F] of the arms, where they have any."""
        memory, _ = self.before(context, features)
        own = [None] * len(self._arms) if features is None else features
        self._queries = np.stack([memory.pad(context, each) for each in own])
        self._reading = arms.read_decision(memory, self._queries, self._arms, features is not None)
        self._probs = arms.decide(self._reading)
        return int(rng.choice(len(self._arms), p=self._probs / self._probs.sum(dtype=np.float64)))

    def learn(self, arm: int, reward: float) -> None:
        """Learn the reward of the arm that was drawn last."""
        reading = self._reading
        only = slice(arm, arm + 1)
        own = arms.ArmReading(
            reading.means[:, only], reading.mean[only], reading.deviation[only], reading.scale, reading.counts[only]
        )
        arms.learn_reward(self.memory, own, reward)
        self.append(self._queries[arm], reward, (arm, float(self._probs[arm])))
