"""The run of the recall probes: every arm learns every scene and answers its questions at every distance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from research.evaluation.recall.arms import Answer, OracleArm, RecallArm
from research.evaluation.recall.filler import Filler
from research.evaluation.recall.scenes import Question, Scene
from research.evaluation.recall.scoring import Verdict, score_answer
from research.runs import ResultCache, code_hash, content_hash

SOURCES = tuple(
    f"evaluation/recall/{name}.py"
    for name in ("arms", "embedder", "memory", "prompt", "scenes", "search", "spans", "speaker", "trial")
)

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Record:
    """One answer of one arm, with its scores. distance: other tokens learned between the scene and the question."""

    probe: str
    arm: str
    scene: str
    distance: int
    question: Question
    answer: str
    verdict: Verdict


class RecallTrial:
    """Runs arms on scenes. Finished scenes are cached, so that a killed run resumes.

    base: fingerprint of the base
    fillers: other text, in order; every scene is followed by the same
    distances: numbers of other tokens after which the questions are put
    """

    def __init__(
        self, base: str, device: torch.device, runs: ResultCache, fillers: Sequence[Filler], distances: Sequence[int]
    ) -> None:
        self._base, self._device, self._runs = base, device, runs
        self._fillers, self._distances = fillers, sorted(distances)

    def run(self, probe: str, scene: Scene, arm: RecallArm, advance: Advance = lambda _: None) -> list[Record]:
        """Return the answers of an arm to all questions of a scene at all distances.

        `advance` gets 1 for each distance. Distances beyond the fillers are left out.
        """
        key = content_hash(
            code_hash(self._device, *SOURCES), self._base, arm.name, arm.identity, asdict(scene), self._distances,
            [filler.text for filler in self._fillers],
        )  # fmt: skip
        if (cached := self._runs.load(key)) is None:
            cached = {"none": torch.zeros(0)}, self._answers(scene, arm, advance)
            self._runs.save(key, *cached)
        else:
            advance(len(self._distances))
        found = []
        for distance, answers in cached[1].items():
            for question, (text, spans) in zip(scene.questions, answers, strict=True):
                verdict = score_answer(question, text, None if spans is None else tuple(spans))
                found.append(Record(probe, arm.name, scene.name, int(distance), question, text, verdict))
        return found

    def _answers(self, scene: Scene, arm: RecallArm, advance: Advance) -> Mapping[str, list[tuple[str, object]]]:
        """Return the text and the spans of each answer, by distance."""
        arm.forget()
        if isinstance(arm, OracleArm):
            arm.evidence = {question.text: question.evidence for question in scene.questions}
        for messages in scene.requests:
            arm.teach(messages)
        found, learned, waiting = {}, 0, iter(self._fillers)
        for distance in self._distances:
            while learned < distance and (filler := next(waiting, None)) is not None:
                arm.teach_text(filler.text)
                learned += filler.tokens
            if learned >= distance:
                answers = [_answer(arm, question, scene.max_tokens) for question in scene.questions]
                found[str(distance)] = [(answer.text, answer.spans) for answer in answers]
            advance(1)
        return found


def _answer(arm: RecallArm, question: Question, max_tokens: int) -> Answer:
    return (arm.complete if question.is_cue else arm.ask)(question.text, max_tokens)
