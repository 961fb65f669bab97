"""The tabular learners: what they promise for any stream."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest

from model.memory import Pool
from model.tabular.config import EXAMPLES, MAX_EXAMPLES, TabularError
from model.tabular.label_learner import Labels
from model.tabular.number_learner import Regression
from model.tabular.reward_learner import Bandit
from tests.model.tabular_cases import Array, learner_of, new_pool, stream, teach

LABELS = cast(Labels, learner_of("labels"))
NUMBERS = cast(Regression, learner_of("regression"))
ARMS = cast(Bandit, learner_of("bandit"))


def reward_session(pool: Pool, contexts: Array, rewards: Array, features: Array | None = None) -> int:
    """Return a session that has learned the rewards of arms 0, 1, 2 in turn."""
    session = pool.open()
    for i, (context, reward) in enumerate(zip(contexts, rewards, strict=True)):
        draft = pool.draft(session)
        own = None if features is None else features[i % 3]
        ARMS.learn(context, i % 3, own, float(reward), 1 / 3, draft)
        draft.commit()
    return session


def test_labels_are_learned_from_a_few_examples() -> None:
    pool = new_pool(LABELS)
    x, y = stream(60)
    session = pool.open()
    losses = teach(LABELS, pool, session, x, y)
    assert np.mean(losses[30:]) < 0.8 * np.log(3)
    prediction = LABELS.predict(x[2], pool, session)
    assert prediction.probs.sum() + prediction.unknown == pytest.approx(1, abs=1e-5)
    assert prediction.votes[0].ordinal == 3  # the example itself
    assert 0 < sum(vote.weight for vote in prediction.votes) <= 1 + 1e-6


def test_an_empty_session_knows_nothing() -> None:
    x = np.ones(3, np.float32)
    assert LABELS.predict(x, new_pool(LABELS), 0).unknown == 1.0
    estimate = NUMBERS.predict(x, new_pool(NUMBERS), 0)
    assert (estimate.mean, estimate.lower, estimate.upper) == (0.0, -np.inf, np.inf)
    decision = ARMS.decide(x, np.array([4, 7]), None, new_pool(ARMS), 0)
    assert decision.probs.tolist() == pytest.approx([0.5, 0.5])


def test_the_order_and_the_scale_of_columns_change_no_bit() -> None:
    x, y = stream(50)
    order = np.array([3, 1, 4, 0, 2])
    changed = x[:, order] * np.float32(4.0)
    for learner, values in ((LABELS, y), (NUMBERS, np.nan_to_num(x).sum(1))):
        pool = new_pool(learner)
        first, second = pool.open(), pool.open()
        assert teach(learner, pool, first, x, values) == teach(learner, pool, second, changed, values)
    pool = new_pool(ARMS)
    rewards, arms = np.nan_to_num(x[:, 0]), np.arange(3)
    one, other = reward_session(pool, x, rewards), reward_session(pool, changed, rewards)
    decisions = [ARMS.decide(x[0], arms, None, pool, one), ARMS.decide(changed[0], arms, None, pool, other)]
    assert decisions[0].probs.tolist() == decisions[1].probs.tolist()


def test_columns_and_labels_may_appear_at_any_time() -> None:
    pool = new_pool(LABELS)
    session = pool.open()
    x, y = stream(40, columns=40, labels=2)
    teach(LABELS, pool, session, x[:20, :3], y[:20])
    teach(LABELS, pool, session, x[20:], y[20:] + (y[20:] == 1))
    assert LABELS.num_labels(pool, session) == 3
    assert len(LABELS.predict(x[0], pool, session).probs) == 3
    assert len(LABELS.predict(x[0, :1], pool, session).probs) == 3


def test_what_is_out_of_the_limits_is_refused_by_name() -> None:
    x, pool = np.ones(3, np.float32), new_pool(LABELS)
    draft = pool.draft(0)
    with pytest.raises(TabularError, match=r"label must be in 0\.\.0, got 1"):
        LABELS.learn(x, 1, draft)
    with pytest.raises(TabularError, match="x must have at most 256 columns, got 257"):
        LABELS.predict(np.ones(257, np.float32), pool, 0)
    with pytest.raises(TabularError, match="target must be a finite float32, got nan"):
        NUMBERS.learn(x, float("nan"), new_pool(NUMBERS).draft(0))
    with pytest.raises(TabularError, match=r"arm must be in 0\.\.255, got 256"):
        ARMS.decide(x, np.array([256]), None, new_pool(ARMS), 0)


def test_columns_of_any_content_give_probabilities() -> None:
    rng = np.random.default_rng(0)
    x = np.stack(
        [np.zeros(30), np.full(30, np.nan), rng.standard_cauchy(30) * 1e30, np.where(rng.random(30) < 0.5, np.inf, 1)],
        axis=1,
    ).astype(np.float32)
    pool, y = new_pool(LABELS), np.concatenate([[0, 1], rng.integers(0, 2, 28)])
    session = pool.open()
    assert np.isfinite(teach(LABELS, pool, session, x, y)).all()
    assert np.isfinite(LABELS.predict(x[0], pool, session).probs).all()
    pool = new_pool(NUMBERS)
    session = pool.open()
    assert np.isfinite(teach(NUMBERS, pool, session, x, rng.standard_cauchy(30) * 1e20)).all()


def test_a_session_does_not_see_its_neighbours_and_survives_its_store() -> None:
    x, y = stream(30)
    exclusive, shared = new_pool(LABELS), new_pool(LABELS)
    first, second, other = exclusive.open(), shared.open(), shared.open()
    teach(LABELS, exclusive, first, x, y)
    for i in range(30):
        teach(LABELS, shared, second, x[i : i + 1], y[i : i + 1])
        teach(LABELS, shared, other, -x[i : i + 1], np.zeros(1, np.int64))
    restored = shared.open(exclusive.dump(first))
    expected = LABELS.predict(x[4], exclusive, first)
    for session in (second, restored):
        found = LABELS.predict(x[4], shared, session)
        assert found.probs.tobytes() == expected.probs.tobytes() and found.votes == expected.votes


def test_a_draft_that_is_rolled_back_leaves_nothing() -> None:
    pool, (x, y) = new_pool(LABELS), stream(20)
    session = pool.open()
    teach(LABELS, pool, session, x[:10], y[:10])
    before = LABELS.predict(x[0], pool, session)
    draft = pool.draft(session)
    LABELS.learn(x[10], int(y[10]), draft)
    draft.rollback()
    assert LABELS.predict(x[0], pool, session).probs.tobytes() == before.probs.tobytes()


def test_a_session_is_bounded_and_a_write_touches_few_rows() -> None:
    pool, (x, y) = new_pool(LABELS), stream(MAX_EXAMPLES + 5, columns=2, labels=2)
    session = pool.open()
    teach(LABELS, pool, session, x[:20], y[:20])
    draft = pool.draft(session)
    for i in range(20, len(x)):  # one commit, to be quick
        LABELS.learn(x[i], int(y[i]), draft)
    draft.commit()
    assert pool.num_rows(session)[EXAMPLES] == MAX_EXAMPLES
    draft = pool.draft(session)
    LABELS.learn(x[0], int(y[0]), draft)
    assert sum(len(rows.slots) for rows in draft.touched().values()) <= 16
    for learner in (LABELS, NUMBERS, ARMS):
        assert sum(site.slots * site.row_bytes for site in learner.config.memory.sites) <= 2 * 2**20


def test_changed_labels_are_learned_again() -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(360, 3)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int64)
    y[240:] = 1 - y[240:]
    y[:2] = 0, 1
    pool = new_pool(LABELS)
    session, hits = pool.open(), []
    for features, label in zip(x, y.tolist(), strict=True):
        draft = pool.draft(session)
        hits.append(LABELS.learn(features, label, draft).hit)
        draft.commit()
    assert np.mean(hits[200:240]) > 0.9
    assert np.mean(hits[320:]) > 0.8


@pytest.mark.parametrize("helped", [0, 120])
def test_harmful_examples_lose_little_against_the_best_constant_answer(helped: int) -> None:
    """Law 12: from the example `helped` on, columns say nothing of labels, of which one is far more frequent."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(helped + 400, 4)).astype(np.float32)
    y = rng.choice(4, size=len(x), p=[0.85, 0.05, 0.05, 0.05])
    y[:helped] = x[:helped, :4].argmax(1)
    _, first, y = np.unique(y, return_index=True, return_inverse=True)
    y = first.argsort().argsort()[y]  # numbered in the order in which they appear
    pool = new_pool(LABELS)
    session, won = pool.open(), []
    for features, label in zip(x, y.tolist(), strict=True):
        draft = pool.draft(session)
        learned = LABELS.learn(features, label, draft)
        won.append(learned.frozen_loss - learned.loss)
        draft.commit()
    gain = np.cumsum(won)
    assert (np.maximum.accumulate(gain) - gain)[-1] < 17
    assert gain[-1] > 10 or not helped


