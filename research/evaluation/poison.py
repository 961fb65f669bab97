"""The harm of nonsense that a session has learned to the normal text that follows (law 12)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence

from model.adaptive_lm import AdaptiveLM
from model.memory import Pool
from research.evaluation.prequential import Passage, Progress, new_pool, read_passage, score_request

CONTEXT = 7  # tokens of the context whose continuation alternates


def poison_streams(vocabulary: int, tokens: int, seed: int = 0) -> dict[str, list[int]]:
    """Return streams of `tokens` tokens that teach nothing.

    The streams are random tokens, one repeated token, and one context with two alternating continuations, of which the
    last learned one is always wrong.
    """
    rng = random.Random(seed)

    def random_tokens(n: int) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(n)]

    noise, (repeated,) = random_tokens(tokens), random_tokens(1)
    context, (first, second) = random_tokens(CONTEXT), random_tokens(2)
    alternating = itertools.cycle([*context, first, *context, second])
    return {
        "random tokens": noise,
        "one token repeated": [repeated] * tokens,
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
    """Return adapted − frozen loss by poison and stream, in nats per token.

    The session learns the poison in requests of `window` tokens, and then scores and learns the passages of a stream.
    Each passage is reported to `progress`.
    """
    pool = new_pool(lm, sessions=2)
    found: dict[str, dict[str, float]] = {}
    for name, ids in poison_streams(lm.backbone.config.vocab_size, tokens).items():
        poisoned = _learn_stream(lm, pool, ids, bos, window)
        found[name] = {}
        for stream, passages in streams.items():
            session, lost, num_tokens = pool.open(pool.dump(poisoned)), 0.0, 0
            for passage in passages:
                adapted = score_request(lm, pool, session, passage, bos, learn=True)
                lost += float((passage.log_probs - adapted).double().sum())
                num_tokens += len(adapted)
                progress(1)
            pool.close(session)
            found[name][stream] = lost / num_tokens
        pool.close(poisoned)
    return found


def _learn_stream(lm: AdaptiveLM, pool: Pool, ids: Sequence[int], bos: int, window: int) -> int:
    session = pool.open()
    for start in range(0, len(ids), window):
        score_request(lm, pool, session, read_passage(lm.backbone, ids[start : start + window], bos), bos, learn=True)
    return session
