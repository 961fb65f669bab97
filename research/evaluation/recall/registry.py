"""The arms of the recall probes by name. A new arm is one more entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from research.evaluation.recall.arms import FrozenArm, OracleArm, RecallArm, RetrievalArm, SummaryArm
from research.evaluation.recall.episodes import EpisodesArm
from research.evaluation.recall.memory import MemoryArm
from research.evaluation.recall.prompt import BEST, WORDINGS
from research.evaluation.recall.search import BM25, Embeddings, Fused, Index, Newest
from research.evaluation.recall.speaker import Speaker
from service.errors import CommandError

NewArm = Callable[[Speaker, int], RecallArm]


PROMPT_RESERVE = 512  # tokens of the context that full history leaves for the question and the answer


def _retrieval(name: str, title: str, new_index: Callable[[Speaker], Index], limit: int = 10_000) -> NewArm:
    return lambda speaker, tokens: RetrievalArm(
        speaker, name, title, lambda: new_index(speaker), limit=limit, tokens=tokens
    )


def _full_history(speaker: Speaker, tokens: int) -> RecallArm:
    room = max(tokens, speaker.max_context - PROMPT_RESERVE)
    return RetrievalArm(speaker, "full-history", "all texts that the context holds", Newest, tokens=room)


def _oracle(wording: str) -> NewArm:
    return lambda speaker, tokens: OracleArm(speaker, wording)


def _bm25(speaker: Speaker) -> Index:
    return BM25()


def _embeddings(speaker: Speaker) -> Index:
    if speaker.encoder is None:
        raise CommandError("the arms `embedder` and `fused` need an encoder, got IMPRINT_RECALL_ENCODER=none")
    return Embeddings(speaker.encoder)


def _fused(speaker: Speaker) -> Index:
    return Fused([BM25(), _embeddings(speaker)])


ARMS: Mapping[str, NewArm] = {
    "frozen": lambda speaker, tokens: FrozenArm(speaker),
    "memory": lambda speaker, tokens: MemoryArm(speaker),
    "episodes": EpisodesArm,
    "bm25-1": _retrieval("bm25-1", "BM25, best text in the prompt", _bm25, limit=1),
    "bm25": _retrieval("bm25", "BM25, best texts in the prompt", _bm25),
    "embedder-1": _retrieval("embedder-1", "sentence embedder, best text in the prompt", _embeddings, limit=1),
    "embedder": _retrieval("embedder", "sentence embedder, best texts in the prompt", _embeddings),
    "fused-1": _retrieval("fused-1", "BM25 and embedder, best text", _fused, limit=1),
    "fused": _retrieval("fused", "BM25 and embedder, best texts", _fused),
    "last-tokens": _retrieval("last-tokens", "the last texts in the prompt", lambda speaker: Newest()),
    "summary": SummaryArm,
    "full-history": _full_history,
    **{f"oracle-{wording.replace(' ', '-')}": _oracle(wording) for wording in WORDINGS if wording != BEST},
    "oracle": _oracle(BEST),
}
COSTLY = ("summary", "full-history")
EMBEDDER = ("embedder-1", "embedder", "fused-1", "fused")
NOT_BY_DEFAULT = (*COSTLY, *(name for name in ARMS if name.startswith("oracle-")))


def new_arms(speaker: Speaker, names: Sequence[str], tokens: int) -> list[RecallArm]:
    """Return the arms of the given names, in the order of ARMS; without names all but NOT_BY_DEFAULT.

    Without names and without an encoder, the arms that need one are left out too. Raises CommandError.

    tokens: tokens of past text that an arm may put in the prompt
    """
    left_out = NOT_BY_DEFAULT if speaker.encoder is not None else (*NOT_BY_DEFAULT, *EMBEDDER)
    chosen = names or [name for name in ARMS if name not in left_out]
    return [new_arm(speaker, tokens) for name, new_arm in ARMS.items() if name in chosen]
