"""Run one turn: acquire → plan → quota → load → stream → commit → last event. Nothing else knows what a turn is.

A turn that ends early, for whatever reason, leaves its session at the version that the turn found.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from service.concurrency import run_off_loop
from service.engine import Event, JobFinished, JobRequest, JobStream, MemoryAccess, StateId
from service.engine.stored_rows import as_tensors, is_valid_site
from service.errors import VersionConflict
from service.metrics import Metrics
from service.store.base import MAX_LOG_ENTRIES, SessionStore
from service.store.errors import damaged_session
from service.turns.commit import Commit, TurnOutcome, TurnPlan, build_commit, outcome_of, record_commit, record_jobs
from service.turns.idempotency import RequestContext
from service.turns.loaded_model import LoadedModel
from service.turns.quotas import Quotas
from service.turns.session_gate import SessionGate, SessionHandle, SessionTarget, session_changed, version_conflict

Json = dict[str, Any]
E = TypeVar("E")
OUTPUT_COST = 8  # a generated token, with its alternatives, costs as much as so many tokens of a prompt
NO_STATE_ID: StateId = (-1.0, -1.0, -1)  # of rows that no stored version has


class Turn(ABC, Generic[E]):
    """The one object by which kinds of turns differ: what to run, what to yield to the client, what to remember.

    `run_turn` calls the methods in this order. `plan` resets the turn's state, because a turn may run twice.
    """

    target: SessionTarget | None = None  # the session to acquire; None = no session

    @abstractmethod
    def replayed(self, record: Json) -> Iterable[E]:
        """Return the events of an earlier answer from the record that `record` made of it."""

    @abstractmethod
    async def plan(self, handle: SessionHandle, model: LoadedModel) -> TurnPlan:
        """Return what to run. Raises the error of a request that cannot be honoured."""

    def outputs(self, segment: int, event: Event) -> Iterable[E]:
        """Return what to yield to the client for an event of segment number `segment`."""
        return ()

    def remaining_outputs(self) -> Iterable[E]:
        """Return what to yield to the client after the engine's last event, before the last event of the turn."""
        return ()

    def reply_digests(self) -> Sequence[str]:
        """Return the digests under which the reply comes back as a chat's history."""
        return ()

    @abstractmethod
    def last_event(self, outcome: TurnOutcome) -> E:
        """Return the last event of the turn, which the client gets after the commit."""

    @abstractmethod
    def record(self, last: E) -> Json:
        """Return the answer, up to and with its last event, as JSON for an idempotency record."""


@dataclass(frozen=True)
class TurnRestarted:
    """The turn runs once more: its earlier events are void. A stream never gets this event."""


