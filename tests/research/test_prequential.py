"""Prequential evaluation: tokens are scored before they are learned, and a replay equals a read through the base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.adaptive_lm import AdaptiveLM
from model.base.checkpoint import load_backbone
from model.memory import Memory, MemoryConfig, SiteConfig
from model.memory.initial import default_config, random_memory
from research.evaluation.prequential import (
    Stream,
    cut,
    needs_final_states_only,
    read,
    read_passage,
    read_trace,
    replay,
    score_request,
)

BOS = 1


@pytest.fixture(scope="module")
def lm(tiny_base: Path) -> AdaptiveLM:
    backbone = load_backbone(tiny_base)
    return AdaptiveLM(backbone, random_memory(default_config(backbone.config.hidden_size), seed=0))


def request(seed: int, size: int = 90) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(3, 300, (size,), generator=generator).tolist()
    return ids


def test_cut_drops_the_partial_request_and_keeps_order() -> None:
    assert cut(range(10), 4, 9) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut(range(10), 4, 1) == [[0, 1, 2, 3]]
    assert cut(range(3), 4, 9) == []


def test_a_trace_holds_each_request_by_itself(lm: AdaptiveLM) -> None:
    stream = Stream("a", "a", [request(0, 9), request(1, 5)])
    reported: list[int] = []
    trace = read_trace(lm.backbone, stream, BOS, lambda token: token % 7, reported.append)
    assert trace.targets.tolist() == [*stream.requests[0], *stream.requests[1]]
    assert trace.widths.tolist() == [token % 7 for token in trace.targets.tolist()]
    assert [part for part in trace.parts()] == [slice(0, 9), slice(9, 14)]
    assert reported == [1, 1]
    alone = read_passage(lm.backbone, stream.requests[1], BOS)
    (_, second) = trace.passages()
    assert torch.equal(second.states, alone.states)
    torch.testing.assert_close(second.log_probs, alone.log_probs)
    probs = lm.backbone.logits(alone.states).softmax(-1)
    torch.testing.assert_close(trace.entropy[9:], torch.special.entr(probs).sum(-1))


def test_reading_scores_before_it_learns_and_predicting_leaves_no_trace(lm: AdaptiveLM) -> None:
    pool = lm.new_pool(rows=100_000, sessions=4)
    session = pool.open()
    ids = request(0, size=lm.memory.config.block - 1)
    frozen = read_passage(lm.backbone, ids, BOS).log_probs
    first = read(lm, pool, session, ids, BOS, learn=True)
    torch.testing.assert_close(first, frozen, atol=1e-4, rtol=0)  # one block: nothing had been learned yet
    state = {name: rows.data for name, rows in pool.dump(session).items()}
    again = read(lm, pool, session, ids, BOS, learn=False)
    assert again.sum() > first.sum()
    assert all(torch.equal(rows.data, state[name]) for name, rows in pool.dump(session).items())


@pytest.mark.parametrize("size", [1, 62, 63, 64, 65, 127, 128, 200])
def test_a_replay_equals_a_read_through_the_base(lm: AdaptiveLM, size: int) -> None:
    pool = lm.new_pool(rows=400_000, sessions=6)
    one, other = pool.open(), pool.open()
    for seed in (0, 1, 0):
        ids = request(seed, size)
        passage = read_passage(lm.backbone, ids, BOS)
        read_through = read(lm, pool, one, ids, BOS, learn=True)
        replayed = replay(lm, pool, other, passage, BOS, learn=True)
        torch.testing.assert_close(replayed, read_through, atol=5e-5, rtol=0)
    assert pool.num_rows(one) == pool.num_rows(other)


def test_a_memory_below_the_output_is_read_through_the_base(tiny_base: Path) -> None:
    backbone = load_backbone(tiny_base)
    d = backbone.config.hidden_size
    memory = Memory(MemoryConfig(d, (SiteConfig("deep", "hidden", slots=64, k=4, layer=0, width=8),), block=16))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.normal_(std=0.3)
    lm = AdaptiveLM(backbone, memory)
    assert not needs_final_states_only(memory)
    pool = lm.new_pool(rows=1000, sessions=4)
    ids = request(0)
    passage = read_passage(backbone, ids, BOS)
    one, other = pool.open(), pool.open()
    scored = score_request(lm, pool, one, passage, BOS, learn=True)
    assert torch.equal(scored, read(lm, pool, other, ids, BOS, learn=True))
    assert not torch.allclose(scored, passage.log_probs, atol=1e-3)
