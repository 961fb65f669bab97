"""The choice of an arm's settings on the streams set aside for tuning, with equal weight for each kind."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from research.evaluation.arms import Arm, Outcome, Setting, Subject

Run = Callable[[Subject, Setting], Outcome]


@dataclass(frozen=True)
class Tuned:
    """The chosen setting, the parameters fitted with it, and the loss of each setting (mean nats per token)."""

    setting: Setting
    fitted: dict[str, float]
    losses: list[float]

    def to_dict(self) -> dict[str, float]:
        """Return the setting and the fitted parameters as one dict."""
        return {**self.setting, **self.fitted}


def tune(arm: Arm, subjects: Sequence[Subject], run: Run) -> Tuned:
    """Run the arm's grid on the tuning subjects, and return the setting with the least loss."""
    chosen = tuning_subjects(arm, subjects)
    if not chosen:
        return Tuned(arm.grid[0], {}, [])
    weights = shares([subject.stream.kind for subject in chosen])
    tried = []
    for setting in arm.grid:
        examples = [(subject, run(subject, setting)) for subject in chosen]
        fitted = arm.fit(examples, weights)
        loss = 0.0
        for (subject, outcome), weight in zip(examples, weights, strict=True):
            loss -= weight * float(arm.finish(subject, outcome, fitted).double().mean())
        tried.append((loss if math.isfinite(loss) else math.inf, setting, fitted))
    _, setting, fitted = min(tried, key=lambda trial: trial[0])
    return Tuned(setting, fitted, [loss for loss, _, _ in tried])


def tuning_subjects(arm: Arm, subjects: Sequence[Subject]) -> list[Subject]:
    """Return the subjects that an arm is tuned on.

    The list is empty for an arm with nothing to choose or fit. A costly arm gets the first subject of each kind.
    """
    if len(arm.grid) == 1 and not arm.needs_fit:
        return []
    return list({s.stream.kind: s for s in reversed(subjects)}.values()) if arm.costly else list(subjects)


def shares(kinds: Sequence[str]) -> list[float]:
    """Return the weight of each stream, with Σ = 1: kinds have equal weight, and so have the streams of a kind."""
    counts = Counter(kinds)
    return [1 / (len(counts) * counts[kind]) for kind in kinds]