def test_columns_that_mislead_a_bandit_are_not_read_until_they_help_again() -> None:
    """Law 12: what decides then are the arms' own rewards, the best constant decision among them."""
    rng, pool, arms, told = np.random.default_rng(0), new_pool(ARMS), np.arange(2), []
    session = pool.open()
    for step in range(250):
        x = rng.normal(size=2).astype(np.float32)
        probs = ARMS.decide(x, arms, None, pool, session).probs
        arm = int(rng.random() > probs[0])
        reward = rng.random() < 0.5 if 100 <= step < 200 else (x[0] > 0) == arm
        draft = pool.draft(session)
        ARMS.learn(x, arm, None, float(reward), float(probs[arm]), draft)
        draft.commit()
        if step in (99, 199, 249):
            ends = [ARMS.decide(np.array([end, 0], np.float32), arms, None, pool, session) for end in (-2, 2)]
            told.append(float(np.abs(ends[0].expected - ends[1].expected).sum()))
    assert told[0] > 0.8 and told[1] < 0.2 < told[2]


def test_numbers_are_learned_and_the_interval_holds_most() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(150, 3)).astype(np.float32)
    y = 1000.0 + 50 * x[:, 0] - 20 * x[:, 1] + rng.normal(size=150)
    pool = new_pool(NUMBERS)
    session, inside, errors = pool.open(), [], []
    for features, target in zip(x, y.tolist(), strict=True):
        estimate = NUMBERS.predict(features, pool, session)
        inside.append(estimate.lower <= target <= estimate.upper)
        errors.append(abs(estimate.mean - target))
        teach(NUMBERS, pool, session, features[None], np.array([target]))
    assert np.mean(errors[50:]) < 0.4 * y.std()
    assert 0.8 <= np.mean(inside[20:]) <= 1.0


