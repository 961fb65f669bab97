"""The weight of scores that read episodes: it costs little where they do not help, and no token chooses its own."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from model.recall import SHARE, ReadingWeight

log_prob = st.floats(-40, -1e-6)
pairs = st.lists(st.tuples(log_prob, log_prob), min_size=1, max_size=300)


@given(pairs)
def test_a_mixture_costs_little_and_lies_between_its_parts(drawn: list[tuple[float, float]]) -> None:
    reading, plain = torch.tensor(drawn, dtype=torch.float64).unbind(1)
    mixed = ReadingWeight().mix(reading, plain)
    assert bool((mixed <= torch.maximum(reading, plain) + 1e-9).all())
    assert bool((mixed >= torch.minimum(reading, plain) - 1e-9).all())
    cost = math.log(2) - len(drawn) * math.log1p(-SHARE / 2)
    for part in (reading, plain):
        assert float(mixed.sum()) >= float(part.sum()) - cost - 1e-9


@given(pairs, pairs)
def test_the_weight_of_a_token_depends_on_the_tokens_before_alone(
    before: list[tuple[float, float]], after: list[tuple[float, float]]
) -> None:
    reading, plain = torch.tensor(before + after, dtype=torch.float64).unbind(1)
    n, weight = len(before), ReadingWeight()
    parts = [weight.mix(reading[part], plain[part]) for part in (slice(n), slice(n, None))]
    assert torch.equal(torch.cat(parts), ReadingWeight().mix(reading, plain))
    assert torch.equal(parts[0], ReadingWeight().mix(reading[:n], plain[:n]))


def test_where_episodes_help_their_scores_are_soon_taken() -> None:
    reading, plain = torch.full((200,), -1.0), torch.full((200,), -2.0)
    mixed = ReadingWeight().mix(reading, plain)
    assert float(mixed[-1]) > -1.01
    assert float(ReadingWeight().mix(torch.cat([reading, plain]), torch.cat([plain, reading]))[-1]) > -1.01
