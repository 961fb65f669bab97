"""The arms of the recall probes by name. A new arm is one more entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from research.evaluation.recall.arms import FrozenArm, OracleArm, RecallArm, RetrievalArm
from research.evaluation.recall.memory import MemoryArm
from research.evaluation.recall.search import BM25
from research.evaluation.recall.speaker import Speaker

NewArm = Callable[[Speaker, int], RecallArm]


def _bm25_one(speaker: Speaker, tokens: int) -> RecallArm:
    return RetrievalArm(speaker, "bm25-1", "BM25, best text in the prompt", BM25, limit=1, tokens=tokens)


def _bm25(speaker: Speaker, tokens: int) -> RecallArm:
    return RetrievalArm(speaker, "bm25", "BM25, best texts in the prompt", BM25, tokens=tokens)


ARMS: Mapping[str, NewArm] = {
    "frozen": lambda speaker, tokens: FrozenArm(speaker),
    "memory": lambda speaker, tokens: MemoryArm(speaker),
    "bm25-1": _bm25_one,
    "bm25": _bm25,
    "oracle": lambda speaker, tokens: OracleArm(speaker),
}


def new_arms(speaker: Speaker, names: Sequence[str], tokens: int) -> list[RecallArm]:
    """Return the arms of the given names, in the order of ARMS; all without names.

    tokens: tokens of past text that an arm may put in the prompt
    """
    return [new_arm(speaker, tokens) for name, new_arm in ARMS.items() if name in names or not names]
