"""The jobs of the learners of tables: a job takes the steps of its request one by one, so that long ones share the
engine's thread with other jobs.

The schema of a session, the versions that its examples came with, and the actions that wait for their rewards are rows
of the session's memory, beside those of the learner itself.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from model.memory import Draft, MemoryConfig, Pool, SiteConfig
from model.policies.journal import (
    ACTION,
    CLOSED,
    HEADER_SIZE,
    NUMBER,
    PROBABILITY,
    FloatArray,
    Journal,
    JournalError,
    journal_site,
)
from model.policies.journal import NAME as JOURNAL
from model.tabular.backend import LabelLearner, Learned, NumberLearner, RewardLearner, Vote
from model.tabular.config import TabularConfig
from model.tabular.decision_rules import Draw, draw, limit
from model.tabular.limits import MAX_ARMS, MAX_COLUMNS
from model.tabular.schema import ARM_FEATURES, NAME, Schema, SchemaError, names_site
from service.engine.policy_job import reward_error
from service.engine.resident import MemoryJob, ResidentSessions
from service.engine.types import (
    ActionReward,
    ArmChoice,
    Event,
    Example,
    JobRequest,
    PastActions,
    PastReward,
    Step,
    TabularAnswer,
    TabularRequest,
    TakenArm,
)
from service.errors import BadRequest, EngineError

AnyLearner = LabelLearner | NumberLearner | RewardLearner
STEPS_AT_ONCE = 8  # of one job, before other jobs get the engine's thread
ORIGINS = "origins"  # row 0: [examples learned, 0]; row 1 + i mod NUM_ORIGINS: [number i + 1 of an example, version]
NUM_ORIGINS = 1024  # as many as a learner remembers
JOURNAL_SLOTS = 256  # the last 255 actions can be rewarded
LOSS_UNIT = 2.0**-24
HELD_OUT = 0  # the first input of an action in the journal; the others are the numbers of its row
MISSING = np.finfo(np.float32).min  # rows are finite


def memory_config(config: TabularConfig) -> MemoryConfig:
    """Return the memory of a learner's sessions: the learner's own sites, and those of the jobs."""
    sites = [*config.memory.sites, names_site(), SiteConfig(ORIGINS, "journal", slots=1 + NUM_ORIGINS, k=2, width=2)]
    if config.task == "bandit":
        sites.append(journal_site(1 + MAX_COLUMNS, JOURNAL_SLOTS))
    return replace(config.memory, sites=tuple(sites))


class TabularJob(MemoryJob):
    """One request of one session."""

    def __init__(self, request: JobRequest, learner: AnyLearner) -> None:
        super().__init__(request)
        assert isinstance(request.policy_request, TabularRequest)
        self.tabular_request = request.policy_request
        self._learner = learner
        self._num_done = 0
        self._events: list[Event] = []

    @property
    def is_started(self) -> bool:
        """True if the job has its session's memory."""
        return self._pool is not None

    @property
    def is_done(self) -> bool:
        """True if all steps have been taken."""
        return self._num_done == len(self.tabular_request.steps)

    def start(self, resident: ResidentSessions) -> None:
        """Acquire the session's memory and read its schema and journal. Raises PoolFullError, EngineError."""
        super().start(resident)
        site = resident.pool.sites[NAME]
        rows = site.physical_cells[self._index]
        rows = rows[: np.count_nonzero(rows)]
        heads, texts = (field.numpy()[rows] for field in site.fields)
        try:
            self._schema = Schema.of_rows(heads, texts, may_grow=self._draft is not None)
        except (ValueError, IndexError) as error:
            raise EngineError(
                "The session's schema is damaged in the store; erase the session.", code="damaged"
            ) from error
        self._origins, self._touched = self._rows(ORIGINS), set[int]()
        self._journal = Journal(self._rows(JOURNAL)) if JOURNAL in resident.pool.sites else None
        if self._journal is not None and not self._journal.is_valid:
            raise EngineError("The session's journal is damaged in the store; erase the session.", code="damaged")

    def take_steps(self) -> None:
        """Take the next steps; after the last one, write what the session keeps besides the examples.

        Raises BadRequest, Conflict or PoolFullError.
        """
        request = self.tabular_request
        for number in range(self._num_done, min(self._num_done + STEPS_AT_ONCE, len(request.steps))):
            try:
                self._take_step(request.steps[number], request.fields[number])
            except SchemaError as error:
                raise BadRequest(str(error), param=error.field) from None
            self._num_done += 1
        if self.is_done and self._draft is not None:
            self._write(self._draft)

    def events(self) -> Iterator[Event]:
        """Yield the answers of the steps."""
        yield from self._events

    def _take_step(self, step: Step, field: str) -> None:
        if isinstance(step, Example):
            self._take_example(step, field)
        elif isinstance(step, ActionReward):
            self._take_reward(step, field)
        elif isinstance(step, ArmChoice):
            self._decide(step, field)
        elif isinstance(step, PastReward):
            taken = step.taken
            self._learn_reward(self._row_of(taken), self._arm_of(taken), taken.propensity, step.reward, step.version)
        else:
            self._keep_actions(step)

    def _take_example(self, example: Example, field: str) -> None:
        if self._learner.config.task == "labels":
            self._take_labelled(example, field, cast(LabelLearner, self._learner))
        else:
            self._take_number(example, field, cast(NumberLearner, self._learner))

    def _take_labelled(self, example: Example, field: str, learner: LabelLearner) -> None:
        x = self._encode_example(example, field)
        if example.predict:
            found = learner.predict(x, self.pool, self._index)
            probs = dict(zip(self._schema.labels, found.probs.tolist(), strict=False))
            label = max(probs, key=probs.__getitem__) if probs else None
            why = self._why(found.votes)
            self._answer({"label": label, "probabilities": probs, "unknown": float(found.unknown), "why": why})
        if example.label is not None:
            number = self._schema.label(example.label, f"{field}label")
            assert number is not None
            learned = learner.learn(x, number, self._require_draft())
            self._record(learned, learned.hit, example.version)

    def _take_number(self, example: Example, field: str, learner: NumberLearner) -> None:
        x = self._encode_example(example, field)
        if example.predict:
            found = learner.predict(x, self.pool, self._index)
            is_known = math.isfinite(found.lower) and math.isfinite(found.upper)
            interval = [found.lower, found.upper] if is_known else None
            self._answer(
                {"value": found.mean if is_known else None, "interval": interval, "why": self._why(found.votes)}
            )
        if example.target is not None:
            self._record(learner.learn(x, example.target, self._require_draft()), 0.0, example.version)

    def _encode_example(self, example: Example, field: str) -> FloatArray:
        """Return the row of an example, of at least one column."""
        row = self._schema.row(self._schema.encode(example.features, f"{field}features"))
        return row if len(row) else np.full(1, np.nan, np.float32)

    def _take_reward(self, step: ActionReward, field: str) -> None:
        journal = self._require_journal()
        try:
            row = journal.pending_row(step.action_id, self.tabular_request.highest_action)
        except JournalError as error:
            raise reward_error(error, step.action_id, field) from None
        inputs = _with_nan(journal.inputs(row)[: 1 + self._schema.width])
        arm, propensity = int(journal.rows[row, ACTION]), float(journal.rows[row, PROBABILITY])
        self._learn_reward(inputs[1:], arm, propensity, step.reward, None)
        journal.reward(row, step.reward)
        self.stats.decided.append((bool(inputs[HELD_OUT]), step.reward))

    def _learn_reward(self, row: FloatArray, arm: int, propensity: float, reward: float, version: int | None) -> None:
        """Learn the reward of an arm from the row of its context and features; version: that of `_record`."""
        context, features = self._split(row[None])
        own = None if features is None else features[0]
        learner = cast(RewardLearner, self._learner)
        self._record(learner.learn(context, arm, own, reward, propensity, self._require_draft()), reward, version)

    def _keep_actions(self, step: PastActions) -> None:
        journal = self._require_journal()
        journal.touched |= set(journal.rows[:, NUMBER].nonzero()[0].tolist())
        journal.rows[:] = 0
        for row, number, state, held_out, taken in step.actions:
            arm = self._arm_of(taken)
            inputs = _journal_inputs(self._row_of(taken), held_out)
            journal.rows[row] = np.concatenate([[number, arm, taken.propensity, state], inputs])
            journal.rows[0, :HEADER_SIZE] = number, arm, state == CLOSED, 0.0
            journal.touched |= {0, row}

    def _row_of(self, taken: TakenArm) -> FloatArray:
        """Return the encoded row of an arm that was taken before."""
        schema = self._schema
        return schema.row(schema.encode(taken.context, ""), schema.encode(taken.features, "", ARM_FEATURES))

    def _arm_of(self, taken: TakenArm) -> int:
        (arm,) = self._arm_numbers([taken.arm], "")
        return int(arm)

    def _decide(self, choice: ArmChoice, field: str) -> None:
        learner, schema = cast(RewardLearner, self._learner), self._schema
        numbers = schema.encode(choice.context, f"{field}context")
        own = [
            schema.encode(features, f"{field}actions.{i}.features", ARM_FEATURES)
            for i, features in enumerate(choice.features or [{}] * len(choice.arms))
        ]
        arms = self._arm_numbers(choice.arms, field)
        rows = np.stack([schema.row(numbers, features) for features in own])
        context, features = self._split(rows)
        found = learner.decide(context, arms, features, self.pool, self._index)

        allowed = np.array([choice.allowed is None or arm in choice.allowed for arm in choice.arms])
        probs = limit(sharpen(found.probs, choice.temperature), allowed, self.tabular_request.rules)
        if choice.forced is None:
            seed = None if choice.seed is None else choice.seed % 2**64  # NumPy takes no negative number
            drawn = draw(probs, allowed, self.tabular_request.rules, np.random.default_rng(seed))
        else:
            drawn = Draw(choice.arms.index(choice.forced), choice.propensity, False)
        number = 0
        if self._draft is not None:
            inputs = _journal_inputs(rows[drawn.arm], drawn.held_out)
            journal, highest = self._require_journal(), max(self.tabular_request.highest_action, self.stats.action)
            number = journal.record_action(int(arms[drawn.arm]), drawn.propensity, inputs, highest)
            self.stats.action = number
        answer = {
            "action": choice.arms[drawn.arm],
            "propensity": drawn.propensity,
            "probabilities": dict(zip(choice.arms, probs.tolist(), strict=True)),
            "expected": dict(zip(choice.arms, found.expected.tolist(), strict=True)),
            "holdout": drawn.held_out,
            "why": self._why(found.votes),
        }
        self._answer(answer, number)

    def _arm_numbers(self, names: Sequence[str], field: str) -> NDArray[np.int64]:
        """Return the numbers of arms; arms that the session does not know and may not learn have the next free ones."""
        numbers: list[int] = []
        for i, name in enumerate(names):
            number = self._schema.arm(name, f"{field}actions.{i}")
            numbers.append(min(len(self._schema.arms) + i, MAX_ARMS - 1) if number is None else number)
        return np.array(numbers, np.int64)

    def _split(self, rows: FloatArray) -> tuple[FloatArray, FloatArray | None]:
        """Return the context and the features of arms from their rows [A, C]; None where no arm ever had features."""
        groups = np.array(self._schema.groups, np.int64)
        of_arms = groups == ARM_FEATURES
        return rows[0][~of_arms], rows[:, of_arms] if of_arms.any() else None

    def _record(self, learned: Learned, reward: float, version: int | None) -> None:
        """Count a learned example, and note its version; None: that of the turn."""
        count = int(self._origins[0, 0]) + 1
        row = 1 + (count - 1) % NUM_ORIGINS
        self._origins[0, 0], self._origins[row] = count, (count, version or self.request.version)
        self._touched |= {0, row}
        stats = self.stats
        stats.tokens_learned += 1
        stats.proof_tokens += 1
        stats.segments_learned = 1
        stats.rewards += reward
        # Multiples of one unit have the same sum in any order: unlearning adds the losses of a session up anew.
        loss, frozen_loss = (
            float(np.round(each / LOSS_UNIT)) * LOSS_UNIT for each in (learned.loss, learned.frozen_loss)
        )
        stats.loss_sum += loss
        stats.proof_loss_sum += loss
        stats.proof_frozen_loss_sum += frozen_loss

    def _why(self, votes: Sequence[Vote]) -> list[dict[str, Any]]:
        """Return the votes by the versions that learned the examples; null for one that the session has lost."""
        found = []
        for vote in votes:
            number, version = self._origins[1 + (vote.ordinal - 1) % NUM_ORIGINS].tolist()
            known = int(version) if int(number) == vote.ordinal else None
            found.append({"version": known, "example": vote.ordinal, "weight": vote.weight})
        return found

    def _answer(self, answer: dict[str, Any], action: int = 0) -> None:
        self._events.append(TabularAnswer(answer, action))

    def _write(self, draft: Draft) -> None:
        """Write the rows of the schema, of the origins and of the journal that are new. Raises PoolFullError."""
        slots, heads, texts = self._schema.new_rows()
        if len(slots):
            draft.put(NAME, torch.from_numpy(slots), [torch.from_numpy(heads), torch.from_numpy(texts)])
        tables = [(ORIGINS, self._origins, self._touched)]
        if self._journal is not None:
            tables.append((JOURNAL, self._journal.rows, self._journal.touched))
        for name, rows, touched in tables:
            if touched:
                changed = sorted(touched)
                draft.put(name, torch.tensor(changed), [torch.from_numpy(rows[changed])])

    @property
    def pool(self) -> Pool:
        """The pool that has the session."""
        assert self._pool is not None
        return self._pool

    def _rows(self, name: str) -> FloatArray:
        """Return a copy of all rows of a site of the session."""
        site = self.pool.sites[name]
        rows: FloatArray = site.fields[0].numpy()[site.physical_cells[self._index]]
        return rows

    def _require_draft(self) -> Draft:
        assert self._draft is not None
        return self._draft

    def _require_journal(self) -> Journal:
        assert self._journal is not None
        return self._journal


