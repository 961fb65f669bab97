"""Where the time of a step goes: the model's operators under torch's profiler, outside of any server."""

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
REST, PYTHON = "other operators", "compiled loops and Python"

Step = Callable[[], Any]


@torch.inference_mode()
def profiles(
    lm: AdaptiveLM, texts: PromptSource, batches: tuple[int, ...], threads: int, steps: int
) -> dict[str, dict[str, Any]]:
    """By step: its seconds (not profiled) and the shares of its time (profiled) by groups of operators.

    The session that is read and taught is full.
    """
    torch.set_num_threads(threads)
    block = lm.memory.config.block
    pool = lm.new_pool(rows=ROWS + 4096, sessions=2)
    made = random_session(lm.memory.config, "full", "", ROWS, lm.backbone.config.vocab_size)
    session = pool.open(as_tensors(made.sites))
    ids = texts.cut("profile", block)
    every: dict[str, Step] = {}
    for count in batches:
        every[f"decode {count}, off"] = decode_step(lm, pool, EMPTY_SESSION, ids[:PROMPT], count, steps)
        every[f"decode {count}, predict"] = decode_step(lm, pool, session, ids[:PROMPT], count, steps)
    every["block, off"] = lambda: lm.block(ids, lm.backbone.new_cache(block), pool, EMPTY_SESSION)
    every["block, learned"] = lambda: learn_block(lm, pool, session, ids)
    return {name: {"seconds": seconds(step, steps), "shares": shares(step, steps)} for name, step in every.items()}


def decode_step(lm: AdaptiveLM, pool: Pool, session: int, prompt: list[int], count: int, steps: int) -> Step:
    """A step of so many sequences, each `PROMPT` tokens long or a little more."""
    room = len(prompt) + 4 * steps + 8
    first = lm.backbone.new_cache(room)
    decode_state, _ = lm.block(prompt, first, pool, session)
    caches = [first, *(first.fork(room) for _ in range(count - 1))]
    state = {"carries": [decode_state] * count}

    def step() -> None:
        drawn = lm.predict(state["carries"], pool, [session] * count).argmax(-1).tolist()
        state["carries"] = lm.decode(drawn, caches, state["carries"], pool, [session] * count)

    return step


def learn_block(lm: AdaptiveLM, pool: Pool, session: int, ids: list[int]) -> None:
    """One block, scored and learned; then forgotten."""
    draft = pool.draft(session)
    lm.block(ids, lm.backbone.new_cache(len(ids)), pool, draft.index, learn=[True] * len(ids), draft=draft, frozen=True)
    draft.rollback()


def seconds(step: Step, steps: int) -> float:
    """The median of so many steps, the first ones not counted."""
    step()
    times = []
    for _ in range(steps):
        begun = time.perf_counter()
        step()
        times.append(time.perf_counter() - begun)
    return sorted(times)[len(times) // 2]


def shares(step: Step, steps: int) -> dict[str, float]:
    """By group, the share of the time of so many steps; the largest first."""
    with profile(use_kineto=False) as found:  # the other one prints of its own
        begun = time.perf_counter()
        for _ in range(steps):
            step()
        total = time.perf_counter() - begun
    spent: dict[str, float] = {}
    for event in found.key_averages():
        group = operator_group(event.key)
        spent[group] = spent.get(group, 0.0) + event.self_cpu_time_total * 1e-6 / total
    spent[PYTHON] = max(0.0, 1.0 - sum(spent.values()))
    return dict(sorted(spent.items(), key=lambda item: -item[1]))


def operator_group(operator: str) -> str:
    """The group of an operator such as `aten::addmm`."""
    name = operator.rpartition("::")[2]
    return next((group for group, words in GROUPS.items() if any(word in name for word in words)), REST)


def told(shares: dict[str, float], most: int = 3) -> str:
    """The largest shares in words."""
    return ", ".join(f"{group} {share:.0%}" for group, share in list(shares.items())[:most])


def read_bandwidth(device: str, threads: int) -> float:
    """Bytes a second at which the device reads memory, at its best of a few times."""
    torch.set_num_threads(threads)
    # A GPU reads 256 MB in less time than it takes to ask it to.
    megabytes = 4096 if device == "cuda" else 256
    buffer, best = torch.ones(megabytes * 2**18, device=device), 0.0
    for _ in range(6):
        begun = time.perf_counter()
        float(buffer.sum())
        best = max(best, buffer.nbytes / (time.perf_counter() - begun))
    return best
