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

from service.engine import Event, Job, JobFailed, JobFinished, JobStats, MemoryAccess, Segment, StateId, TokenScores
from service.errors import NotFound, NotReady, PreconditionFailed, VersionConflict
from service.metrics import Metrics
from service.store.base import CommitMetadata, Option, RowBatch, SessionMeta, SessionStore, WriteMode
from service.store.errors import damaged_session
from service.tenants import Tenant
from service.turns import prompts
from service.turns.idempotency import RequestContext
from service.turns.learned_tokens import StateDelta, digest, pack_learned_tokens
from service.turns.prompts import ChatPrompt, EncodedPrompt, Prompt, TextPrompt, TokenPrompt
from service.turns.quotas import Quotas
from service.turns.session_gate import (
    ServerLimits,
    SessionGate,
    SessionHandle,
    known,
    require_match,
    session_changed,
    session_not_found,
)
from service.turns.types import (
    AdaptPolicy,
    CompletionJob,
    Delta,
    GenerationOptions,
    LoadedModel,
    ObserveResult,
    OutputProcessor,
    ScoreResult,
    TokenLogprob,
    Turn,
    TurnEnd,
    TurnRestarted,
    next_meta,
    pack_answer,
    score_result,
    segment,
    unpack_answer,
)
from service.types import Adaptation
from service.versions.export_file import as_tensors, is_valid_site

__all__ = [
    "ChatPrompt",
    "CompletionJob",
    "Delta",
    "GenerationOptions",
    "LoadedModel",
    "ObserveResult",
    "Prompt",
    "RequestContext",
    "ScoreResult",
    "ServerLimits",
    "Sessions",
    "TextPrompt",
    "TokenLogprob",
    "TokenPrompt",
    "TurnEnd",
    "TurnRestarted",
]

E = TypeVar("E")
NO_STATE_ID = (-1.0, -1.0, -1)  # the stamp of rows that no stored version has
LONG_TEXT_CHARS = 20_000  # characters from which on tokenising leaves the event loop's thread


