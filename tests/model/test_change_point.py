"""Change-point hypotheses equal the exact posterior, and decide which labels of a session count."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from model.memory import MemoryConfig, Pool, SiteConfig, choose_backend
from model.policies.change_point import NAME, NUM_HYPOTHESES, ChangePointHypotheses, change_point_site
from model.policies.config import PolicyConfig, PolicyError
from model.policies.network import Policy, new_policy

FEATURES = torch.cat([torch.eye(6)[:2], -torch.eye(6)[:2]]) * 4
LEXICAL = SiteConfig("memory", "lexical", slots=64, cell=64, k=1, width=8)


@pytest.fixture(scope="module")
def policy() -> Policy:
    config = PolicyConfig("changing", "label", 6, 5, MemoryConfig(16, (LEXICAL, change_point_site())), width=16)
    policy = new_policy(config, seed=1)
    policy.labels.sharpness.fill_(100.0)  # examples do not generalise to each other
    return policy


def learn_labels(policy: Policy, pool: Pool, index: int, labels: list[int]) -> None:
    """Learn labels one by one, for the four examples in turn."""
    for step, label in enumerate(labels):
        draft = pool.draft(index)
        example = FEATURES[step % 4][None]
        (update,) = policy.label_updates(example, torch.tensor([label]), pool, torch.tensor([draft.index]))
        update.apply(draft)
        assert {name: len(rows.slots) for name, rows in draft.touched().items() if name in ("memory", NAME)} == {
            "memory": 1,
            NAME: 1,
        }
        draft.commit()


def predicted_labels(policy: Policy, pool: Pool, *sessions: int) -> Tensor:
    """Return log p [n, 4, L] of the labels of the four examples in each session."""
    log_probs = [policy.label(FEATURES[i].expand(len(sessions), -1), pool, torch.tensor(sessions)) for i in range(4)]
    return torch.stack(log_probs, dim=1)


def read_hypotheses(pool: Pool, index: int) -> ChangePointHypotheses:
    return ChangePointHypotheses.of(
        pool.sites[NAME].read(torch.tensor([index]), torch.zeros(1, 1, dtype=torch.long))[0][:, 0]
    )


def test_hypotheses_equal_the_exact_posterior() -> None:
    """The reference sums over all subsets of labels after which the rule may have changed."""
    labels, hazard = NUM_HYPOTHESES - 1, 0.1
    likelihoods = torch.rand(labels, labels, generator=torch.Generator().manual_seed(0))  # of a label by a start
    rows = torch.zeros(1, 2 * NUM_HYPOTHESES)
    for label in range(labels):
        starts = ChangePointHypotheses.of(rows).starts.long()
        rows = ChangePointHypotheses.of(rows).update(
            likelihoods[label, starts], torch.tensor(hazard), torch.tensor([label + 1])
        )
    expected = torch.zeros(labels + 1)
    for changes in itertools.product((False, True), repeat=labels):
        start, prob = 0, 1.0
        for label, change in enumerate(changes):
            prob *= float(likelihoods[label, start]) * (hazard if change else 1 - hazard)
            start = label + 1 if change else start
        expected[start] += prob
    starts, probs = ChangePointHypotheses.of(rows)
    found = torch.zeros(labels + 1).index_add(0, starts[0].long(), probs[0])
    torch.testing.assert_close(found, expected / expected.sum())


def test_labels_before_a_change_do_not_count(policy: Policy) -> None:
    pool = Pool(policy.config.memory, rows=256, sessions=4, backend=choose_backend(torch.device("cpu")))
    index = pool.open()
    learn_labels(policy, pool, index, [0, 1, 2, 3] * 4)
    hypotheses = read_hypotheses(pool, index)
    assert hypotheses.probs[hypotheses.starts == 0].sum() > 0.9
    learn_labels(policy, pool, index, [4, 4, 4, 4] * 2)
    hypotheses = read_hypotheses(pool, index)
    assert (
        hypotheses.probs[(hypotheses.starts >= 15) & (hypotheses.starts <= 16)].sum()
        > 0.5
        > 4 * hypotheses.probs[hypotheses.starts == 0].sum()
    )
    assert predicted_labels(policy, pool, index)[0].argmax(-1).tolist() == [4, 4, 4, 4]


def test_hypotheses_move_with_their_session_and_change_no_neighbour(policy: Policy) -> None:
    pool = Pool(policy.config.memory, rows=512, sessions=8, backend=choose_backend(torch.device("cpu")))
    index, empty = pool.open(), pool.open()
    learn_labels(policy, pool, index, [0, 1, 2, 3, 1, 2, 3, 4])
    copy = pool.open(pool.dump(index))
    alone = policy.base(policy.embed(FEATURES)).logits.log_softmax(-1)
    one, other, nothing = predicted_labels(policy, pool, index, copy, empty)
    assert (
        torch.equal(one, other)
        and torch.equal(one, predicted_labels(policy, pool, index)[0])
        and torch.equal(nothing, alone)
    )


def test_a_forged_row_of_hypotheses_still_gives_probabilities(policy: Policy) -> None:
    for forged in (-1e38, 1e38, 1e-45):
        pool = Pool(policy.config.memory, rows=256, sessions=4, backend=choose_backend(torch.device("cpu")))
        index = pool.open()
        learn_labels(policy, pool, index, [0, 1, 2])
        pool.sites[NAME].fields[0][pool.sites[NAME].tables[index].long()] = forged
        learn_labels(policy, pool, index, [3, 1])
        torch.testing.assert_close(predicted_labels(policy, pool, index).exp().sum(-1), torch.ones(1, 4))


def test_change_points_need_a_site_with_one_cell() -> None:
    several = dataclasses.replace(LEXICAL, cell=8)
    with pytest.raises(PolicyError, match="cells must be 1 where the memory has a site 'since'"):
        PolicyConfig("changing", "label", 6, 5, MemoryConfig(16, (several, change_point_site())), width=16)
