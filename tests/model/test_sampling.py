"""Sampling follows OpenAI's parameters, and a sequence's tokens do not depend on other sequences."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.text import sampling, sampling_reference
from model.text.sampling import Sampler, SamplingParams, _draw_batch, draw_token

SCORES = torch.tensor([1.0, 3.0, 2.0, 0.0, -1.0])


def drawn(options: SamplingParams, n: int, scores: Tensor = SCORES, choice: int = 0) -> list[int]:
    sampler = Sampler(options, choice=choice)
    return [sampler.draw(scores) for _ in range(n)]


def assert_frequencies(tokens: list[int], probabilities: Tensor) -> None:
    """Check Pearson's χ² against its 99.9 % quantile for up to six degrees of freedom, and that impossible tokens
    never occur."""
    counts = torch.tensor([tokens.count(i) for i in range(len(probabilities))], dtype=torch.float64)
    expected = probabilities.double() / probabilities.double().sum() * len(tokens)
    possible = expected > 0
    assert not counts[~possible].any()
    assert float(((counts - expected)[possible].square() / expected[possible]).sum()) < 22.5


# Distributions.


def test_temperature_zero_is_greedy_whatever_the_seed() -> None:
    assert set(drawn(SamplingParams(temperature=0.0), 20)) == {1}
    assert drawn(SamplingParams(temperature=0.0, seed=1, top_p=0.1), 3) == drawn(
        SamplingParams(temperature=0.0, seed=2), 3
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_those_of_the_tempered_softmax(temperature: float) -> None:
    tokens = drawn(SamplingParams(temperature=temperature, seed=1), 3000)
    assert_frequencies(tokens, (SCORES / temperature).softmax(-1))


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-40, 5e-324])
def test_the_lowest_temperatures_are_greedy_too(temperature: float) -> None:
    for scores in (SCORES, SCORES - 7.0, torch.tensor([-1e-3, -9.0])):
        assert set(drawn(SamplingParams(temperature=temperature, seed=1), 20, scores)) == {int(scores.argmax())}


@pytest.mark.parametrize("window", [2, sampling.TOP_P_WINDOW])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.7, 0.9, 0.97])
def test_the_nucleus_is_the_fewest_likeliest_tokens_whose_mass_reaches_top_p(
    top_p: float, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nucleus may be larger than the first window of the search."""
    monkeypatch.setattr(sampling, "TOP_P_WINDOW", window)
    probabilities = SCORES.softmax(-1)
    nucleus, mass = torch.zeros(5), 0.0
    for token in probabilities.argsort(descending=True).tolist():
        nucleus[token] = probabilities[token]
        mass += float(probabilities[token])
        if mass >= top_p:
            break
    assert_frequencies(drawn(SamplingParams(top_p=top_p, seed=3), 2000), nucleus)


@settings(max_examples=100, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.0, 1e-6, 1.0, 1.0, 2.0]), min_size=1, max_size=6).filter(any),
    top_p=st.sampled_from([0.0, 0.5, 0.999999, 1.0]),
    u=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1 - 2**-53]),
)
@example(weights=[0.0, 1.0], top_p=1.0, u=0.0)
@example(weights=[1.0, 0.0], top_p=1.0, u=1 - 2**-53)
def test_a_token_of_probability_zero_is_never_drawn(weights: list[float], top_p: float, u: float) -> None:
    """The random number lies between 0 and 1 − 2⁻⁵³."""
    probabilities = torch.tensor(weights) / sum(weights)
    assert weights[draw_token(probabilities, SamplingParams(top_p=top_p), u)] > 0


def test_a_distribution_of_one_token_draws_it() -> None:
    certain = torch.full((7,), -torch.inf)
    certain[4] = 0.0
    for options in (
        SamplingParams(temperature=0.0),
        SamplingParams(seed=1),
        SamplingParams(seed=1, top_p=0.5),
        SamplingParams(temperature=2.0),
    ):
        assert set(drawn(options, 20, certain)) == {4}
        assert set(drawn(options, 5, torch.zeros(1))) == {0}


def test_logits_and_log_probabilities_draw_the_same() -> None:
    """The logits of a base and its log-probabilities differ by a constant only."""
    for options in (SamplingParams(seed=1), SamplingParams(seed=2, top_p=0.8, temperature=0.7)):
        assert drawn(options, 200, SCORES.double()) == drawn(options, 200, SCORES.double().log_softmax(-1))


