"""What policies do on the device: one step for all sessions that wait, in which each learns first and then decides."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from model.memory import Draft
from model.policies.backend import PolicyBackend
from model.policies.journal import NAME, FloatArray, Journal, JournalError
from model.policies.network import Policy
from service.engine.memory_job import MemoryJob
from service.engine.resident import ResidentSessions
from service.engine.types import Event, Job, PolicyDecision, PolicyRequest
from service.errors import BadRequest, Conflict, EngineError

IsolateFailure = Callable[["PolicyJob", Callable[[], None]], None]


class PolicyJob(MemoryJob):
    """One request of one session. Raises what the model raises, and BadRequest or Conflict for a reward that cannot be
    placed."""

    def __init__(self, job: Job, policy: PolicyBackend) -> None:
        super().__init__(job)
        assert job.policy_request is not None
        self.policy_request: PolicyRequest = job.policy_request
        self.row: int | None = None  # of the journal: the action that is rewarded
        self._policy = policy
        self._journal: Journal | None = None
        self._decided: PolicyDecision | None = None

    @property
    def journal(self) -> Journal:
        """Of a policy that acts, once the job has started."""
        assert self._journal is not None
        return self._journal

    def start(self, resident: ResidentSessions) -> None:
        """Takes its session's memory, and finds the action that is rewarded."""
        super().start(resident)
        if self._policy.config.task != "act":
            return
        site = resident.pool.sites[NAME]
        self._journal = Journal(site.fields[0][site.tables[self._index]].cpu().numpy())
        if not self._journal.is_valid or self._journal.last[0] >= self._policy.config.actions:
            raise EngineError("The session's journal is damaged in the store; erase the session.", code="damaged")
        if self.policy_request.reward is not None:
            try:
                self.row = self._journal.pending_row(self.policy_request.action_id)
            except JournalError as error:
                raise _refusal(error, self.policy_request.action_id) from None

    @property
    def reward(self) -> float:
        assert self.policy_request.reward is not None
        return self.policy_request.reward

    def apply_reward(self, slots: Tensor, rows: Tensor, loss: float, frozen: float) -> None:
        """Writes what a reward changes: rows [k, d_v] of the memory's slots [k], the guard and the journal. Raises
        PoolFullError."""
        assert self._draft is not None and self.row is not None
        self._draft.put(self._policy.site.config.name, slots, [rows])
        self.journal.reward(self.row, self.reward)
        was_open = self._policy.guard_step(self._draft, frozen - loss)
        self.count(self.reward, loss if was_open else frozen, frozen)

    def label(self, choice: int, loss: float, frozen: float, learn: Callable[[Draft], None]) -> None:
        """Learns a label; choice: what the policy would have said. Raises PoolFullError."""
        assert self._draft is not None
        learn(self._draft)
        self.count(float(choice == self.policy_request.label), loss, frozen)

    def count(self, reward: float, loss: float, frozen: float) -> None:
        stats = self.stats
        stats.tokens_learned, stats.segments_learned, stats.proof_tokens = 1, 1, 1
        stats.rewards, stats.loss_sum, stats.proof_loss_sum, stats.proof_frozen_loss_sum = reward, loss, loss, frozen

    def decide(self, logits: Tensor, expected: list[float] | None, inputs: FloatArray | None) -> None:
        """Chooses by logits [A] at the temperature; of an action, what is expected of each [A] is told, and what it
        asked with (inputs [A, F]) is remembered."""
        config, policy_request = self._policy.config, self.policy_request
        temperature = (
            (0.0 if config.greedy else 1.0) if policy_request.temperature is None else policy_request.temperature
        )
        if temperature == 0.0:
            choice = int(logits.argmax())
            probs = [0.0] * len(logits)
            probs[choice] = 1.0
        else:
            distribution = torch.softmax(logits.double() / temperature, dim=0)
            generator = torch.Generator()
            if policy_request.seed is None:
                generator.seed()
            else:
                generator.manual_seed(policy_request.seed)
            choice = int(torch.multinomial(distribution, 1, generator=generator))
            probs = distribution.tolist()
        number = None
        if inputs is not None and self._draft is not None:
            number = self.journal.record_action(choice, probs[choice], inputs[choice])
        self._decided = PolicyDecision(choice, probs, expected, number)

    def events(self) -> Iterator[Event]:
        """What was decided, once all of it is written. Raises PoolFullError."""
        if self._draft is not None and self._journal is not None and self._journal.touched:
            device = self._draft.pool.device
            touched = sorted(self._journal.touched)
            rows = torch.from_numpy(self._journal.rows[touched])
            self._draft.put(NAME, torch.tensor(touched, device=device), [rows.to(device)])
        if self._decided is not None:
            yield self._decided


