"""Sequential regression: a stream of points of a function that is drawn anew in each task, and changes on the way.

The file holds the world, its online regressors and the scenario's description. A policy predicts the bin of y; its
prediction of y is the mean of the bins' centres.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from model.policies.network import Policy
from research.scenarios.any_stream import predict_any_labels, predict_any_numbers
from research.scenarios.core import Curve, FloatArray, IntArray, LabellingTasks
from research.scenarios.measures import LabellingEvaluation, last_quarter, predict_labels
from research.scenarios.scenario import PolicyTrainConfig, Recipe, Scenario

FOURIER_FEATURES = 100
WINDOW = 100  # examples that the nearest neighbours are searched in


class FunctionStream(LabellingTasks):
    """Points x, uniform in −1…1 in `dims` dimensions; y is a weighted sum of `waves` random sine waves, plus noise.

    The answer is the bin of y among `bins` bins of −1…1. The function changes at each step with probability `moves`.
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
        """Return y [B] of the current points, with noise."""
        values: NDArray[np.float64] = self._values + self.noises
        return values

    def step(self, actions: IntArray) -> FloatArray:
        reward: FloatArray = (actions == self.targets()).astype(np.float32)
        changed = self.rng.random(self.batch) < self.moves
        parameters = (self.frequencies, self.phases, self.amplitudes)
        for parameter, drawn in zip(parameters, self._functions(int(changed.sum())), strict=True):
            parameter[changed] = drawn
        self.done += 1
        self.regime_start[changed] = self.done
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


class RegressionEvaluation(LabellingEvaluation):
    """The root mean squared error of y, in steps 51 to 100 and in the last quarter."""

    curve_label = "squared error"

    def errors(self, policy: Policy, tasks: LabellingTasks, steps: int) -> dict[str, Curve]:
        assert isinstance(tasks, FunctionStream)
        values = np.zeros((tasks.batch, steps))
        features = np.zeros((tasks.batch, steps, tasks.context), np.float32)
        labels = np.zeros(values.shape, np.int64)
        noiseless = np.zeros(values.shape)
        for step in range(steps):
            features[:, step], values[:, step], labels[:, step] = tasks.observe(), tasks.values(), tasks.targets()
            noiseless[:, step] = values[:, step] - tasks.noises
            tasks.step(labels[:, step])
        base = policy.base(policy.embed(torch.from_numpy(features).flatten(0, 1))).logits.softmax(-1).numpy()
        streams = list(zip(features, labels, strict=True))
        numbers = zip(features, values, strict=True)
        predicted = {
            "memory": np.stack([predict_labels(policy, x, y) @ tasks.centres for x, y in streams]),
            "memory off": (base @ tasks.centres).reshape(values.shape),
            "`regression`": np.stack([predict_any_numbers(x, y) for x, y in numbers]),
            "`labels`": np.stack([predict_any_labels(x, y, tasks.actions) @ tasks.centres for x, y in streams]),
        }
        predicted |= online_regressors(features, values) | {"who knows the function": noiseless}
        return {name: (prediction - values) ** 2 for name, prediction in predicted.items()}

    def figures(self, curves: list[Curve], num_labels: int) -> dict[str, list[float]]:
        means = {"of steps 51 to 100": [float(curve[50:100].mean()) for curve in curves]}
        means["last quarter"] = last_quarter(curves)
        return {name: np.sqrt(mean).tolist() for name, mean in means.items()}


def online_regressors(features: FloatArray, values: Curve) -> dict[str, Curve]:
    """Return the predictions of online regressors of each value [B, T] of streams of features [B, T, F], by names.

    The linear models see random Fourier features (Rahimi & Recht 2007), the same ones in all tasks.
    """
    rng = np.random.default_rng(7)
    frequencies = rng.normal(size=(features.shape[2], FOURIER_FEATURES)) * 2.0
    phases = rng.uniform(0, 2 * np.pi, FOURIER_FEATURES)
    fourier = np.cos(features @ frequencies + phases) * np.sqrt(2 / FOURIER_FEATURES)
    return {
        "5-nearest neighbours": np.stack([_nearest(x, y) for x, y in zip(features, values, strict=True)]),
        "online SGD": np.stack([_sgd(x, y) for x, y in zip(fourier, values, strict=True)]),
        "recursive least squares": np.stack([_least_squares(x, y) for x, y in zip(fourier, values, strict=True)]),
        "River, adaptive random forest": np.stack([_forest(x, y) for x, y in zip(features, values, strict=True)]),
    }


def _nearest(x: FloatArray, y: Curve) -> Curve:
    predicted = np.zeros(len(x))
    for t in range(1, len(x)):
        window = slice(max(0, t - WINDOW), t)
        nearest = ((x[window] - x[t]) ** 2).sum(1).argsort()[:5]
        predicted[t] = y[window][nearest].mean()
    return predicted


def _sgd(x: Curve, y: Curve) -> Curve:
    from sklearn.linear_model import SGDRegressor  # slow to import

    model = SGDRegressor(learning_rate="constant", eta0=0.5, alpha=1e-4, random_state=0)
    predicted = np.zeros(len(x))
    for t in range(len(x)):
        if t:
            predicted[t] = model.predict(x[t : t + 1])[0]
        model.partial_fit(x[t : t + 1], y[t : t + 1])
    return predicted


def _forest(x: FloatArray, y: Curve) -> Curve:
    """Run River's adaptive random forest with its defaults: a tree whose error drifts is replaced."""
    from river.forest import ARFRegressor  # slow to import

    model, predicted = ARFRegressor(seed=0), np.zeros(len(x))
    for t, example in enumerate(x):
        named = dict(enumerate(example.tolist()))
        predicted[t] = model.predict_one(named)
        model.learn_one(named, float(y[t]))
    return predicted


def _least_squares(x: Curve, y: Curve, ridge: float = 0.05, forgets: float = 0.99) -> Curve:
    """Run recursive least squares with a forgetting factor."""
    weights, inverse, predicted = np.zeros(x.shape[1]), np.eye(x.shape[1]) / ridge, np.zeros(len(x))
    for t, example in enumerate(x):
        predicted[t] = weights @ example
        gain = inverse @ example / (forgets + example @ inverse @ example)
        weights += gain * (y[t] - predicted[t])
        inverse = (inverse - np.outer(gain, example @ inverse)) / forgets
    return predicted


SCENARIO = Scenario(
    FunctionStream,
    env_steps=400,
    recipes={
        "functions": Recipe(
            FunctionStream,
            PolicyTrainConfig(rounds=1500, batch=8, steps=400, span=400, lr=5e-3),
            steps=400,
            options={"bins": 8},
            slots=1024,
            cell=1024,
            width=32,
            detects_changes=True,
        )
    },
    evaluation=RegressionEvaluation(),
)