# Biases and penalties: μ_j ← μ_j − c_j · frequency − [c_j > 0] · presence, as OpenAI documents them.


def test_a_bias_of_100_forces_and_of_minus_100_bans() -> None:
    assert set(drawn(SamplingParams(seed=1, logit_bias={4: 100.0}), 50)) == {4}
    banned = drawn(SamplingParams(seed=1, temperature=2.0, logit_bias={1: -100.0, 2: -100.0}), 300)
    assert set(banned) == {0, 3, 4}
    assert drawn(SamplingParams(temperature=0.0, logit_bias={1: -100.0}), 1) == [2]


def test_a_bias_is_added_to_the_score() -> None:
    changed = SCORES + torch.tensor([2.0, 0.0, -0.5, 0.0, 0.0])
    assert_frequencies(drawn(SamplingParams(seed=5, logit_bias={0: 2.0, 2: -0.5}), 3000), changed.softmax(-1))


@pytest.mark.parametrize(("presence", "frequency"), [(0.9, 0.0), (0.0, 0.4), (0.3, 0.2), (-0.5, 0.0), (0.0, -0.5)])
def test_penalties_count_what_was_drawn_before(presence: float, frequency: float) -> None:
    options = SamplingParams(
        temperature=0.0, presence_penalty=presence, frequency_penalty=frequency, logit_bias={3: 0.7}
    )
    counts, expected = Counter[int](), []
    for _ in range(20):
        changed = SCORES.clone()
        changed[3] += 0.7
        for token, count in counts.items():
            changed[token] -= count * frequency + presence
        expected.append(int(changed.argmax()))
        counts[expected[-1]] += 1
    assert drawn(options, 20) == expected


def test_the_scores_that_are_given_stay_as_they_were() -> None:
    scores = SCORES.clone()
    drawn(SamplingParams(seed=1, frequency_penalty=1.0, presence_penalty=1.0, logit_bias={0: 5.0}), 10, scores)
    assert torch.equal(scores, SCORES)


# Against the reference.

CUTS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 5.0]),
        "top_k": st.sampled_from([0, 0, 1, 3, 7, 500]),
        "top_p": st.sampled_from([1.0, 1.0, 0.0, 0.4, 0.9, 0.999]),
        "min_p": st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0]),
        "typical_p": st.sampled_from([1.0, 1.0, 0.2, 0.7, 0.95]),
    }
)
PENALTIES = st.fixed_dictionaries(
    {
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.7]),
        "repetition_window": st.sampled_from([None, 0, 1, 4]),
        "presence_penalty": st.sampled_from([0.0, 0.5]),
        "frequency_penalty": st.sampled_from([0.0, 0.3]),
        "logit_bias": st.sampled_from([{}, {2: 1.5, 9: -3.0}]),
        "min_tokens": st.sampled_from([0, 0, 4]),
        "ignore_eos": st.booleans(),
        "stop_token_ids": st.sampled_from([frozenset(), frozenset({5})]),
    }
)


@pytest.mark.parametrize("window", [2, sampling.TOP_P_WINDOW])
@settings(max_examples=150, deadline=None)
@given(cuts=CUTS, penalties=PENALTIES, seed=st.integers(0, 1000), prompt=st.lists(st.integers(0, 11), max_size=5))
@example(cuts={"top_k": 3, "typical_p": 0.2, "top_p": 0.4, "min_p": 0.5}, penalties={}, seed=1, prompt=[])
def test_every_sampler_draws_what_the_reference_draws(
    window: int, cuts: dict[str, Any], penalties: dict[str, Any], seed: int, prompt: list[int]
) -> None:
    """One by one and in a batch, with a search window smaller than the vocabulary and with a larger one."""
    options, eos = SamplingParams(seed=seed, **cuts, **penalties), frozenset({3})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "TOP_P_WINDOW", window)
        one, batched = (Sampler(options, prompt=prompt, eos=eos) for _ in range(2))
        stream, drawn = random.Random(f"{seed}/0"), list[int]()
        for step in range(6):
            scores = 3 * torch.randn(12, generator=torch.Generator().manual_seed(seed + step), dtype=torch.float64)
            adjusted = sampling_reference.adjusted_scores(scores.tolist(), options, prompt, drawn, eos)
            u = 0.0 if options.is_greedy else stream.random()
            expected = sampling_reference.draw(adjusted, options, u)
            (batched._predrawn,) = _draw_batch([batched], [scores])
            assert one.draw(scores) == expected == batched.draw(scores)
            drawn.append(expected)


