"""The effect of learning on a session: repeated text is predicted better, and harm is bounded (law 12)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from model.adaptive_lm import AdaptiveLM
from model.base.backbone import Backbone
from model.memory.config import BALANCE, GATE_CLOSED, TRUST
from model.memory.guard import GUARD_LIMIT_NATS
from model.memory.lexical.site import TRUST_LIMITS
from model.memory.lexical.types import NGRAM_SIZES
from tests.model.tiny_lm import (
    BLOCK,
    LEXICAL,
    VOCAB,
    RequestReader,
    build,
    decode_state_of,
    learn,
    learned,
    new_pool,
    read,
    text,
    tiny_backbone,
)

LENGTH = 190  # tokens of a request
POISONS = {
    "random tokens": torch.randint(1, VOCAB, (8 * LENGTH,), generator=torch.Generator().manual_seed(5)).tolist(),
    "one token again and again": [7] * 8 * LENGTH,
    "a context with two continuations": [t for i in range(LENGTH) for t in (11, 12, 13, 14, 15, 16, 17, 20 + i % 2)],
}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone()


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def base_samples(backbone: Backbone) -> list[list[int]]:
    """Return texts that were sampled from the base: no memory can predict them better than the base."""
    texts, g = [], torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for _ in range(8):
            ids, cache = [0], backbone.new_cache(LENGTH)
            while len(ids) < LENGTH:
                p = backbone.logits(backbone(torch.tensor([ids[-1:]]), [cache])[0]).softmax(-1)
                ids.append(int(torch.multinomial(p[0], 1, generator=g)))
            texts.append(ids)
    return texts


def overtrusting_lm(backbone: Backbone) -> AdaptiveLM:
    """Return a model whose memory always has γ = σ(3), for any gate features and any experience."""
    lm = build(backbone, LEXICAL)
    assert lm.memory.lexical is not None
    lm.memory.lexical.gate_out.zero_()
    lm.memory.lexical.gate_out_bias.copy_(torch.tensor([3.0, 0.0, 0.0]))
    lm.memory.lexical.trust_rate.zero_()
    return lm


def gain(request: RequestReader) -> torch.Tensor:
    """Return the gain of each token over the base in nats."""
    return request.adapted - request.frozen


def test_text_that_was_read_before_is_predicted_better(backbone: Backbone) -> None:
    lm = build(backbone, LEXICAL)
    pool, ids = new_pool(lm), text(1)
    session = pool.open()
    first, second = (learn(lm, pool, session, ids) for _ in range(2))
    other_session = read(lm, pool, learned(lm, pool, seed=7), ids)
    assert torch.equal(first.frozen, second.frozen)
    assert second.adapted.mean() > first.adapted.mean() + 0.5
    assert second.adapted.mean() > other_session.adapted.mean() + 0.5, "the session learned this text"


def test_text_that_is_read_repeatedly_takes_no_more_space(backbone: Backbone) -> None:
    lm = build(backbone, replace(LEXICAL, surprise=1.0))
    assert lm.memory.lexical is not None
    lm.memory.lexical.gate_out_bias[0] = 3.0
    pool, rows = new_pool(lm), [0]
    session = pool.open()
    for _ in range(3):
        learn(lm, pool, session, text(1, 2 * BLOCK))
        rows.append(pool.num_rows(session)["words"])
    assert rows[1] > BLOCK
    assert rows[2] - rows[1] < BLOCK / 4
    assert rows[3] - rows[2] < BLOCK / 4


def test_trust_rises_with_right_predictions_and_falls_with_wrong_ones(backbone: Backbone) -> None:
    lm = build(backbone, LEXICAL)
    lexical = lm.memory.lexical
    assert lexical is not None
    lexical.trust_rate.fill_(0.5)
    pool = new_pool(lm)
    session, trust = pool.open(), [0.0]
    for ids in ([5, 6], [5, 6], [5, 6], [5, 7]):
        learn(lm, pool, session, ids)
        trust.append(float(pool.sites["words"].session_scalars[session, TRUST].sum()))
    assert trust[1] == 0.0, "nothing was found, so nothing was read"
    assert 0.0 < trust[2] < trust[3]
    assert trust[4] < trust[3]
    lexical.trust_rate.fill_(1e6)
    for ids, bound in (([5, 8], min(TRUST_LIMITS)), ([5, 6], max(TRUST_LIMITS))):
        learn(lm, pool, session, ids)
        assert pool.sites["words"].session_scalars[session, TRUST].tolist() == [bound, 0.0, 0.0, 0.0]


# Law 12: never worse for long.


def test_the_balance_is_the_gain_over_the_base(backbone: Backbone) -> None:
    lm = build(backbone, LEXICAL)
    pool, balance = new_pool(lm), 0.0
    session = pool.open()
    for ids in ([5, 6], [5, 6], [5, 7], [5, 6]):
        gained = float(gain(learn(lm, pool, session, ids)).sum())
        balance = balance * (1 - 1 / 1024) + gained
        assert float(pool.sites["words"].session_scalars[session, BALANCE, 0]) == pytest.approx(balance, abs=1e-4)
    assert 0.1 < abs(balance) < GUARD_LIMIT_NATS


def test_a_harmful_memory_is_closed_within_a_bounded_loss(backbone: Backbone, base_samples: list[list[int]]) -> None:
    lm = overtrusting_lm(backbone)
    pool = new_pool(lm)
    session = pool.open()
    gains = torch.cat([gain(learn(lm, pool, session, ids)) for ids in base_samples])
    num_guards = len(NGRAM_SIZES) + 1  # one for each number of n-gram matches
    assert float(-gains.cumsum(0).min()) <= num_guards * (
        GUARD_LIMIT_NATS + BLOCK * -torch.sigmoid(torch.tensor(-3.0)).log()
    )
    assert bool(pool.sites["words"].session_scalars[session, GATE_CLOSED].any())
    assert pool.num_rows(session)["words"] == LEXICAL.slots, "the session goes on learning"


def test_a_closed_session_is_the_base_bit_for_bit(backbone: Backbone, base_samples: list[list[int]]) -> None:
    lm = overtrusting_lm(backbone)
    pool = new_pool(lm)
    session = learned(lm, pool, seed=1)
    for closed in (0.0, 1.0):
        pool.sites["words"].session_scalars[session, GATE_CLOSED] = closed
        request = read(lm, pool, session, base_samples[0][:-1])
        decode_states = lm.decode(base_samples[0][-1:], [request.cache], [decode_state_of(request)], pool, [session])
        predicted, base = lm.predict(decode_states, pool, [session]), backbone.logits(decode_states[0].hidden[None])
        assert torch.equal(request.adapted, request.frozen) == bool(closed)
        assert torch.equal(predicted, base) == bool(closed)


def test_a_closed_session_opens_again_when_its_memory_would_help(backbone: Backbone) -> None:
    lm = overtrusting_lm(backbone)
    pool = new_pool(lm)
    session = learned(lm, pool, seed=1)
    session_scalars = pool.sites["words"].session_scalars
    session_scalars[session, GATE_CLOSED], session_scalars[session, BALANCE] = 1.0, -GUARD_LIMIT_NATS
    first, *_, last = [gain(learn(lm, pool, session, text(1))) for _ in range(4)]
    assert not first[: BLOCK - 1].any()
    assert float(last.mean()) > 1.0
    assert not session_scalars[session, GATE_CLOSED, -1], "the gate of repeated n-grams is open"


def test_repeated_text_is_read_although_the_gate_of_chance_similarity_is_closed(
    backbone: Backbone, base_samples: list[list[int]]
) -> None:
    lm = overtrusting_lm(backbone)
    pool = new_pool(lm)
    session = learned(lm, pool, seed=1)
    learn(lm, pool, session, base_samples[0][: 4 * BLOCK])
    assert bool(pool.sites["words"].session_scalars[session, GATE_CLOSED, 0])
    assert float(gain(learn(lm, pool, session, text(1))).mean()) > 0.5


@pytest.mark.parametrize("poison", POISONS)
def test_a_poisoned_session_is_not_worse_than_the_base_afterwards(
    backbone: Backbone, base_samples: list[list[int]], poison: str
) -> None:
    """Some poisons do harm, others are so easy that the memory seems to be worth a lot."""
    lm = overtrusting_lm(backbone)
    pool = new_pool(lm)
    session = pool.open()
    for start in range(0, len(POISONS[poison]), LENGTH):
        learn(lm, pool, session, POISONS[poison][start : start + LENGTH])
    requests = [learn(lm, pool, session, ids) for ids in base_samples]
    lost = -float(sum(gain(request).sum() for request in requests))
    assert lost <= 0.01 * -float(sum(request.frozen.sum() for request in requests))
