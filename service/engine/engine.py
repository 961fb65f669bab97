"""The engine: one thread that owns the device and runs every job, a block or a token at a time.

Other threads hand it messages and get events on the event loop; nothing of the device is touched elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from types import MappingProxyType

import torch

from model.adaptive_lm import AdaptiveLM
from model.memory import MemoryConfig, Pool, PoolFullError
from model.policies.backend import choose_backend
from model.policies.network import Policy
from model.text.sampling import predraw
from model.text.tokenizer import Tokenizer
from service.engine.gather_executor import GatherExecutor
from service.engine.policy_job import PolicyJob, PolicyWorker
from service.engine.resident import ResidentSessions
from service.engine.scheduler import Scheduler
from service.engine.text_job import TextJob, TextSequence
from service.engine.types import Event, Job, JobFailed, JobFinished, SessionKey, StateId
from service.errors import EngineError, ImprintError, Overloaded, TooLarge
from service.metrics import Metrics

SPECULATIVE_ROWS = 4  # of a step, where fewer sequences are at work
POLICY_ROWS_DIVISOR = 32  # each policy has room for so many times fewer hot rows than text

log = logging.getLogger(__name__)


class Engine:
    """Runs jobs. Every job ends in exactly one `JobFinished` or `JobFailed`, unless it is cancelled; after
    `JobFinished` it waits for `settle`, and its session is not free for another writing job before."""

    def __init__(
        self,
        lm: AdaptiveLM,
        tokenizer: Tokenizer,
        *,
        max_turns: int,
        max_batch: int,
        kv_tokens: int,
        hot_rows: int,
        hot_sessions: int,
        threads: int,
        metrics: Metrics,
        policies: Mapping[str, Policy] = MappingProxyType({}),
    ) -> None:
        # Each turn in hand may hold a session and a draft, be it waiting, running or being committed.
        sessions = max(hot_sessions + max_batch, 2 * max_turns)

        def make_resident(config: MemoryConfig, rows: int) -> ResidentSessions:
            def make_pool(make_room: Callable[[], bool]) -> Pool:
                return Pool(config, rows=rows, sessions=sessions, device=lm.device, make_room=make_room)

            return ResidentSessions(make_pool, on_evict=metrics.session_evictions_total.inc)

        self._lm = lm
        self._tokenizer = tokenizer
        self._threads = threads
        self._metrics = metrics
        self._resident = make_resident(lm.memory.config, hot_rows)
        # A policy's session holds a few rows, where one of text holds thousands.
        policy_rows = -(-hot_rows // POLICY_ROWS_DIVISOR)
        self._policies = {
            name: PolicyWorker(one, choose_backend(one, lm.device), make_resident(one.config.memory, policy_rows))
            for name, one in policies.items()
        }
        self._scheduler: Scheduler[TextJob] = Scheduler(max_sequences=max_batch, max_tokens=kv_tokens)
        metrics.kv_tokens_capacity.set(kv_tokens)
        self._runs: dict[Job, TextJob | PolicyJob] = {}
        self._arrived: dict[Job, float] = {}
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._events: list[tuple[Job, Event]] = []
        self._gather_executor = GatherExecutor(lm.device, self._inbox.put)
        self._stopping = False
        self._prepared = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._main, name="imprint-engine", daemon=True)

    # --- from other threads ----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Starts the thread and waits until it can serve; events are delivered on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        await asyncio.to_thread(self._prepared.wait)

    async def stop(self) -> None:
        """Ends the thread after its current step; jobs that are not done end without an event."""
        self._inbox.put(self._stop)
        await asyncio.to_thread(self._thread.join)

    def pin(self, key: SessionKey, state_id: StateId, policy: str = "") -> bool:
        """Whether a session is hot as of then; it then stays so for the next job that uses it."""
        return self._resident_of(policy).pin(key, state_id)

    def submit(self, job: Job) -> None:
        """Queues a job."""
        self._arrived[job] = time.monotonic()
        self._inbox.put(lambda: self._add(job))

    def cancel(self, job: Job) -> None:
        """Ends a job within the current step, without an event, and forgets what it wrote."""
        self.settle(job, None)

    def settle(self, job: Job, committed: StateId | None) -> None:
        """After `JobFinished`: the job's rows are stored as of `committed`, or (None) are to be forgotten."""
        if committed is not None and job.memory is not None:
            self._resident_of(job.memory.policy).set_state_id(job.memory.key, committed)
        self._inbox.put(lambda: self._close(job, commit=committed is not None))

    def drop(self, key: SessionKey) -> None:
        """Drops a session from the device."""
        for resident in self._all_residents():
            self._inbox.put(lambda resident=resident: resident.drop(key))  # type: ignore[misc]

    def drop_all(self) -> None:
        """Drops every session from the device, those in use at their last use."""
        for resident in self._all_residents():
            for key in resident.resident_keys():
                self.drop(key)

    def memory_config(self, policy: str = "") -> MemoryConfig:
        """What the rows of a policy's sessions, or of those of text, look like."""
        return self._resident_of(policy).pool.config

    @property
    def sessions_hot(self) -> int:
        return sum(len(resident) for resident in self._all_residents())

    def _resident_of(self, policy: str) -> ResidentSessions:
        return self._policies[policy].resident if policy else self._resident

    def _all_residents(self) -> list[ResidentSessions]:
        return [self._resident, *(worker.resident for worker in self._policies.values())]

    # --- the engine's thread ---------------------------------------------------------------------------------------

    def _main(self) -> None:
        if self._threads:
            torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                self._lm.prepare(self._resident.pool)
                for worker in self._policies.values():
                    worker.prepare()
                self._prepared.set()
                while not self._stopping:
                    self._take_messages()
                    self._step()
                    self._deliver()
        except BaseException:
            log.critical("the engine's thread died; the server ends", exc_info=True)
            os.kill(os.getpid(), signal.SIGTERM)
            raise
        finally:
            self._gather_executor.stop()
            self._prepared.set()

    def _stop(self) -> None:
        self._stopping = True

    def _take_messages(self) -> None:
        """Handles what has come in; sleeps until something does if there is nothing to run."""
        idle = not self._scheduler.running and not self._scheduler.waiting and not any(self._busy_workers())
        while True:
            try:
                handle = self._inbox.get(block=idle)
            except queue.Empty:
                return
            handle()
            idle = False

    def _add(self, job: Job) -> None:
        if job.policy_request is not None:
            worker = self._policies[job.policy_request.policy]
            self._runs[job] = policy_request = PolicyJob(job, worker.backend)
            worker.waiting.append(policy_request)
            return
        self._runs[job] = run = TextJob(job, self._lm, self._tokenizer)
        self._scheduler.add(run)

    def _close(self, job: Job, *, commit: bool) -> None:
        run = self._runs.pop(job, None)
        self._arrived.pop(job, None)
        if isinstance(run, TextJob):
            self._scheduler.remove(run)
            run.close(self._resident, commit=commit)
        elif run is not None:
            worker = self._policies[run.policy_request.policy]
            worker.remove(run)
            run.close(worker.resident, commit=commit)

    def _step(self) -> None:
        for run in self._scheduler.admit():
            self._metrics.queue_time_seconds.observe(time.monotonic() - self._arrived.pop(run.job))
            self._isolate_failures([run], lambda run=run: run.start(self._resident))  # type: ignore[misc]
        if (turn := self._scheduler.next_block()) is not None:
            with self._metrics.engine_step_seconds.labels("prefill").time():
                self._isolate_failures([turn], lambda: self._emit(turn, turn.block(self._resident)))
        self._decode()
        self._decide()
        for done in [run for run in self._scheduler.running if run.done]:
            self._scheduler.remove(done)
            self._end(done)
        self._metrics.queue_depth.set(len(self._scheduler.waiting))
        self._metrics.kv_tokens_reserved.set(self._scheduler.tokens_reserved)
        self._metrics.sessions_hot.set(len(self._resident))
        self._metrics.hot_rows_ratio.set(self._resident.pool.utilization)

    def _decode(self) -> None:
        batch = [(run, sequence) for run in self._scheduler.running for sequence in run.decodable()]
        if batch:
            self._metrics.batch_size.observe(len(batch))
            with self._metrics.engine_step_seconds.labels("decode").time():
                self._isolate_failures([run for run, _ in batch], lambda: self._decode_batch(batch))

    def _decode_batch(self, batch: list[tuple[TextJob, TextSequence]]) -> None:
        """A token for every sequence, or a few where it was guessed rightly; what was drawn in the last step is taken
        in first."""
        # A few rows more cost little as long as reading the weights is what takes the time.
        step_inputs = [
            (run, sequence, sequence.input_tokens(SPECULATIVE_ROWS // len(batch))) for run, sequence in batch
        ]
        input_tokens = [
            (run, sequence, at, tokens) for run, sequence, tokens in step_inputs for at in range(len(tokens))
        ]
        decoded = iter(
            self._lm.decode(
                [tokens[at] for _, _, at, tokens in input_tokens],
                [sequence.cache.advanced(at) if at else sequence.cache for _, sequence, at, _ in input_tokens],
                [
                    sequence.decode_state.advanced(tokens[:at]) if at else sequence.decode_state
                    for _, sequence, at, tokens in input_tokens
                ],
                self._resident.pool,
                [run.index for run, _, _, _ in input_tokens],
            )
            if input_tokens
            else ()
        )
        decode_states = [
            list(islice(decoded, len(tokens))) or [sequence.decode_state] for _, sequence, tokens in step_inputs
        ]
        index = [run.index for (run, _), rows in zip(batch, decode_states, strict=True) for _ in rows]
        predictions = self._lm.predict(
            [decode_state for rows in decode_states for decode_state in rows], self._resident.pool, index
        )
        if len(predictions) == len(batch):
            predraw([sequence.sampler for _, sequence in batch], predictions)
        scores = iter(predictions)
        for (run, sequence, tokens), rows in zip(step_inputs, decode_states, strict=True):
            start_length = sequence.cache.length
            accepted = run.accept(sequence, tokens[1:], rows, list(islice(scores, len(rows))))
            self._isolate_failures([run], lambda run=run, accepted=accepted: self._emit(run, accepted))  # type: ignore[misc]
            self._metrics.guessed_tokens_total.inc(len(rows) - 1)
            self._metrics.guessed_rightly_total.inc(sequence.cache.length - start_length)

    def _busy_workers(self) -> Iterator[PolicyWorker]:
        """The policies that are asked for something."""
        return (worker for worker in self._policies.values() if worker.waiting)

    def _decide(self) -> None:
        """Does what is asked of each policy, for all sessions together."""
        for worker in self._busy_workers():
            runs = worker.take(self._scheduler.max_sequences)
            self._metrics.decisions_batch.observe(len(runs))
            with self._metrics.engine_step_seconds.labels("decide").time(), _one_thread():
                for run in runs:
                    self._metrics.queue_time_seconds.observe(time.monotonic() - self._arrived.pop(run.job))
                    self._isolate_failures([run], lambda run=run, worker=worker: run.start(worker.resident))  # type: ignore[misc]
                for step in (worker.learn, worker.decide):
                    live_jobs = [run for run in runs if run.job in self._runs]
                    self._isolate_failures(
                        live_jobs,
                        lambda step=step, live_jobs=live_jobs: step(live_jobs, self._isolate_failure),  # type: ignore[misc]
                    )
                for run in [run for run in runs if run.job in self._runs]:
                    self._isolate_failures([run], lambda run=run: self._emit(run, run.events()))  # type: ignore[misc]
                    self._end(run)

    def _end(self, run: TextJob | PolicyJob) -> None:
        """Tells what a job leaves behind, once the device has it; meanwhile others go on."""

        def emit_finished(gather_result: Callable[[], JobFinished]) -> None:
            if run.job in self._runs:
                self._isolate_failures([run], lambda: self._events.append((run.job, gather_result())))

        if run.writes:
            self._gather_executor.execute(run.finished, emit_finished)
        else:
            emit_finished(run.finished)

    def _isolate_failure(self, run: PolicyJob, work: Callable[[], None]) -> None:
        self._isolate_failures([run], work)

    def _emit(self, run: TextJob | PolicyJob, events: Iterable[Event]) -> None:
        for event in events:
            self._events.append((run.job, event))

    def _isolate_failures(self, runs: Sequence[TextJob | PolicyJob], work: Callable[[], None]) -> None:
        """Does the work; if it fails, the runs it was for fail with it, and nobody else."""
        try:
            work()
        except Exception as error:
            for run in runs:
                if run.job in self._runs:
                    memory = run.job.memory
                    only_resident = memory is not None and self._resident_of(memory.policy).only_resident(memory.key)
                    self._events.append((run.job, JobFailed(_explain(error, only_resident=only_resident))))
                    self._close(run.job, commit=False)

    def _deliver(self) -> None:
        events, self._events = self._events, []
        if events and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_emit_all, events)


@contextmanager
def _one_thread() -> Iterator[None]:
    """For steps so small that to share them takes longer than to do them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _emit_all(events: list[tuple[Job, Event]]) -> None:
    for job, event in events:
        job.emit(job, event)


def _explain(error: Exception, *, only_resident: bool) -> ImprintError:
    """alone: the session had the whole device, and waiting would give it no more."""
    if isinstance(error, ImprintError):
        return error
    if isinstance(error, PoolFullError) and only_resident:
        return TooLarge("The session, with what this request adds, has more rows than the device holds ('hot_rows').")
    if isinstance(error, PoolFullError):
        return Overloaded("The device has no room for more fast weights now.", code="memory_full")
    log.error("the engine failed on a request", exc_info=error)
    return EngineError("The engine failed on this request; the server's log says why.")
