"""The sessions of one server: what routes ask for, and the server's state from loading to draining."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing, suppress
from typing import TypeVar

from service.errors import EngineError, NotFound, NotReady, PreconditionFailed, Unavailable, VersionConflict
from service.metrics import Metrics
from service.store.base import Option, SessionMeta, SessionStore
from service.tenants import Tenant
from service.turns.completion import CompletionTurn, Delta, TurnEnd
from service.turns.completion_job import CompletionJob
from service.turns.idempotency import RequestContext
from service.turns.loaded_model import LoadedModel
from service.turns.prompts import ChatPrompt, TextPrompt, require_fits
from service.turns.quotas import Quotas
from service.turns.run import Turn, TurnRestarted, TurnRunner
from service.turns.session_gate import ServerLimits, SessionGate, require_match, session_not_found
from service.turns.text_turns import ObserveResult, ObserveTurn, ScoreResult, ScoreTurn
from service.types import StoreStatus

CHECK_EVERY_S = 60.0  # time between two looks whether the sessions on the device still exist
E = TypeVar("E")


class Sessions:
    """All sessions of this server. The state is "loading" until `begin`, then "ready", at last "draining"."""

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
        self.store_status: StoreStatus = "ok"  # for the probes
        self._quotas = quotas
        self._turns = TurnRunner(self.gate, store, quotas, metrics, proof_rate)
        self._loaded: LoadedModel | None = None

    # --- the server's state ----------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """ "loading", "ready" or "draining"."""
        return self.gate.state

    @property
    def loaded_model(self) -> LoadedModel:
        """The loaded model. Raises NotReady while the model loads."""
        if self._loaded is None:
            raise NotReady("The server is loading; try again later.")
        return self._loaded

    @property
    def fingerprints(self) -> dict[str, str]:
        return self.loaded_model.fingerprints

    @property
    def context(self) -> int:
        """Number of tokens that one request may hold."""
        return self.loaded_model.context

    @property
    def vocab_size(self) -> int:
        return self.loaded_model.vocab_size

    @property
    def num_parameters(self) -> int:
        return self.loaded_model.num_parameters

    @property
    def in_flight(self) -> int:
        """Number of turns that run or wait."""
        return self.gate.in_flight

    def set_ready(self, loaded_model: LoadedModel) -> None:
        """Take turns from now on, with the model that has been loaded."""
        self._loaded = loaded_model
        self.gate.state = "ready"

    async def drain(self, timeout_s: float) -> None:
        """Take no more turns, and wait for the turns in flight, at most `timeout_s` seconds."""
        self.gate.state = "draining"
        deadline = time.monotonic() + timeout_s
        while self.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    # --- turns -----------------------------------------------------------------------------------------------------

    async def generate(
        self, ctx: RequestContext, job: CompletionJob
    ) -> AsyncGenerator[Delta | TurnEnd | TurnRestarted, None]:
        """Answer a completion request: `Delta`s, then one `TurnEnd` after the commit.

        Returns once the first event exists, so that every earlier error gets its own HTTP status. Cancelling this call
        or closing the generator ends the work within one step of the engine and rolls the turn back.

        Raises BadRequest, before the turn has a place in the queue, for a prompt whose size tells that it cannot fit.
        """
        for prompt in job.prompts:
            require_fits(prompt, self.loaded_model.tokenizer, self.context)
        turn = CompletionTurn(job)
        events = self._turns.stream(ctx, turn, self.loaded_model, restartable=not job.stream)
        return _prepend(await anext(events), events)

    async def observe(
        self,
        ctx: RequestContext,
        session: str,
        prompt: TextPrompt | ChatPrompt,
        *,
        if_match: str | None = None,
        recall: bool | None = None,
        source: str | None = None,
    ) -> ObserveResult:
        """Learn a text of any length as one turn; of a chat, only what the session has not seen.

        recall: False keeps no episodes of the text; None is the session's option. source: where the text comes from,
        for the log.
        """
        return await self.run(ctx, ObserveTurn(session, prompt, if_match, recall, source))

    async def score(
        self,
        ctx: RequestContext,
        session: str,
        text: str,
        *,
        learn: bool,
        if_match: str | None = None,
        recall: bool | None = None,
    ) -> ScoreResult:
        """Score a text of up to `MAX_LOGPROBS` tokens, with memory and without.

        With `learn`, learn each block after its score; `recall` is that of `observe`.
        """
        return await self.run(ctx, ScoreTurn(session, text, learn, if_match, recall))

    async def run(self, ctx: RequestContext, turn: Turn[E]) -> E:
        """Run a turn to its end and return its last event."""
        return await self._turns.result(ctx, turn, self.loaded_model)

    # --- sessions --------------------------------------------------------------------------------------------------

    async def put(
        self, tenant: Tenant, session: str, options: dict[str, Option], *, model: str = "", if_match: str | None = None
    ) -> tuple[SessionMeta, bool]:
        """Create a session with options, of the policy `model` or of text, or replace the options of a session.

        Returns the session and whether the session is new.
        """
        if model and model not in self.loaded_model.policy_fingerprints:
            raise NotFound(f"There is no policy {model[:80]!r}.", param="model", code="model_not_found")
        async with self.gate.lock_session(tenant, session):
            meta = await self.store.meta(tenant.name, session)
            require_match(if_match, meta)
            self.loaded_model.require_options(meta, model, options)
            if meta is None:
                new = self.loaded_model.new_meta(session, options, model)
                async with self._quotas.reserve_session(tenant, session):
                    return await self.store.create(tenant.name, new), True
            if model:
                self.loaded_model.require_model(meta, model)
            return await self.store.configure(tenant.name, session, options), False

    async def get(self, tenant: Tenant, session: str) -> SessionMeta:
        """Return the meta of a session. Raises NotFound."""
        meta = await self.store.meta(tenant.name, session)
        if meta is None:
            raise session_not_found(session)
        return meta

    async def delete(self, tenant: Tenant, session: str, *, if_match: str | None = None) -> None:
        """Erase a session on every replica. Raises NotFound."""
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
        """Return a page of sessions, ordered by id, and the id after which the next page starts."""
        page = await self.store.list(tenant.name, after=after, limit=limit + 1)
        return page[:limit], page[limit - 1].id if len(page) > limit else None

    async def count_cold(self, tenants: Iterable[str]) -> int:
        """Return how many stored sessions of these tenants together are not on the device."""
        stored = sum([await self.store.count(name) for name in tenants])
        return max(0, stored - self.loaded_model.engine.sessions_hot)

    async def tokens_left(self, tenant: Tenant) -> tuple[int, float]:
        """Return how many tokens a limited tenant may learn now, and the seconds until the full limit is back."""
        return await self._quotas.tokens(tenant)

    async def drop_erased(self) -> None:
        """Drop from the device each session that any replica erases, for ever.

        Where a message of the store may have been lost, drop all sessions.
        """
        async for erased in self.store.erased():
            if self._loaded is None:
                continue
            if erased is None:
                self.loaded_model.engine.drop_all()
            else:
                self.loaded_model.engine.drop(erased)

    async def drop_missing(self) -> None:
        """Drop from the device each session that the store has no more, because it expired for example, for ever."""
        while True:
            await asyncio.sleep(CHECK_EVERY_S)
            for key in [] if self._loaded is None else self.loaded_model.engine.resident_keys():
                with suppress(Unavailable, EngineError):
                    if await self.store.meta(*key) is None:
                        self.loaded_model.engine.drop(key)


async def _prepend(first: E, rest: AsyncGenerator[E, None]) -> AsyncGenerator[E, None]:
    """Yield the first event, then the rest; close the rest with this generator."""
    async with aclosing(rest):
        yield first
        async for event in rest:
            yield event
