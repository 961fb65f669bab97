"""Policies keep the laws of the memory: an empty session is the network alone, no neighbours, sparse writes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from model.memory import Draft, Pool, choose_backend
from model.memory.config import BALANCE, GATE_CLOSED
from model.memory.delta import reference as delta_reference
from model.memory.delta import torch_ops
from model.policies.config import PolicyConfig, PolicyError
from model.policies.journal import COUNTER_WRAP, MAX_PENDING, MAX_TOUCHED_ROWS, SLOTS, Journal, JournalError
from model.policies.network import Policy, load_policy, new_policy, save_policy
from research.scenarios.card_sorting import CardSorting
from research.scenarios.registry import RECIPES
from research.scenarios.scenario import PolicyTrainConfig
from research.training.agents import Agent, ContextAgent, MemoryAgent, RecurrentAgent
from research.training.policy_loop import ActingRound, LabellingRound, PolicyTrainer, train_agent
from tests.tiny import build_tiny_policies

EMPTY_SESSION = 0


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return build_tiny_policies(tmp_path_factory.mktemp("policies") / "tiny")


@pytest.fixture(scope="module")
def act_policy(paths: list[Path]) -> Policy:
    return load_policy(paths[0])


@pytest.fixture(scope="module")
def label_policy(paths: list[Path]) -> Policy:
    return load_policy(paths[1])


def build_pool(policy: Policy) -> Pool:
    return Pool(policy.config.memory, rows=1024, sessions=16, backend=choose_backend(torch.device("cpu")))


def random_inputs(policy: Policy, n: int, seed: int = 0) -> Tensor:
    """Return the inputs [n, A, F] of the actions of n sessions."""
    generator = torch.Generator().manual_seed(seed)
    observation = torch.randn(n, policy.config.observation_size, generator=generator)
    return policy.inputs(observation, torch.full((n,), -1), torch.full((n,), math.nan))


def learn_rewards(policy: Policy, pool: Pool, index: int, times: int, seed: int = 0) -> None:
    """Learn `times` rewards in a session."""
    inputs = random_inputs(policy, times, seed)
    for time in range(times):
        draft = pool.draft(index)
        write_reward(policy, draft, inputs[time, time % 3], float(time % 2))
        draft.commit()


def write_reward(policy: Policy, draft: Draft, inputs: Tensor, value: float) -> None:
    session = torch.tensor([draft.index])
    slots, rows, _, _ = policy.reward(inputs[None], torch.tensor([value]), draft.pool, session)
    draft.put("memory", slots[0], [rows[0]])


def test_the_magnitude_of_a_delta_read_equals_the_reference() -> None:
    rows, w = torch.randn(5, 3, 4, dtype=torch.float64), torch.rand(5, 3, dtype=torch.float64)
    rows[2] = 0
    torch.testing.assert_close(torch_ops.delta_read_magnitude(rows, w), delta_reference.delta_read_magnitude(rows, w))


def test_an_empty_session_decides_as_the_network_alone(act_policy: Policy, label_policy: Policy) -> None:
    inputs, pool = random_inputs(act_policy, 4), build_pool(act_policy)
    index = pool.open()
    alone = act_policy.logit_and_value(act_policy.state(inputs.flatten(0, 1)))
    for session in (EMPTY_SESSION, index):
        logits, expected = act_policy.decide(inputs, pool, torch.full((4,), session))
        assert torch.equal(logits.flatten(), alone[0]) and torch.equal(expected.flatten(), alone[1])
    features, labels = torch.randn(4, 6), build_pool(label_policy)
    alone_labels = label_policy.base(label_policy.embed(features)).logits.log_softmax(-1)
    assert torch.equal(label_policy.label(features, labels, torch.full((4,), labels.open())), alone_labels)


def test_neighbours_change_no_bit(act_policy: Policy, label_policy: Policy) -> None:
    pool = build_pool(act_policy)
    sessions = [pool.open() for _ in range(5)]
    for number, index in enumerate(sessions):
        learn_rewards(act_policy, pool, index, 6, seed=number)
    inputs, rewards = random_inputs(act_policy, 5, seed=9), torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    together = act_policy.decide(inputs, pool, torch.tensor(sessions))
    written = act_policy.reward(inputs[:, 1], rewards, pool, torch.tensor(sessions))
    for i, index in enumerate(sessions):
        alone = act_policy.decide(inputs[i : i + 1], pool, torch.tensor([index]))
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, together, strict=True))
        alone_written = act_policy.reward(inputs[i : i + 1, 1], rewards[i : i + 1], pool, torch.tensor([index]))
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone_written, written, strict=True))
    labels = build_pool(label_policy)
    opened = [labels.open() for _ in range(4)]
    features = torch.randn(4, 6)
    for index in opened[1:]:
        learn_label(label_policy, labels, index, features[index % 4], index % 5)
    batch_log_probs = label_policy.label(features, labels, torch.tensor(opened))
    for i, index in enumerate(opened):
        assert torch.equal(
            label_policy.label(features[i : i + 1], labels, torch.tensor([index]))[0], batch_log_probs[i]
        )


def learn_label(policy: Policy, pool: Pool, index: int, features: Tensor, label: int) -> None:
    draft = pool.draft(index)
    session = torch.tensor([draft.index])
    (update,) = policy.label_updates(features[None], torch.tensor([label]), pool, session)
    update.apply(draft)
    assert len(draft.touched()["memory"].slots) == 1
    draft.commit()


def test_a_reward_touches_k_rows_and_no_other(act_policy: Policy) -> None:
    pool = build_pool(act_policy)
    index = pool.open()
    learn_rewards(act_policy, pool, index, 8)
    before = pool.dump(index)["memory"]
    draft = pool.draft(index)
    write_reward(act_policy, draft, random_inputs(act_policy, 1, seed=5)[0, 0], 1.0)
    touched = draft.touched()["memory"]
    assert 1 <= len(touched.slots) <= act_policy.site.config.k
    draft.commit()
    after = pool.dump(index)["memory"]
    kept = {int(slot): row for slot, row in zip(after.slots, after.data, strict=True)}
    for slot, row in zip(before.slots, before.data, strict=True):
        assert int(slot) in touched.slots or torch.equal(kept[int(slot)], row)


def test_training_reads_and_writes_what_serving_does(act_policy: Policy) -> None:
    """The rows of training and of the pool agree: the same rewards lead to the same decisions."""
    pool, agent = build_pool(act_policy), MemoryAgent(act_policy)
    index, last, last_reward = pool.open(), torch.tensor([-1]), torch.tensor([math.nan])
    agent.reset(1)
    for step, observation in enumerate(torch.randn(12, 1, act_policy.config.observation_size)):
        inputs = act_policy.inputs(observation, last, last_reward)
        served = act_policy.decide(inputs, pool, torch.tensor([index]))
        for trained, expected in zip(agent.ask(observation), served, strict=True):
            torch.testing.assert_close(trained, expected)
        last, last_reward = torch.tensor([step % 3]), torch.tensor([float(step % 2)])
        agent.tell(last, last_reward)
        draft = pool.draft(index)
        write_reward(act_policy, draft, inputs[0, step % 3], float(last_reward))
        draft.commit()


def test_a_guard_shuts_out_a_memory_that_misleads_and_lets_it_in_again(paths: list[Path]) -> None:
    """Law 12: when rewards contradict what memory expects, decisions are soon those of the network alone."""
    act_policy = load_policy(paths[0])
    inputs = random_inputs(act_policy, 1)
    act_policy.head.weight.mul_(5)  # firm expectations, and none without memory
    act_policy.head.bias[1] -= torch.logit(act_policy.logit_and_value(act_policy.state(inputs[0, :1]))[1][0])
    pool = build_pool(act_policy)
    index = pool.open()
    alone = act_policy.decide(inputs, pool, torch.tensor([EMPTY_SESSION]))

    def steps_until_shut_changes(helps: bool) -> int:
        """Return the number of rewards until the guard changes; helps: whether the rewards agree with memory."""
        for count in range(1, 200):
            rewards = reward_that(helps)
            draft = pool.draft(index)
            session = torch.tensor([draft.index])
            slots, rows, loss, frozen = act_policy.reward(inputs[0, :1], rewards, pool, session)
            assert bool(frozen < loss) != helps
            draft.put("memory", slots[0], [rows[0]])
            was_open = act_policy.guard_step(draft, float(frozen - loss))
            num_closed = draft.num_guards_closed()
            draft.commit()
            decided = act_policy.decide(inputs, pool, torch.tensor([index]))
            same = all(torch.equal(a, b) for a, b in zip(decided, alone, strict=True))
            assert same == (num_closed > 0 or (not was_open and num_closed == 0))
            if num_closed:
                return count
        raise AssertionError("the guard did not move")

    def reward_that(helps: bool) -> Tensor:
        open_one = pool.open(pool.dump(index))
        pool.sites["memory"].session_scalars[open_one] = 0.0
        expected = act_policy.decide(inputs, pool, torch.tensor([open_one]))[1][0, 0]
        pool.close(open_one)
        return ((expected > alone[1][0, 0]) == helps).float()[None]

    learn_rewards(act_policy, pool, index, 4)
    assert steps_until_shut_changes(helps=False) > 1
    steps_until_shut_changes(helps=True)


def test_a_label_that_is_new_to_a_session_is_no_evidence_against_its_memory(label_policy: Policy) -> None:
    """Law 12: no memory can expect a label that it has no row of; labels that it could expect still shut the guard."""
    pool = build_pool(label_policy)
    index, features = pool.open(), torch.randn(6)
    scalars = pool.sites["memory"].session_scalars
    alone = label_policy.label(features[None], pool, torch.tensor([EMPTY_SESSION]))[0]
    known = alone.argsort(descending=True)[:4]
    for label in known.tolist():
        learn_label(label_policy, pool, index, features, label)
        assert (scalars[index, BALANCE] == 0).all() and not scalars[index, GATE_CLOSED].any()
    for _ in range(100):
        remembered = label_policy.label(features[None], pool, torch.tensor([index]))[0]
        if scalars[index, GATE_CLOSED].any():
            break
        learn_label(label_policy, pool, index, features, int(known[(remembered - alone)[known].argmin()]))
    assert torch.equal(remembered, alone)


def test_a_label_is_remembered_and_the_latest_counts_most(label_policy: Policy) -> None:
    pool = build_pool(label_policy)
    index, features = pool.open(), torch.randn(6)

    def predicted() -> int:
        return int(label_policy.label(features[None], pool, torch.tensor([index])).argmax())

    learn_label(label_policy, pool, index, features, 3)
    assert predicted() == 3
    for _ in range(3):
        learn_label(label_policy, pool, index, features, 1)
    assert predicted() == 1


def test_a_policy_is_loaded_as_it_was_saved(act_policy: Policy, tmp_path: Path) -> None:
    save_policy(act_policy, tmp_path / "again")
    again = load_policy(tmp_path / "again")
    assert again.config == act_policy.config and again.fingerprint() == act_policy.fingerprint()
    (tmp_path / "broken").write_bytes(b"no policy")
    with pytest.raises(PolicyError, match="cannot read the policy broken"):
        load_policy(tmp_path / "broken")
    with pytest.raises(PolicyError, match="cue must be in"):
        PolicyConfig("x", "act", 1, 2, act_policy.config.memory, cue=2)


def test_a_journal_finds_the_actions_whose_reward_may_arrive() -> None:
    journal = Journal(np.zeros((SLOTS, 4 + 2), np.float32))
    assert journal.last[0] == -1 and math.isnan(journal.last[1])
    with pytest.raises(JournalError, match="no action yet"):
        journal.pending_row(None)
    numbers = [journal.record_action(n % 3, 0.5, np.array([n, -1.0], np.float32)) for n in range(MAX_PENDING + 5)]
    assert numbers == list(range(1, MAX_PENDING + 6)) and journal.is_valid
    journal = Journal(journal.rows)
    journal.reward(journal.pending_row(40), 1.0)
    assert math.isnan(journal.last[1])  # the reward of another action
    with pytest.raises(JournalError, match="rewarded before"):
        journal.pending_row(40)
    with pytest.raises(JournalError, match="no longer kept"):
        journal.pending_row(5)
    with pytest.raises(JournalError, match="1 to 68"):
        journal.pending_row(69)
    with pytest.raises(JournalError, match="undone"):
        journal.pending_row(69, highest=69)
    journal = Journal(journal.rows)
    last = journal.pending_row(None)
    assert journal.inputs(last).tolist() == [MAX_PENDING + 4, -1.0]
    journal.reward(last, 0.25)
    journal.record_action(0, 1.0, np.zeros(2, np.float32))
    assert len(journal.touched) <= MAX_TOUCHED_ROWS


def test_a_journal_gives_no_number_twice_and_loses_its_oldest_action_first() -> None:
    inputs = np.zeros(2, np.float32)
    journal = Journal(np.zeros((SLOTS, 4 + 2), np.float32))
    for _ in range(MAX_PENDING):
        journal.record_action(0, 1.0, inputs)
    for highest in (80, 100, COUNTER_WRAP + 5):
        rolled_back = Journal(journal.rows.copy())
        number = rolled_back.record_action(0, 1.0, inputs, highest)
        assert highest < number <= highest + MAX_PENDING and rolled_back.is_valid
        assert rolled_back.pending_row(number, number) == rolled_back.pending_row(None)
        assert rolled_back.pending_row(2, number) and rolled_back.pending_row(MAX_PENDING, number)
        with pytest.raises(JournalError, match="no longer kept"):
            rolled_back.pending_row(1, number)


def test_training_resumes_from_the_last_save(tmp_path: Path) -> None:
    train_config = PolicyTrainConfig(rounds=4, batch=4, steps=4, span=2)
    recipe = RECIPES["card-sorting"]

    def trainer(folder: str, rounds: int) -> PolicyTrainer:
        policy = new_policy(recipe.config("cards"), seed=0)
        config = PolicyTrainConfig(rounds=rounds, batch=4, steps=4, span=2)
        return PolicyTrainer(policy, lambda batch, rng: recipe.make(batch, rng), config, tmp_path / folder)

    whole = trainer("whole", train_config.rounds)
    whole.run(lambda done, loss: None)

    def stop(done: int, loss: float) -> None:
        first._save()
        if done == 2:
            raise KeyboardInterrupt

    first = trainer("parts", train_config.rounds)
    with pytest.raises(KeyboardInterrupt):
        first.run(stop)
    second = trainer("parts", train_config.rounds)
    assert len(second.losses) == 2
    second.run(lambda done, loss: None)
    assert second.losses == whole.losses
    assert second.policy.fingerprint() == whole.policy.fingerprint()


def test_both_kinds_of_rounds_give_gradients_to_the_trained_parameters() -> None:
    rng = np.random.default_rng(0)
    for name in ("card-sorting", "digits", "functions"):
        recipe = RECIPES[name].with_train_config(batch=2, steps=8, span=8)
        policy = new_policy(recipe.config(name), seed=0)
        policy.requires_grad_(True)
        tasks = recipe.make(2, rng, training=True)
        training_round: ActingRound | LabellingRound
        if policy.config.task == "act":
            training_round = ActingRound(MemoryAgent(policy), tasks, recipe.train_config, rng, greedy=True)
        else:
            training_round = LabellingRound(policy, tasks, 8)
        training_round.loss().backward()
        grads = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None and p.grad.any()}
        assert all(bool(grad.isfinite().all()) for grad in grads.values())
        assert len(grads) >= 12


@pytest.mark.parametrize("kind", ["gru", "lstm", "transformer"])
def test_meta_baselines_learn_from_the_same_tasks(kind: str) -> None:
    recipe = RECIPES["card-sorting"].with_train_config(batch=4, steps=4, span=2)
    tasks = recipe.make(1, np.random.default_rng(0))
    transformer = kind == "transformer"
    agent: Agent = ContextAgent(tasks, 8, seed=0) if transformer else RecurrentAgent(tasks, 8, cell=kind, seed=0)
    before = [parameter.clone() for parameter in agent.network.parameters()]
    losses = train_agent(agent, recipe.make, recipe.train_config, greedy=True, seconds=0.05)
    assert losses
    assert any(not torch.equal(a, b) for a, b in zip(before, agent.network.parameters(), strict=True))


def test_the_ideal_observer_of_card_sorting_makes_one_and_a_half_errors_a_switch() -> None:
    tasks, errors = CardSorting(200, np.random.default_rng(0)), 0.0
    for _ in range(200):
        action = (tasks.teacher_scores() + 1e-6 * tasks.rng.random((200, 4))).argmax(1)
        errors += float((1 - tasks.step(action)).sum())
    assert errors / tasks.switches.sum() == pytest.approx(1.5, abs=0.1)
