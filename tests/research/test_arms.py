"""The arms: every arm is causal and normalised, and implements the method of its name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.adaptive_lm import AdaptiveLM
from model.base.backbone import Backbone
from model.base.checkpoint import load_backbone
from model.base.config import tiny_config
from model.memory.initial import default_config, random_memory
from model.text.tokenizer import Tokenizer
from research.evaluation.arms import (
    Adapter,
    Arm,
    ClearedMemory,
    FrozenBase,
    MemoryArm,
    Outcome,
    PastMemory,
    RevisitedMemory,
    Subject,
    other_subjects,
)
from research.evaluation.caches import Combined, NeuralCache, NGrams, Whitening, mixture_weights
from research.evaluation.contexts import FullHistory, LastTokens
from research.evaluation.gradients import DenseDelta, DynamicAll, DynamicHead, DynamicLoRA
from research.evaluation.past_rows import LastTokensMemory, NewestEpisodes
from research.evaluation.prequential import Stream, read_trace
from research.evaluation.tuning import shares, tune
from tests.tiny import build_tiny_base

BOS = 1
GATE = {"bias": -1.0, "log_total": 0.3, "agreement": 0.5, "entropy": 0.1}
WORDS = range(3, 40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a base with a vocabulary small enough to score every token."""
    return build_tiny_base(tmp_path_factory.mktemp("few") / "words", tiny_config(vocab_size=48, max_context=512))


@pytest.fixture(scope="module")
def lm(folder: Path) -> AdaptiveLM:
    backbone = load_backbone(folder)
    return AdaptiveLM(backbone, random_memory(default_config(backbone.config.hidden_size), seed=0))


@pytest.fixture(scope="module")
def arms(lm: AdaptiveLM, folder: Path) -> dict[str, Arm]:
    whitening = Whitening.of([subject(lm, 7, "warm").trace.states])

    def trainable() -> Backbone:
        return load_backbone(folder, trainable=True)

    all_arms: list[Arm] = [
        FrozenBase(),
        MemoryArm(lm, BOS),
        ClearedMemory(lm, BOS),
        PastMemory(lm, BOS, "own-past", "", lambda s: [s]),
        RevisitedMemory(lm, BOS, lambda s: [subject(lm, 8, "other")], 2),
        Adapter(lm.backbone, lambda h: 1.1 * h, "x"),
        NeuralCache(whitening=None, limited=False, gated=True),
        NeuralCache(whitening=whitening, limited=False, gated=True),
        NeuralCache(whitening=whitening, limited=True, gated=True),
        Combined(),
        NGrams(),
        DenseDelta(lm.backbone, whitening),
        DynamicHead(lm.backbone, whitening),
        NewestEpisodes(lm, BOS, Tokenizer.load(folder)),
        LastTokensMemory(lm, BOS),
        LastTokens(lm.backbone, BOS),
        FullHistory(lm.backbone, BOS),
        DynamicLoRA(trainable, BOS),
        DynamicAll(trainable, BOS),
    ]
    return {arm.name: arm for arm in all_arms}


NAMES = (
    "static", "memory", "cleared", "own-past", "returned", "adapter", "cache-raw", "cache", "cache-bytes",
    "memory+cache", "ngrams", "dense", "dynamic-head", "episodes", "memory+last-tokens", "last-tokens", "full-history",
    "dynamic-lora", "dynamic-all",
)  # fmt: skip


def tokens(seed: int, sizes: tuple[int, ...] = (40, 40, 40)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(WORDS.start, WORDS.stop, (size,), generator=generator).tolist() for size in sizes]


def subject(lm: AdaptiveLM, seed: int, kind: str, requests: list[list[int]] | None = None) -> Subject:
    stream = Stream(f"{kind}/{seed}", kind, requests or tokens(seed))
    return Subject(stream, read_trace(lm.backbone, stream, BOS, lambda _: 1), f"{kind}/{seed}")


def fitted(arm: Arm) -> dict[str, float]:
    if isinstance(arm, NGrams):
        return {f"w{case}{order}": 1 / (case + 1) for case in range(1, 4) for order in range(case + 1)}
    return GATE if arm.needs_fit else {}


def outcome(arms: dict[str, Arm], name: str, lm: AdaptiveLM, requests: list[list[int]]) -> tuple[Outcome, Tensor]:
    """Return the outcome and log p of an arm with its strongest setting, after the arms that it requires."""
    it = subject(lm, 0, "a", requests)
    arm = arms[name]
    for need in arm.requires:
        it.outcomes[need] = arms[need].run(it, arms[need].grid[0], lambda _: None)
    if arm.equal_bytes:  # what the memory holds at the end depends on the whole stream
        it.outcomes["memory"] = replace(it.outcomes["memory"], state_bytes=20_000)
    found = arm.run(it, arm.grid[-1], lambda _: None)
    return found, arm.finish(it, found, fitted(arm))


