"""The profile of a model step by groups of operators, with torch's profiler and without a server."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.profiler import profile

from benchmarks.texts import PromptSource, random_session
from model.adaptive_lm import EMPTY_SESSION, AdaptiveLM
from model.memory import Pool
from service.engine.stored_rows import as_tensors

PROMPT, ROWS = 16, 51_200
GROUPS = {
    "matrix products": ("linear", "mm", "gemm", "matmul"),
    "attention": ("attention",),
    "finding rows": ("index", "gather", "scatter", "embedding", "sort", "topk", "take", "unique", "searchsorted"),
    "copies": ("copy", "cat", "clone", "contiguous", "_to_", "stack", "empty", "zeros", "fill"),
}
OTHER_OPERATORS, OUTSIDE_OF_TORCH = "other operators", "compiled loops and Python"

Step = Callable[[], Any]


@torch.inference_mode()
def profiles(
    lm: AdaptiveLM, texts: PromptSource, batches: tuple[int, ...], threads: int, steps: int
) -> dict[str, dict[str, Any]]:
    """Return the duration of each step (without the profiler) and the shares of its time by groups of operators.

    The session that the steps read and write is full.
    """
    torch.set_num_threads(threads)
    block = lm.memory.config.block
    pool = lm.new_pool(rows=ROWS + 4096, sessions=2)
    full_session = random_session(lm.memory.config, "full", "", ROWS, lm.backbone.config.vocab_size)
    session = pool.open(as_tensors(full_session.sites))
    ids = texts.cut("profile", block)
    all_steps: dict[str, Step] = {}
    for count in batches:
        all_steps[f"decode {count}, off"] = decode_step(lm, pool, EMPTY_SESSION, ids[:PROMPT], count, steps)
        all_steps[f"decode {count}, predict"] = decode_step(lm, pool, session, ids[:PROMPT], count, steps)
    all_steps["block, off"] = lambda: lm.block(ids, lm.backbone.new_cache(block), pool, EMPTY_SESSION)
    all_steps["block, learned"] = lambda: learn_block(lm, pool, session, ids)
    return {name: {"seconds": seconds(step, steps), "shares": shares(step, steps)} for name, step in all_steps.items()}


def decode_step(lm: AdaptiveLM, pool: Pool, session: int, prompt: list[int], count: int, steps: int) -> Step:
    """Return a decode step of `count` sequences that begin with the same prompt."""
    room = len(prompt) + 4 * steps + 8
    first = lm.backbone.new_cache(room)
    decode_state, _ = lm.block(prompt, first, pool, session)
    caches = [first, *(first.fork(room) for _ in range(count - 1))]
    state = {"decode_states": [decode_state] * count}

    def step() -> None:
        drawn = lm.predict(state["decode_states"], pool, [session] * count).argmax(-1).tolist()
        state["decode_states"] = lm.decode(drawn, caches, state["decode_states"], pool, [session] * count)

    return step


def learn_block(lm: AdaptiveLM, pool: Pool, session: int, ids: list[int]) -> None:
    """Score and learn one block, and roll the draft back."""
    draft = pool.draft(session)
    lm.block(
        ids, lm.backbone.new_cache(len(ids)), pool, draft.index, learn=[True] * len(ids), draft=draft, score_frozen=True
    )
    draft.rollback()


def seconds(step: Step, steps: int) -> float:
    """Return the median duration of a step, after one warm-up step."""
    step()
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def shares(step: Step, steps: int) -> dict[str, float]:
    """Return the share of each group of operators in the time of `steps` steps, the largest first."""
    with profile(use_kineto=False) as found:  # kineto prints messages of its own
        started = time.perf_counter()
        for _ in range(steps):
            step()
        total = time.perf_counter() - started
    spent: dict[str, float] = {}
    for event in found.key_averages():
        group = operator_group(event.key)
        spent[group] = spent.get(group, 0.0) + event.self_cpu_time_total * 1e-6 / total
    spent[OUTSIDE_OF_TORCH] = max(0.0, 1.0 - sum(spent.values()))
    return dict(sorted(spent.items(), key=lambda item: -item[1]))


def operator_group(operator: str) -> str:
    """Return the group of an operator such as `aten::addmm`."""
    name = operator.rpartition("::")[2]
    return next((group for group, words in GROUPS.items() if any(word in name for word in words)), OTHER_OPERATORS)


def format_shares(shares: dict[str, float], limit: int = 3) -> str:
    """Return the largest shares as text."""
    return ", ".join(f"{group} {share:.0%}" for group, share in list(shares.items())[:limit])


def read_bandwidth(device: str, threads: int) -> float:
    """Return the memory bandwidth of the device for reads, in bytes per second: the best of six measurements."""
    torch.set_num_threads(threads)
    # A GPU reads 256 MB in less time than a kernel launch takes.
    megabytes = 4096 if device == "cuda" else 256
    buffer, best = torch.ones(megabytes * 2**18, device=device), 0.0
    for _ in range(6):
        started = time.perf_counter()
        float(buffer.sum())
        best = max(best, buffer.nbytes / (time.perf_counter() - started))
    return best