class TabularWorker:
    """A learner of tables with its sessions and its waiting jobs. The rows are on the host, whatever the device."""

    def __init__(self, learner: AnyLearner, resident: ResidentSessions) -> None:
        self.learner = learner
        self.resident = resident
        self.waiting: deque[TabularJob] = deque()

    def prepare(self) -> None:
        """Prepare the learner, before the first job."""
        self.learner.prepare(self.resident.pool)

    def remove(self, job: TabularJob) -> None:
        """Remove a job that waits, if the job does."""
        if job in self.waiting:
            self.waiting.remove(job)


def sharpen(probs: FloatArray, temperature: float | None) -> NDArray[np.float64]:
    """Return probabilities at a temperature: 0 = all on the likeliest, None or 1 = as they are."""
    given: NDArray[np.float64] = probs.astype(np.float64)
    if temperature == 0:
        given = np.where(np.arange(len(given)) == given.argmax(), 1.0, 0.0)
    elif temperature is not None:
        given = np.power(given / given.max(), 1 / temperature)
    sharpened: NDArray[np.float64] = given / given.sum()
    return sharpened


def _journal_inputs(row: FloatArray, held_out: bool) -> FloatArray:
    inputs = np.full(1 + MAX_COLUMNS, MISSING, np.float32)
    inputs[HELD_OUT] = held_out
    inputs[1 : 1 + len(row)] = np.where(np.isnan(row), MISSING, row)
    return inputs


def _with_nan(rows: FloatArray) -> FloatArray:
    return np.where(rows == MISSING, np.float32(np.nan), rows)
