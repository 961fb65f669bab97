"""The measures of a scenario: the figures of an arm, and the baselines that a policy is compared with.

An arm is one compared condition: a policy, the policy without memory, or a baseline. The module holds the measures that
fit more than one scenario; a scenario with figures of its own defines a subclass in its file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from model.memory import Pool, choose_backend
from model.policies.network import Policy
from research.scenarios.any_stream import predict_any_labels
from research.scenarios.baselines import online_classifiers
from research.scenarios.core import Actor, Curve, FloatArray, IntArray, LabellingTasks, Tasks


class ActingMetrics:
    """The figures of one arm over one batch of B tasks that are acted in: mean summed reward and regret.

    main: the figure by which arms are compared; lower is better.
    """

    main = "regret"

    def before_step(self, tasks: Tasks, actions: IntArray, wrong: NDArray[np.bool_]) -> None:
        """See the actions [B] before they are taken, and which of them [B] are not the best."""

    def after_step(self, tasks: Tasks) -> None:
        """See the tasks after the actions were taken."""

    def figures(self, tasks: Tasks, regret: FloatArray, reward: FloatArray) -> dict[str, float]:
        """Return the figures by name; regret and reward [B, T] of all steps, tasks as they stand after the last."""
        return {"reward": float(reward.sum(1).mean()), "regret": float(regret.sum(1).mean())}


@dataclass(frozen=True)
class ActingEvaluation:
    """The evaluation of a scenario that is acted in.

    baselines: for each name, a function that makes an actor for a batch of new tasks. metrics: what is counted.
    """

    baselines: Mapping[str, Callable[[], Actor]]
    metrics: type[ActingMetrics] = ActingMetrics
    curve_label: str = "missed reward"


class LabellingEvaluation(ABC):
    """The evaluation of a scenario that is labelled."""

    curve_label: str = "missed reward"

    @abstractmethod
    def errors(self, policy: Policy, tasks: LabellingTasks, steps: int) -> dict[str, Curve]:
        """Play `steps` (T) steps and return the error [B, T] of each arm by name; the arm "memory" is the policy."""

    @abstractmethod
    def figures(self, curves: list[Curve], num_labels: int) -> dict[str, list[float]]:
        """Return the figures of an arm by name, a value for each seed; curves: the mean error [T] of each seed."""


class ClassificationEvaluation(LabellingEvaluation):
    """The evaluation of a stream of classes: accuracy after 5 labels a class, and over the last quarter."""

    def baselines(self, tasks: LabellingTasks, features: FloatArray, labels: IntArray) -> dict[str, Curve]:
        """Return whether each baseline predicts each label [B, T] of features [B, T, F], by the baseline's name."""
        return online_classifiers(features, labels, tasks.actions)

    def errors(self, policy: Policy, tasks: LabellingTasks, steps: int) -> dict[str, Curve]:
        features, labels, _ = tasks.read(steps)
        streams = list(zip(features, labels, strict=True))
        correct = {"memory": np.stack([predict_labels(policy, x, y).argmax(1) == y for x, y in streams])}
        correct["`labels`"] = np.stack([predict_any_labels(x, y, tasks.actions).argmax(1) == y for x, y in streams])
        correct |= self.baselines(tasks, features, labels)
        return {name: 1.0 - is_correct for name, is_correct in correct.items()}

    def figures(self, curves: list[Curve], num_labels: int) -> dict[str, list[float]]:
        first = 5 * num_labels
        early = [1 - float(curve[first : first + 10].mean()) for curve in curves]
        return {"after 5 a class": early, "last quarter": [1 - error for error in last_quarter(curves)]}


def last_quarter(curves: list[Curve]) -> list[float]:
    """Return the mean of the last quarter of each curve [T]."""
    return [float(curve[-len(curve) // 4 :].mean()) for curve in curves]


def predict_labels(policy: Policy, features: FloatArray, labels: IntArray) -> Curve:
    """Return the probabilities [T, L] of the labels of a stream, each predicted before the policy learns it.

    features [T, F], labels [T]: one session, updated as a server does.
    """
    pool = Pool(policy.config.memory, rows=4096, sessions=4, backend=choose_backend(torch.device("cpu")))
    index, probs = pool.open(), []
    for example, label in zip(torch.from_numpy(features), torch.from_numpy(labels), strict=True):
        probs.append(policy.label(example[None], pool, torch.tensor([index]))[0].exp().numpy())
        draft = pool.draft(index)
        (update,) = policy.label_updates(example[None], label[None], pool, torch.tensor([draft.index]))
        update.apply(draft)
        draft.commit()
    return np.stack(probs).astype(np.float64)
