"""LoCoMo (Maharana et al. 2024): questions about long conversations of two people. CC BY-NC, so for measuring only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from research.evaluation.recall.arms import Finder
from research.evaluation.recall.scenes import Question, Scene, user
from service.errors import CommandError

CATEGORIES = {4: "single-hop", 2: "temporal", 1: "multi-hop"}
BEST_TURNS = (1, 4, 8, 16)


@dataclass(frozen=True)
class Conversation:
    """A conversation: turns as "speaker: text" by id, in order, and questions (text, answer, ids, category)."""

    name: str
    turns: dict[str, str]
    questions: list[tuple[str, str, list[str], str]]


def read_conversations(path: Path) -> list[Conversation]:
    """Return the conversations of a file of LoCoMo. Raises CommandError."""
    try:
        return [_conversation(entry) for entry in json.loads(path.read_text("utf-8"))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CommandError(f"{path} is no LoCoMo file: {error!r}") from error


def _conversation(entry: dict[str, Any]) -> Conversation:
    talk, turns = entry["conversation"], dict[str, str]()
    for number in count(1):
        if (session := talk.get(f"session_{number}")) is None:
            break
        for turn in session:
            turns[turn["dia_id"]] = " ".join(
                f"{turn['speaker']}: {turn['text']} {turn.get('blip_caption', '')}".split()
            )
    questions = [
        (item["question"], str(item["answer"]), [turn for turn in item["evidence"] if turn in turns], category)
        for item in entry["qa"]
        if (category := CATEGORIES.get(item["category"])) is not None
    ]
    return Conversation(entry["sample_id"], turns, [question for question in questions if question[2]])


def scenes(conversations: Sequence[Conversation]) -> list[Scene]:
    """Return a scene for each conversation: each turn is a request, and the single-hop questions are put."""
    return [
        Scene(
            talk.name,
            tuple((user(text),) for text in talk.turns.values()),
            tuple(
                Question(text, answer, "\n".join(talk.turns[turn] for turn in evidence), category)
                for text, answer, evidence, category in talk.questions
                if category == "single-hop"
            ),
        )
        for talk in conversations
    ]


def evidence_shares(arm: Finder, conversations: Sequence[Conversation]) -> dict[str, dict[str, list[float]]]:
    """Return for each category and number of best texts the share of each question's evidence that is among them.

    A text counts as evidence if it is a part of an evidence turn.
    """
    found = {category: {str(best): list[float]() for best in BEST_TURNS} for category in CATEGORIES.values()}
    for talk in conversations:
        arm.forget()
        for text in talk.turns.values():
            arm.teach([user(text)])
        for question, _, evidence, category in talk.questions:
            ranked = arm.find(question, max(BEST_TURNS))
            for best in BEST_TURNS:
                hits = sum(any(text in talk.turns[turn] for text in ranked[:best]) for turn in evidence)
                found[category][str(best)].append(hits / len(evidence))
    return found
