"""What policies do on the device: one step for all sessions that wait, in which each learns first and then decides."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from model.memory import Draft
from model.policies.journal import NAME, Journal, JournalError, Numbers
from model.policies.network import Policy
from model.policies.numba_step import SwiftPolicy, serving
from service.engine.memory_job import Hold
from service.engine.resident import HotSessions
from service.engine.types import Decided, Deed, Event, Job
from service.errors import BadRequest, Conflict, EngineError

Guard = Callable[["DeedRun", Callable[[], None]], None]


class DeedRun(Hold):
    """One request of one session. Raises what the model raises, and BadRequest or Conflict for a reward that cannot be
    placed."""

    def __init__(self, job: Job, policy: Policy | SwiftPolicy) -> None:
        super().__init__(job)
        assert job.deed is not None
        self.deed: Deed = job.deed
        self.row: int | None = None  # of the journal: the action that is rewarded
        self._policy = policy
        self._journal: Journal | None = None
        self._decided: Decided | None = None

    @property
    def journal(self) -> Journal:
        """Of a policy that acts, once the job has started."""
        assert self._journal is not None
        return self._journal

    def start(self, hot: HotSessions) -> None:
        """Takes its session's memory, and finds the action that is rewarded."""
        super().start(hot)
        if self._policy.config.task != "act":
            return
        site = hot.pool.sites[NAME]
        self._journal = Journal(site.fields[0][site.tables[self._index]].cpu().numpy())
        if not self._journal.sound or self._journal.last[0] >= self._policy.config.actions:
            raise EngineError("The session's journal is damaged in the store; erase the session.", code="damaged")
        if self.deed.reward is not None:
            try:
                self.row = self._journal.open(self.deed.action_id)
            except JournalError as error:
                raise _refusal(error, self.deed.action_id) from None

    @property
    def reward(self) -> float:
        assert self.deed.reward is not None
        return self.deed.reward

    def rewarded(self, slots: Tensor, rows: Tensor, loss: float, frozen: float) -> None:
        """Writes what a reward changes: rows [k, d_v] of the memory's slots [k], the guard and the journal. Raises
        PoolFullError."""
        assert self._draft is not None and self.row is not None
        self._draft.put(self._policy.site.config.name, slots, [rows])
        self.journal.reward(self.row, self.reward)
        was_open = self._policy.guard(self._draft, frozen - loss)
        self.count(self.reward, loss if was_open else frozen, frozen)

    def label(self, choice: int, loss: float, frozen: float, learn: Callable[[Draft], None]) -> None:
        """Learns a label; choice: what the policy would have said. Raises PoolFullError."""
        assert self._draft is not None
        learn(self._draft)
        self.count(float(choice == self.deed.label), loss, frozen)

    def count(self, reward: float, loss: float, frozen: float) -> None:
        stats = self.stats
        stats.tokens_learned, stats.segments_learned, stats.proof_tokens = 1, 1, 1
        stats.rewards, stats.loss_sum, stats.proof_loss_sum, stats.proof_frozen_loss_sum = reward, loss, loss, frozen

    def decide(self, logits: Tensor, expected: list[float] | None, inputs: Numbers | None) -> None:
        """Chooses by logits [A] at the temperature; of an action, what is expected of each [A] is told, and what it
        asked with (inputs [A, F]) is remembered."""
        config, deed = self._policy.config, self.deed
        temperature = (0.0 if config.greedy else 1.0) if deed.temperature is None else deed.temperature
        if temperature == 0.0:
            choice = int(logits.argmax())
            chances = [0.0] * len(logits)
            chances[choice] = 1.0
        else:
            drawn_from = torch.softmax(logits.double() / temperature, dim=0)
            generator = torch.Generator()
            if deed.seed is None:
                generator.seed()
            else:
                generator.manual_seed(deed.seed)
            choice = int(torch.multinomial(drawn_from, 1, generator=generator))
            chances = drawn_from.tolist()
        number = None
        if inputs is not None and self._draft is not None:
            number = self.journal.take(choice, chances[choice], inputs[choice])
        self._decided = Decided(choice, chances, expected, number)

    def events(self) -> Iterator[Event]:
        """What was decided, once all of it is written. Raises PoolFullError."""
        if self._draft is not None and self._journal is not None and self._journal.touched:
            device = self._draft.pool.device
            touched = sorted(self._journal.touched)
            rows = torch.from_numpy(self._journal.rows[touched])
            self._draft.put(NAME, torch.tensor(touched, device=device), [rows.to(device)])
        if self._decided is not None:
            yield self._decided


