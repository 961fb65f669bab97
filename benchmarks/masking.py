"""The cost of a masked token: decoding steps of the served model whose tokens are drawn with a grammar and without.

Both arms draw from the same scores of the same step, so that other work on the machine and the length of the text
change neither.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.texts import PromptSource
from model.adaptive_lm import EMPTY_SESSION, AdaptiveLM
from model.text.grammar import Grammar, GrammarCompiler, GrammarSource
from model.text.sampling import Sampler, SamplingParams
from model.text.tokenizer import Tokenizer

PROMPT = 64
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "city": {"enum": ["Oslo", "Rome", "Lima"]},
        "hobbies": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 4},
        "note": {"type": "string", "minLength": 40},
    },
    "required": ["name", "age", "city", "hobbies", "note"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": PERSON, "minItems": 500}  # the text never ends by itself


@torch.inference_mode()
def masked(
    lm: AdaptiveLM, tokenizer: Tokenizer, texts: PromptSource, count: int, threads: int, rounds: int, steps: int
) -> dict[str, Any]:
    """Return the seconds of a step of `count` sequences by arm, one value a round: `plain` and `masked` draws."""
    torch.set_num_threads(threads)
    compiler = GrammarCompiler(tokenizer, lm.backbone.config.vocab_size)
    grammar = compiler.compile(GrammarSource("json_schema", json.dumps(SCHEMA)))
    seconds: dict[str, list[float]] = {"plain": [], "masked": []}
    for number in range(rounds):
        found = _round(lm, grammar, texts.cut(f"masked/{number}", PROMPT), count, steps, number)
        for arm, spent in zip(seconds, found, strict=True):
            seconds[arm].append(spent)
    title = f"Decoding at batch {count}, with draws under a JSON Schema and without, of the same scores"
    return {"title": title, "arms": {arm: {"s_per_step": values} for arm, values in seconds.items()}}


def _round(
    lm: AdaptiveLM, grammar: Grammar, prompt: Sequence[int], count: int, steps: int, seed: int
) -> tuple[float, float]:
    """Return the median seconds of a step with plain draws, and of the same step with masked draws."""
    pool = lm.new_pool(rows=64, sessions=1)
    room = len(prompt) + steps + 1
    first = lm.backbone.new_cache(room)
    state, _ = lm.block(prompt, first, pool, EMPTY_SESSION)
    states, caches = [state] * count, [first, *(first.fork(room) for _ in range(count - 1))]
    plain, masking = (
        [Sampler(SamplingParams(seed=seed, grammar=each), choice=choice, prompt=prompt) for choice in range(count)]
        for each in (None, grammar)
    )
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        scores = list(lm.predict(states, pool, [EMPTY_SESSION] * count))
        scored = time.perf_counter()
        for sampler, row in zip(plain, scores, strict=True):
            sampler.draw(row)
        drawn_plain = time.perf_counter()
        tokens = [sampler.draw(row) for sampler, row in zip(masking, scores, strict=True)]
        drawn_masked = time.perf_counter()
        states = lm.decode(tokens, caches, states, pool, [EMPTY_SESSION] * count)
        step = scored - started + time.perf_counter() - drawn_masked
        times.append((step + drawn_plain - scored, step + drawn_masked - drawn_plain))
    middle = len(times) // 2
    return sorted(time for time, _ in times)[middle], sorted(time for _, time in times)[middle]
