"""The cost of a memory in time. The ways are measured in turns, so that other load slows all of them alike."""

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
    """Run the base alone in the blocks of the memory, without the head."""
    cache, block = lm.backbone.new_cache(len(token_ids)), lm.memory.config.block
    for start in range(0, len(token_ids), block):
        lm.backbone(torch.tensor([token_ids[start : start + block]]), [cache])


def serve(lm: AdaptiveLM, pool: Pool, session: int, token_ids: Sequence[int], *, learn: bool) -> None:
    """Score the tokens as a server does, and learn them with `learn`."""
    for _ in score_blocks(lm, pool, session, token_ids, learn=learn, frozen=True):
        pass


@torch.inference_mode()
def decode(lm: AdaptiveLM, pool: Pool, session: int, token_ids: Sequence[int], steps: int) -> None:
    """Decode greedy tokens after a prompt of at most one block."""
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
    """Return medians over requests: seconds for a request (decode: for all steps) and multiples of the frozen base.

    observe: score with and without the memory, and learn. The session learns each request in the same round, so
        decoding reads rows of the same text.
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
            started = time.perf_counter()
            way()
            times.setdefault(name, []).append(time.perf_counter() - started)
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
