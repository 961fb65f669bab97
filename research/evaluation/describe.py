"""The description of arms from their log-probabilities, as plain values for tables, figures and JSON files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from research.evaluation import metrics
from research.evaluation.arms import Arm, Subject


@dataclass(frozen=True)
class StreamScores:
    """The result of an arm on one stream: log p [n] in nats, and the duration and size as in `Outcome`."""

    log_probs: Tensor
    seconds: float
    state_bytes: int
    base_seconds: float


ScoresByStream = Mapping[str, StreamScores]  # of one arm, by stream


class Describer:
    """Describes arms over the same subjects.

    tuning: kinds of streams that settings were chosen on
    """

    def __init__(
        self, subjects: Sequence[Subject], stream_scores: Mapping[str, ScoresByStream], tuning: set[str]
    ) -> None:
        self.subjects, self.stream_scores, self.tuning = subjects, stream_scores, tuning
        self.kinds = {subject.stream.name: subject.stream.kind for subject in subjects}

    def arm(self, arm: Arm) -> dict[str, Any]:
        """Return the description of one arm.

        Ratios are perplexity ÷ the frozen base's. `memory_over` and `own_past_over` are the perplexity of the memory,
        and of the memory frozen after the first half, ÷ the arm's.
        """
        arm_scores = self.stream_scores[arm.name]
        perplexities = [metrics.perplexity(arm_scores[s.stream.name].log_probs, s.trace.widths) for s in self.subjects]
        lengths = max((subject.trace.lengths for subject in self.subjects), key=len)
        curve = self.curve(arm.name)
        return {
            "title": arm.title,
            "part": arm.part,
            "equal_bytes": arm.equal_bytes,
            "ratio": self.ratios(arm.name, "static") if arm.part == "all" else None,
            "ratio_half": self.ratios(arm.name, "static", half=True),
            "memory_over": self.ratios("memory", arm.name, half=arm.part == "half"),
            "perplexity": self._geometric([token for token, _ in perplexities]),
            "perplexity_per_byte": self._geometric([byte for _, byte in perplexities]),
            "by_request": curve,
            "gain_per_1k": metrics.slope([-math.log(ratio) for ratio in curve["ratio"]], lengths),
            "own_past_over": self.ratios("own-past", arm.name, half=True) if "own-past" in self.stream_scores else None,
            "kept_share": self.kept_share(arm.name) if arm.part == "half" else None,
            "novelty": self.novelty(arm.name),
            "state_bytes": round(float(np.mean([scores.state_bytes for scores in arm_scores.values()]))),
            "cost": float(np.mean([_cost(arm, scores) for scores in arm_scores.values()])),
        }

    def ratios(self, numerator: str, denominator: str, *, half: bool = False) -> dict[str, Any]:
        """Return one arm's perplexity ÷ another's on the tokens that both predict.

        The result has the ratio of groups of kinds with an interval, of each kind and of each stream. With `half`, only
        the second half counts.
        """
        gains = {}
        for subject in self.subjects:
            name, n = subject.stream.name, len(subject.trace.targets)
            mask = torch.arange(n) >= (subject.stream.past if half else 0)
            pair = [self.stream_scores[arm][name].log_probs for arm in (numerator, denominator)]
            gains[name] = metrics.gain(pair[0], pair[1], mask & pair[1].isfinite())
        groups = metrics.summary(gains, self.kinds, self.tuning)
        return {
            **{group: None if found is None else asdict(found) for group, found in groups.items()},
            "kinds": metrics.each_kind(gains, self.kinds),
            "streams": {name: math.exp(-value) for name, value in gains.items() if not math.isnan(value)},
        }

    def curve(self, arm: str) -> dict[str, list[float]]:
        """Return the ratio to the frozen base by request, with its interval; NaN where the arm predicts nothing."""
        gains = [metrics.by_request(*self._pair(arm, subject), subject.trace.lengths) for subject in self.subjects]
        kinds = [subject.stream.kind for subject in self.subjects]
        points = [metrics.over_kinds(request_gains, kinds) for request_gains in zip_longest(*gains, fillvalue=math.nan)]
        curve: dict[str, list[float]] = {"ratio": [], "low": [], "high": []}
        for point in points:
            estimate = None if point is None else point.exp(-1)
            curve["ratio"].append(math.nan if estimate is None else estimate.value)
            curve["low"].append(math.nan if estimate is None else estimate.low)
            curve["high"].append(math.nan if estimate is None else estimate.high)
        return curve

    def kept_share(self, arm: str) -> float | None:
        """Return the arm's gain on the second half ÷ the gain of the memory of the first half alone.

        For the arm "returned", the value is the share of A's gain that is left after B.
        """
        if "own-past" not in self.stream_scores:
            return None
        ratio, own_past = (self.ratios(name, "static", half=True)["all"] for name in (arm, "own-past"))
        return math.log(ratio["value"]) / math.log(own_past["value"]) if ratio and own_past["value"] < 1 else None

    def novelty(self, arm: str) -> dict[str, dict[str, float] | None]:
        """Return the ratio on the targets of each class of `metrics.NOVELTY`, and the share of targets in the class."""
        classes = [metrics.novelty(subject.trace.targets, subject.trace.lengths) for subject in self.subjects]
        kinds = [subject.stream.kind for subject in self.subjects]
        found: dict[str, dict[str, float] | None] = {}
        for number, name in enumerate(metrics.NOVELTY):
            gains = [
                metrics.gain(*self._pair(arm, subject), target_class == number)
                for subject, target_class in zip(self.subjects, classes, strict=True)
            ]
            share = float(np.mean([float((target_class == number).double().mean()) for target_class in classes]))
            mean = metrics.over_kinds(gains, kinds)
            found[name] = None if mean is None else {"share": share, **asdict(mean.exp(-1))}
        return found

    def _pair(self, arm: str, subject: Subject) -> tuple[Tensor, Tensor]:
        name = subject.stream.name
        return self.stream_scores[arm][name].log_probs, self.stream_scores["static"][name].log_probs

    def _geometric(self, values: Sequence[float]) -> float:
        """Return the geometric mean over kinds, from the value of each stream."""
        mean = metrics.over_kinds([math.log(value) for value in values], [s.stream.kind for s in self.subjects])
        return math.nan if mean is None else math.exp(mean.value)


def _cost(arm: Arm, scores: StreamScores) -> float:
    """Return the duration ÷ the frozen base's on the same tokens. An arm of the second half has half of the tokens."""
    share = 0.5 if arm.part == "half" else 1.0
    relative = scores.seconds / (share * scores.base_seconds)
    return relative if arm.own_base else 1.0 + relative
