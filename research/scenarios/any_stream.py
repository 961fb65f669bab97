"""The learners `bandit`, `labels` and `regression` as players of scenarios, none of which they were trained for.

They get what a user would send: an observation as columns, the features of actions as those of arms, the reward of the
action that was taken, or the right answer. They know neither the kind of a scenario nor its length.
"""

from __future__ import annotations

import numpy as np

from research.scenarios.core import Actor, Curve, FloatArray, IntArray, Tasks
from research.streams.array_learners import ImprintArms, ImprintLabels, ImprintNumbers


class AnyArms(Actor):
    """The learner `bandit`, a session a task; an arm is drawn with the probability that the learner gives."""

    def __init__(self) -> None:
        self._sessions: list[ImprintArms] = []

    def act(self, tasks: Tasks) -> IntArray:
        if not self._sessions:
            self._sessions = [ImprintArms(tasks.actions) for _ in range(tasks.batch)]
        contexts, features = np.split(tasks.observe(), [tasks.context], axis=1)
        own = features.reshape(tasks.batch, tasks.actions, -1) if tasks.features else [None] * tasks.batch
        sessions = zip(self._sessions, contexts, own, strict=True)
        return np.array([session.draw(context, each, tasks.rng) for session, context, each in sessions])

    def learn(self, actions: IntArray, rewards: FloatArray) -> None:
        for session, action, reward in zip(self._sessions, actions, rewards, strict=True):
            session.learn(int(action), float(reward))


def predict_any_labels(features: FloatArray, labels: IntArray, num_labels: int) -> Curve:
    """Return the probabilities [T, L] of the labels of a stream, each predicted before `labels` learns it.

    features [T, F], labels [T]. A label that was not seen yet has the probability 0.
    """
    learner, probs = ImprintLabels(), np.zeros((len(labels), num_labels))
    for step, (x, label) in enumerate(zip(features, labels.tolist(), strict=True)):
        columns = as_columns(x)
        known = learner.predict(columns)
        probs[step] = [known.get(each, 0.0) for each in range(num_labels)]
        learner.learn(columns, label)
    return probs


def predict_any_numbers(features: FloatArray, values: Curve) -> Curve:
    """Return the numbers [T] of a stream, each predicted before `regression` learns it; features [T, F]."""
    learner, predicted = ImprintNumbers(), np.zeros(len(values))
    for step, (x, value) in enumerate(zip(features, values.tolist(), strict=True)):
        columns = as_columns(x)
        predicted[step] = learner.predict(columns)
        learner.learn(columns, value)
    return predicted


def as_columns(numbers: FloatArray) -> dict[str, float | str]:
    """Return numbers [F] as the columns of a table."""
    return {str(column): float(number) for column, number in enumerate(numbers)}
