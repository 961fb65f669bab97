"""The run of the recall probes: every arm learns every scene and answers its questions at every distance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from model.text.tokenizer import Tokenizer
from research.evaluation.recall.arms import Answer, BatchArm, Finder, FrozenArm, OracleArm, RecallArm
from research.evaluation.recall.chapter import Chapter, TypedWord, typed_words
from research.evaluation.recall.filler import Filler
from research.evaluation.recall.locomo import Conversation, evidence_shares
from research.evaluation.recall.scenes import Question, Scene
from research.evaluation.recall.scoring import Verdict, score_answer
from research.runs import ResultCache, code_hash, content_hash

SOURCES = tuple(
    f"evaluation/recall/{name}.py"
    for name in (
        "arms",
        "chapter",
        "locomo",
        "memory",
        "prompt",
        "scenes",
        "search",
        "spans",
        "speaker",
        "trial",
    )
)


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

    def run(self, probe: str, scene: Scene, arm: RecallArm) -> list[Record]:
        """Return the answers of an arm to all questions of a scene at all distances that the fillers reach."""
        answers = self.cached(arm, asdict(scene), lambda: self._answers(scene, arm))
        found = []
        for distance, its_answers in answers.items():
            for question, (text, spans) in zip(scene.questions, its_answers, strict=True):
                verdict = score_answer(question, text, None if spans is None else tuple(spans))
                found.append(Record(probe, arm.name, scene.name, int(distance), question, text, verdict))
        return found

    def suggestions(self, book: Chapter, arm: RecallArm, tokenizer: Tokenizer) -> dict[str, list[TypedWord]]:
        """Return the words that are typed after the earlier chapters and other text, by distance.

        Raises TypeError for an arm that suggests nothing.
        """

        def measure() -> dict[str, list[TypedWord]]:
            arm.forget()
            for request in book.taught:
                arm.teach_text(tokenizer.decode(request))
            return {str(distance): typed_words(arm, book, tokenizer) for distance in self._teach_fillers(arm)}

        found: dict[str, list[TypedWord]] = self.cached(
            arm, ["chapter", book.taught, book.typed, sorted(book.names)], measure
        )
        return found

    def evidence(self, arm: RecallArm, talks: Sequence[Conversation]) -> dict[str, dict[str, list[float]]]:
        """Return `evidence_shares` of an arm. Raises TypeError for an arm that finds no texts."""
        if not isinstance(arm, Finder):
            raise TypeError(f"{arm.name} finds no texts")
        finder = arm
        found: dict[str, dict[str, list[float]]] = self.cached(
            arm, [asdict(talk) for talk in talks], lambda: evidence_shares(finder, talks)
        )
        return found

    def cached(self, arm: RecallArm, data: object, make: Callable[[], Any]) -> Any:
        """Return what `make` measures of an arm on some data, as JSON holds it, from the cache if possible."""
        key = content_hash(
            code_hash(self._device, *SOURCES), self._base, arm.name, arm.identity, data, self._distances,
            [filler.text for filler in self._fillers],
        )  # fmt: skip
        if (found := self._runs.load(key)) is None:
            found = {"none": torch.zeros(0)}, make()
            self._runs.save(key, *found)
        return found[1]

    def _answers(self, scene: Scene, arm: RecallArm) -> dict[str, list[tuple[str, tuple[str, ...] | None]]]:
        """Return the text and the spans of each answer, by distance."""
        arm.forget()
        if isinstance(arm, OracleArm):
            arm.evidence = {question.text: question.evidence for question in scene.questions}
        for messages in scene.requests:
            arm.teach(messages)
        found: dict[str, list[tuple[str, tuple[str, ...] | None]]] = {}
        for distance in self._teach_fillers(arm):
            if found and isinstance(arm, FrozenArm | OracleArm):  # the answers are the same at every distance
                found[str(distance)] = next(iter(found.values()))
                continue
            answers = answer_all(arm, scene.questions, scene.max_tokens)
            found[str(distance)] = [(answer.text, answer.spans) for answer in answers]
        return found

    def _teach_fillers(self, arm: RecallArm) -> Iterator[int]:
        """Teach other text, and yield each distance when as many tokens are learned."""
        learned, waiting = 0, iter(self._fillers)
        for distance in self._distances:
            while learned < distance and (filler := next(waiting, None)) is not None:
                arm.teach_text(filler.text)
                learned += filler.tokens
            if learned >= distance:
                yield distance


def answer_all(arm: RecallArm, questions: Sequence[Question], max_tokens: int) -> list[Answer]:
    """Return the answers of an arm, in order; together if the arm can."""
    if not isinstance(arm, BatchArm):
        return [(arm.complete if question.is_cue else arm.ask)(question.text, max_tokens) for question in questions]
    found: dict[int, Answer] = {}
    for is_cue, answer in ((False, arm.ask_all), (True, arm.complete_all)):
        numbers = [number for number, question in enumerate(questions) if question.is_cue == is_cue]
        found |= zip(numbers, answer([questions[number].text for number in numbers], max_tokens), strict=True)
    return [found[number] for number in range(len(questions))]
