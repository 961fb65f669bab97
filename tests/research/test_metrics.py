"""Metrics and descriptions of arms, on small handmade arrays."""

from __future__ import annotations

import math

import pytest
import torch

from research.evaluation import metrics
from research.evaluation.arms import FrozenBase, PastMemory, Subject
from research.evaluation.describe import Describer, StreamScores
from research.evaluation.prequential import Stream, Trace

NAN = math.nan


def test_a_gain_is_a_mean_over_the_targets_that_are_predicted_and_selected() -> None:
    frozen = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    adapted = torch.tensor([NAN, -1.0, -1.0, -4.5])
    assert metrics.gain(adapted, frozen) == pytest.approx((1 + 2 - 0.5) / 3)
    assert metrics.gain(adapted, frozen, torch.tensor([True, True, False, True])) == pytest.approx((1 - 0.5) / 2)
    assert math.isnan(metrics.gain(adapted, frozen, torch.tensor([True, False, False, False])))


def test_means_count_kinds_alike_and_leave_out_what_is_missing() -> None:
    found = metrics.over_kinds([1.0, 3.0, 5.0, NAN], ["a", "a", "b", "c"])
    assert found is not None
    assert found.value == pytest.approx((2 + 5) / 2)
    assert 1 <= found.low <= found.value <= found.high <= 5
    assert metrics.over_kinds([NAN], ["a"]) is None
    sure = metrics.over_kinds([2.0, 2.0], ["a", "b"])
    assert sure is not None
    assert (sure.low, sure.high) == (2.0, 2.0)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for trial in range(60):
        values = torch.randn(30, generator=generator).tolist()
        found = metrics.over_kinds(values, ["a"] * 30, seed=trial)
        assert found is not None
        hits += found.low <= 0 <= found.high
    assert 50 <= hits <= 60


def test_an_exponent_turns_an_interval_round() -> None:
    turned = metrics.BootstrapEstimate(0.5, 0.1, 0.7).exp(-1)
    assert (turned.value, turned.low, turned.high) == pytest.approx((math.exp(-0.5), math.exp(-0.7), math.exp(-0.1)))


def test_gain_by_request_and_its_slope() -> None:
    frozen = torch.zeros(6) - 1
    adapted = frozen + torch.tensor([0.0, 0.0, 0.2, 0.2, 0.4, 0.4])
    gains = metrics.by_request(adapted, frozen, [2, 2, 2])
    assert gains == pytest.approx([0, 0.2, 0.4])
    assert metrics.slope(gains, [500, 500, 500]) == pytest.approx(0.4)
    assert metrics.slope([NAN, 0.2, 0.4], [500, 500, 500]) == pytest.approx(0.4)
    assert math.isnan(metrics.slope([NAN, NAN, 0.4], [500, 500, 500]))


def test_novelty_checks_the_request_first_and_then_the_history() -> None:
    targets = torch.tensor([5, 6, 5, 7, 6, 6, 8, 5])
    assert metrics.novelty(targets, [4, 4]).tolist() == [2, 2, 0, 2, 1, 0, 2, 1]


def test_perplexity_by_token_and_by_byte() -> None:
    log_probs = torch.tensor([NAN, -2.0, -4.0])
    token, byte = metrics.perplexity(log_probs, torch.tensor([9, 1, 2]))
    assert (token, byte) == pytest.approx((math.exp(3), math.exp(2)))


def test_groups_of_kinds_have_separate_ratios() -> None:
    gains = {"a/1": 0.1, "a/2": 0.3, "b/1": 0.6, "c/1": NAN}
    kinds = {name: name[0] for name in gains}
    found = metrics.summary(gains, kinds, {"a", "c"})
    assert found["all"] is not None and found["tuned"] is not None and found["held_out"] is not None
    assert found["all"].value == pytest.approx(math.exp(-0.4))
    assert found["tuned"].value == pytest.approx(math.exp(-0.2))
    assert found["held_out"].value == pytest.approx(math.exp(-0.6))
    assert metrics.summary(gains, kinds, {"a", "b", "c"})["held_out"] is None
    assert metrics.each_kind(gains, kinds) == pytest.approx({"a": math.exp(-0.2), "b": math.exp(-0.6)})


def subject(name: str, kind: str, targets: list[int], lengths: list[int]) -> Subject:
    parts = torch.tensor(targets).split(lengths)
    stream = Stream(name, kind, [part.tolist() for part in parts])
    n = len(targets)
    log_probs = torch.full((n,), -2.0)
    trace = Trace(torch.zeros(n, 1), torch.tensor(targets), log_probs, -log_probs, torch.full((n,), 2), lengths)
    return Subject(stream, trace, name)


def test_an_arm_is_described_on_the_tokens_that_it_predicts() -> None:
    one, two = subject("a/1", "a", [5, 6, 5, 7], [2, 2]), subject("b/1", "b", [5, 5, 6, 6, 5, 7], [2, 2, 2])
    static = {s.stream.name: StreamScores(s.trace.log_probs, 0.0, 0, 2.0) for s in (one, two)}
    memory = {
        "a/1": StreamScores(torch.tensor([-2.0, -2.0, -1.0, -2.0]), 1.0, 100, 2.0),
        "b/1": StreamScores(torch.tensor([-2.0, -2.0, -2.0, -2.0, -1.0, -1.0]), 3.0, 300, 2.0),
    }
    own_past = {
        "a/1": StreamScores(torch.tensor([NAN, NAN, -1.5, -2.0]), 0.5, 100, 2.0),
        "b/1": StreamScores(torch.tensor([NAN, NAN, -2.0, -2.0, -2.0, -2.0]), 0.5, 100, 2.0),
    }
    describer = Describer([one, two], {"static": static, "memory": memory, "own-past": own_past}, {"a"})

    class Memory(FrozenBase):
        name = "memory"

    described = describer.arm(Memory())
    assert described["ratio"]["all"]["value"] == pytest.approx(math.exp(-(1 / 4 + 2 / 6) / 2))
    assert described["ratio"]["held_out"]["value"] == pytest.approx(math.exp(-2 / 6))
    assert described["ratio_half"]["streams"] == pytest.approx({"a/1": math.exp(-1 / 2), "b/1": math.exp(-2 / 4)})
    assert described["by_request"]["ratio"] == pytest.approx([1, math.exp(-(0.5 + 0) / 2), math.exp(-1)])
    assert described["memory_over"]["all"]["value"] == 1
    assert described["state_bytes"] == 200
    assert described["cost"] == pytest.approx(1 + (1 / 2 + 3 / 2) / 2)
    assert described["novelty"]["seen before"]["value"] == pytest.approx(math.exp(-(1 + 1) / 2))
    assert described["perplexity_per_byte"] == pytest.approx(math.exp((7 / 8 + 10 / 12) / 2))

    class Half(PastMemory):
        def __init__(self) -> None:
            self.name, self.title = "own-past", ""

    half = describer.arm(Half())
    assert half["ratio"] is None
    assert half["ratio_half"]["streams"] == pytest.approx({"a/1": math.exp(-1 / 4), "b/1": 1})
    assert half["memory_over"]["streams"] == pytest.approx({"a/1": math.exp(-1 / 4), "b/1": math.exp(-2 / 4)})
    assert half["kept_share"] == pytest.approx(1)
    assert half["cost"] == pytest.approx(1 + 0.5)
