"""The arms of the recall probes by name. A new arm is one more entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from research.evaluation.recall.arms import FrozenArm, OracleArm, RecallArm, RetrievalArm
from research.evaluation.recall.memory import MemoryArm
from research.evaluation.recall.prompt import BEST, WORDINGS
from research.evaluation.recall.search import BM25
from research.evaluation.recall.speaker import Speaker

NewArm = Callable[[Speaker, int], RecallArm]


def _bm25_one(speaker: Speaker, tokens: int) -> RecallArm:
    return RetrievalArm(speaker, "bm25-1", "BM25, best text in the prompt", BM25, limit=1, tokens=tokens)


def _bm25(speaker: Speaker, tokens: int) -> RecallArm:
    return RetrievalArm(speaker, "bm25", "BM25, best texts in the prompt", BM25, tokens=tokens)


def _oracle(wording: str) -> NewArm:
    return lambda speaker, tokens: OracleArm(speaker, wording)


ARMS: Mapping[str, NewArm] = {
    "frozen": lambda speaker, tokens: FrozenArm(speaker),
    "memory": lambda speaker, tokens: MemoryArm(speaker),
    "bm25-1": _bm25_one,
    "bm25": _bm25,
    **{f"oracle-{wording.replace(' ', '-')}": _oracle(wording) for wording in WORDINGS if wording != BEST},
    "oracle": _oracle(BEST),
}
NOT_BY_DEFAULT = tuple(name for name in ARMS if name.startswith("oracle-"))


def new_arms(speaker: Speaker, names: Sequence[str], tokens: int) -> list[RecallArm]:
    """Return the arms of the given names, in the order of ARMS; without names all but NOT_BY_DEFAULT.

    tokens: tokens of past text that an arm may put in the prompt
    """
    chosen = names or [name for name in ARMS if name not in NOT_BY_DEFAULT]
    return [new_arm(speaker, tokens) for name, new_arm in ARMS.items() if name in chosen]
