"""Law 2 for policies that CPUs serve: the compiled step decides and learns as the torch reference does."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import model
from model import memory
from model.memory.config import BALANCE, GATE_CLOSED
from model.policies.backend import PolicyBackend, choose_backend
from model.policies.config import PolicyError
from model.policies.network import load_policy
from model.policies.numba_step import NumbaPolicy

FOLDER = Path(model.__file__).parent / "checkpoints" / "policies"
NAMES = ("bandit", "bandit-linear", "card-sorting", "card-sorting-pairs", "choices")  # every kind of address and of row
USERS = 4


class PolicySessions:
    """USERS sessions of a policy that acts, with a compiled step and the reference over one pool."""

    def __init__(self, name: str) -> None:
        self.policy = load_policy(FOLDER / f"{name}.safetensors")
        self.numba_policy = NumbaPolicy(self.policy)
        self.pool = memory.Pool(
            self.policy.config.memory, rows=1024, sessions=16, backend=memory.choose_backend(torch.device("cpu"))
        )
        self.sessions = torch.tensor([self.pool.open() for _ in range(USERS)])
        self.last, self.reward = torch.full((USERS,), -1), torch.full((USERS,), math.nan)
        self.generator = torch.Generator().manual_seed(0)

    def observations(self) -> torch.Tensor:
        return torch.randn(USERS, self.policy.config.observation_size, generator=self.generator)

    def step(self, *, served: PolicyBackend | None = None) -> torch.Tensor:
        """Take an action in each session and learn its reward; return the inputs [n, A, F] of the actions."""
        actor, config = served or self.numba_policy, self.policy.config
        inputs = actor.inputs(self.observations(), self.last, self.reward)
        self.last = actor.decide(inputs, self.pool, self.sessions)[0].argmax(1)
        share = torch.rand(USERS, generator=self.generator)
        self.reward = config.lowest + (config.highest - config.lowest) * share
        self.reward[0] = math.nan  # the first session gets no reward
        taken = inputs[torch.arange(USERS), self.last]
        slots, rows, loss, frozen = actor.reward(taken[1:], self.reward[1:], self.pool, self.sessions[1:])
        for i, index in enumerate(self.sessions[1:].tolist()):
            draft = self.pool.draft(index)
            draft.put("memory", slots[i], [rows[i]])
            actor.guard_step(draft, float(frozen[i] - loss[i]))
            draft.commit()
        return inputs


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_policy_agrees_with_the_reference(name: str) -> None:
    policy_sessions = PolicySessions(name)
    for _ in range(30):
        observations = policy_sessions.observations()
        inputs = policy_sessions.numba_policy.inputs(observations, policy_sessions.last, policy_sessions.reward)
        assert torch.equal(
            inputs, policy_sessions.policy.inputs(observations, policy_sessions.last, policy_sessions.reward)
        )
        ours, references = (
            one.decide(inputs, policy_sessions.pool, policy_sessions.sessions)
            for one in (policy_sessions.numba_policy, policy_sessions.policy)
        )
        for compiled, expected in zip(ours, references, strict=True):
            torch.testing.assert_close(compiled, expected, atol=2e-5, rtol=1e-5)
        assert torch.equal(ours[0].argmax(1), references[0].argmax(1))
        args = (
            inputs[:, 1],
            torch.full((USERS,), policy_sessions.policy.config.highest),
            policy_sessions.pool,
            policy_sessions.sessions,
        )
        learned, reference = policy_sessions.numba_policy.reward(*args), policy_sessions.policy.reward(*args)
        assert torch.equal(learned[0], reference[0])
        for compiled, expected in zip(learned[1:], reference[1:], strict=True):
            torch.testing.assert_close(compiled, expected, atol=2e-5, rtol=1e-5)
        policy_sessions.step()


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_session_and_one_whose_guard_is_shut_decide_as_the_network_alone(name: str) -> None:
    policy_sessions = PolicySessions(name)
    for _ in range(5):
        inputs = policy_sessions.step()
    learned = policy_sessions.numba_policy.decide(inputs[1:], policy_sessions.pool, policy_sessions.sessions[1:])
    policy_sessions.pool.sites["memory"].session_scalars[policy_sessions.sessions[1:], GATE_CLOSED, 0] = 1.0
    for open_guard, shut_guard in zip(
        learned,
        policy_sessions.numba_policy.decide(inputs[1:], policy_sessions.pool, policy_sessions.sessions[1:]),
        strict=True,
    ):
        assert not torch.equal(open_guard, shut_guard)
    alone = policy_sessions.numba_policy.decide(inputs, policy_sessions.pool, torch.zeros(USERS, dtype=torch.long))
    for compiled, expected in zip(
        policy_sessions.numba_policy.decide(inputs, policy_sessions.pool, policy_sessions.sessions), alone, strict=True
    ):
        assert torch.equal(compiled, expected)


@pytest.mark.parametrize("name", NAMES)
def test_neighbours_change_no_bit_of_a_served_policy(name: str) -> None:
    policy_sessions = PolicySessions(name)
    for _ in range(5):
        inputs = policy_sessions.step()
    rewards = torch.full((USERS,), policy_sessions.policy.config.highest)
    together = policy_sessions.numba_policy.decide(inputs, policy_sessions.pool, policy_sessions.sessions)
    learned = policy_sessions.numba_policy.reward(inputs[:, 1], rewards, policy_sessions.pool, policy_sessions.sessions)
    for i in range(USERS):
        one = slice(i, i + 1)
        alone = policy_sessions.numba_policy.decide(inputs[one], policy_sessions.pool, policy_sessions.sessions[one])
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, together, strict=True))
        alone_learned = policy_sessions.numba_policy.reward(
            inputs[one, 1], rewards[one], policy_sessions.pool, policy_sessions.sessions[one]
        )
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone_learned, learned, strict=True))


def test_a_guard_step_equals_the_reference_bit_for_bit() -> None:
    policy_sessions = PolicySessions("bandit")
    ours, reference = (policy_sessions.pool.draft(int(policy_sessions.sessions[i])) for i in range(2))
    was_shut = set()
    for gain in [0.3, -20.0, -1.7, 5.1, 9.0, *[-1.3] * 20, 0.1, *[4.7] * 5]:
        opens = [
            one.guard_step(draft, gain)
            for one, draft in ((policy_sessions.numba_policy, ours), (policy_sessions.policy, reference))
        ]
        session_scalars = policy_sessions.pool.sites["memory"].session_scalars
        assert opens[0] == opens[1] and torch.equal(session_scalars[ours.index], session_scalars[reference.index])
        was_shut.add(bool(session_scalars[ours.index, GATE_CLOSED, 0]))
    assert was_shut == {True, False} and session_scalars[ours.index, BALANCE, 0] != 0


def test_a_backend_is_chosen_by_device_and_task() -> None:
    acting, labelling = (load_policy(FOLDER / f"{name}.safetensors") for name in ("bandit", "digits"))
    assert isinstance(choose_backend(acting, torch.device("cpu")), NumbaPolicy)
    assert choose_backend(acting, torch.device("cuda")) is acting
    assert choose_backend(labelling, torch.device("cpu")) is labelling
    with pytest.raises(PolicyError, match="task must be 'act'"):
        NumbaPolicy(labelling)