def test_the_better_arm_is_drawn_more_often_where_it_is_better() -> None:
    rng = np.random.default_rng(2)
    contexts = rng.normal(size=(90, 2)).astype(np.float32)
    rewards = [float((i % 3 == 0) == (contexts[i, 0] > 0)) for i in range(90)]
    pool = new_pool(ARMS)
    session = reward_session(pool, contexts, np.array(rewards))
    high = ARMS.decide(np.array([2.0, 0.0], np.float32), np.arange(3), None, pool, session)
    low = ARMS.decide(np.array([-2.0, 0.0], np.float32), np.arange(3), None, pool, session)
    assert high.probs.sum() == pytest.approx(1, abs=1e-5)
    assert high.probs[0] > 0.8 and low.probs[0] < 0.1
    assert high.expected[0] > 0.7


def test_arms_are_judged_by_their_features_and_may_come_late() -> None:
    rng = np.random.default_rng(5)
    features = np.array([[0.0], [0.5], [1.0]], np.float32)
    rewards = np.array([features[i % 3, 0] for i in range(60)]) + rng.normal(size=60) * 0.05
    pool = new_pool(ARMS)
    session = reward_session(pool, np.zeros((60, 0), np.float32), rewards, features)
    late = np.array([[0.1], [0.9]], np.float32)
    decision = ARMS.decide(np.zeros(0, np.float32), np.array([10, 11]), late, pool, session)
    assert decision.expected[1] > decision.expected[0]
    assert decision.probs[1] > decision.probs[0]
