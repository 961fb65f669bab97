"""What a session guesses of since when its labels hold is what Bayes has of it, and decides what counts."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from model.memory import MemoryConfig, Pool, SiteConfig
from model.policies.change_point import NAME, NUM_HYPOTHESES, ChangePointHypotheses, change_point_site
from model.policies.config import PolicyConfig, PolicyError
from model.policies.network import Policy, new_policy

FEATURES = torch.cat([torch.eye(6)[:2], -torch.eye(6)[:2]]) * 4
LEXICAL = SiteConfig("memory", "lexical", slots=64, cell=64, k=1, width=8)


@pytest.fixture(scope="module")
def policy() -> Policy:
    config = PolicyConfig("changing", "label", 6, 5, MemoryConfig(16, (LEXICAL, change_point_site())), width=16)
    policy = new_policy(config, seed=1)
    policy.labels.sharpness.fill_(100.0)  # one example says nothing of the others
    return policy


def learned(policy: Policy, pool: Pool, index: int, labels: list[int]) -> None:
    """Learns a label of each of the examples in turn, over and over."""
    for step, label in enumerate(labels):
        draft = pool.draft(index)
        example = FEATURES[step % 4][None]
        ((*_, learn),) = policy.label_updates(example, torch.tensor([label]), pool, torch.tensor([draft.index]))
        learn(draft)
        assert {name: len(rows.slots) for name, rows in draft.touched().items() if name in ("memory", NAME)} == {
            "memory": 1,
            NAME: 1,
        }
        draft.commit()


def predicted_labels(policy: Policy, pool: Pool, *sessions: int) -> Tensor:
    """Of each session what is said of each example [n, 4, L]."""
    told = [policy.label(FEATURES[i].expand(len(sessions), -1), pool, torch.tensor(sessions)) for i in range(4)]
    return torch.stack(told, dim=1)


def read_guesses(pool: Pool, index: int) -> ChangePointHypotheses:
    return ChangePointHypotheses.of(
        pool.sites[NAME].read(torch.tensor([index]), torch.zeros(1, 1, dtype=torch.long))[0][:, 0]
    )


def test_guesses_are_believed_as_bayes_has_it() -> None:
    """Beside the sum over all ways in which things may have changed after some of the labels."""
    labels, doubt = NUM_HYPOTHESES - 1, 0.1
    likelihoods = torch.rand(labels, labels, generator=torch.Generator().manual_seed(0))  # of a label by a start
    rows = torch.zeros(1, 2 * NUM_HYPOTHESES)
    for label in range(labels):
        starts = ChangePointHypotheses.of(rows).starts.long()
        rows = ChangePointHypotheses.of(rows).update(
            likelihoods[label, starts], torch.tensor(doubt), torch.tensor([label + 1])
        )
    wanted = torch.zeros(labels + 1)
    for changes in itertools.product((False, True), repeat=labels):
        start, chance = 0, 1.0
        for label, change in enumerate(changes):
            chance *= float(likelihoods[label, start]) * (doubt if change else 1 - doubt)
            start = label + 1 if change else start
        wanted[start] += chance
    starts, probs = ChangePointHypotheses.of(rows)
    found = torch.zeros(labels + 1).index_add(0, starts[0].long(), probs[0])
    torch.testing.assert_close(found, wanted / wanted.sum())


def test_what_came_before_a_change_counts_no_more(policy: Policy) -> None:
    pool = Pool(policy.config.memory, rows=256, sessions=4)
    index = pool.open()
    learned(policy, pool, index, [0, 1, 2, 3] * 4)
    hypotheses = read_guesses(pool, index)
    assert hypotheses.probs[hypotheses.starts == 0].sum() > 0.9
    learned(policy, pool, index, [4, 4, 4, 4] * 2)
    hypotheses = read_guesses(pool, index)
    assert (
        hypotheses.probs[(hypotheses.starts >= 15) & (hypotheses.starts <= 16)].sum()
        > 0.5
        > 4 * hypotheses.probs[hypotheses.starts == 0].sum()
    )
    assert predicted_labels(policy, pool, index)[0].argmax(-1).tolist() == [4, 4, 4, 4]


def test_guesses_go_where_their_session_goes_and_change_no_neighbour(policy: Policy) -> None:
    pool = Pool(policy.config.memory, rows=512, sessions=8)
    index, empty = pool.open(), pool.open()
    learned(policy, pool, index, [0, 1, 2, 3, 1, 2, 3, 4])
    copy = pool.open(pool.dump(index))
    alone = policy.base(policy.embed(FEATURES)).logits.log_softmax(-1)
    one, other, nothing = predicted_labels(policy, pool, index, copy, empty)
    assert (
        torch.equal(one, other)
        and torch.equal(one, predicted_labels(policy, pool, index)[0])
        and torch.equal(nothing, alone)
    )


def test_a_forged_row_of_guesses_still_leads_to_chances(policy: Policy) -> None:
    for forged in (-1e38, 1e38, 1e-45):
        pool = Pool(policy.config.memory, rows=256, sessions=4)
        index = pool.open()
        learned(policy, pool, index, [0, 1, 2])
        pool.sites[NAME].fields[0][pool.sites[NAME].tables[index].long()] = forged
        learned(policy, pool, index, [3, 1])
        torch.testing.assert_close(predicted_labels(policy, pool, index).exp().sum(-1), torch.ones(1, 4))


def test_guesses_need_ages_that_count_all_labels() -> None:
    several = dataclasses.replace(LEXICAL, cell=8)
    with pytest.raises(PolicyError, match="cells must be 1 beside the site 'since'"):
        PolicyConfig("changing", "label", 6, 5, MemoryConfig(16, (several, change_point_site())), width=16)
