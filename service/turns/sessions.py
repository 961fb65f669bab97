"""Turns. One turn = load → run → commit → tell, and nothing else knows what a turn is.

A session's turns run one at a time, in the order they came. A turn that ends early, for whatever reason, leaves the
session at the version it found.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import asdict
from typing import Any, TypeVar

from service.engine import Event, Failed, Finished, Job, MemoryUse, Segment, Stamp, Stats, TokenScores
from service.errors import NotFound, NotReady, PreconditionFailed, VersionConflict
from service.metrics import Metrics
from service.store.base import Note, Option, RowBatch, SessionMeta
from service.store.codec import damaged
from service.store.redis.store import RedisStore
from service.tenants import Tenant
from service.turns import prompts
from service.turns.idempotency import Call
from service.turns.learned_tokens import Content, digest, pack_lesson
from service.turns.prompts import ChatPrompt, Encoded, Prompt, TextPrompt, TokenPrompt
from service.turns.quotas import Ledger
from service.turns.session_gate import Held, Limits, Turnstile, Write, known, overtaken, require_match, unknown
from service.turns.types import (
    Again,
    Answer,
    Ask,
    Delta,
    Generation,
    Grant,
    ObserveResult,
    ScoreResult,
    Served,
    TokenLogprob,
    Turn,
    TurnEnd,
    next_meta,
    pack_answer,
    score_result,
    segment,
    unpack_answer,
)
from service.types import Adaptation
from service.versions.export_file import as_tensors, sound

__all__ = [
    "Again",
    "Ask",
    "Call",
    "ChatPrompt",
    "Delta",
    "Generation",
    "Limits",
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

E = TypeVar("E")
NOWHERE = (-1.0, -1.0, -1)  # the stamp of rows that no stored version has
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
        limits: Limits,
        proof_rate: float,
    ) -> None:
        self.gate = Turnstile(store, ledger, metrics, limits)
        self.model_id = model_id
        self.store = store
        self._ledger = ledger
        self._metrics = metrics
        self._proof_rate = proof_rate
        self._loaded: Served | None = None

    @property
    def state(self) -> str:
        """ "loading", "ready" or "draining"."""
        return self.gate.state

    @property
    def fingerprints(self) -> dict[str, str]:
        return self.served.fingerprints

    @property
    def context(self) -> int:
        """Tokens that one request may hold."""
        return self.served.context

    @property
    def vocab_size(self) -> int:
        return self.served.vocab_size

    @property
    def in_flight(self) -> int:
        """Turns that run or wait."""
        return self.gate.in_flight

    def begin(self, served: Served) -> None:
        """The model is loaded: turns are taken from now on."""
        self._loaded = served
        self.gate.state = "ready"

    async def drain(self, timeout_s: float) -> None:
        """Takes no more turns, and waits for those there are."""
        self.gate.state = "draining"
        deadline = time.monotonic() + timeout_s
        while self.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    # --- turns -----------------------------------------------------------------------------------------------------

    async def generate(self, call: Call, ask: Ask) -> AsyncGenerator[Delta | Again | TurnEnd, None]:
        """Answers a completion request: `Delta`s, then one `TurnEnd` after the commit.

        Returns once the first event is there, so that every earlier error has a status of its own. Cancelling this call
        or closing the generator ends the work within one step of the engine and rolls the turn back.
        """
        events = self._generate(call, ask)
        return _resumed(await anext(events), events)

    async def observe(
        self, call: Call, session: str, prompt: TextPrompt | ChatPrompt, *, if_match: str | None = None
    ) -> ObserveResult:
        """Learns a text of any length as one turn; of a chat, only what the session has not seen."""

        async def turn_once() -> ObserveResult:
            async with self._session(call, session, if_match) as held:
                if held.replay is not None:
                    return ObserveResult(**held.replay)
                meta = known(held)
                encoded = await self._observed(prompt, meta)
                start = self.served.tokenizer.start_token_id
                parts = prompts.segments(encoded, self.context, start, learn=True, score=False)
                turn = Turn(held, seen=encoded.digests)
                turn.result = lambda new: asdict(ObserveResult.of(turn.adaptation(new.version)))
                async for _ in self.run(parts, turn, write=True):
                    pass
                return ObserveResult.of(turn.adaptation())

        return await self.gate.turn(turn_once)

    async def score(
        self, call: Call, session: str, text: str, *, learn: bool, if_match: str | None = None
    ) -> ScoreResult:
        """Log-probabilities of a text of any length, with memory and without; learns each block after scoring it, if
        asked to."""

        async def turn_once() -> ScoreResult:
            async with self._session(call, session, if_match, write="always" if learn else "never") as held:
                if held.replay is not None:
                    return ScoreResult(**held.replay)
                meta = known(held)
                encoded = await self._observed(TextPrompt(text), meta)
                start = self.served.tokenizer.start_token_id
                parts = prompts.segments(encoded, self.context, start, learn=learn, score=True)
                turn, scored = Turn(held), list[TokenScores]()
                tokens = [self.served.tokenizer.token_bytes(i) for i in encoded.token_ids]
                turn.result = lambda new: asdict(score_result(tokens, scored, new.version))
                async for _, event in self.run(parts, turn, write=learn, frozen=True):
                    if isinstance(event, TokenScores):
                        scored.append(event)
                return score_result(tokens, scored, turn.adaptation().version_to)

        return await self.gate.turn(turn_once)

    # --- sessions --------------------------------------------------------------------------------------------------

    async def put(
        self, tenant: Tenant, session: str, options: dict[str, Option], *, model: str = "", if_match: str | None = None
    ) -> tuple[SessionMeta, bool]:
        """Creates a session with options (of the policy `model`, or of text), or replaces its options; returns it and
        whether it is new."""
        if model and model not in self.served.policies:
            raise NotFound(f"There is no policy {model[:80]!r}.", param="model", code="model_not_found")
        async with self.gate.ordered(tenant, session):
            meta = await self.store.meta(tenant.name, session)
            require_match(if_match, meta)
            if meta is None:
                async with self._ledger.place(tenant, session):
                    return await self.store.create(tenant.name, self.served.new_meta(session, options, model)), True
            if model:
                self.served.require_own(meta, model)
            return await self.store.configure(tenant.name, session, options), False

    async def get(self, tenant: Tenant, session: str) -> SessionMeta:
        """Raises NotFound."""
        meta = await self.store.meta(tenant.name, session)
        if meta is None:
            raise unknown(session)
        return meta

    async def delete(self, tenant: Tenant, session: str, *, if_match: str | None = None) -> None:
        """Erases a session, on every replica. Raises NotFound."""
        async with self.gate.ordered(tenant, session):
            meta = None if if_match is None else await self.store.meta(tenant.name, session)
            require_match(if_match, meta)
            try:
                erased = await self.store.delete(tenant.name, session, version=None if meta is None else meta.version)
            except VersionConflict as error:
                raise PreconditionFailed(f"'If-Match' is {if_match}, and {error}.", param="If-Match") from error
            self.served.engine.forget((tenant.name, session))
            await self._ledger.forget(tenant, session)
            if not erased:
                raise unknown(session)

    async def list(self, tenant: Tenant, after: str, limit: int) -> tuple[list[SessionMeta], str | None]:
        """A page of sessions in order of their ids, and the id after which the next page starts."""
        page = await self.store.list(tenant.name, after=after, limit=limit + 1)
        return page[:limit], page[limit - 1].id if len(page) > limit else None

    async def count_cold(self, tenants: Iterable[str]) -> int:
        """Stored sessions, of these tenants together, that are not on the device."""
        stored = sum([await self.store.count(name) for name in tenants])
        return max(0, stored - self.served.engine.sessions_hot)

    async def tokens_left(self, tenant: Tenant) -> tuple[int, float]:
        """Tokens that a tenant with a limit of them may learn now, and seconds until it may learn all of them again."""
        return await self._ledger.tokens(tenant)

    async def forget_erased(self) -> None:
        """Drops the hot copies of sessions that any replica erases; all of them where a message may have been missed.
        Never ends."""
        async for erased in self.store.erased():
            if self._loaded is None:
                continue
            if erased is None:
                self.served.engine.forget_all()
            else:
                self.served.engine.forget(erased)

    # --- one turn --------------------------------------------------------------------------------------------------

    async def _generate(self, call: Call, ask: Ask) -> AsyncGenerator[Delta | Again | TurnEnd, None]:
        """Runs the turn; once more if another replica changed the session and nothing was told to a stream."""
        told = False
        async with self.gate.admitted():
            for last in (False, True):
                try:
                    async with aclosing(self._generate_once(call, ask)) as events:
                        async for event in events:
                            told = told or ask.stream
                            yield event
                    return
                except VersionConflict as error:
                    if told or last:
                        raise overtaken() from error
                if not ask.stream:
                    yield Again()

    async def _generate_once(self, call: Call, ask: Ask) -> AsyncGenerator[Delta | TurnEnd, None]:
        async with AsyncExitStack() as stack:
            held = None
            if ask.session is not None:
                write: Write = {None: "unless predict", "predict": "never"}.get(ask.adapt, "always")  # type: ignore[assignment]
                held = await stack.enter_async_context(self._session(call, ask.session, ask.if_match, write=write))
                if held.replay is not None:
                    deltas, end = unpack_answer(held.replay)
                    for delta in deltas:
                        yield delta
                    yield end
                    return
            meta = None if held is None else held.meta
            policy = Grant.of(ask, meta)
            known = () if meta is None else meta.digests
            encoded = [await self._encode(prompt, known, reply=True) for prompt in ask.prompts]
            parts = [
                segment(ask, prompt, e, policy, self.context) for prompt, e in zip(ask.prompts, encoded, strict=True)
            ]
            turn = Turn(held)
            answer = Answer(ask.generation, encoded, self.served.tokenizer)
            if policy.learn_prompt:
                turn.seen = [digest for e in encoded for digest in e.digests]
            if policy.adapt == "both" and isinstance(chat := ask.prompts[0], ChatPrompt):
                turn.said = lambda: prompts.reply_digests(chat.messages, answer.texts)
            told, late = list[Delta](), list[Delta]()

            def told_last(adaptation: Adaptation | None) -> TurnEnd:
                tokens = sum(len(e.token_ids) for e in encoded)
                return TurnEnd(answer.finish_reasons, tokens, turn.completion_tokens, adaptation)

            def result(new: SessionMeta) -> dict[str, Any]:
                late.extend(answer.rest())
                return pack_answer([*told, *late], told_last(turn.adaptation(new.version)))

            turn.result = result
            writes = policy.learn_prompt or policy.learn_completion
            async with aclosing(self.run(parts, turn, write=writes)) as events:
                async for prompt_number, event in events:
                    for delta in answer.deltas(prompt_number, event):
                        if writes:
                            told.append(delta)
                        yield delta
            for delta in [*late, *answer.rest()]:
                yield delta
            yield told_last(None if meta is None else turn.adaptation())

    async def run(
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
        if turn.held is not None and ((write and (parts or turn.deed)) or turn.kind in ("fork", "import")):
            await self._ledger.check_learning(turn.held.call.tenant)
        queue: asyncio.Queue[tuple[Job, Event]] = asyncio.Queue()
        jobs: dict[Job, int] = {}
        if turn.meta is None:
            for number, part in enumerate(parts):
                jobs[Job([part], _putter(queue), frozen=frozen)] = number
        elif parts or turn.deed is not None:
            memory = await self._memory(turn, write=write)
            start = turn.meta if turn.content is None else turn.content.applied_to(turn.meta)
            proof_from, proof_rate = start.requests, self._proof_rate
            job = Job(parts, _putter(queue), memory, frozen, proof_from, proof_rate, turn.deed)
            jobs[job] = 0
        for job in jobs:
            self.served.engine.submit(job)
        unsettled = set(jobs)
        try:
            while unsettled:
                job, event = await queue.get()
                if isinstance(event, Failed):
                    unsettled.discard(job)
                    raise event.error
                if isinstance(event, Finished):
                    committed = await self._finish(turn, event, parts)
                    unsettled.discard(job)
                    self.served.engine.settle(job, committed)
                    continue
                yield (jobs[job] if turn.meta is None else event.segment), event
        finally:
            for job in unsettled:
                self.served.engine.cancel(job)
        if not jobs and turn.meta is not None:
            await self._finish(turn, Finished(Stats(), {}), parts)

    async def _finish(self, turn: Turn, done: Finished, parts: Sequence[Segment]) -> Stamp | None:
        """Commits what a job did; returns when the session now is as of, or None if there was nothing to commit."""
        self._metrics.tokens_prefilled_total.inc(done.stats.prompt_tokens)
        self._metrics.tokens_predicted_total.inc(done.stats.completion_tokens)
        turn.completion_tokens += done.stats.completion_tokens
        if turn.held is None or turn.meta is None:
            return None
        meta = turn.meta if turn.content is None else turn.content.applied_to(turn.meta)
        turn.stats, turn.rows_written = done.stats, done.rows_written
        kept = prompts.remember(meta.digests, [*turn.seen, *turn.said()])
        learned = done.rows or done.stats.tokens_learned or not set(kept) <= set(meta.digests)
        if turn.content is None and not learned:
            if meta.version == 0:
                await self.store.create(turn.held.call.tenant.name, meta, turn.held.lease)
            return None
        turn.meta = await self._commit(turn, turn.held, done, next_meta(meta, done, kept), parts)
        return turn.meta.stamp

    async def _commit(
        self, turn: Turn, held: Held, done: Finished, new: SessionMeta, parts: Sequence[Segment]
    ) -> SessionMeta:
        stats, limits = done.stats, self.gate.limits
        lesson = pack_lesson(parts, done.said)
        entry: dict[str, Any] = {
            "kind": turn.kind,
            "time": new.updated,
            "digest": digest(lesson),
            "tokens": stats.tokens_learned,
            "rows": done.rows_written,
            "loss": stats.loss_sum / stats.tokens_learned if stats.tokens_learned else None,
            "request_id": held.call.request_id,
        }
        if turn.of is not None:
            entry["of"] = turn.of
        if turn.completion_tokens and len(parts) == 1:
            entry["answer"] = [held.call.id, len(parts[0].token_ids)]
        once = held.call.once(turn.result(new), new.version, key_ttl_s=limits.key_ttl_s, retry_ttl_s=limits.retry_ttl_s)
        note = Note(
            log=entry,
            text=lesson if new.options.get("keep_text") and turn.kind == "learn" else b"",
            once=once,
        )
        rows = {site: RowBatch(batch.slots.numpy(), batch.data.numpy()) for site, batch in done.rows.items()}
        content = Content({}, rows, {}) if turn.content is None else turn.content.overlaid(rows)
        await self.gate.commit(held, new, content.sites, gone=content.gone, note=note, tokens=stats.tokens_learned)
        if turn.deed is None:
            self._metrics.tokens_learned_total.inc(stats.tokens_learned)
        else:
            self._metrics.rewarded(turn.deed, new.tokens_learned, stats)
        self._metrics.rows_written_total.inc(done.rows_written)
        self._metrics.guards_shut_total.inc(max(0, done.guards))
        self._metrics.guards_opened_total.inc(max(0, -done.guards))
        self._metrics.proof_tokens_total.inc(stats.proof_tokens)
        self._metrics.proof_loss_nats_total.inc(stats.proof_loss_sum)
        self._metrics.proof_frozen_loss_nats_total.inc(stats.proof_frozen_loss_sum)
        if stats.proof_tokens:
            gain = (new.frozen_loss_sum - new.loss_sum) / new.proof_tokens
            self._metrics.session_gain_nats_per_token.observe(gain)
        return new

    async def _memory(self, turn: Turn, *, write: bool) -> MemoryUse:
        """Where the engine finds the session's memory: on the device already, or with the rows that come along."""
        assert turn.held is not None and turn.meta is not None
        meta, tenant = turn.meta, turn.held.call.tenant.name
        key, stamp, policy = (tenant, meta.id), meta.stamp, "" if turn.deed is None else turn.deed.policy
        if turn.content is None and meta.version == 0:
            return MemoryUse(key, stamp, write, {}, policy)
        if turn.content is None and self.served.engine.pin(key, stamp, policy):
            return MemoryUse(key, stamp, write, policy=policy)
        with self._metrics.load_seconds.time():
            stored = await self.store.load(tenant, meta.id)
        if stored is None or stored.meta.stamp != stamp:
            raise VersionConflict(f"Session {meta.id!r} was changed by somebody else during this turn.")
        sites, config = stored.sites, self.served.engine.memory_config(policy)
        vocab_size = self.served.policies[policy].config.actions if policy else self.vocab_size
        if not all(sound(name, batch, config, vocab_size) for name, batch in sites.items()):
            raise damaged(meta.id)
        if turn.content is not None:
            sites, stamp = turn.content.rows_from(sites), NOWHERE
        return MemoryUse(key, stamp, write, as_tensors(sites), policy)

    async def _observed(self, prompt: TextPrompt | ChatPrompt, meta: SessionMeta) -> Encoded:
        """The tokens of a text that may be empty, without BOS."""
        if isinstance(prompt, TextPrompt) and not prompt.text:
            return Encoded([], [])
        encoded = await self._encode(prompt, meta.digests, reply=False)
        return prompts.without_bos(encoded, self.served.tokenizer.start_token_id)

    async def _encode(self, prompt: Prompt, known: Sequence[str], *, reply: bool) -> Encoded:
        def encode() -> Encoded:
            return prompts.encode(prompt, self.served.tokenizer, known, reply=reply)

        long = isinstance(prompt, TextPrompt) and len(prompt.text) > LONG_TEXT
        return await asyncio.to_thread(encode) if long else encode()

    @property
    def served(self) -> Served:
        """The model; raises NotReady while it loads."""
        if self._loaded is None:
            raise NotReady("The server is loading; try again later.")
        return self._loaded

    # --- order -----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _session(
        self, call: Call, name: str, if_match: str | None, *, write: Write = "always"
    ) -> AsyncIterator[Held]:
        """A session for one turn; a new one is at version 0 and not yet stored."""
        async with self.gate.hold(call, name, write=write, if_match=if_match) as held:
            if held.replay is None:
                if held.meta is None:
                    held.meta = self.served.new_meta(name, {})
                self.served.require_own(held.meta)
            yield held


async def _resumed(first: E, rest: AsyncGenerator[E, None]) -> AsyncGenerator[E, None]:
    async with aclosing(rest):
        yield first
        async for event in rest:
            yield event


def _putter(queue: asyncio.Queue[tuple[Job, Event]]) -> Callable[[Job, Event], None]:
    return lambda job, event: queue.put_nowait((job, event))