class PolicyWorker:
    """A policy that is served, the sessions of it that are hot, and what waits for its next step."""

    def __init__(self, policy: Policy, backend: PolicyBackend, resident: ResidentSessions) -> None:
        self.policy = policy
        self.resident = resident
        self.backend = backend
        self.waiting: deque[PolicyJob] = deque()

    def prepare(self) -> None:
        """Before sessions are served."""
        self.backend.prepare(self.resident.pool)

    def take(self, limit: int) -> list[PolicyJob]:
        """The runs of the next step, first come, first served."""
        return [self.waiting.popleft() for _ in range(min(limit, len(self.waiting)))]

    def remove(self, run: PolicyJob) -> None:
        if run in self.waiting:
            self.waiting.remove(run)

    def learn(self, runs: Sequence[PolicyJob], guard: IsolateFailure) -> None:
        """Learns the rewards or labels that came with some of the runs."""
        if self.policy.config.task == "act":
            self._reward([run for run in runs if run.row is not None], guard)
        else:
            self._label([run for run in runs if run.policy_request.label is not None], guard)

    def decide(self, runs: Sequence[PolicyJob], guard: IsolateFailure) -> None:
        """Chooses an action or a label for those that want one."""
        runs = [run for run in runs if run.policy_request.decide]
        if not runs:
            return
        observation, session = self._observations(runs), self._sessions(runs)
        if self.policy.config.task == "label":
            for run, logits in zip(
                runs, self.policy.label(observation, self.resident.pool, session).cpu(), strict=True
            ):
                guard(run, lambda run=run, logits=logits: run.decide(logits, None, None))  # type: ignore[misc]
            return
        values = zip(*(run.journal.last for run in runs), strict=True)
        last, reward = (torch.tensor(part, device=self.resident.pool.device) for part in values)
        inputs = self.backend.inputs(observation, last, reward)
        logits, expected = self.backend.decide(inputs, self.resident.pool, session)
        config = self.policy.config
        expected_rewards = (config.lowest + (config.highest - config.lowest) * expected).tolist()
        for run, *decision_args in zip(runs, logits.cpu(), expected_rewards, inputs.cpu().numpy(), strict=True):
            guard(run, lambda run=run, decision_args=decision_args: run.decide(*decision_args))  # type: ignore[misc]

    def _reward(self, runs: Sequence[PolicyJob], guard: IsolateFailure) -> None:
        if not runs:
            return
        device = self.resident.pool.device
        inputs = torch.from_numpy(np.stack([run.journal.inputs(run.row or 0) for run in runs])).to(device)
        rewards = torch.tensor([run.reward for run in runs], device=device)
        slots, rows, loss, frozen = self.backend.reward(inputs, rewards, self.resident.pool, self._sessions(runs))
        for run, *values in zip(runs, slots, rows, loss.tolist(), frozen.tolist(), strict=True):
            guard(run, lambda run=run, values=values: run.apply_reward(*values))  # type: ignore[misc]

    def _label(self, runs: Sequence[PolicyJob], guard: IsolateFailure) -> None:
        if not runs:
            return
        labels = torch.tensor([run.policy_request.label for run in runs], device=self.resident.pool.device)
        updates = self.policy.label_updates(self._observations(runs), labels, self.resident.pool, self._sessions(runs))
        for run, update in zip(runs, updates, strict=True):
            guard(run, lambda run=run, update=update: run.label(*update))  # type: ignore[misc]

    def _observations(self, runs: Sequence[PolicyJob]) -> Tensor:
        return torch.tensor([run.policy_request.observation for run in runs], device=self.resident.pool.device)

    def _sessions(self, runs: Sequence[PolicyJob]) -> Tensor:
        return torch.tensor([run.index for run in runs], device=self.resident.pool.device)


def _refusal(error: JournalError, action_id: int | None) -> BadRequest | Conflict:
    named = "'reward'" if action_id is None else f"'action_id' {action_id}"
    if error.was_taken:
        return Conflict(f"{named} can't be learned: {error}.", param="action_id", code="action_closed")
    param = "reward" if action_id is None else "action_id"
    return BadRequest(f"{named} is of an action never taken: {error}.", param=param, code="unknown_action")
