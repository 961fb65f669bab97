"""The engine: one thread that owns the device and runs all jobs, a block or a token at a time.

Other threads send messages to the engine's thread; events go to the event loop. No other thread touches the device,
except the thread that gathers a GPU's results (`gather_executor.py`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType, TracebackType
from typing import TypeVar

import torch

from model.adaptive_lm import AdaptiveLM
from model.memory import MemoryConfig, PoolFullError
from model.memory import choose_backend as choose_memory_backend
from model.policies.backend import choose_backend
from model.policies.network import Policy
from model.text.tokenizer import Tokenizer
from service.engine.decode_step import decode_step
from service.engine.gather_executor import new_gather_executor
from service.engine.policy_job import PolicyJob, PolicyWorker
from service.engine.resident import ResidentSessions
from service.engine.scheduler import Scheduler
from service.engine.tabular_job import AnyLearner, TabularJob, TabularWorker, memory_config
from service.engine.text_job import TextJob
from service.engine.types import Event, JobFailed, JobFinished, JobRequest, SessionKey, StateId, TabularRequest
from service.errors import EngineError, ImprintError, Overloaded, TooLarge
from service.metrics import Metrics

EVENTS_PER_STEP = 16  # events of one turn that are taken before other tasks of the loop get their turn
POLICY_ROWS_DIVISOR = 32  # each policy's pool has `hot_rows` divided by this number
TABULAR_ROWS_DIVISOR = 4

Job = TextJob | PolicyJob | TabularJob
T = TypeVar("T")
log = logging.getLogger(__name__)


class Engine:
    """Runs jobs. A job is submitted as a `JobRequest` and ends in exactly one `JobFinished` or `JobFailed`.

    A cancelled job ends without an event. After `JobFinished` a job waits for `settle`; until then, no other job may
    write to the job's session.
    """

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
        tabular: Mapping[str, AnyLearner] = MappingProxyType({}),
    ) -> None:
        # Each turn in flight may use a session and a draft, while it waits, runs or is committed.
        new_resident = partial(
            ResidentSessions,
            sessions=max(hot_sessions + max_batch, 2 * max_turns),
            on_evict=metrics.session_evictions_total.inc,
        )
        self._lm, self._tokenizer = lm, tokenizer
        self._threads = threads
        self._metrics = metrics
        forget = lm.episodes.forget if lm.episodes is not None else lambda key: None
        host = torch.device("cpu")
        on_device = partial(new_resident, device=lm.device, backend=choose_memory_backend(lm.device))
        on_host = partial(new_resident, device=host, backend=choose_memory_backend(host))
        self._resident = on_device(lm.memory_config, rows=hot_rows, on_close=forget)
        # A session of a policy has a few rows, where a session of text has thousands.
        policy_rows = math.ceil(hot_rows / POLICY_ROWS_DIVISOR)
        self._policies = {
            name: PolicyWorker(
                policy, choose_backend(policy, lm.device), on_device(policy.config.memory, rows=policy_rows)
            )
            for name, policy in policies.items()
        }
        tabular_rows = math.ceil(hot_rows / TABULAR_ROWS_DIVISOR)
        self._learners = {
            name: TabularWorker(learner, on_host(memory_config(learner.config), rows=tabular_rows))
            for name, learner in tabular.items()
        }
        self._workers: dict[str, PolicyWorker | TabularWorker] = {**self._policies, **self._learners}
        self._scheduler: Scheduler[TextJob] = Scheduler(max_sequences=max_batch, max_tokens=kv_tokens)
        metrics.kv_tokens_capacity.set(kv_tokens)
        self._jobs: dict[JobRequest, Job] = {}
        self._arrived: dict[JobRequest, float] = {}
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._extra_work: deque[Callable[[], None]] = deque()
        self._events: list[tuple[JobRequest, Event]] = []
        self._gather_executor = new_gather_executor(lm.device, self._inbox.put)
        self._stopping = False
        self._prepared: Future[None] = Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._main, name="imprint-engine", daemon=True)

    # --- from other threads ----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the thread and wait until the thread can serve. Events go to the event loop that runs now.

        Raises the error of a failed preparation.
        """
        self._loop = asyncio.get_running_loop()
        self._prepared.set_running_or_notify_cancel()  # a cancelled `start` does not cancel the preparation
        self._thread.start()
        await asyncio.wrap_future(self._prepared)

    async def stop(self) -> None:
        """End the thread after its current step; unfinished jobs end without an event."""
        self._inbox.put(self._stop)
        await asyncio.to_thread(self._thread.join)

    def pin(self, key: SessionKey, state_id: StateId, policy: str = "") -> bool:
        """Keep a session on the device for the next job that uses it; return False if that content is not there."""
        return self._resident_of(policy).pin(key, state_id)

    def submit(self, request: JobRequest) -> None:
        """Queue a job."""
        self._arrived[request] = time.monotonic()
        self._inbox.put(lambda: self._add(request))

    def cancel(self, request: JobRequest) -> None:
        """End a job within the current step, without an event, and roll its draft back."""
        self.settle(request, None)

    def settle(self, request: JobRequest, committed: StateId | None) -> None:
        """End a job after `JobFinished`: its rows are stored under the id `committed`, or (None) are discarded."""
        if committed is not None and request.memory is not None:
            self._resident_of(request.memory.policy).set_state_id(request.memory.key, committed)
        self._inbox.put(lambda: self._close(request, commit=committed is not None))

    async def run(self, work: Callable[[], T]) -> T:
        """Return what `work` returns, which needs the device and takes about as long as a step.

        The jobs go on meanwhile: a step of theirs comes between two such works, whoever asks for them.
        """
        result: Future[T] = Future()

        def settle() -> None:
            if result.set_running_or_notify_cancel():
                try:
                    result.set_result(work())
                except Exception as error:
                    result.set_exception(error)

        self._inbox.put(partial(self._extra_work.append, settle))
        return await asyncio.wrap_future(result)

    def drop(self, key: SessionKey) -> None:
        """Drop a session from the device."""
        for resident in self._all_residents():
            self._inbox.put(partial(resident.drop, key))

    def drop_all(self) -> None:
        """Drop every session from the device; a session in use goes after its last use."""
        for key in self.resident_keys():
            self.drop(key)

    def resident_keys(self) -> list[SessionKey]:
        """Return the sessions that are on the device."""
        return [key for resident in self._all_residents() for key in resident.resident_keys()]

    def memory_config(self, policy: str = "") -> MemoryConfig:
        """Return the configuration of a policy's memory; of the language model's memory for ""."""
        return self._resident_of(policy).pool.config

    def only_asks(self, token_ids: Sequence[int]) -> bool:
        """Return whether an episode only asks, so that no reply reads it."""
        return self._lm.episodes is not None and self._lm.episodes.only_asks(token_ids)

    @property
    def sessions_hot(self) -> int:
        """Number of sessions on the device."""
        return sum(len(resident) for resident in self._all_residents())

    def _resident_of(self, policy: str) -> ResidentSessions:
        return self._workers[policy].resident if policy else self._resident

    def _all_residents(self) -> list[ResidentSessions]:
        return [self._resident, *(worker.resident for worker in self._workers.values())]

    # --- the engine's thread ---------------------------------------------------------------------------------------

    def _main(self) -> None:
        if self._threads:
            torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                if self._prepare():
                    self._run()
        finally:
            if self._gather_executor is not None:
                self._gather_executor.stop()

    def _prepare(self) -> bool:
        """Prepare the model and the policies; return False if that failed: `start` raises the error."""
        try:
            self._lm.prepare(self._resident.pool)
            for worker in self._workers.values():
                worker.prepare()
        except BaseException as error:
            self._prepared.set_exception(error)
            return False
        self._prepared.set_result(None)
        return True

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._take_messages()
                self._step()
                self._deliver()
        except BaseException:
            log.critical("the engine's thread died; the server ends", exc_info=True)
            os.kill(os.getpid(), signal.SIGTERM)
            raise

    def _stop(self) -> None:
        self._stopping = True

    def _take_messages(self) -> None:
        """Handle the messages that have arrived; where there is nothing to run, sleep until a message arrives."""
        idle = not (
            self._scheduler.running or self._scheduler.waiting or self._extra_work or self._has_waiting_workers()
        )
        while True:
            try:
                handle = self._inbox.get(block=idle)
            except queue.Empty:
                return
            handle()
            idle = False

    def _add(self, request: JobRequest) -> None:
        if isinstance(request.policy_request, TabularRequest):
            tabular_worker = self._learners[request.policy_request.policy]
            self._jobs[request] = tabular_job = TabularJob(request, tabular_worker.learner)
            tabular_worker.waiting.append(tabular_job)
            return
        if request.policy_request is not None:
            worker = self._policies[request.policy_request.policy]
            self._jobs[request] = policy_job = PolicyJob(request, worker.backend)
            worker.waiting.append(policy_job)
            return
        self._jobs[request] = text_job = TextJob(request, self._lm, self._tokenizer)
        self._scheduler.add(text_job)

    def _close(self, request: JobRequest, *, commit: bool) -> None:
        job = self._jobs.pop(request, None)
        self._arrived.pop(request, None)
        if isinstance(job, TextJob):
            self._scheduler.remove(job)
            job.close(self._resident, commit=commit)
        elif isinstance(job, TabularJob):
            tabular_worker = self._learners[job.tabular_request.policy]
            tabular_worker.remove(job)
            job.close(tabular_worker.resident, commit=commit)
        elif job is not None:
            worker = self._policies[job.policy_request.policy]
            worker.remove(job)
            job.close(worker.resident, commit=commit)

    def _step(self) -> None:
        """Run one block of one text job, one token of every sequence, the policies' requests and one extra work."""
        for job in self._scheduler.admit():
            self._start(job, self._resident)
        if (block_job := self._scheduler.next_block()) is not None:
            with self._metrics.engine_step_seconds.labels("prefill").time(), self._failures_of([block_job]):
                self._emit(block_job, block_job.block(self._resident))
        self._decode()
        self._decide()
        self._take_tabular_steps()
        if self._extra_work:
            self._extra_work.popleft()()
        for job in [job for job in self._scheduler.running if job.done]:
            self._scheduler.remove(job)
            self._finish(job)
        self._metrics.queue_depth.set(len(self._scheduler.waiting))
        self._metrics.kv_tokens_reserved.set(self._scheduler.tokens_reserved)
        self._metrics.sessions_hot.set(len(self._resident))
        self._metrics.hot_rows_ratio.set(self._resident.pool.utilization)

    def _start(self, job: Job, resident: ResidentSessions) -> None:
        self._metrics.queue_time_seconds.observe(time.monotonic() - self._arrived.pop(job.request))
        with self._failures_of([job]):
            job.start(resident)

    def _decode(self) -> None:
        """Decode a token of every sequence; several tokens where the drafted tokens are right."""
        batch = [(job, sequence) for job in self._scheduler.running for sequence in job.decodable()]
        if not batch:
            return

        self._metrics.batch_size.observe(len(batch))
        jobs = [job for job, _ in batch]
        with self._metrics.engine_step_seconds.labels("decode").time(), self._failures_of(jobs):
            for job, sequence, num_drafted, events in decode_step(self._lm, self._resident.pool, batch):
                start_length = sequence.cache.length
                with self._failures_of([job]):
                    self._emit(job, events)
                self._metrics.guessed_tokens_total.inc(num_drafted)
                self._metrics.guessed_rightly_total.inc(sequence.cache.length - start_length)

    def _has_waiting_workers(self) -> bool:
        """Return whether a policy or a learner has requests."""
        return any(worker.waiting for worker in self._workers.values())

    def _decide(self) -> None:
        """Run the requests of each policy, for all sessions together."""
        for worker in self._policies.values():
            if not worker.waiting:
                continue
            jobs = worker.pop_batch(self._scheduler.max_sequences)
            self._metrics.decisions_batch.observe(len(jobs))
            with self._metrics.engine_step_seconds.labels("decide").time(), _one_thread():
                for job in jobs:
                    self._start(job, worker.resident)
                for step in (worker.learn, worker.decide):
                    live_jobs = [job for job in jobs if job.request in self._jobs]
                    with self._failures_of(live_jobs):
                        for job, apply in step(live_jobs):
                            with self._failures_of([job]):
                                apply()
                for job in [job for job in jobs if job.request in self._jobs]:
                    with self._failures_of([job]):
                        self._emit(job, job.events())
                    self._finish(job)

    def _take_tabular_steps(self) -> None:
        """Run some steps of each request of the tabular of tables."""
        for worker in self._learners.values():
            for _ in range(len(worker.waiting)):
                job = worker.waiting.popleft()
                with self._metrics.engine_step_seconds.labels("decide").time(), _one_thread():
                    if not job.is_started:
                        self._start(job, worker.resident)
                    if job.request not in self._jobs:
                        continue
                    with self._failures_of([job]):
                        job.take_steps()
                        if job.is_done:
                            self._emit(job, job.events())
                            self._finish(job)
                        else:
                            worker.waiting.append(job)

    def _finish(self, job: Job) -> None:
        """Emit a job's last event, once the host has the job's rows; meanwhile other jobs go on."""
        if job.writes and self._gather_executor is not None:
            self._gather_executor.execute(job.finished, lambda gathered: self._emit_finished(job, gathered.result))
        else:
            self._emit_finished(job, job.finished)

    def _emit_finished(self, job: Job, finished: Callable[[], JobFinished]) -> None:
        if job.request in self._jobs:
            with self._failures_of([job]):
                self._events.append((job.request, finished()))

    def _emit(self, job: Job, events: Iterable[Event]) -> None:
        for event in events:
            self._events.append((job.request, event))

    @contextmanager
    def _failures_of(self, jobs: Sequence[Job]) -> Iterator[None]:
        """Let an exception of the `with` block fail these jobs, and no other job."""
        try:
            yield
        except Exception as error:
            for job in jobs:
                if job.request in self._jobs:
                    memory = job.request.memory
                    only_resident = memory is not None and self._resident_of(memory.policy).only_resident(memory.key)
                    self._events.append((job.request, JobFailed(_client_error(error, only_resident=only_resident))))
                    self._close(job.request, commit=False)

    def _deliver(self) -> None:
        """Send the events of this step to the event loop, where `JobRequest.emit` takes them."""
        events, self._events = self._events, []
        if events and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_emit_all, events)