def test_no_end_is_drawn_before_min_tokens_and_none_at_all_with_ignore_eos() -> None:
    flat, eos = torch.zeros(4), frozenset({1})
    for seed in range(20):
        options = SamplingParams(seed=seed, min_tokens=30, stop_token_ids=frozenset({2}))
        sampler = Sampler(options, eos=eos)
        assert {sampler.draw(flat) for _ in range(30)} == {0, 3}
        assert {sampler.draw(flat) for _ in range(60)} == {0, 1, 2, 3}
        assert sampler.ends == {1, 2}
        endless = Sampler(SamplingParams(seed=seed, ignore_eos=True), eos=eos)
        assert {endless.draw(flat) for _ in range(60)} == {0, 2, 3}


# Batches.


@pytest.mark.parametrize("window", [5, sampling.TOP_P_WINDOW])
@pytest.mark.parametrize("spread", [0.5, 4.0])
def test_rows_drawn_together_are_those_drawn_one_by_one(
    window: int, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows have different parameters, and some nuclei exceed the window."""
    monkeypatch.setattr(sampling, "TOP_P_WINDOW", window)
    options = [
        SamplingParams(temperature=0.0),
        SamplingParams(seed=1),
        SamplingParams(seed=2, temperature=1.7, top_p=0.9),
        SamplingParams(seed=3, top_p=0.0),
        SamplingParams(seed=4, top_p=0.99, logit_bias={3: 5.0}),
        SamplingParams(seed=5, temperature=0.3, frequency_penalty=1.5),
        SamplingParams(temperature=0.0, presence_penalty=2.0),
        SamplingParams(seed=6, top_k=4),
        SamplingParams(seed=7, top_k=50, top_p=0.8, min_p=0.1),
        SamplingParams(seed=8, min_p=0.02),
        SamplingParams(seed=9, typical_p=0.5),
        SamplingParams(seed=10, repetition_penalty=1.5),
    ]
    together, alone = ([Sampler(option) for option in options] for _ in range(2))
    for step in range(30):
        scores = spread * torch.randn(len(options), 300, generator=torch.Generator().manual_seed(step))
        tokens = _draw_batch(together, list(scores))
        for sampler, token in zip(together, tokens, strict=True):
            sampler._predrawn = token  # as `predraw` does on a GPU
        given = [sampler.draw(row) for sampler, row in zip(together, torch.zeros(len(options), 300), strict=True)]
        assert given == tokens == [sampler.draw(row) for sampler, row in zip(alone, scores, strict=True)]


# Seeds.


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 2}, {"min_p": 0.3}, {"temperature": 0.0}, {"logit_bias": {1: -100.0}}]
)
def test_the_log_probabilities_are_those_that_tokens_are_drawn_with(options: dict[str, Any]) -> None:
    params = SamplingParams(seed=2, **options)
    chances = Sampler(params).log_probs(SCORES).exp()
    assert chances.sum().item() == pytest.approx(1)
    assert_frequencies(drawn(params, 3000), chances)


def test_a_seed_reproduces_its_sequence_and_choices_differ() -> None:
    options, flat = SamplingParams(seed=7), torch.zeros(1000)
    assert drawn(options, 20, flat) == drawn(options, 20, flat)
    sequences = [tuple(drawn(options, 20, flat, choice)) for choice in range(4)]
    sequences += [tuple(drawn(SamplingParams(seed=seed), 20, flat)) for seed in (8, -7, 70)]
    sequences += [tuple(drawn(SamplingParams(), 20, flat)) for _ in range(2)]
    assert len(set(sequences)) == len(sequences)


@pytest.mark.parametrize(
    "options",
    [
        SamplingParams(seed=1),
        SamplingParams(seed=1, top_k=50, min_p=0.1, top_p=0.9),
        SamplingParams(seed=1, typical_p=0.7, repetition_penalty=1.5, min_tokens=9, ignore_eos=True),
    ],
)
def test_tokens_do_not_depend_on_other_samplers(options: SamplingParams) -> None:
    flat = torch.zeros(1000)
    alone = drawn(options, 20, flat)
    sampler, other, unseeded = (Sampler(replace(options, seed=seed)) for seed in (1, 2, None))
    interleaved = []
    for _ in range(20):
        other.draw(flat)
        unseeded.draw(torch.randn(1000))
        interleaved.append(sampler.draw(flat))
    assert interleaved == alone
