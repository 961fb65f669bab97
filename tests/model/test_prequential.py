"""The evaluation scores before it learns, keeps streams apart, and compares like with like."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from model.checkpoint import load_backbone
from model.evaluation.prequential import Losses, Stream, arms, cut, evaluate, ratio, read
from model.lm import AdaptiveLM
from model.training.initial import default_config, random_memory

BOS = 1


@pytest.fixture(scope="module")
def lm(tiny_base: Path) -> AdaptiveLM:
    backbone = load_backbone(tiny_base)
    return AdaptiveLM(backbone, random_memory(default_config(backbone.config.hidden_size), seed=0))


def requests(seed: int, count: int = 4, size: int = 90) -> list[list[int]]:
    """The same random request again and again: nothing but memory can foresee it."""
    generator = torch.Generator().manual_seed(seed)
    request: list[int] = torch.randint(3, 300, (size,), generator=generator).tolist()
    return [request] * count


def test_cut_drops_the_partial_request_and_keeps_order() -> None:
    assert cut(range(10), 4, 9) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut(range(10), 4, 1) == [[0, 1, 2, 3]]
    assert cut(range(3), 4, 9) == []


def test_reading_scores_before_it_learns_and_predicting_leaves_no_trace(lm: AdaptiveLM) -> None:
    pool = lm.new_pool(rows=100_000, sessions=4)
    session = pool.open()
    (request, *_) = requests(0, size=lm.memory.config.block - 1)
    first = read(lm, pool, session, request, BOS, learn=True)
    assert first[0] == first[1]  # one block: nothing had been learned when it was scored
    state = {name: rows.data for name, rows in pool.dump(session).items()}
    again = read(lm, pool, session, request, BOS, learn=False)
    assert again[0] < again[1] == first[1]
    assert all(torch.equal(rows.data, state[name]) for name, rows in pool.dump(session).items())


def test_every_arm_reads_the_same_tokens_and_the_own_past_wins(lm: AdaptiveLM) -> None:
    streams = [
        Stream("a1", "a", requests(1)),
        Stream("a2", "a", requests(2)),
        Stream("b1", "b", requests(3)),
    ]
    done = 0

    def count(_: str, n: int) -> None:
        nonlocal done
        done += n

    reports = {report.name: report for report in evaluate(lm, streams, BOS, progress=count)}
    assert done == arms(streams)
    for report in reports.values():
        assert report.frozen.tokens == report.online.tokens == [90] * 4
        assert report.own.tokens == [90] * 2
        assert ratio(report.own, report.frozen, 2) < 1
        assert report.other_kind is not None
        assert report.own.mean() < report.other_kind.mean()
        assert report.online.by_request[3] < report.online.by_request[0]
    assert reports["b1"].same_kind is None
    assert (same := reports["a1"].same_kind) is not None
    assert reports["a1"].own.mean() < same.mean()


def test_a_ratio_compares_means_over_tokens_of_the_same_part() -> None:
    frozen = Losses([9.0, 2.0, 4.0], [5, 1, 3])
    assert frozen.mean(1) == pytest.approx(3.5)
    assert ratio(Losses([2.0, 3.0], [1, 3]), frozen, 1) == pytest.approx(math.exp(2.75 - 3.5))