class JobStream:
    """The jobs of one turn, on the event loop: submits them, yields their events, cancels unsettled jobs on exit.

    A job that uses a session's memory stays unsettled after `JobFinished` until `settle`; any other job settles at
    once.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._queue: asyncio.Queue[tuple[JobRequest, Event]] = asyncio.Queue()
        self._numbers: dict[JobRequest, int] = {}
        self._unsettled: set[JobRequest] = set()
        self.finished: list[JobFinished] = []

    async def __aenter__(self) -> JobStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for request in self._unsettled:
            self._engine.cancel(request)

    def submit(self, request: JobRequest) -> None:
        """Hand a job, whose `emit` is this stream's, to the engine."""
        self._numbers[request] = len(self._numbers)
        self._unsettled.add(request)
        self._engine.submit(request)

    def emit(self, request: JobRequest, event: Event) -> None:
        """Take an event from the engine; the engine calls this method on the event loop."""
        self._queue.put_nowait((request, event))

    async def events(self) -> AsyncGenerator[tuple[int, Event], None]:
        """Yield each event with the number of its segment over all jobs, until every job has finished.

        Raises the error of the first job that fails.
        """
        num_taken = 0
        while len(self.finished) < len(self._numbers):
            request, event = await self._queue.get()
            num_taken += 1
            if num_taken % EVENTS_PER_STEP == 0:  # a queue with entries never gives the loop to other tasks
                await asyncio.sleep(0)
            if isinstance(event, JobFailed):
                self._unsettled.discard(request)
                raise event.error
            if isinstance(event, JobFinished):
                self.finished.append(event)
                if request.memory is None:
                    self._settle(request, None)
            else:
                yield self._numbers[request] + event.segment, event

    def settle(self, committed: StateId | None) -> None:
        """Tell the engine under which id the written rows are stored; None discards the rows."""
        for request in list(self._unsettled):
            self._settle(request, committed)

    def _settle(self, request: JobRequest, committed: StateId | None) -> None:
        self._unsettled.discard(request)
        self._engine.settle(request, committed)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread, for steps so small that several threads take longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _emit_all(events: list[tuple[JobRequest, Event]]) -> None:
    for request, event in events:
        request.emit(request, event)


def _client_error(error: Exception, *, only_resident: bool) -> ImprintError:
    """Return the error that the client gets; with `only_resident`, waiting would give the session no more room."""
    if isinstance(error, ImprintError):
        return error
    if isinstance(error, PoolFullError) and only_resident:
        return TooLarge("The session, with what this request adds, has more rows than the device holds ('hot_rows').")
    if isinstance(error, PoolFullError):
        return Overloaded("The device has no room for more fast weights now.", code="memory_full")
    log.error("the engine failed on a request", exc_info=error)
    return EngineError("The engine failed on this request; the server's log says why.")
