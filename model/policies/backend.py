"""The contract of the steps that serve a policy, and the choice of their implementation.

A new implementation of the steps needs a class that satisfies `PolicyBackend` and a line in `choose_backend`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from model.memory import DeltaSite, Draft, Pool
from model.policies.config import PolicyConfig
from model.policies.network import Policy, RewardUpdate
from model.policies.numba_step import NumbaPolicy


class PolicyBackend(Protocol):
    """The steps of a policy that acts, computed for n sessions at once.

    Implementations: `Policy` (torch, any device; the reference) and `NumbaPolicy` (compiled, CPU). Two implementations
    agree up to the rounding of fp32; `inputs` and `guard_step` agree bit for bit. In every implementation

    - a session's results do not depend on the other sessions of the batch, not in the last bit;
    - an empty session, and one whose guard is closed, decides as the network without memory;
    - only `guard_step` changes state; `reward` returns writes, which the caller puts into a draft.

    A policy that labels has one implementation, the network: `Policy.label` and `Policy.label_updates`. Its sessions
    never call the steps below, except `prepare`.

    Shapes: n sessions, A actions, F inputs of an action, k slots of an address, d_v width of a row. All tensors are on
    the pool's device; `session` [n] long holds the pool's index of each session.
    """

    @property
    def config(self) -> PolicyConfig:
        """Return the configuration of the policy."""

    @property
    def site(self) -> DeltaSite:
        """Return the memory site that rewards are written to."""

    def prepare(self, pool: Pool) -> None:
        """Compile and warm up whatever the steps need, once, before sessions are served. Changes no state."""

    def inputs(self, observation: Tensor, last: Tensor, reward: Tensor) -> Tensor:
        """Return the inputs [n, A, F] of all actions.

        observation [n, context + A·features]; last [n] long, the last action (−1: none); reward [n], the reward of the
        last action (NaN: not known).
        """

    def decide(self, inputs: Tensor, pool: Pool, session: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [n, A] of the actions and their expected rewards [n, A], scaled to 0…1."""

    def reward(self, inputs: Tensor, reward: Tensor, pool: Pool, session: Tensor) -> RewardUpdate:
        """Return the writes of rewards [n], in the policy's range, of actions that were taken with inputs [n, F].

        Sessions must be distinct: the writes of one session do not see each other.
        """

    def guard_step(self, draft: Draft, gain: float) -> bool:
        """Count the gain of one reward in the guard of the draft's session; return whether the guard was open before.

        gain (nats): frozen_loss − loss of the reward. The guard closes when memory has lost more than GUARD_LIMIT_NATS
        of late, and opens when the balance is positive again. Changes the draft's session scalars in place.
        """


def choose_backend(policy: Policy, device: torch.device) -> PolicyBackend:
    """Return the fastest implementation of a policy's steps on a device."""
    return NumbaPolicy(policy) if device.type == "cpu" and policy.config.task == "act" else policy
