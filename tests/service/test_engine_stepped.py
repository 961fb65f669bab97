"""The engine with steps of fixed shapes over paged caches, as on a GPU, generates and learns the same as without."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from pathlib import Path

import pytest

from model.adaptive_lm import AdaptiveLM
from model.base.checkpoint import load_backbone
from model.decode.cuda_graphs import CudaGraphLM
from model.decode.paged_cache import PAGE_SIZE
from model.memory import Draft, MemoryConfig, Pool, SiteConfig, SiteRows
from model.memory.initial import random_memory
from model.text.sampling import SamplingParams
from model.text.tokenizer import Tokenizer
from service.engine import (
    Engine,
    Event,
    GenerationParams,
    JobFailed,
    JobFinished,
    JobRequest,
    MemoryAccess,
    Segment,
    TokenOutput,
    gather_executor,
)
from service.metrics import Metrics
from tests.live import WAIT_TIMEOUT_S
from tests.model.tiny_lm import DEVICE
from tests.tiny import TEXT

pytestmark = pytest.mark.gpu
GREEDY = SamplingParams(temperature=0.0)
KV_TOKENS = 6 * PAGE_SIZE


def jobs(ids: list[int]) -> list[tuple[Segment, MemoryAccess | None]]:
    """Return more jobs than fit at once: with several choices, with a learning or a reading session, or with none."""
    mask = [True] * len(ids)
    users = [MemoryAccess(("t", name), (1.0, 1.0, 1), write=name == "a", stored={}) for name in "ab"]
    return [
        (Segment(ids[:20], generate=GenerationParams(9, GREEDY, n=3)), None),
        (Segment(ids, learn=mask, generate=GenerationParams(40, GREEDY, learn=True)), users[0]),
        (Segment(ids[5:60], generate=GenerationParams(12, GREEDY, logprobs=2)), users[1]),
        (Segment(ids[:70], generate=GenerationParams(30, GREEDY)), None),
        (Segment(ids[3:9], generate=GenerationParams(2, GREEDY, n=8)), None),
    ]


@pytest.fixture
def plain(tiny_base: Path) -> AdaptiveLM:
    backbone = load_backbone(tiny_base, device=DEVICE)
    site = SiteConfig("words", "lexical", slots=64, k=4, width=16, cell=8)
    memory = random_memory(MemoryConfig(backbone.config.hidden_size, (site,), block=16), seed=0).to(DEVICE)
    return AdaptiveLM(backbone, memory)


@pytest.fixture
def tokenizer(tiny_base: Path) -> Tokenizer:
    return Tokenizer.load(tiny_base)


def new_engine(lm: AdaptiveLM, tokenizer: Tokenizer) -> Engine:
    return Engine(
        lm, tokenizer, max_turns=8, max_batch=4, kv_tokens=KV_TOKENS, hot_rows=2000, hot_sessions=4, threads=1,
        metrics=Metrics(),
    )  # fmt: skip


def run(lm: AdaptiveLM, tokenizer: Tokenizer, ids: list[int]) -> list[tuple[object, ...]]:
    """Run all jobs, and return the text, token counts and written rows of each."""
    engine = new_engine(lm, tokenizer)

    async def run_one(segment: Segment, memory: MemoryAccess | None) -> tuple[object, ...]:
        events: list[Event] = []
        ended = asyncio.Event()

        def emit(job: JobRequest, event: Event) -> None:
            events.append(event)
            if isinstance(event, JobFinished | JobFailed):
                ended.set()

        job = JobRequest([segment], emit, memory)
        engine.submit(job)
        await ended.wait()
        engine.settle(job, None)
        assert isinstance(events[-1], JobFinished), events[-1]
        outputs = [(event.choice, event.text, event.finish) for event in events if isinstance(event, TokenOutput)]
        text = {choice: "".join(t for c, t, _ in outputs if c == choice) for choice, _, _ in outputs}
        stats = events[-1].stats
        return (
            text,
            stats.tokens_learned,
            stats.completion_tokens,
            {n: len(r.slots) for n, r in events[-1].rows.items()},
        )

    async def run_all() -> list[tuple[object, ...]]:
        await engine.start()
        try:
            return await asyncio.gather(*(run_one(*job) for job in jobs(ids)))
        finally:
            await engine.stop()

    return asyncio.run(run_all())


def test_what_is_said_and_learned_does_not_depend_on_the_kind_of_step(
    plain: AdaptiveLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepped = CudaGraphLM(plain, kv_tokens=max(KV_TOKENS, 8 * 128), max_batch=8)
    ids = tokenizer.encode(TEXT * 2)[:90]
    expected = run(plain, tokenizer, ids)
    monkeypatch.setattr(gather_executor, "has_streams", lambda device: True)
    assert run(stepped, tokenizer, ids) == expected
    assert stepped.pages.utilization == 0.0, "the reserved pages are free again"


async def test_what_a_turn_wrote_is_gathered_while_others_go_on(
    plain: AdaptiveLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_gather, touched = threading.Event(), Draft.touched

    def delayed(draft: Draft) -> dict[str, SiteRows]:
        assert may_gather.wait(WAIT_TIMEOUT_S)
        return touched(draft)

    monkeypatch.setattr(gather_executor, "has_streams", lambda device: True)
    monkeypatch.setattr(Draft, "touched", delayed)
    ids = tokenizer.encode(TEXT)[:40]
    engine, events = new_engine(plain, tokenizer), defaultdict[str, list[Event]](list)

    def job(name: str, *, learns: bool, version: int = 1) -> JobRequest:
        segment = Segment(ids, learn=[learns] * len(ids), generate=GenerationParams(3, GREEDY))
        memory = MemoryAccess(("t", name), (1.0, 1.0, version), write=learns, stored={} if version == 1 else None)
        return JobRequest([segment], lambda _, event: events[name].append(event), memory)

    async def ended(name: str) -> Event:
        while not any(isinstance(event, JobFinished | JobFailed) for event in events[name]):
            await asyncio.sleep(0.001)
        return events[name][-1]

    async with asyncio.timeout(WAIT_TIMEOUT_S):
        monkeypatch.setattr(plain, "prepare", lambda pool: None)
        await engine.start()
        learning, cancelled = job("learns", learns=True), job("leaves", learns=True)
        for each in (learning, cancelled):
            engine.submit(each)
        for name in ("reads", "too"):
            engine.submit(reader := job(name, learns=False))
            assert isinstance(await ended(name), JobFinished)
            engine.settle(reader, None)
        event_types = [type(event) for name in ("learns", "leaves") for event in events[name]]
        assert set(event_types) == {TokenOutput}, "all text is out, and no reader waited for the gathering"
        engine.cancel(cancelled)
        may_gather.set()
        done = await ended("learns")
        assert isinstance(done, JobFinished)
        assert done.rows["words"].slots.numel() > 0
        engine.settle(learning, (1.0, 1.0, 2))
        assert engine.pin(("t", "learns"), (1.0, 1.0, 2))
        engine.submit(again := job("learns", learns=True, version=2))
        events["learns"].clear()
        assert isinstance(await ended("learns"), JobFinished)
        engine.settle(again, None)
        await engine.stop()
    assert JobFinished not in map(type, events["leaves"]), "a cancelled job emits nothing more"
    assert not any(isinstance(event, JobFailed) for each in events.values() for event in each)


def test_a_start_raises_the_error_of_a_failed_preparation(
    plain: AdaptiveLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(pool: Pool) -> None:
        raise RuntimeError("no kernel for this device")

    monkeypatch.setattr(plain, "prepare", fail)

    async def run_engine() -> None:
        engine = new_engine(plain, tokenizer)
        with pytest.raises(RuntimeError, match="no kernel"):
            await engine.start()
        await engine.stop()

    asyncio.run(run_engine())
