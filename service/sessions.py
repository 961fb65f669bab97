"""Turns. One turn = load → run → commit → tell, and nothing else knows what a turn is.

A session's turns run one at a time, in the order they came. A turn that ends early, for whatever reason, leaves the
session at the version it found.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from typing import Literal

import torch

from model.memory import SiteRows
from service import prompts
from service.engine import Event, Failed, Finished, Generate, Job, MemoryUse, Segment, Stats, TokenScores
from service.errors import BadRequest, NotFound, NotReady, Overloaded, PreconditionFailed, VersionConflict
from service.ledger import Ledger
from service.metrics import Metrics
from service.order import Locks, uninterrupted
from service.prompts import ChatPrompt, Encoded, Prompt, TextPrompt, TokenPrompt
from service.store.redis import RedisStore
from service.store.types import RowBatch, SessionMeta
from service.tenants import Tenant
from service.turns import (
    Adapt,
    Adaptation,
    Answer,
    Ask,
    Delta,
    Generation,
    Learn,
    ObserveResult,
    Policy,
    ScoreResult,
    Served,
    TokenLogprob,
    Turn,
    TurnEnd,
)

__all__ = [
    "Adapt",
    "Adaptation",
    "Ask",
    "ChatPrompt",
    "Delta",
    "Generation",
    "Learn",
    "ObserveResult",
    "Prompt",
    "ScoreResult",
    "Served",
    "Sessions",
    "TextPrompt",
    "TokenLogprob",
    "TokenPrompt",
    "TurnEnd",
]

LONG_TEXT = 20_000  # characters from which on tokenising leaves the event loop's thread


class Sessions:
    """All sessions of this server; "loading" until `begin`."""

    def __init__(
        self,
        store: RedisStore,
        ledger: Ledger,
        metrics: Metrics,
        *,
        model_id: str,
        max_queue: int,
        proof_rate: float,
    ) -> None:
        self.state: Literal["loading", "ready", "draining"] = "loading"
        self.model_id = model_id
        self._store = store
        self._ledger = ledger
        self._metrics = metrics
        self._max_queue = max_queue
        self._proof_rate = proof_rate
        self._loaded: Served | None = None
        self._in_flight = 0
        self._locks = Locks()

    @property
    def fingerprints(self) -> dict[str, str]:
        return self._served.fingerprints

    @property
    def context(self) -> int:
        """Tokens that one request may hold."""
        return self._served.context

    @property
    def vocab_size(self) -> int:
        return self._served.vocab_size

    @property
    def in_flight(self) -> int:
        """Turns that run or wait."""
        return self._in_flight

    def begin(self, served: Served) -> None:
        """The model is loaded: turns are taken from now on."""
        self._loaded = served
        self.state = "ready"

    async def drain(self, timeout_s: float) -> None:
        """Takes no more turns, and waits for those there are."""
        self.state = "draining"
        deadline = time.monotonic() + timeout_s
        while self._in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    # --- turns -----------------------------------------------------------------------------------------------------

    async def generate(self, ask: Ask) -> AsyncGenerator[Delta | TurnEnd, None]:
        """Answers a completion request: `Delta`s, then one `TurnEnd` after the commit.

        Returns once the first event is there, so that every earlier error has a status of its own. Cancelling this call
        or closing the generator ends the work within one step of the engine and rolls the turn back.
        """
        events = self._generate(ask)
        return _resumed(await anext(events), events)

    async def observe(
        self, tenant: Tenant, session: str, prompt: TextPrompt | ChatPrompt, *, if_match: str | None = None
    ) -> ObserveResult:
        """Learns a text of any length as one turn; of a chat, only what the session has not seen."""
        async with self._admitted(), self._session(tenant, session, if_match) as meta:
            encoded = await self._observed(prompt, meta)
            parts = prompts.segments(
                encoded, self.context, self._served.tokenizer.start_token_id, learn=True, score=False
            )
            turn = Turn(tenant, meta, seen=encoded.digests)
            async for _ in self._run(parts, turn, write=True):
                pass
            done = turn.adaptation()
            return ObserveResult(done.tokens_learned, done.rows_written, done.loss, done.version_to)

    async def score(
        self, tenant: Tenant, session: str, text: str, *, learn: bool, if_match: str | None = None
    ) -> ScoreResult:
        """Log-probabilities of a text of any length, with memory and without; learns each block after scoring it, if
        asked to."""
        async with self._admitted(), self._session(tenant, session, if_match) as meta:
            encoded = await self._observed(TextPrompt(text), meta)
            parts = prompts.segments(
                encoded, self.context, self._served.tokenizer.start_token_id, learn=learn, score=True
            )
            turn = Turn(tenant, meta)
            scored = [
                event
                async for _, event in self._run(parts, turn, write=learn, frozen=True)
                if isinstance(event, TokenScores)
            ]
        adapted = [value for event in scored for value in event.adapted]
        frozen = [value for event in scored for value in event.frozen or ()]
        tokens = [self._served.tokenizer.token_bytes(i).decode(errors="replace") for i in encoded.token_ids]
        return ScoreResult(
            tokens, adapted, frozen, _mean_loss(adapted), _mean_loss(frozen), turn.adaptation().version_to
        )

    # --- sessions --------------------------------------------------------------------------------------------------

    async def put(
        self, tenant: Tenant, session: str, options: dict[str, str], *, if_match: str | None = None
    ) -> tuple[SessionMeta, bool]:
        """Creates a session with options, or replaces its options; returns it and whether it is new."""
        async with self._locks.hold((tenant.name, session)):
            meta = await self._store.meta(tenant.name, session)
            _require_match(if_match, meta)
            if meta is None:
                async with self._ledger.place(tenant, session):
                    return await self._store.create(tenant.name, self._new_meta(session, options)), True
            return await self._store.configure(tenant.name, session, options), False

    async def get(self, tenant: Tenant, session: str) -> SessionMeta:
        """Raises NotFound."""
        meta = await self._store.meta(tenant.name, session)
        if meta is None:
            raise _unknown(session)
        return meta

    async def delete(self, tenant: Tenant, session: str, *, if_match: str | None = None) -> None:
        """Erases a session. Raises NotFound."""
        async with self._locks.hold((tenant.name, session)):
            _require_match(if_match, await self._store.meta(tenant.name, session))
            erased = await self._store.delete(tenant.name, session)
            self._served.engine.forget((tenant.name, session))
            await self._ledger.forget(tenant, session)
            if not erased:
                raise _unknown(session)

    async def list(self, tenant: Tenant, after: str, limit: int) -> tuple[list[SessionMeta], str | None]:
        """A page of sessions in order of their ids, and the id after which the next page starts."""
        page = await self._store.list(tenant.name, after=after, limit=limit + 1)
        return page[:limit], page[limit - 1].id if len(page) > limit else None

    async def count_cold(self, tenants: Iterable[str]) -> int:
        """Stored sessions, of these tenants together, that are not on the device."""
        stored = sum([await self._store.count(name) for name in tenants])
        return max(0, stored - self._served.engine.sessions_hot)

    async def tokens_left(self, tenant: Tenant) -> tuple[int, float]:
        """Tokens that a tenant with a limit of them may learn now, and seconds until it may learn all of them again."""
        return await self._ledger.tokens(tenant)

    # --- one turn --------------------------------------------------------------------------------------------------

    async def _generate(self, ask: Ask) -> AsyncGenerator[Delta | TurnEnd, None]:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._admitted())
            meta = None
            if ask.session is not None:
                meta = await stack.enter_async_context(self._session(ask.tenant, ask.session, ask.if_match))
            policy = Policy.of(ask, meta)
            known = () if meta is None else meta.digests
            encoded = [await self._encode(prompt, known, reply=True) for prompt in ask.prompts]
            parts = [self._segment(ask, prompt, e, policy) for prompt, e in zip(ask.prompts, encoded, strict=True)]
            turn = Turn(ask.tenant, meta)
            answer = Answer(ask.generation, encoded, self._served.tokenizer)
            if policy.learn_prompt:
                turn.seen = [digest for e in encoded for digest in e.digests]
            if policy.adapt == "both" and isinstance(chat := ask.prompts[0], ChatPrompt):
                turn.said = lambda: prompts.reply_digests(chat.messages, answer.texts)
            writes = policy.learn_prompt or policy.learn_completion
            async with aclosing(self._run(parts, turn, write=writes)) as events:
                async for prompt_number, event in events:
                    for delta in answer.deltas(prompt_number, event):
                        yield delta
            for delta in answer.rest():
                yield delta
            yield TurnEnd(
                answer.finish_reasons,
                sum(len(e.token_ids) for e in encoded),
                turn.completion_tokens,
                None if meta is None else turn.adaptation(),
            )

    def _segment(self, ask: Ask, prompt: Prompt, encoded: Encoded, policy: Policy) -> Segment:
        options, count = ask.generation, len(encoded.token_ids)
        param = "messages" if isinstance(prompt, ChatPrompt) else "prompt"
        wanted = 0 if policy.adapt == "observe" else options.max_tokens
        if count + (wanted or 0) > self.context or (wanted is None and count == self.context):
            asked = f"{count} tokens" if not wanted else f"{count} tokens and 'max_tokens' {wanted}"
            raise BadRequest(
                f"'{param}' and completion may hold {self.context} tokens together (the model's context), "
                f"got {param} of {asked}.",
                param=param,
                code="context_length_exceeded",
            )
        generate = None
        if policy.adapt != "observe":
            generate = Generate(
                max_tokens=self.context - count if wanted is None else wanted,
                sampling=options.sampling,
                stop=options.stop,
                n=options.n,
                logprobs=options.logprobs,
                learn=policy.learn_completion,
            )
        scored = options.echo and options.logprobs is not None
        return Segment(
            encoded.token_ids,
            learn=encoded.learn if policy.learn_prompt else None,
            score=[True] * count if scored else None,
            top=max(1, options.logprobs or 0) if scored else 0,
            generate=generate,
        )

    async def _run(
        self,
        parts: Sequence[Segment],
        turn: Turn,
        *,
        write: bool,
        frozen: bool = False,
    ) -> AsyncGenerator[tuple[int, Event], None]:
        """Runs the requests of a turn and commits it; yields each event with the number of its request.

        A session's requests follow one another, since each may learn; without a session they run side by side.
        """
        if write:
            await self._ledger.check_learning(turn.tenant)
        queue: asyncio.Queue[tuple[Job, Event]] = asyncio.Queue()
        jobs: dict[Job, int] = {}
        if turn.meta is None:
            for number, part in enumerate(parts):
                jobs[Job([part], _putter(queue), frozen=frozen)] = number
        elif parts:
            memory = await self._memory(turn.tenant, turn.meta, write=write)
            proof_from, proof_rate = turn.meta.requests, self._proof_rate
            job = Job(parts, _putter(queue), memory, frozen=frozen, proof_from=proof_from, proof_rate=proof_rate)
            jobs[job] = 0
        for job in jobs:
            self._served.engine.submit(job)
        unsettled = set(jobs)
        try:
            while unsettled:
                job, event = await queue.get()
                if isinstance(event, Failed):
                    unsettled.discard(job)
                    raise event.error
                if isinstance(event, Finished):
                    committed = await self._finish(turn, event)
                    unsettled.discard(job)
                    self._served.engine.settle(job, committed)
                    continue
                yield (jobs[job] if turn.meta is None else event.segment), event
        finally:
            for job in unsettled:
                self._served.engine.cancel(job)
        if not jobs and turn.meta is not None:
            await self._finish(turn, Finished(Stats(), {}))

    async def _finish(self, turn: Turn, done: Finished) -> int | None:
        """Commits what a job did; returns the new version, or None if there was nothing to commit."""
        self._metrics.tokens_prefilled_total.inc(done.stats.prompt_tokens)
        self._metrics.tokens_predicted_total.inc(done.stats.completion_tokens)
        turn.completion_tokens += done.stats.completion_tokens
        meta = turn.meta
        if meta is None:
            return None
        turn.stats, turn.rows_written = done.stats, done.rows_written
        kept = prompts.remember(meta.digests, [*turn.seen, *turn.said()])
        if not done.rows and not done.stats.tokens_learned and set(kept) <= set(meta.digests):
            if meta.version == 0:
                await self._store.create(turn.tenant.name, meta)
            return None
        turn.meta = await uninterrupted(self._commit(turn.tenant, meta, done, kept))
        return turn.meta.version

    async def _commit(self, tenant: Tenant, meta: SessionMeta, done: Finished, digests: tuple[str, ...]) -> SessionMeta:
        stats = done.stats
        new = replace(
            meta,
            version=meta.version + 1,
            tokens_learned=meta.tokens_learned + stats.tokens_learned,
            rows=done.rows_held if done.rows else meta.rows,
            bytes=done.bytes_held if done.rows else meta.bytes,
            updated=time.time(),
            proof_tokens=meta.proof_tokens + stats.proof_tokens,
            loss_sum=meta.loss_sum + stats.proof_loss_sum,
            frozen_loss_sum=meta.frozen_loss_sum + stats.proof_frozen_loss_sum,
            requests=meta.requests + stats.segments_learned,
            digests=digests,
        )
        rows = {site: RowBatch(batch.slots.numpy(), batch.data.numpy()) for site, batch in done.rows.items()}
        with self._metrics.commit_seconds.time():
            await self._store.commit(tenant.name, new, rows)
        await self._ledger.learned(tenant, new.id, new.bytes, stats.tokens_learned)
        self._metrics.commit_bytes.observe(sum(batch.data.nbytes for batch in rows.values()))
        self._metrics.tokens_learned_total.inc(stats.tokens_learned)
        self._metrics.rows_written_total.inc(done.rows_written)
        self._metrics.guards_shut_total.inc(max(0, done.guards))
        self._metrics.guards_opened_total.inc(max(0, -done.guards))
        self._metrics.proof_tokens_total.inc(stats.proof_tokens)
        self._metrics.proof_loss_nats_total.inc(stats.proof_loss_sum)
        self._metrics.proof_frozen_loss_nats_total.inc(stats.proof_frozen_loss_sum)
        return new

    async def _memory(self, tenant: Tenant, meta: SessionMeta, *, write: bool) -> MemoryUse:
        """Where the engine finds the session's memory: on the device already, or with the rows that come along."""
        key = (tenant.name, meta.id)
        if meta.version == 0:
            return MemoryUse(key, 0, write, stored={})
        if self._served.engine.pin(key, meta.version):
            return MemoryUse(key, meta.version, write)
        with self._metrics.load_seconds.time():
            stored = await self._store.load(tenant.name, meta.id)
        if stored is None or stored.meta.version != meta.version:
            raise VersionConflict(f"Session {meta.id!r} was changed by somebody else during this turn.")
        rows = {
            site: SiteRows(torch.from_numpy(batch.slots), torch.from_numpy(batch.data))
            for site, batch in stored.sites.items()
        }
        return MemoryUse(key, meta.version, write, stored=rows)

    async def _observed(self, prompt: TextPrompt | ChatPrompt, meta: SessionMeta) -> Encoded:
        """The tokens of a text that may be empty, without BOS."""
        if isinstance(prompt, TextPrompt) and not prompt.text:
            return Encoded([], [])
        encoded = await self._encode(prompt, meta.digests, reply=False)
        return prompts.without_bos(encoded, self._served.tokenizer.start_token_id)

    async def _encode(self, prompt: Prompt, known: Sequence[str], *, reply: bool) -> Encoded:
        def encode() -> Encoded:
            return prompts.encode(prompt, self._served.tokenizer, known, reply=reply)

        long = isinstance(prompt, TextPrompt) and len(prompt.text) > LONG_TEXT
        return await asyncio.to_thread(encode) if long else encode()

    @property
    def _served(self) -> Served:
        if self._loaded is None:
            raise NotReady("The server is loading; try again later.")
        return self._loaded

    # --- order -----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _admitted(self) -> AsyncIterator[None]:
        """A place in the bounded queue."""
        if self.state != "ready":
            raise NotReady(f"The server is {self.state}; try again later.", code=self.state)
        if self._in_flight >= self._max_queue:
            raise Overloaded(f"The server has {self._in_flight} requests in hand and takes no more than that.")
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1

    @asynccontextmanager
    async def _session(self, tenant: Tenant, name: str, if_match: str | None) -> AsyncIterator[SessionMeta]:
        """A session for one turn, in the order of asking; a new one is at version 0 and not yet stored."""
        async with self._locks.hold((tenant.name, name)):
            meta = await self._store.meta(tenant.name, name)
            _require_match(if_match, meta)
            if meta is not None and meta.model != self._served.slow_weights:
                raise VersionConflict(
                    f"Session {name!r} was learned by other slow weights ({meta.model[:23]}…) than those served "
                    f"({self._served.slow_weights[:23]}…), and cannot be read with them.",
                    code="model_mismatch",
                )
            if meta is not None:
                yield meta
                return
            async with self._ledger.place(tenant, name):
                yield self._new_meta(name, {})

    def _new_meta(self, name: str, options: dict[str, str]) -> SessionMeta:
        now = time.time()
        return SessionMeta(
            id=name,
            version=0,
            model=self._served.slow_weights,
            tokens_learned=0,
            rows=0,
            bytes=0,
            created=now,
            updated=now,
            proof_tokens=0,
            loss_sum=0.0,
            frozen_loss_sum=0.0,
            requests=0,
            options=options,
            digests=(),
        )


async def _resumed(
    first: Delta | TurnEnd, rest: AsyncGenerator[Delta | TurnEnd, None]
) -> AsyncGenerator[Delta | TurnEnd, None]:
    async with aclosing(rest):
        yield first
        async for event in rest:
            yield event


def _putter(queue: asyncio.Queue[tuple[Job, Event]]) -> Callable[[Job, Event], None]:
    return lambda job, event: queue.put_nowait((job, event))


def _require_match(if_match: str | None, meta: SessionMeta | None) -> None:
    """RFC 9110 §13.1.1; a session that does not exist counts as version 0, which only `*` tells apart."""
    if if_match is None:
        return
    tags = [tag.strip() for tag in if_match.split(",")]
    current = f'"v{0 if meta is None else meta.version}"'
    if not (current in tags or ("*" in tags and meta is not None)):
        raise PreconditionFailed(f"'If-Match' is {if_match[:80]}, the session is at {current}.", param="If-Match")


def _unknown(session: str) -> NotFound:
    return NotFound(f"Session {session!r} does not exist.", param="id", code="session_not_found")


def _mean_loss(log_probs: Sequence[float]) -> float | None:
    return -sum(log_probs) / len(log_probs) if log_probs else None
