"""The recall probes by name: each makes scenes from a seed and a split."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from research.evaluation.recall import changes, locomo, people, statements, support
from research.evaluation.recall.scenes import SPLITS, Scene, Split
from service.errors import CommandError


@dataclass(frozen=True)
class ProbeOptions:
    """The data of the probes.

    split: train, dev or review (checked by the command)
    size: number of people, numbers and so on
    questions: questions of a probe in all scenes together, at most
    locomo: file of LoCoMo
    """

    split: str
    seed: int
    size: int
    questions: int
    locomo: Path | None = None

    @property
    def checked_split(self) -> Split:
        """Return the split. Raises ValueError for another name."""
        return SPLITS[SPLITS.index(self.split)]


def limited(scenes: list[Scene], questions: int) -> list[Scene]:
    """Return the scenes with at most `questions` questions in all, spread evenly over the scenes."""
    each, more = divmod(questions, len(scenes))
    counts = [each + (number < more) for number in range(len(scenes))]
    chosen = [replace(scene, questions=scene.questions[:count]) for scene, count in zip(scenes, counts, strict=True)]
    return [scene for scene in chosen if scene.questions]


def conversations(options: ProbeOptions) -> list[locomo.Conversation]:
    """Return the conversations of LoCoMo. Raises CommandError if the file is not given or not readable."""
    if options.locomo is None:
        raise CommandError("recall-locomo is needed: the file of LoCoMo's conversations")
    return locomo.read_conversations(options.locomo)


def _locomo(options: ProbeOptions) -> list[Scene]:
    return limited(locomo.scenes(conversations(options)), options.questions)


def _probe(invent: Callable[[int, int, Split], list[Scene]]) -> Callable[[ProbeOptions], list[Scene]]:
    def make(options: ProbeOptions) -> list[Scene]:
        return limited(invent(options.size, options.seed, options.checked_split), options.questions)

    return make


PROBES: Mapping[str, Callable[[ProbeOptions], list[Scene]]] = {
    "people": _probe(people.invent_scenes),
    "numbers": _probe(statements.number_scenes),
    "corrections": _probe(statements.correction_scenes),
    "changes": _probe(changes.change_scenes),
    "untold": _probe(changes.untold_scenes),
    "support": _probe(support.support_scenes),
    "locomo": _locomo,
}
CHAPTER = "chapter"  # measures suggestions, not answers
NAMES = (*PROBES, CHAPTER)
