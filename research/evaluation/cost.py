"""What a memory costs in time, each way measured in turns with the others so that a busy machine slows all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch

from model.adaptive_lm import EMPTY_SESSION, AdaptiveLM
from model.memory import Pool
from research.evaluation.prequential import new_pool, score_blocks


@torch.inference_mode()
def prefill(lm: AdaptiveLM, token_ids: Sequence[int]) -> None:
    """The base alone, in the memory's blocks, without the head."""
    cache, block = lm.backbone.new_cache(len(token_ids)), lm.memory.config.block
    for start in range(0, len(token_ids), block):
        lm.backbone(torch.tensor([token_ids[start : start + block]]), [cache])


def serve(lm: AdaptiveLM, pool: Pool, session: int, token_ids: Sequence[int], *, learn: bool) -> None:
    """Scores, and learns or not, as a server does."""
    for _ in score_blocks(lm, pool, session, token_ids, learn=learn, frozen=True):
        pass


@torch.inference_mode()
def decode(lm: AdaptiveLM, pool: Pool, session: int, token_ids: Sequence[int], steps: int) -> None:
    """Greedy tokens after a prompt of one block at most."""
    prompt = list(token_ids[: lm.memory.config.block])
    cache = lm.backbone.new_cache(len(prompt) + steps)
    decode_state, _ = lm.block(prompt, cache, pool, session)
    for _ in range(steps):
        token = int(lm.predict([decode_state], pool, [session])[0].argmax())
        (decode_state,) = lm.decode([token], [cache], [decode_state], pool, [session])


def learning_cost(
    lm: AdaptiveLM,
    requests: Sequence[Sequence[int]],
    bos: int,
    steps: int = 32,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, float]:
    """Medians over requests, in seconds for a request (decode: a token) and as multiples of the frozen base's.

    observe: score and learn, without and with memory. The session has learned the requests before, so that its rows are
    there to be read.
    """
    pool = new_pool(lm)
    session, times = pool.open(), dict[str, list[float]]()
    for request in requests:
        ids = [bos, *request]
        ways: dict[str, Callable[[], None]] = {
            "prefill": partial(prefill, lm, ids),
            "score_frozen": partial(serve, lm, pool, EMPTY_SESSION, ids, learn=False),
            "score": partial(serve, lm, pool, session, ids, learn=False),
            "observe": partial(serve, lm, pool, session, ids, learn=True),
            "decode_frozen": partial(decode, lm, pool, EMPTY_SESSION, ids, steps),
            "decode": partial(decode, lm, pool, session, ids, steps),
        }
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            times.setdefault(name, []).append(time.perf_counter() - begun)
        progress(1)
    seconds = {name: median(each) for name, each in times.items()}
    return {
        **{f"{name}_s": value for name, value in seconds.items()},
        "observe_over_prefill": median(o / p for o, p in zip(times["observe"], times["prefill"], strict=True)),
        "observe_over_score_frozen": median(
            o / p for o, p in zip(times["observe"], times["score_frozen"], strict=True)
        ),
        "decode_over_frozen": median(o / p for o, p in zip(times["decode"], times["decode_frozen"], strict=True)),
    }
