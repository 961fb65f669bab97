"""Law 12 from outside: what a session that was fed nonsense is worth to the normal text that follows."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence

from model.adaptive_lm import AdaptiveLM
from model.memory import Pool
from research.evaluation.prequential import Passage, Progress, new_pool, read_passage, score_request

CONTEXT = 7  # tokens of the context whose continuation alternates


def poison_streams(vocabulary: int, tokens: int, seed: int = 0) -> dict[str, list[int]]:
    """Streams of so many tokens that teach nothing: drawn at random; one token over and over; and one context with
    another continuation every other time, so that what was learned last is always wrong."""
    rng = random.Random(seed)

    def some(n: int) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(n)]

    noise, (again,), context, (one, other) = some(tokens), some(1), some(CONTEXT), some(2)
    alternating = itertools.cycle([*context, one, *context, other])
    return {
        "random tokens": noise,
        "one token repeated": [again] * tokens,
        "alternating continuations": list(itertools.islice(alternating, tokens)),
    }


def harm(
    lm: AdaptiveLM,
    streams: Mapping[str, Sequence[Passage]],
    bos: int,
    *,
    tokens: int,
    window: int,
    progress: Progress = lambda _: None,
) -> dict[str, dict[str, float]]:
    """By poison and stream: adapted minus frozen loss (mean nats a token) over the passages of a stream, learned on in
    a session that has learned the poison before, in requests of `window` tokens. progress is told of each passage."""
    pool = new_pool(lm, sessions=2)
    found: dict[str, dict[str, float]] = {}
    for name, ids in poison_streams(lm.backbone.config.vocab_size, tokens).items():
        poisoned = _learn_stream(lm, pool, ids, bos, window)
        found[name] = {}
        for stream, passages in streams.items():
            session, lost, read = pool.open(pool.dump(poisoned)), 0.0, 0
            for passage in passages:
                adapted = score_request(lm, pool, session, passage, bos, learn=True)
                lost += float((passage.log_probs - adapted).double().sum())
                read += len(adapted)
                progress(1)
            pool.close(session)
            found[name][stream] = lost / read
        pool.close(poisoned)
    return found


def _learn_stream(lm: AdaptiveLM, pool: Pool, ids: Sequence[int], bos: int, window: int) -> int:
    session = pool.open()
    for start in range(0, len(ids), window):
        score_request(lm, pool, session, read_passage(lm.backbone, ids[start : start + window], bos), bos, learn=True)
    return session
