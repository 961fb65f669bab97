"""Very long sessions: the gain and the size of a memory by position in the stream."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from model.adaptive_lm import AdaptiveLM
from model.memory import Pool
from model.memory.lexical.types import KEY_SCALE
from research.evaluation.arms import state_bytes
from research.evaluation.prequential import Passage, Progress, new_pool, score_request


@dataclass
class LongRun:
    """The course of a long session, request by request.

    position: tokens learned before the request
    frozen, adapted: mean loss of the request without and with the memory, in nats per token
    rows: number of rows after the request
    norm: Euclidean norm of the state after the request
    tokens: tokens learned in total
    state_bytes: size of the stored session at the end
    """

    position: list[int] = field(default_factory=list)
    frozen: list[float] = field(default_factory=list)
    adapted: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    norm: list[float] = field(default_factory=list)
    tokens: int = 0
    state_bytes: int = 0


def read_long(lm: AdaptiveLM, passages: Iterable[Passage], bos: int, progress: Progress = lambda _: None) -> LongRun:
    """Score and learn all passages in order, in one session."""
    pool = new_pool(lm)
    session, run = pool.open(), LongRun()
    for passage in passages:
        adapted = score_request(lm, pool, session, passage, bos, learn=True)
        run.position.append(run.tokens)
        run.frozen.append(-float(passage.log_probs.double().mean()))
        run.adapted.append(-float(adapted.double().mean()))
        run.rows.append(sum(pool.num_rows(session).values()))
        run.norm.append(state_norm(pool, session))
        run.tokens += len(adapted)
        progress(1)
    run.state_bytes = state_bytes(pool.dump(session))
    return run


def state_norm(pool: Pool, session: int) -> float:
    """Return the Euclidean norm of all vectors in the rows of a session. Keys have length 1."""
    total = 0.0
    for site in pool.sites.values():
        table, vectors = site.tables[session], site.fields[-1]
        scale = 1.0 if vectors.is_floating_point() else KEY_SCALE
        total += float((vectors[table[table > 0]].double() / scale).square().sum())
    return math.sqrt(total)


def ratio_between(run: LongRun, start: int, end: int) -> float:
    """Return perplexity with memory ÷ without, on the requests that begin in [start, end); NaN without requests."""
    chosen = [i for i, position in enumerate(run.position) if start <= position < end]
    differences = torch.tensor([run.adapted[i] - run.frozen[i] for i in chosen], dtype=torch.float64)
    return float(differences.mean().exp())