@dataclass(frozen=True)
class TurnRunner:
    """Runs turns with the gate, the store, the quotas and the metrics that a turn needs.

    proof_rate: share of the learned segments that are scored without memory too.
    """

    gate: SessionGate
    store: SessionStore
    quotas: Quotas
    metrics: Metrics
    proof_rate: float

    async def run_turn(self, ctx: RequestContext, turn: Turn[E], model: LoadedModel) -> AsyncGenerator[E, None]:
        """Run one turn; yield its events, the last one after the commit.

        Closing the generator ends the jobs within one step of the engine and rolls the turn back. Raises
        VersionConflict if another replica changed the session meanwhile.
        """
        async with self.gate.acquire(ctx, turn.target) as handle:
            if handle.replay is not None:
                for event in turn.replayed(handle.replay):
                    yield event
                return
            plan = await turn.plan(handle, model)
            if plan.costs_quota:
                await self.quotas.check_learning(ctx.tenant)
            memory = await self._load_memory(ctx, plan, model)
            async with JobStream(model.engine) as stream:
                self._submit(plan, memory, stream)
                async with aclosing(stream.events()) as events:
                    async for segment, engine_event in events:
                        for output in turn.outputs(segment, engine_event):
                            yield output
                record_jobs(self.metrics, stream.finished)
                size = plan.num_tokens + sum(OUTPUT_COST * job.stats.completion_tokens for job in stream.finished)
                times = await self._times_of_recalled(ctx, plan, stream.finished)
                remaining, commit, last = await run_off_loop(
                    size, _conclude, ctx, turn, plan, stream.finished, model, times
                )
                await self._commit(handle, plan, commit, stream.finished, turn.record, last, size)
                stream.settle(None if commit is None else commit.meta.state_id)
            if commit is not None and not plan.runs_jobs:
                model.engine.drop((ctx.tenant.name, commit.meta.id))  # the device still holds the earlier content
            elif plan.meta is not None and handle.meta is None and not plan.writes:
                model.engine.drop((ctx.tenant.name, plan.meta.id))  # the turn read a session that does not exist
            remaining.reverse()  # each output is freed when it is sent: echoes of long prompts are large
            while remaining:
                yield remaining.pop()
            yield last

    async def stream(
        self, ctx: RequestContext, turn: Turn[E], model: LoadedModel, *, restartable: bool
    ) -> AsyncGenerator[E | TurnRestarted, None]:
        """Run a turn with a place in the bounded queue; run it once more if another replica changed the session.

        A turn that is not restartable runs once more only while its client has got nothing. Raises SessionBusy if the
        session changes again.
        """
        has_output = False
        async with self.gate.admit():
            for is_last_try in (False, True):
                try:
                    async with aclosing(self.run_turn(ctx, turn, model)) as events:
                        async for event in events:
                            has_output = True
                            yield event
                    return
                except VersionConflict as error:
                    if is_last_try or (has_output and not restartable):
                        raise session_changed() from error
                if has_output:
                    yield TurnRestarted()

    async def result(self, ctx: RequestContext, turn: Turn[E], model: LoadedModel) -> E:
        """Run a turn as `stream` does and return its last event."""
        events = self.stream(ctx, turn, model, restartable=True)
        async with aclosing(events):
            async for event in events:
                if not isinstance(event, TurnRestarted):
                    last = event
        return last

    async def _load_memory(self, ctx: RequestContext, plan: TurnPlan, model: LoadedModel) -> MemoryAccess | None:
        """Return how the engine gets the session's memory: from the device, or from the rows that come along."""
        if plan.meta is None or not plan.runs_jobs:
            return None
        meta, key, policy = plan.meta, (ctx.tenant.name, plan.meta.id), plan.policy
        if plan.state_delta is None and meta.version == 0:
            return MemoryAccess(key, meta.state_id, plan.writes, {}, policy)
        if plan.state_delta is None and model.engine.pin(key, meta.state_id, policy):
            return MemoryAccess(key, meta.state_id, plan.writes, policy=policy)
        with self.metrics.load_seconds.time():
            stored = await self.store.load(ctx.tenant.name, meta.id)
        if stored is None or stored.meta.state_id != meta.state_id:
            raise version_conflict(meta.id)
        sites, config, vocab_size = stored.sites, model.engine.memory_config(policy), model.row_vocab_size(policy)
        if not all(is_valid_site(name, batch, config, vocab_size) for name, batch in sites.items()):
            raise damaged_session(meta.id)
        if plan.state_delta is None:
            return MemoryAccess(key, meta.state_id, plan.writes, as_tensors(sites), policy)
        rows = as_tensors(plan.state_delta.apply_to_rows(sites))
        return MemoryAccess(key, NO_STATE_ID, plan.writes, rows, policy)

    async def _times_of_recalled(
        self, ctx: RequestContext, plan: TurnPlan, jobs: Sequence[JobFinished]
    ) -> dict[int, float]:
        """Return when the versions were made whose episodes the jobs have read, as far as the session's log has them.

        The log is asked, since a time in an episode's row would make what is learned depend on the clock.
        """
        versions = {episode.version for job in jobs for episode in job.recalled}
        if plan.meta is None or not versions:
            return {}
        entries = min(MAX_LOG_ENTRIES, plan.meta.version - min(versions) + 1)
        history = await self.store.history(ctx.tenant.name, plan.meta.id, undo=False, entries=entries)
        return {} if history is None else {entry["version"]: entry["time"] for entry in history.log}

    def _submit(self, plan: TurnPlan, memory: MemoryAccess | None, stream: JobStream) -> None:
        """Submit one job for a session, whose segments may learn; without a session, one job per segment."""
        if plan.start_meta is None:
            for segment in plan.segments:
                stream.submit(JobRequest([segment], stream.emit, frozen=plan.score_frozen))
        elif plan.runs_jobs:
            stream.submit(
                JobRequest(
                    plan.segments,
                    stream.emit,
                    memory,
                    plan.score_frozen,
                    plan.start_meta.requests,
                    self.proof_rate,
                    plan.policy_request,
                    plan.keep_episodes,
                    plan.start_meta.version + 1,
                )
            )

    async def _commit(
        self,
        handle: SessionHandle,
        plan: TurnPlan,
        commit: Commit | None,
        jobs: Sequence[JobFinished],
        record: Callable[[E], Json],
        last: E,
        size: int,
    ) -> None:
        """Commit the turn, or store a new session of a turn that may learn and learned nothing.

        size: number of tokens that the answer is about.
        """
        if commit is not None:
            await self.gate.commit(handle, commit, await run_off_loop(size, record, last), size)
            record_commit(self.metrics, plan.policy_request, commit, jobs)
        elif plan.meta is not None and handle.meta is None and plan.writes:
            await self.store.create(handle.ctx.tenant.name, plan.meta, handle.lease)


def _conclude(
    ctx: RequestContext,
    turn: Turn[E],
    plan: TurnPlan,
    jobs: Sequence[JobFinished],
    model: LoadedModel,
    times: Mapping[int, float],
) -> tuple[list[E], Commit | None, E]:
    """Return the outputs that remain, what to commit, and the last event of a turn whose jobs have finished.

    times: when the versions were made that taught what the jobs have recalled.
    """
    remaining = list(turn.remaining_outputs())
    commit = build_commit(ctx, plan, jobs, turn.reply_digests())
    return remaining, commit, turn.last_event(outcome_of(plan, jobs, commit, model.tokenizer.decode, times))