class Sessions:
    """All sessions of this server; "loading" until `begin`."""

    def __init__(
        self,
        store: SessionStore,
        quotas: Quotas,
        metrics: Metrics,
        *,
        model_id: str,
        limits: ServerLimits,
        proof_rate: float,
    ) -> None:
        self.gate = SessionGate(store, quotas, metrics, limits)
        self.model_id = model_id
        self.store = store
        self._quotas = quotas
        self._metrics = metrics
        self._proof_rate = proof_rate
        self._loaded: LoadedModel | None = None

    @property
    def state(self) -> str:
        """ "loading", "ready" or "draining"."""
        return self.gate.state

    @property
    def fingerprints(self) -> dict[str, str]:
        return self.loaded_model.fingerprints

    @property
    def context(self) -> int:
        """Tokens that one request may hold."""
        return self.loaded_model.context

    @property
    def vocab_size(self) -> int:
        return self.loaded_model.vocab_size

    @property
    def in_flight(self) -> int:
        """Turns that run or wait."""
        return self.gate.in_flight

    def begin(self, loaded_model: LoadedModel) -> None:
        """The model is loaded: turns are taken from now on."""
        self._loaded = loaded_model
        self.gate.state = "ready"

    async def drain(self, timeout_s: float) -> None:
        """Takes no more turns, and waits for those there are."""
        self.gate.state = "draining"
        deadline = time.monotonic() + timeout_s
        while self.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    # --- turns -----------------------------------------------------------------------------------------------------

    async def generate(
        self, ctx: RequestContext, completion_job: CompletionJob
    ) -> AsyncGenerator[Delta | TurnRestarted | TurnEnd, None]:
        """Answers a completion request: `Delta`s, then one `TurnEnd` after the commit.

        Returns once the first event is there, so that every earlier error has a status of its own. Cancelling this call
        or closing the generator ends the work within one step of the engine and rolls the turn back.
        """
        events = self._generate(ctx, completion_job)
        return _prepend_event(await anext(events), events)

    async def observe(
        self, ctx: RequestContext, session: str, prompt: TextPrompt | ChatPrompt, *, if_match: str | None = None
    ) -> ObserveResult:
        """Learns a text of any length as one turn; of a chat, only what the session has not seen."""

        async def run_once() -> ObserveResult:
            async with self._acquire_session(ctx, session, if_match) as handle:
                if handle.replay is not None:
                    return ObserveResult(**handle.replay)
                meta = known(handle)
                encoded = await self._encode_observed(prompt, meta)
                start = self.loaded_model.tokenizer.start_token_id
                parts = prompts.segments(encoded, self.context, start, learn=True, score=False)
                turn = Turn(handle, seen_digests=encoded.digests)
                turn.result = lambda new: asdict(ObserveResult.of(turn.adaptation(new.version)))
                async for _ in self.run(parts, turn, write=True):
                    pass
                return ObserveResult.of(turn.adaptation())

        return await self.gate.turn(run_once)

    async def score(
        self, ctx: RequestContext, session: str, text: str, *, learn: bool, if_match: str | None = None
    ) -> ScoreResult:
        """Log-probabilities of a text of any length, with memory and without; learns each block after scoring it, if
        asked to."""

        async def run_once() -> ScoreResult:
            async with self._acquire_session(ctx, session, if_match, write="always" if learn else "never") as handle:
                if handle.replay is not None:
                    return ScoreResult(**handle.replay)
                meta = known(handle)
                encoded = await self._encode_observed(TextPrompt(text), meta)
                start = self.loaded_model.tokenizer.start_token_id
                parts = prompts.segments(encoded, self.context, start, learn=learn, score=True)
                turn, scored = Turn(handle), list[TokenScores]()
                tokens = [self.loaded_model.tokenizer.token_bytes(i) for i in encoded.token_ids]
                turn.result = lambda new: asdict(score_result(tokens, scored, new.version))
                async for _, event in self.run(parts, turn, write=learn, frozen=True):
                    if isinstance(event, TokenScores):
                        scored.append(event)
                return score_result(tokens, scored, turn.adaptation().version_to)

        return await self.gate.turn(run_once)

    # --- sessions --------------------------------------------------------------------------------------------------

    async def put(
        self, tenant: Tenant, session: str, options: dict[str, Option], *, model: str = "", if_match: str | None = None
    ) -> tuple[SessionMeta, bool]:
        """Creates a session with options (of the policy `model`, or of text), or replaces its options; returns it and
        whether it is new."""
        if model and model not in self.loaded_model.policies:
            raise NotFound(f"There is no policy {model[:80]!r}.", param="model", code="model_not_found")
        async with self.gate.lock_session(tenant, session):
            meta = await self.store.meta(tenant.name, session)
            require_match(if_match, meta)
            if meta is None:
                async with self._quotas.reserve_session(tenant, session):
                    return await self.store.create(
                        tenant.name, self.loaded_model.new_meta(session, options, model)
                    ), True
            if model:
                self.loaded_model.require_model(meta, model)
            return await self.store.configure(tenant.name, session, options), False

    async def get(self, tenant: Tenant, session: str) -> SessionMeta:
        """Raises NotFound."""
        meta = await self.store.meta(tenant.name, session)
        if meta is None:
            raise session_not_found(session)
        return meta

    async def delete(self, tenant: Tenant, session: str, *, if_match: str | None = None) -> None:
        """Erases a session, on every replica. Raises NotFound."""
        async with self.gate.lock_session(tenant, session):
            meta = None if if_match is None else await self.store.meta(tenant.name, session)
            require_match(if_match, meta)
            try:
                erased = await self.store.delete(tenant.name, session, version=None if meta is None else meta.version)
            except VersionConflict as error:
                raise PreconditionFailed(f"'If-Match' is {if_match}, and {error}.", param="If-Match") from error
            self.loaded_model.engine.drop((tenant.name, session))
            await self._quotas.drop(tenant, session)
            if not erased:
                raise session_not_found(session)

    async def list(self, tenant: Tenant, after: str, limit: int) -> tuple[list[SessionMeta], str | None]:
        """A page of sessions in order of their ids, and the id after which the next page starts."""
        page = await self.store.list(tenant.name, after=after, limit=limit + 1)
        return page[:limit], page[limit - 1].id if len(page) > limit else None

    async def count_cold(self, tenants: Iterable[str]) -> int:
        """Stored sessions, of these tenants together, that are not on the device."""
        stored = sum([await self.store.count(name) for name in tenants])
        return max(0, stored - self.loaded_model.engine.sessions_hot)

    async def tokens_left(self, tenant: Tenant) -> tuple[int, float]:
        """Tokens that a tenant with a limit of them may learn now, and seconds until it may learn all of them again."""
        return await self._quotas.tokens(tenant)

    async def drop_erased(self) -> None:
        """Drops the hot copies of sessions that any replica erases; all of them where a message may have been missed.
        Never ends."""
        async for erased in self.store.erased():
            if self._loaded is None:
                continue
            if erased is None:
                self.loaded_model.engine.drop_all()
            else:
                self.loaded_model.engine.drop(erased)

    # --- one turn --------------------------------------------------------------------------------------------------

    async def _generate(
        self, ctx: RequestContext, completion_job: CompletionJob
    ) -> AsyncGenerator[Delta | TurnRestarted | TurnEnd, None]:
        """Runs the turn; once more if another replica changed the session and nothing was told to a stream."""
        told = False
        async with self.gate.admit():
            for last in (False, True):
                try:
                    async with aclosing(self._generate_once(ctx, completion_job)) as events:
                        async for event in events:
                            told = told or completion_job.stream
                            yield event
                    return
                except VersionConflict as error:
                    if told or last:
                        raise session_changed() from error
                if not completion_job.stream:
                    yield TurnRestarted()

    async def _generate_once(
        self, ctx: RequestContext, completion_job: CompletionJob
    ) -> AsyncGenerator[Delta | TurnEnd, None]:
        async with AsyncExitStack() as stack:
            handle = None
            if completion_job.session is not None:
                write: WriteMode = {None: "unless predict", "predict": "never"}.get(completion_job.adapt, "always")  # type: ignore[assignment]
                handle = await stack.enter_async_context(
                    self._acquire_session(ctx, completion_job.session, completion_job.if_match, write=write)
                )
                if handle.replay is not None:
                    deltas, end = unpack_answer(handle.replay)
                    for delta in deltas:
                        yield delta
                    yield end
                    return
            meta = None if handle is None else handle.meta
            policy = AdaptPolicy.of(completion_job, meta)
            known = () if meta is None else meta.digests
            encoded = [await self._encode(prompt, known, reply=True) for prompt in completion_job.prompts]
            parts = [
                segment(completion_job, prompt, e, policy, self.context)
                for prompt, e in zip(completion_job.prompts, encoded, strict=True)
            ]
            turn = Turn(handle)
            output = OutputProcessor(completion_job.generation, encoded, self.loaded_model.tokenizer)
            if policy.learn_prompt:
                turn.seen_digests = [digest for e in encoded for digest in e.digests]
            if policy.adapt == "both" and isinstance(chat := completion_job.prompts[0], ChatPrompt):
                turn.said = lambda: prompts.reply_digests(chat.messages, output.texts)
            told, late_deltas = list[Delta](), list[Delta]()

            def turn_end(adaptation: Adaptation | None) -> TurnEnd:
                tokens = sum(len(e.token_ids) for e in encoded)
                return TurnEnd(output.finish_reasons, tokens, turn.completion_tokens, adaptation)

            def result(new: SessionMeta) -> dict[str, Any]:
                late_deltas.extend(output.rest())
                return pack_answer([*told, *late_deltas], turn_end(turn.adaptation(new.version)))

            turn.result = result
            writes = policy.learn_prompt or policy.learn_completion
            async with aclosing(self.run(parts, turn, write=writes)) as events:
                async for prompt_number, event in events:
                    for delta in output.deltas(prompt_number, event):
                        if writes:
                            told.append(delta)
                        yield delta
            for delta in [*late_deltas, *output.rest()]:
                yield delta
            yield turn_end(None if meta is None else turn.adaptation())

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
        if turn.handle is not None and ((write and (parts or turn.policy_request)) or turn.kind in ("fork", "import")):
            await self._quotas.check_learning(turn.handle.ctx.tenant)
        queue: asyncio.Queue[tuple[Job, Event]] = asyncio.Queue()
        jobs: dict[Job, int] = {}
        if turn.meta is None:
            for number, part in enumerate(parts):
                jobs[Job([part], _queue_sink(queue), frozen=frozen)] = number
        elif parts or turn.policy_request is not None:
            memory = await self._memory(turn, write=write)
            start = turn.meta if turn.state_delta is None else turn.state_delta.apply_to_meta(turn.meta)
            proof_from, proof_rate = start.requests, self._proof_rate
            job = Job(parts, _queue_sink(queue), memory, frozen, proof_from, proof_rate, turn.policy_request)
            jobs[job] = 0
        for job in jobs:
            self.loaded_model.engine.submit(job)
        unsettled = set(jobs)
        try:
            while unsettled:
                job, event = await queue.get()
                if isinstance(event, JobFailed):
                    unsettled.discard(job)
                    raise event.error
                if isinstance(event, JobFinished):
                    committed = await self._finish(turn, event, parts)
                    unsettled.discard(job)
                    self.loaded_model.engine.settle(job, committed)
                    continue
                yield (jobs[job] if turn.meta is None else event.segment), event
        finally:
            for job in unsettled:
                self.loaded_model.engine.cancel(job)
        if not jobs and turn.meta is not None:
            await self._finish(turn, JobFinished(JobStats(), {}), parts)

    async def _finish(self, turn: Turn, done: JobFinished, parts: Sequence[Segment]) -> StateId | None:
        """Commits what a job did; returns when the session now is as of, or None if there was nothing to commit."""
        self._metrics.tokens_prefilled_total.inc(done.stats.prompt_tokens)
        self._metrics.tokens_predicted_total.inc(done.stats.completion_tokens)
        turn.completion_tokens += done.stats.completion_tokens
        if turn.handle is None or turn.meta is None:
            return None
        meta = turn.meta if turn.state_delta is None else turn.state_delta.apply_to_meta(turn.meta)
        turn.stats, turn.rows_written = done.stats, done.rows_written
        kept = prompts.merge_digests(meta.digests, [*turn.seen_digests, *turn.said()])
        learned = done.rows or done.stats.tokens_learned or not set(kept) <= set(meta.digests)
        if turn.state_delta is None and not learned:
            if meta.version == 0:
                await self.store.create(turn.handle.ctx.tenant.name, meta, turn.handle.lease)
            return None
        turn.meta = await self._commit(turn, turn.handle, done, next_meta(meta, done, kept), parts)
        return turn.meta.state_id

    async def _commit(
        self, turn: Turn, handle: SessionHandle, done: JobFinished, new: SessionMeta, parts: Sequence[Segment]
    ) -> SessionMeta:
        stats, limits = done.stats, self.gate.limits
        learned_tokens = pack_learned_tokens(parts, done.learned_completions)
        entry: dict[str, Any] = {
            "kind": turn.kind,
            "time": new.updated,
            "digest": digest(learned_tokens),
            "tokens": stats.tokens_learned,
            "rows": done.rows_written,
            "loss": stats.loss_sum / stats.tokens_learned if stats.tokens_learned else None,
            "request_id": handle.ctx.request_id,
        }
        if turn.of is not None:
            entry["of"] = turn.of
        if turn.completion_tokens and len(parts) == 1:
            entry["answer"] = [handle.ctx.id, len(parts[0].token_ids)]
        idempotency_record = handle.ctx.idempotency_record(
            turn.result(new), new.version, key_ttl_s=limits.key_ttl_s, retry_ttl_s=limits.retry_ttl_s
        )
        commit_metadata = CommitMetadata(
            log=entry,
            text=learned_tokens if new.options.get("keep_text") and turn.kind == "learn" else b"",
            idempotency_record=idempotency_record,
        )
        rows = {site: RowBatch(batch.slots.numpy(), batch.data.numpy()) for site, batch in done.rows.items()}
        state_delta = StateDelta({}, rows, {}) if turn.state_delta is None else turn.state_delta.with_rows(rows)
        await self.gate.commit(
            handle,
            new,
            state_delta.sites,
            cleared_slots=state_delta.cleared_slots,
            commit_metadata=commit_metadata,
            tokens=stats.tokens_learned,
        )
        if turn.policy_request is None:
            self._metrics.tokens_learned_total.inc(stats.tokens_learned)
        else:
            self._metrics.observe_rewards(turn.policy_request, new.tokens_learned, stats)
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

    async def _memory(self, turn: Turn, *, write: bool) -> MemoryAccess:
        """Where the engine finds the session's memory: on the device already, or with the rows that come along."""
        assert turn.handle is not None and turn.meta is not None
        meta, tenant = turn.meta, turn.handle.ctx.tenant.name
        key, state_id, policy = (
            (tenant, meta.id),
            meta.state_id,
            "" if turn.policy_request is None else turn.policy_request.policy,
        )
        if turn.state_delta is None and meta.version == 0:
            return MemoryAccess(key, state_id, write, {}, policy)
        if turn.state_delta is None and self.loaded_model.engine.pin(key, state_id, policy):
            return MemoryAccess(key, state_id, write, policy=policy)
        with self._metrics.load_seconds.time():
            stored = await self.store.load(tenant, meta.id)
        if stored is None or stored.meta.state_id != state_id:
            raise VersionConflict(f"Session {meta.id!r} was changed by somebody else during this turn.")
        sites, config = stored.sites, self.loaded_model.engine.memory_config(policy)
        vocab_size = self.loaded_model.policies[policy].config.actions if policy else self.vocab_size
        if not all(is_valid_site(name, batch, config, vocab_size) for name, batch in sites.items()):
            raise damaged_session(meta.id)
        if turn.state_delta is not None:
            sites, state_id = turn.state_delta.apply_to_rows(sites), NO_STATE_ID
        return MemoryAccess(key, state_id, write, as_tensors(sites), policy)

    async def _encode_observed(self, prompt: TextPrompt | ChatPrompt, meta: SessionMeta) -> EncodedPrompt:
        """The tokens of a text that may be empty, without BOS."""
        if isinstance(prompt, TextPrompt) and not prompt.text:
            return EncodedPrompt([], [])
        encoded = await self._encode(prompt, meta.digests, reply=False)
        return prompts.without_bos(encoded, self.loaded_model.tokenizer.start_token_id)

    async def _encode(self, prompt: Prompt, known: Sequence[str], *, reply: bool) -> EncodedPrompt:
        def encode() -> EncodedPrompt:
            return prompts.encode(prompt, self.loaded_model.tokenizer, known, reply=reply)

        long = isinstance(prompt, TextPrompt) and len(prompt.text) > LONG_TEXT_CHARS
        return await asyncio.to_thread(encode) if long else encode()

    @property
    def loaded_model(self) -> LoadedModel:
        """The model; raises NotReady while it loads."""
        if self._loaded is None:
            raise NotReady("The server is loading; try again later.")
        return self._loaded

    # --- order -----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _acquire_session(
        self, ctx: RequestContext, name: str, if_match: str | None, *, write: WriteMode = "always"
    ) -> AsyncIterator[SessionHandle]:
        """A session for one turn; a new one is at version 0 and not yet stored."""
        async with self.gate.acquire(ctx, name, write=write, if_match=if_match) as handle:
            if handle.replay is None:
                if handle.meta is None:
                    handle.meta = self.loaded_model.new_meta(name, {})
                self.loaded_model.require_model(handle.meta)
            yield handle


async def _prepend_event(first: E, rest: AsyncGenerator[E, None]) -> AsyncGenerator[E, None]:
    async with aclosing(rest):
        yield first
        async for event in rest:
            yield event


def _queue_sink(queue: asyncio.Queue[tuple[Job, Event]]) -> Callable[[Job, Event], None]:
    return lambda job, event: queue.put_nowait((job, event))
