"""The streams: data sets that come inside river and scikit-learn, and river's generators.

A stream is a list of examples in order. Where the order of a data set means nothing, each seed shuffles it; a series in
time starts at another of its first examples for each seed; a generator draws from the seed.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from river import datasets as river_datasets
from river.datasets import synth
from sklearn import datasets as sklearn_datasets

Features = dict[str, float | str]
Kind = Literal["labels", "drift", "numbers"]
Pair = tuple[Features, Any]
MAX_STEPS = 3000


@dataclass(frozen=True)
class Stream:
    """A stream of examples; kind: labels without drift, labels with drift, or numbers to predict.

    load: the examples of a seed. in_time: whether the order of the examples means something.
    """

    name: str
    kind: Kind
    load: Callable[[int], Iterator[Pair]]
    in_time: bool = False

    def examples(self, seed: int, steps: int = MAX_STEPS) -> list[Pair]:
        """Return at most `steps` examples of a seed."""
        if self.in_time:
            pairs = list(self.load(seed))
            return pairs[seed * len(pairs) // 50 :][:steps]
        return list(itertools.islice(self.load(seed), steps))


def _plain(x: dict[str, Any]) -> Features:
    """Return features as numbers and strings; a date becomes its day, month, weekday and year."""
    features: Features = {}
    for name, value in x.items():
        if isinstance(value, datetime.datetime):
            features |= {f"{name}.time": value.timestamp() / 86400, f"{name}.month": float(value.month)}
            features |= {f"{name}.weekday": float(value.weekday()), f"{name}.hour": float(value.hour)}
        else:
            features[str(name)] = value if isinstance(value, str) else float(value)
    return features


def _shuffled(rows: Callable[[], list[Pair]]) -> Callable[[int], Iterator[Pair]]:
    def load(seed: int) -> Iterator[Pair]:
        pairs = rows()
        return (pairs[i] for i in np.random.default_rng(seed).permutation(len(pairs)))

    return load


def _river(make: Callable[[], Any]) -> Callable[[], list[Pair]]:
    return lambda: [(_plain(x), y) for x, y in make()]


def _sklearn(make: Callable[[], Any], target: int | None = None) -> Callable[[], list[Pair]]:
    def rows() -> list[Pair]:
        bunch = make()
        names = [str(name) for name in getattr(bunch, "feature_names", range(bunch.data.shape[1]))]
        targets = bunch.target if target is None else bunch.target[:, target]
        return [
            (dict(zip(names, map(float, x), strict=True)), y.item()) for x, y in zip(bunch.data, targets, strict=True)
        ]

    return rows


def _generated(make: Callable[[int], Any]) -> Callable[[int], Iterator[Pair]]:
    return lambda seed: ((_plain(x), y) for x, y in make(seed))


def _drifting(make: Callable[[int, int], Any], concepts: int, *, width: int = 1) -> Callable[[int], Iterator[Pair]]:
    """Return a stream that goes through concepts in turn, changing over `width` steps; make: of (concept, seed)."""

    def load(seed: int) -> Iterator[Pair]:
        rng, part = np.random.default_rng(seed), MAX_STEPS // concepts
        sources = [iter(make(concept, seed + 100 * concept)) for concept in range(concepts)]
        for step in itertools.count():
            concept, offset = divmod(step, part)
            early = width > 1 and offset < width and rng.random() > offset / width
            x, y = next(sources[max(0, min(concept, concepts - 1) - early)])
            yield _plain(x), y

    return load


def _in_time(make: Callable[[], Any]) -> Callable[[int], Iterator[Pair]]:
    return lambda seed: ((_plain(x), y) for x, y in make())


STREAMS = [
    Stream("phishing", "labels", _shuffled(_river(river_datasets.Phishing))),
    Stream("bananas", "labels", _shuffled(_river(river_datasets.Bananas))),
    Stream("segments", "labels", _shuffled(_river(river_datasets.ImageSegments))),
    Stream("shuttle", "labels", _shuffled(_river(river_datasets.Shuttle))),
    Stream("iris", "labels", _shuffled(_sklearn(sklearn_datasets.load_iris))),
    Stream("wine", "labels", _shuffled(_sklearn(sklearn_datasets.load_wine))),
    Stream("cancer", "labels", _shuffled(_sklearn(sklearn_datasets.load_breast_cancer))),
    Stream("digits", "labels", _shuffled(_sklearn(sklearn_datasets.load_digits))),
    Stream("agrawal", "labels", _generated(lambda s: synth.Agrawal(classification_function=s % 10, seed=s))),
    Stream("led", "labels", _generated(lambda s: synth.LED(seed=s, noise_percentage=0.1, irrelevant_features=True))),
    Stream("random tree", "labels", _generated(lambda s: synth.RandomTree(seed_tree=s, seed_sample=s))),
    Stream("random rbf", "labels", _generated(lambda s: synth.RandomRBF(s, s, n_classes=5, n_features=10))),
    Stream("waveform", "labels", _generated(lambda s: synth.Waveform(seed=s))),
    Stream("sine", "labels", _generated(lambda s: synth.Sine(s % 4, seed=s))),
    Stream("hyperplane", "labels", _generated(lambda s: synth.Hyperplane(seed=s, n_features=10))),
    Stream("mixed", "labels", _generated(lambda s: synth.Mixed(s % 2, seed=s))),
    Stream("stagger", "labels", _generated(lambda s: synth.STAGGER(s % 3, seed=s))),
    Stream("sea, sudden", "drift", _drifting(lambda c, s: synth.SEA(c, seed=s, noise=0.1), 4)),
    Stream("agrawal, sudden", "drift", _drifting(lambda c, s: synth.Agrawal(c, seed=s), 4)),
    Stream("agrawal, gradual", "drift", _drifting(lambda c, s: synth.Agrawal(c + 4, seed=s), 4, width=300)),
    Stream("stagger, sudden", "drift", _drifting(lambda c, s: synth.STAGGER(c, seed=s), 3)),
    Stream("sine, sudden", "drift", _drifting(lambda c, s: synth.Sine(c, seed=s), 4)),
    Stream("mixed, recurring", "drift", _drifting(lambda c, s: synth.Mixed(c % 2, seed=s), 6)),
    Stream("led, drifting", "drift", _drifting(lambda c, s: synth.LEDDrift(s, 0.1, True, 2 * c + 1), 3)),
    Stream(
        "rbf, moving",
        "drift",
        _generated(lambda s: synth.RandomRBFDrift(s, s, n_classes=4, change_speed=0.002, n_drift_centroids=25)),
    ),
    Stream(
        "hyperplane, turning",
        "drift",
        _generated(lambda s: synth.Hyperplane(seed=s, n_drift_features=5, mag_change=0.005)),
    ),
    Stream("chicks", "numbers", _shuffled(_river(river_datasets.ChickWeights))),
    Stream("trump approval", "numbers", _in_time(river_datasets.TrumpApproval), in_time=True),
    Stream("water flow", "numbers", _in_time(river_datasets.WaterFlow), in_time=True),
    Stream("airline passengers", "numbers", _in_time(river_datasets.AirlinePassengers), in_time=True),
    Stream("stocks", "numbers", _in_time(river_datasets.SP500Stocks), in_time=True),
    Stream("diabetes", "numbers", _shuffled(_sklearn(sklearn_datasets.load_diabetes))),
    Stream("linnerud", "numbers", _shuffled(_sklearn(sklearn_datasets.load_linnerud, 0))),
    Stream("friedman", "numbers", _generated(lambda s: synth.Friedman(seed=s))),
    Stream(
        "friedman, drifting",
        "numbers",
        _generated(lambda s: synth.FriedmanDrift("gra", position=(1000, 2000), transition_window=200, seed=s)),
    ),
    Stream("planes", "numbers", _generated(lambda s: synth.Planes2D(seed=s))),
    Stream("mv", "numbers", _generated(lambda s: synth.Mv(seed=s))),
]


def find_stream(name: str) -> Stream:
    """Return the stream of a name. Raises KeyError."""
    return {stream.name: stream for stream in STREAMS}[name]
