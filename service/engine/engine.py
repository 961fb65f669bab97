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
from model.policies.network import Policy
from model.text.sampling import draw_ahead
from model.text.tokenizer import Tokenizer
from service.engine.gather_executor import Aside
from service.engine.policy_job import DeedRun, Desk
from service.engine.resident import HotSessions
from service.engine.scheduler import Scheduler
from service.engine.text_job import Choice, Run
from service.engine.types import Event, Failed, Finished, Job, SessionKey, Stamp
from service.errors import EngineError, ImprintError, Overloaded, TooLarge
from service.metrics import Metrics

GUESSING_ROWS = 4  # of a step, where fewer sequences are at work
POLICY_SHARE = 32  # each policy has room for so many times fewer hot rows than text

log = logging.getLogger(__name__)


class Engine:
    """Runs jobs. Every job ends in exactly one `Finished` or `Failed`, unless it is cancelled; after `Finished` it
    waits for `settle`, and its session is not free for another writing job before."""

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

        def make_hot(config: MemoryConfig, rows: int) -> HotSessions:
            def make_pool(make_room: Callable[[], bool]) -> Pool:
                return Pool(config, rows=rows, sessions=sessions, device=lm.device, make_room=make_room)

            return HotSessions(make_pool, on_evict=metrics.session_evictions_total.inc)

        self._lm = lm
        self._tokenizer = tokenizer
        self._threads = threads
        self._metrics = metrics
        self._hot = make_hot(lm.memory.config, hot_rows)
        # A policy's session holds a few rows, where one of text holds thousands.
        few = -(-hot_rows // POLICY_SHARE)
        self._policies = {name: Desk(one, make_hot(one.config.memory, few)) for name, one in policies.items()}
        self._scheduler: Scheduler[Run] = Scheduler(max_sequences=max_batch, max_tokens=kv_tokens)
        metrics.kv_tokens_capacity.set(kv_tokens)
        self._runs: dict[Job, Run | DeedRun] = {}
        self._arrived: dict[Job, float] = {}
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._events: list[tuple[Job, Event]] = []
        self._aside = Aside(lm.device, self._inbox.put)
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

    def pin(self, key: SessionKey, stamp: Stamp, policy: str = "") -> bool:
        """Whether a session is hot as of then; it then stays so for the next job that uses it."""
        return self._hot_of(policy).pin(key, stamp)

    def submit(self, job: Job) -> None:
        """Queues a job."""
        self._arrived[job] = time.monotonic()
        self._inbox.put(lambda: self._add(job))

    def cancel(self, job: Job) -> None:
        """Ends a job within the current step, without an event, and forgets what it wrote."""
        self.settle(job, None)

    def settle(self, job: Job, committed: Stamp | None) -> None:
        """After `Finished`: the job's rows are stored as of `committed`, or (None) are to be forgotten."""
        if committed is not None and job.memory is not None:
            self._hot_of(job.memory.policy).promise(job.memory.key, committed)
        self._inbox.put(lambda: self._close(job, commit=committed is not None))

    def forget(self, key: SessionKey) -> None:
        """Drops a session from the device."""
        for hot in self._everywhere():
            self._inbox.put(lambda hot=hot: hot.forget(key))  # type: ignore[misc]

    def forget_all(self) -> None:
        """Drops every session from the device, those in use at their last use."""
        for hot in self._everywhere():
            for key in hot.everyone():
                self.forget(key)

    def memory_config(self, policy: str = "") -> MemoryConfig:
        """What the rows of a policy's sessions, or of those of text, look like."""
        return self._hot_of(policy).pool.config

    @property
    def sessions_hot(self) -> int:
        return sum(len(hot) for hot in self._everywhere())

    def _hot_of(self, policy: str) -> HotSessions:
        return self._policies[policy].hot if policy else self._hot

    def _everywhere(self) -> list[HotSessions]:
        return [self._hot, *(desk.hot for desk in self._policies.values())]

    # --- the engine's thread ---------------------------------------------------------------------------------------

    def _main(self) -> None:
        if self._threads:
            torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                self._lm.prepare(self._hot.pool)
                for desk in self._policies.values():
                    desk.prepare()
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
            self._aside.stop()
            self._prepared.set()

    def _stop(self) -> None:
        self._stopping = True

    def _take_messages(self) -> None:
        """Handles what has come in; sleeps until something does if there is nothing to run."""
        idle = not self._scheduler.running and not self._scheduler.waiting and not any(self._desks())
        while True:
            try:
                handle = self._inbox.get(block=idle)
            except queue.Empty:
                return
            handle()
            idle = False

    def _add(self, job: Job) -> None:
        if job.deed is not None:
            desk = self._policies[job.deed.policy]
            self._runs[job] = deed = DeedRun(job, desk.acting)
            desk.waiting.append(deed)
            return
        self._runs[job] = run = Run(job, self._lm, self._tokenizer)
        self._scheduler.add(run)

    def _close(self, job: Job, *, commit: bool) -> None:
        run = self._runs.pop(job, None)
        self._arrived.pop(job, None)
        if isinstance(run, Run):
            self._scheduler.remove(run)
            run.close(self._hot, commit=commit)
        elif run is not None:
            desk = self._policies[run.deed.policy]
            desk.remove(run)
            run.close(desk.hot, commit=commit)

    def _step(self) -> None:
        for run in self._scheduler.admit():
            self._metrics.queue_time_seconds.observe(time.monotonic() - self._arrived.pop(run.job))
            self._guard([run], lambda run=run: run.start(self._hot))  # type: ignore[misc]
        if (turn := self._scheduler.next_block()) is not None:
            with self._metrics.engine_step_seconds.labels("prefill").time():
                self._guard([turn], lambda: self._emit(turn, turn.block(self._hot)))
        self._decode()
        self._decide()
        for done in [run for run in self._scheduler.running if run.done]:
            self._scheduler.remove(done)
            self._end(done)
        self._metrics.queue_depth.set(len(self._scheduler.waiting))
        self._metrics.kv_tokens_reserved.set(self._scheduler.tokens_reserved)
        self._metrics.sessions_hot.set(len(self._hot))
        self._metrics.hot_rows_ratio.set(self._hot.pool.taken)

    def _decode(self) -> None:
        batch = [(run, choice) for run in self._scheduler.running for choice in run.decodable()]
        if batch:
            self._metrics.batch_size.observe(len(batch))
            with self._metrics.engine_step_seconds.labels("decode").time():
                self._guard([run for run, _ in batch], lambda: self._decode_batch(batch))

    def _decode_batch(self, batch: list[tuple[Run, Choice]]) -> None:
        """A token for every sequence, or a few where it was guessed rightly; what was drawn in the last step is taken
        in first."""
        # A few rows more cost little as long as reading the weights is what takes the time.
        asked = [(run, choice, choice.intake(GUESSING_ROWS // len(batch))) for run, choice in batch]
        intake = [(run, choice, at, tokens) for run, choice, tokens in asked for at in range(len(tokens))]
        decoded = iter(
            self._lm.decode(
                [tokens[at] for _, _, at, tokens in intake],
                [choice.cache.ahead(at) if at else choice.cache for _, choice, at, _ in intake],
                [choice.carry.ahead(tokens[:at]) if at else choice.carry for _, choice, at, tokens in intake],
                self._hot.pool,
                [run.index for run, _, _, _ in intake],
            )
            if intake
            else ()
        )
        carries = [list(islice(decoded, len(tokens))) or [choice.carry] for _, choice, tokens in asked]
        index = [run.index for (run, _), rows in zip(batch, carries, strict=True) for _ in rows]
        told = self._lm.predict([carry for rows in carries for carry in rows], self._hot.pool, index)
        if len(told) == len(batch):
            draw_ahead([choice.sampler for _, choice in batch], told)
        scores = iter(told)
        for (run, choice, tokens), rows in zip(asked, carries, strict=True):
            stood = choice.cache.length
            accepted = run.accept(choice, tokens[1:], rows, list(islice(scores, len(rows))))
            self._guard([run], lambda run=run, accepted=accepted: self._emit(run, accepted))  # type: ignore[misc]
            self._metrics.guessed_tokens_total.inc(len(rows) - 1)
            self._metrics.guessed_rightly_total.inc(choice.cache.length - stood)

    def _desks(self) -> Iterator[Desk]:
        """The policies that are asked for something."""
        return (desk for desk in self._policies.values() if desk.waiting)

    def _decide(self) -> None:
        """Does what is asked of each policy, for all sessions together."""
        for desk in self._desks():
            runs = desk.take(self._scheduler.max_sequences)
            self._metrics.decisions_batch.observe(len(runs))
            with self._metrics.engine_step_seconds.labels("decide").time(), _one_thread():
                for run in runs:
                    self._metrics.queue_time_seconds.observe(time.monotonic() - self._arrived.pop(run.job))
                    self._guard([run], lambda run=run, desk=desk: run.start(desk.hot))  # type: ignore[misc]
                for step in (desk.learn, desk.decide):
                    held = [run for run in runs if run.job in self._runs]
                    self._guard(held, lambda step=step, held=held: step(held, self._guard_one))  # type: ignore[misc]
                for run in [run for run in runs if run.job in self._runs]:
                    self._guard([run], lambda run=run: self._emit(run, run.events()))  # type: ignore[misc]
                    self._end(run)

    def _end(self, run: Run | DeedRun) -> None:
        """Tells what a job leaves behind, once the device has it; meanwhile others go on."""

        def tell(gathered: Callable[[], Finished]) -> None:
            if run.job in self._runs:
                self._guard([run], lambda: self._events.append((run.job, gathered())))

        if run.writes:
            self._aside.do(run.finished, tell)
        else:
            tell(run.finished)

    def _guard_one(self, run: DeedRun, work: Callable[[], None]) -> None:
        self._guard([run], work)

    def _emit(self, run: Run | DeedRun, events: Iterable[Event]) -> None:
        for event in events:
            self._events.append((run.job, event))

    def _guard(self, runs: Sequence[Run | DeedRun], work: Callable[[], None]) -> None:
        """Does the work; if it fails, the runs it was for fail with it, and nobody else."""
        try:
            work()
        except Exception as error:
            for run in runs:
                if run.job in self._runs:
                    memory = run.job.memory
                    alone = memory is not None and self._hot_of(memory.policy).alone(memory.key)
                    self._events.append((run.job, Failed(_explain(error, alone=alone))))
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


def _explain(error: Exception, *, alone: bool) -> ImprintError:
    """alone: the session had the whole device, and waiting would give it no more."""
    if isinstance(error, ImprintError):
        return error
    if isinstance(error, PoolFullError) and alone:
        return TooLarge("The session, with what this request adds, has more rows than the device holds ('hot_rows').")
    if isinstance(error, PoolFullError):
        return Overloaded("The device has no room for more fast weights now.", code="memory_full")
    log.error("the engine failed on a request", exc_info=error)
    return EngineError("The engine failed on this request; the server's log says why.")
