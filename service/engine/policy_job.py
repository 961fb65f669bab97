"""The jobs of policies on the device: one step serves all waiting sessions; each session learns first, then decides."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from model.memory import Draft
from model.policies.backend import PolicyBackend
from model.policies.journal import NAME, FloatArray, Journal, JournalError
from model.policies.network import Policy
from service.engine.resident import MemoryJob, ResidentSessions
from service.engine.types import Event, JobRequest, PolicyDecision, PolicyRequest
from service.errors import BadRequest, Conflict, EngineError


class PolicyJob(MemoryJob):
    """One request of one session. Methods raise what the model raises.

    Attributes:
        row: the journal's row of the action that the request rewards; None = there is no reward.
    """

    def __init__(self, request: JobRequest, policy: PolicyBackend) -> None:
        super().__init__(request)
        assert isinstance(request.policy_request, PolicyRequest)
        self.policy_request = request.policy_request
        self.row: int | None = None
        self._policy = policy
        self._journal: Journal | None = None
        self._decision: PolicyDecision | None = None

    @property
    def journal(self) -> Journal:
        """The session's journal of actions; only for a policy that acts, once the job has started."""
        assert self._journal is not None
        return self._journal

    def start(self, resident: ResidentSessions) -> None:
        """Acquire the session's memory, and find the action that the request rewards.

        Raises PoolFullError; EngineError for a damaged journal; BadRequest or Conflict for a reward of no such action.
        """
        super().start(resident)
        if self._policy.config.task != "act":
            return
        site = resident.pool.sites[NAME]
        self._journal = Journal(site.fields[0][site.tables[self._index]].cpu().numpy())
        if not self._journal.is_valid or self._journal.last[0] >= self._policy.config.actions:
            raise EngineError("The session's journal is damaged in the store; erase the session.", code="damaged")
        if self.policy_request.reward is not None:
            try:
                self.row = self._journal.pending_row(self.policy_request.action_id, self.policy_request.highest_action)
            except JournalError as error:
                raise reward_error(error, self.policy_request.action_id) from None

    @property
    def reward(self) -> float:
        """The reward of the request, where there is one."""
        assert self.policy_request.reward is not None
        return self.policy_request.reward

    def apply_reward(self, slots: Tensor, rows: Tensor, loss: float, frozen: float) -> None:
        """Write a reward's update: rows [k, d_v] into the memory's slots [k], the guard and the journal.

        `loss` and `frozen` are the losses with and without memory, in nats. Raises PoolFullError.
        """
        assert self._draft is not None and self.row is not None
        self._draft.put(self._policy.site.config.name, slots, [rows])
        self.journal.reward(self.row, self.reward)
        was_open = self._policy.guard_step(self._draft, frozen - loss)
        self.record_loss(self.reward, loss if was_open else frozen, frozen)

    def apply_label(self, choice: int, loss: float, frozen: float, learn: Callable[[Draft], None]) -> None:
        """Learn a label; `choice` is the label that the policy would have chosen. Raises PoolFullError."""
        assert self._draft is not None
        learn(self._draft)
        self.record_loss(float(choice == self.policy_request.label), loss, frozen)

    def record_loss(self, reward: float, loss: float, frozen: float) -> None:
        """Set the job's counts for one reward or label; losses in nats, with and without memory."""
        stats = self.stats
        stats.tokens_learned, stats.segments_learned, stats.proof_tokens = 1, 1, 1
        stats.rewards, stats.loss_sum, stats.proof_loss_sum, stats.proof_frozen_loss_sum = reward, loss, loss, frozen

    def decide(self, logits: Tensor, expected: list[float] | None, inputs: FloatArray | None) -> None:
        """Choose by logits [A] at the request's temperature.

        For an action, `expected` [A] are the expected rewards, and the journal keeps the action's `inputs` ([A, F]).
        """
        request = self.policy_request
        temperature = request.temperature
        if temperature is None:
            temperature = 0.0 if self._policy.config.greedy else 1.0
        if temperature == 0.0:
            choice = int(logits.argmax())
            probs = [0.0] * len(logits)
            probs[choice] = 1.0
        else:
            distribution = torch.softmax(logits.double() / temperature, dim=0)
            generator = torch.Generator()
            if request.seed is None:
                generator.seed()
            else:
                generator.manual_seed(request.seed)
            choice = int(torch.multinomial(distribution, 1, generator=generator))
            probs = distribution.tolist()
        number = None
        if inputs is not None and self._draft is not None:
            number = self.journal.record_action(choice, probs[choice], inputs[choice], request.highest_action)
            self.stats.action = number
        self._decision = PolicyDecision(choice, probs, expected, number)

    def events(self) -> Iterator[Event]:
        """Write the journal's new rows, then yield the decision. Raises PoolFullError."""
        if self._draft is not None and self._journal is not None and self._journal.touched:
            device = self._draft.pool.device
            touched = sorted(self._journal.touched)
            rows = torch.from_numpy(self._journal.rows[touched])
            self._draft.put(NAME, torch.tensor(touched, device=device), [rows.to(device)])
        if self._decision is not None:
            yield self._decision