@pytest.mark.parametrize("name", NAMES)
def test_an_arm_gives_one_number_for_each_target_and_reports_its_progress(
    arms: dict[str, Arm], lm: AdaptiveLM, name: str
) -> None:
    _, log_probs = outcome(arms, name, lm, tokens(0))
    scored = log_probs[40:] if arms[name].part == "half" else log_probs
    assert log_probs.shape == (120,)
    assert (scored < 0).all()
    assert scored.isfinite().all()
    assert log_probs[: 120 - len(scored)].isnan().all()
    it, steps = subject(lm, 0, "a"), list[int]()
    for need in arms[name].requires:
        it.outcomes[need] = arms[need].run(it, arms[need].grid[0], lambda _: None)
    arms[name].run(it, arms[name].grid[0], steps.append)
    assert sum(steps) == arms[name].requests(it)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("at", [(1, 20), (2, 39)])
def test_no_arm_sees_a_token_before_its_score(
    arms: dict[str, Arm], lm: AdaptiveLM, name: str, at: tuple[int, int]
) -> None:
    requests = tokens(0)
    changed = [list(request) for request in requests]
    changed[at[0]][at[1]] = 2
    before = 40 * at[0] + at[1]
    _, log_probs = outcome(arms, name, lm, requests)
    _, log_probs_changed = outcome(arms, name, lm, changed)
    torch.testing.assert_close(log_probs[:before], log_probs_changed[:before], atol=1e-5, rtol=0, equal_nan=True)
    assert log_probs[before] != log_probs_changed[before]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("dynamic-lora", "dynamic-all")])
def test_the_probabilities_of_all_targets_sum_to_one(arms: dict[str, Arm], lm: AdaptiveLM, name: str) -> None:
    requests = [[5, 6, 7, 5, 6, 7, 5], [5, 6, 7, 5, 9, 5, 6]]
    total = 0.0
    for token in range(lm.backbone.config.vocab_size):
        _, log_probs = outcome(arms, name, lm, [requests[0], [*requests[1][:-1], token]])
        total += float(log_probs[-1].double().exp())
    assert total == pytest.approx(1, abs=1e-4)


def test_a_memory_repeats_what_it_has_read_and_a_cleared_one_does_not(arms: dict[str, Arm], lm: AdaptiveLM) -> None:
    (request,) = tokens(3, (60,))
    frozen = outcome(arms, "static", lm, [request] * 3)[1]
    for name in ("memory", "cache", "ngrams", "dense", "dynamic-head", "dynamic-lora", "dynamic-all", "own-past"):
        _, log_probs = outcome(arms, name, lm, [request] * 3)
        assert log_probs[-60:].mean() > frozen[-60:].mean(), name
    cleared = outcome(arms, "cleared", lm, [request] * 3)[1]
    torch.testing.assert_close(cleared[:60], cleared[-60:])


def test_a_cache_with_theta_zero_counts_words(lm: AdaptiveLM) -> None:
    it = subject(lm, 0, "a", [[5, 6, 5, 7], [5, 6, 9, 5]])
    found = NeuralCache(whitening=None, limited=False, gated=False).run(it, {"theta": 0.0}, lambda _: None)
    expected = [0, 0, 1 / 2, 0, 2 / 4, 1 / 5, 0, 3 / 7]
    torch.testing.assert_close(found.values["prob"], torch.tensor(expected))
    assert found.values["log_total"][0] == -math.inf
    torch.testing.assert_close(found.values["log_total"][1:].exp(), torch.arange(1.0, 8))
    assert found.values["agreement"][-1] == pytest.approx(3 / 7)


def test_a_limited_cache_keeps_the_last_entries(lm: AdaptiveLM) -> None:
    it = subject(lm, 0, "a", [[5, 6, 5, 7], [5, 6, 9, 5]])
    entry = 2 * it.trace.states.shape[1] + 4
    it.outcomes["memory"] = Outcome({}, 0.0, 3 * entry + 1)
    found = NeuralCache(whitening=None, limited=True, gated=False).run(it, {"theta": 0.0}, lambda _: None)
    torch.testing.assert_close(found.values["prob"], torch.tensor([0, 0, 1 / 2, 0, 1 / 3, 0, 0, 1 / 3]))
    assert found.state_bytes == 3 * entry


def test_ngrams_are_counted_inside_requests(lm: AdaptiveLM) -> None:
    it = subject(lm, 0, "a", [[5, 6, 5, 6], [5, 6, 5, 7]])
    values = NGrams().run(it, {}, lambda _: None).values
    assert values["seen"].tolist() == [0, 1, 1, 2, 1, 2, 3, 3]
    torch.testing.assert_close(values["probs"][6], torch.tensor([3 / 6, 1.0, 1.0]))
    torch.testing.assert_close(values["probs"][7], torch.tensor([0.0, 0.0, 0.0]))


