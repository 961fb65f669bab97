"""The recall probes by name: each makes scenes from a seed and a split."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from research.evaluation.recall import people, statements, support
from research.evaluation.recall.scenes import SPLITS, Scene, Split


@dataclass(frozen=True)
class ProbeOptions:
    """The data of the probes.

    split: train, dev or review (checked by the command)
    size: number of people, numbers and so on
    questions: questions of a probe in all scenes together, at most
    """

    split: str
    seed: int
    size: int
    questions: int

    @property
    def checked_split(self) -> Split:
        """Return the split. Raises ValueError for another name."""
        return SPLITS[SPLITS.index(self.split)]  # type: ignore[arg-type]


def limited(scenes: list[Scene], questions: int) -> list[Scene]:
    """Return the scenes with at most `questions` questions in all, spread evenly over the scenes."""
    each, more = divmod(questions, len(scenes))
    counts = [each + (number < more) for number in range(len(scenes))]
    chosen = [replace(scene, questions=scene.questions[:count]) for scene, count in zip(scenes, counts, strict=True)]
    return [scene for scene in chosen if scene.questions]


def _probe(invent: Callable[[int, int, Split], list[Scene]]) -> Callable[[ProbeOptions], list[Scene]]:
    def make(options: ProbeOptions) -> list[Scene]:
        return limited(invent(options.size, options.seed, options.checked_split), options.questions)

    return make


PROBES: Mapping[str, Callable[[ProbeOptions], list[Scene]]] = {
    "people": _probe(people.invent_scenes),
    "numbers": _probe(statements.number_scenes),
    "corrections": _probe(statements.correction_scenes),
    "support": _probe(support.support_scenes),
}