JobCall = tuple[PolicyJob, Callable[[], None]]  # a job, and the part of a batched step that concerns this job only


class PolicyWorker:
    """A served policy with its sessions on the device and its waiting jobs."""

    def __init__(self, policy: Policy, backend: PolicyBackend, resident: ResidentSessions) -> None:
        self.policy = policy
        self.resident = resident
        self.backend = backend
        self.waiting: deque[PolicyJob] = deque()

    def prepare(self) -> None:
        """Prepare the policy's compiled steps, before the first job."""
        self.backend.prepare(self.resident.pool)

    def pop_batch(self, limit: int) -> list[PolicyJob]:
        """Remove and return the jobs of the next step, first come, first served."""
        return [self.waiting.popleft() for _ in range(min(limit, len(self.waiting)))]

    def remove(self, job: PolicyJob) -> None:
        """Remove a job that waits, if the job does."""
        if job in self.waiting:
            self.waiting.remove(job)

    def learn(self, jobs: Sequence[PolicyJob]) -> Iterator[JobCall]:
        """Compute the updates of rewards or labels together; yield each job with the call that applies its update."""
        if self.policy.config.task == "act":
            return self._reward([job for job in jobs if job.row is not None])
        return self._label([job for job in jobs if job.policy_request.label is not None])

    def decide(self, jobs: Sequence[PolicyJob]) -> Iterator[JobCall]:
        """Compute the logits of all jobs that want a choice; yield each job with the call that chooses."""
        jobs = [job for job in jobs if job.policy_request.decide]
        if not jobs:
            return
        observation, session = self._observations(jobs), self._sessions(jobs)
        if self.policy.config.task == "label":
            label_logits = self.policy.label(observation, self.resident.pool, session).cpu()
            for job, logits in zip(jobs, label_logits, strict=True):
                yield job, partial(job.decide, logits, None, None)
            return
        last_actions, last_rewards = (
            torch.tensor(values, device=self.resident.pool.device)
            for values in zip(*(job.journal.last for job in jobs), strict=True)
        )
        inputs = self.backend.inputs(observation, last_actions, last_rewards)
        action_logits, expected = self.backend.decide(inputs, self.resident.pool, session)
        config = self.policy.config
        expected_rewards = (config.lowest + (config.highest - config.lowest) * expected).tolist()
        for job, *decision_args in zip(jobs, action_logits.cpu(), expected_rewards, inputs.cpu().numpy(), strict=True):
            yield job, partial(job.decide, *decision_args)

    def _reward(self, jobs: Sequence[PolicyJob]) -> Iterator[JobCall]:
        if not jobs:
            return
        device = self.resident.pool.device
        inputs = torch.from_numpy(np.stack([job.journal.inputs(job.row or 0) for job in jobs])).to(device)
        rewards = torch.tensor([job.reward for job in jobs], device=device)
        slots, rows, loss, frozen = self.backend.reward(inputs, rewards, self.resident.pool, self._sessions(jobs))
        for job, *values in zip(jobs, slots, rows, loss.tolist(), frozen.tolist(), strict=True):
            yield job, partial(job.apply_reward, *values)

    def _label(self, jobs: Sequence[PolicyJob]) -> Iterator[JobCall]:
        if not jobs:
            return
        labels = torch.tensor([job.policy_request.label for job in jobs], device=self.resident.pool.device)
        updates = self.policy.label_updates(self._observations(jobs), labels, self.resident.pool, self._sessions(jobs))
        for job, update in zip(jobs, updates, strict=True):
            yield job, partial(job.apply_label, *update)

    def _observations(self, jobs: Sequence[PolicyJob]) -> Tensor:
        return torch.tensor([job.policy_request.observation for job in jobs], device=self.resident.pool.device)

    def _sessions(self, jobs: Sequence[PolicyJob]) -> Tensor:
        return torch.tensor([job.index for job in jobs], device=self.resident.pool.device)


def reward_error(error: JournalError, action_id: int | None, field: str = "") -> BadRequest | Conflict:
    """Return the client's error for an action that cannot be rewarded. field: the request's part that has it."""
    param = f"{field}reward" if action_id is None else f"{field}action_id"
    named = f"'{param}'" if action_id is None else f"'{param}' {action_id}"
    if error.was_taken:
        return Conflict(f"{named} can't be learned: {error}.", param=f"{field}action_id", code="action_closed")
    return BadRequest(f"{named} is of an action never taken: {error}.", param=param, code="unknown_action")