def test_mixture_weights_find_the_better_model() -> None:
    assert mixture_weights(torch.zeros(0, 3), torch.zeros(0)) == [1.0, 0.0, 0.0]
    probs = torch.tensor([[0.1, 0.9], [0.1, 0.9], [0.9, 0.1]], dtype=torch.float64)
    (first, second) = mixture_weights(probs, torch.ones(3))
    assert first + second == pytest.approx(1)
    assert second == pytest.approx(0.5 + 1 / 6 / 0.8, abs=1e-6)  # where 2·0.8/(0.1 + 0.8s) = 0.8/(0.9 − 0.8s)


def test_full_history_slides_where_the_context_ends(lm: AdaptiveLM, arms: dict[str, Arm]) -> None:
    limit = lm.backbone.config.max_context
    requests = tokens(0, (limit // 4,) * 7)
    _, log_probs = outcome(arms, "full-history", lm, requests)
    expected = []
    for number, request in enumerate(requests[:3]):
        ids = torch.tensor([[BOS, *(token for r in requests[:number] for token in r), *request]])
        logits = lm.backbone.logits(lm.backbone(ids[:, :-1])[0])[-len(request) :]
        expected.append(logits.log_softmax(-1).gather(-1, torch.tensor(request)[:, None])[:, 0])
    torch.testing.assert_close(log_probs[: 3 * limit // 4], torch.cat(expected), atol=1e-3, rtol=0)
    assert log_probs.isfinite().all()


def test_last_tokens_stand_before_the_request(lm: AdaptiveLM) -> None:
    it = subject(lm, 0, "a")
    arm = LastTokens(lm.backbone, BOS)
    it.outcomes["memory"] = Outcome({}, 0.0, 3 * arm.token_bytes)
    first, second, _ = it.stream.requests
    found = arm.run(it, {}, lambda _: None).values["log_probs"]
    ids = torch.tensor([[BOS, *first[-3:], *second[:-1]]])
    logits = lm.backbone.logits(lm.backbone(ids)[0])[-40:]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(second)[:, None])[:, 0]
    torch.testing.assert_close(found[40:80], expected, atol=1e-4, rtol=0)


def test_gradient_arms_reset_their_weights_for_each_stream(arms: dict[str, Arm], lm: AdaptiveLM) -> None:
    for name in ("dynamic-head", "dynamic-lora", "dynamic-all", "dense"):
        once, again = (outcome(arms, name, lm, tokens(0))[1] for _ in range(2))
        assert torch.equal(once, again), name


def test_another_sessions_memory_is_the_one_that_was_chosen(lm: AdaptiveLM) -> None:
    (request,) = tokens(3, (60,))
    (unlike,) = tokens(4, (60,))
    subjects = [
        subject(lm, 1, "a", [request] * 2),
        subject(lm, 2, "a", [request] * 2),
        subject(lm, 3, "b", [unlike] * 2),
        subject(lm, 4, "c", [request] * 2),
    ]
    same, other = other_subjects(subjects, same_kind=True, limit=1), other_subjects(subjects, same_kind=False, limit=2)
    assert [s.key for s in same(subjects[0])] == ["a/2"]
    assert [s.key for s in same(subjects[1])] == ["a/1"]
    assert same(subjects[2]) == []
    assert [s.key for s in other(subjects[1])] == ["b/3", "c/4"]
    assert [s.key for s in other(subjects[3])] == ["a/1", "b/3"]
    memory = MemoryArm(lm, BOS)
    for it in subjects:
        it.outcomes["memory"] = memory.run(it, {}, lambda _: None)

    def past(of: Callable[[Subject], list[Subject]], i: int) -> Tensor:
        return PastMemory(lm, BOS, "x", "", of).run(subjects[i], {}, lambda _: None).values["log_probs"][60:]

    own = past(lambda s: [s], 0)
    torch.testing.assert_close(past(same, 0), own)
    assert past(lambda _: [subjects[2]], 0).mean() < own.mean()
    assert past(same, 2).isnan().all()
    torch.testing.assert_close(
        past(lambda _: subjects[:1] + subjects[2:3], 0), (own + past(lambda _: subjects[2:3], 0)) / 2
    )


def test_tuning_takes_the_best_setting_and_counts_kinds_alike(lm: AdaptiveLM) -> None:
    assert shares(["a", "a", "b"]) == [0.25, 0.25, 0.5]

    class ScriptedLoss(FrozenBase):
        grid = ({"loss": 3.0}, {"loss": 1.0}, {"loss": math.inf}, {"loss": 2.0})

    arm, it = ScriptedLoss(), subject(lm, 0, "a")

    def run(_: Subject, setting: object) -> Outcome:
        assert isinstance(setting, dict)
        return Outcome({"log_probs": torch.full((4,), -setting["loss"])}, 0.0, 0)

    tuned = tune(arm, [it], run)
    assert tuned.setting == {"loss": 1.0}
    assert tuned.losses == [3.0, 1.0, math.inf, 2.0]