class Desk:
    """A policy that is served, the sessions of it that are hot, and what waits for its next step."""

    def __init__(self, policy: Policy, hot: HotSessions) -> None:
        self.policy = policy
        self.hot = hot
        self.acting = serving(policy, hot.pool.device)
        self.waiting: deque[DeedRun] = deque()

    def prepare(self) -> None:
        """Before sessions are served."""
        if isinstance(self.acting, SwiftPolicy):
            self.acting.prepare(self.hot.pool)

    def take(self, limit: int) -> list[DeedRun]:
        """The runs of the next step, first come, first served."""
        return [self.waiting.popleft() for _ in range(min(limit, len(self.waiting)))]

    def remove(self, run: DeedRun) -> None:
        if run in self.waiting:
            self.waiting.remove(run)

    def learn(self, runs: Sequence[DeedRun], guard: Guard) -> None:
        """Learns the rewards or labels that came with some of the runs."""
        if self.policy.config.task == "act":
            self._reward([run for run in runs if run.row is not None], guard)
        else:
            self._label([run for run in runs if run.deed.label is not None], guard)

    def decide(self, runs: Sequence[DeedRun], guard: Guard) -> None:
        """Chooses an action or a label for those that want one."""
        runs = [run for run in runs if run.deed.decide]
        if not runs:
            return
        observation, session = self._observations(runs), self._sessions(runs)
        if self.policy.config.task == "label":
            for run, logits in zip(runs, self.policy.label(observation, self.hot.pool, session).cpu(), strict=True):
                guard(run, lambda run=run, logits=logits: run.decide(logits, None, None))  # type: ignore[misc]
            return
        told = zip(*(run.journal.last for run in runs), strict=True)
        last, reward = (torch.tensor(part, device=self.hot.pool.device) for part in told)
        inputs = self.acting.inputs(observation, last, reward)
        logits, expected = self.acting.decide(inputs, self.hot.pool, session)
        config = self.policy.config
        brings = (config.lowest + (config.highest - config.lowest) * expected).tolist()
        for run, *mine in zip(runs, logits.cpu(), brings, inputs.cpu().numpy(), strict=True):
            guard(run, lambda run=run, mine=mine: run.decide(*mine))  # type: ignore[misc]

    def _reward(self, runs: Sequence[DeedRun], guard: Guard) -> None:
        if not runs:
            return
        device = self.hot.pool.device
        inputs = torch.from_numpy(np.stack([run.journal.inputs(run.row or 0) for run in runs])).to(device)
        rewards = torch.tensor([run.reward for run in runs], device=device)
        slots, rows, loss, frozen = self.acting.reward(inputs, rewards, self.hot.pool, self._sessions(runs))
        for run, *told in zip(runs, slots, rows, loss.tolist(), frozen.tolist(), strict=True):
            guard(run, lambda run=run, told=told: run.rewarded(*told))  # type: ignore[misc]

    def _label(self, runs: Sequence[DeedRun], guard: Guard) -> None:
        if not runs:
            return
        labels = torch.tensor([run.deed.label for run in runs], device=self.hot.pool.device)
        lessons = self.policy.label_lessons(self._observations(runs), labels, self.hot.pool, self._sessions(runs))
        for run, lesson in zip(runs, lessons, strict=True):
            guard(run, lambda run=run, lesson=lesson: run.label(*lesson))  # type: ignore[misc]

    def _observations(self, runs: Sequence[DeedRun]) -> Tensor:
        return torch.tensor([run.deed.observation for run in runs], device=self.hot.pool.device)

    def _sessions(self, runs: Sequence[DeedRun]) -> Tensor:
        return torch.tensor([run.index for run in runs], device=self.hot.pool.device)


def _refusal(error: JournalError, action_id: int | None) -> BadRequest | Conflict:
    named = "'reward'" if action_id is None else f"'action_id' {action_id}"
    if error.known:
        return Conflict(f"{named} can't be learned: {error}.", param="action_id", code="action_closed")
    param = "reward" if action_id is None else "action_id"
    return BadRequest(f"{named} is of an action never taken: {error}.", param=param, code="unknown_action")
