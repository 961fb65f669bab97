"""Choosing an arm's settings on the streams set aside for tuning, every kind of them counting alike."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from research.evaluation.arms import Arm, Outcome, Setting, Subject

Run = Callable[[Subject, Setting], Outcome]


@dataclass(frozen=True)
class Tuned:
    """The chosen setting, what was fitted on top of it, and the loss of each setting tried (mean nats per token)."""

    setting: Setting
    fitted: dict[str, float]
    losses: list[float]

    def to_dict(self) -> dict[str, float]:
        return {**self.setting, **self.fitted}


def tune(arm: Arm, subjects: Sequence[Subject], run: Run) -> Tuned:
    """Tries the arm's grid on the subjects, as far as `tuning_subjects` takes them, and keeps what loses least."""
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
    """Those that an arm is tuned on: none if there is nothing to choose, the first of each kind if it is costly."""
    if len(arm.grid) == 1 and not arm.needs_fit:
        return []
    return list({s.stream.kind: s for s in reversed(subjects)}.values()) if arm.costly else list(subjects)


def shares(kinds: Sequence[str]) -> list[float]:
    """The weight of each stream, given their kinds: kinds count alike, and so do the streams of a kind; Σ = 1."""
    counts = Counter(kinds)
    return [1 / (len(counts) * counts[kind]) for kind in kinds]
