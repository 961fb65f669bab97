"""A session's versions: going back, going two ways, taking away, bringing along. Each is one turn and one version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from service.engine import Segment
from service.errors import BadRequest, Conflict, VersionConflict
from service.store.base import History, SessionMeta
from service.tenants import Tenant
from service.turns.learned_tokens import (
    full_state_delta,
    kept_tokens_of,
    plan_unlearn,
    prompt_tokens_of,
    state_delta_at,
    unpack_learned_tokens,
    with_text,
)
from service.turns.prompts import message_digests
from service.turns.session_gate import SessionHandle, known, require_match, session_not_found
from service.turns.sessions import RequestContext, Sessions
from service.turns.types import ObserveResult, Turn
from service.versions.export_file import pack_session, read_export, unpack_session


class Versions:
    """What can be done with the versions of sessions. Every method raises NotFound for a session that is not there."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._gate = sessions.gate
        self._store = sessions.store

    async def log(
        self, tenant: Tenant, session: str, *, before: int | None, limit: int
    ) -> tuple[list[dict[str, Any]], int | None]:
        """Up to `limit` entries of the log, newest first, of versions below `before`, and the next page's `before`."""
        history = await self._store.history(tenant.name, session, undo=False)
        if history is not None and history.meta.options.get("keep_text"):
            history = await self._store.history(tenant.name, session, undo=True)
        if history is None:
            raise session_not_found(session)
        kept_tokens, decode = kept_tokens_of(history), self._sessions.loaded_model.tokenizer.decode
        entries = [entry for entry in reversed(history.log) if before is None or entry["version"] < before]
        page = [with_text(entry, kept_tokens, decode) for entry in entries[:limit]]
        return page, page[-1]["version"] if len(entries) > limit else None

    async def rollback(
        self, ctx: RequestContext, session: str, version: int, *, if_match: str | None = None
    ) -> SessionMeta:
        """A new version with the content of an earlier one. Raises Conflict for one that is not kept."""

        async def run_once() -> SessionMeta:
            async with self._gate.acquire(ctx, session, if_match=if_match, may_create=False) as handle:
                if handle.replay is not None:
                    return _replayed_meta(handle.replay)
                history = await self._history(handle, session)
                turn = Turn(handle, kind="rollback", of=version, state_delta=state_delta_at(history, version))
                return await self._commit_turn(turn)

        return await self._gate.turn(run_once)

    async def unlearn(
        self, ctx: RequestContext, session: str, version: int, *, if_match: str | None = None
    ) -> SessionMeta:
        """A new version as if `version` had never been learned: goes back to before it, and learns what came later
        again. Its chat messages stay known, so that a client that resends them does not teach them again.

        Raises Conflict where something that this needs is not kept."""

        async def run_once() -> SessionMeta:
            async with self._gate.acquire(ctx, session, if_match=if_match, may_create=False) as handle:
                if handle.replay is not None:
                    return _replayed_meta(handle.replay)
                history = await self._history(handle, session)
                self._sessions.loaded_model.require_loaded_model(history.meta)
                base, kept_tokens = plan_unlearn(history, version)
                state_delta = state_delta_at(history, base)
                state_delta = replace(state_delta, meta=state_delta.meta | {"digests": history.meta.digests})
                turn = Turn(handle, kind="unlearn", of=version, state_delta=state_delta)
                return await self._commit_turn(
                    turn, [part for learned_tokens in kept_tokens for part in unpack_learned_tokens(learned_tokens)]
                )

        return await self._gate.turn(run_once)

    async def learn_kept_text(
        self, ctx: RequestContext, session: str, completion_key: str, text: str, *, if_match: str | None = None
    ) -> ObserveResult:
        """Learns what a user kept of an answer, behind its prompt where the session keeps texts. Raises NotFound for an
        answer that is not in its log."""

        async def run_once() -> ObserveResult:
            async with self._gate.acquire(ctx, session, if_match=if_match, may_create=False) as handle:
                if handle.replay is not None:
                    return ObserveResult(**handle.replay)
                loaded_model = self._sessions.loaded_model
                loaded_model.require_model(known(handle))
                tokenizer, max_tokens = loaded_model.tokenizer, self._sessions.context - 1
                prompt = prompt_tokens_of(await self._history(handle, session), completion_key) or [
                    tokenizer.start_token_id
                ]
                learned = tokenizer.encode(text)[tokenizer.add_bos :]
                if len(learned) > max_tokens:
                    raise BadRequest(f"'text' may have {max_tokens} tokens, got {len(learned)}.", param="text")
                prompt = prompt[len(learned) - max_tokens - 1 :]
                part = Segment(prompt + learned, learn=[False] * len(prompt) + [True] * len(learned))
                turn = Turn(handle, seen_digests=list(message_digests([{"role": "assistant", "content": text}])))
                turn.result = lambda new: asdict(ObserveResult.of(turn.adaptation(new.version)))
                async for _ in self._sessions.run([part], turn, write=True):
                    pass
                return ObserveResult.of(turn.adaptation())

        return await self._gate.turn(run_once)

    async def fork(self, ctx: RequestContext, session: str, new: str, *, if_match: str | None = None) -> SessionMeta:
        """A new session that has learned the same. Raises Conflict if there is one of that id."""

        async def run_once() -> SessionMeta:
            async with self._gate.acquire(ctx, new) as handle:
                if handle.replay is not None:
                    return _replayed_meta(handle.replay)
                stored = await self._store.load(ctx.tenant.name, session)
                if stored is None:
                    raise session_not_found(session)
                require_match(if_match, stored.meta)
                if handle.meta is not None:
                    raise Conflict(f"Session {new!r} exists already.", param="id", code="session_exists")
                meta = self._sessions.loaded_model.new_meta(new, stored.meta.options)
                handle.meta = replace(meta, model=stored.meta.model)
                state_delta = full_state_delta(asdict(stored.meta), stored.sites, {})
                return await self._commit_turn(Turn(handle, kind="fork", of=session, state_delta=state_delta))

        return await self._gate.turn(run_once)

    async def export(self, tenant: Tenant, session: str) -> tuple[bytes, SessionMeta]:
        """The session as a file that `bring` takes."""
        stored = await self._store.load(tenant.name, session)
        if stored is None:
            raise session_not_found(session)
        return pack_session(stored, self._gate.limits.export_key), stored.meta

    async def bring(
        self, ctx: RequestContext, session: str, data: bytes, *, if_match: str | None = None
    ) -> tuple[SessionMeta, bool]:
        """Gives a session what an export holds, in place of what it had; returns it and whether it is new.

        Raises BadRequest for a file that is no sound export, Conflict for one of other slow weights."""
        loaded_model = self._sessions.loaded_model

        async def run_once() -> tuple[SessionMeta, bool]:
            async with self._gate.acquire(ctx, session, if_match=if_match) as handle:
                if handle.replay is not None:
                    return _replayed_meta(handle.replay), handle.replay["session"]["version"] == 1
                manifest, arrays = read_export(data, self._gate.limits.export_key)
                policy = loaded_model.require_loaded_model(
                    replace(loaded_model.new_meta(session, {}), model=manifest["model"])
                )
                vocab_size = loaded_model.policies[policy].config.actions if policy else loaded_model.vocab_size
                manifest, sites = unpack_session(
                    manifest, arrays, loaded_model.engine.memory_config(policy), vocab_size
                )
                new = handle.meta is None
                stored = None if new else await self._store.load(ctx.tenant.name, session)
                if handle.meta is None:
                    handle.meta = loaded_model.new_meta(session, {}, policy)
                loaded_model.require_model(handle.meta, policy)
                state_delta = full_state_delta(manifest, sites, stored.sites if stored else {})
                origin = f"{manifest['id']} v{manifest['version']}"
                return await self._commit_turn(Turn(handle, kind="import", of=origin, state_delta=state_delta)), new

        return await self._gate.turn(run_once)

    async def _history(self, handle: SessionHandle, session: str) -> History:
        history = await self._store.history(handle.ctx.tenant.name, session, undo=True)
        if history is None or history.meta.state_id != known(handle).state_id:
            raise VersionConflict(f"Session {session!r} was changed by somebody else during this turn.")
        return history

    async def _commit_turn(self, turn: Turn, parts: Sequence[Segment] = ()) -> SessionMeta:
        """Runs a turn to its end."""
        turn.result = lambda new: {"session": asdict(replace(new, digests=()))}
        async for _ in self._sessions.run(parts, turn, write=True):
            pass
        assert turn.handle is not None and turn.meta is not None
        if not parts:  # what the device holds is of an earlier version
            self._sessions.loaded_model.engine.drop((turn.handle.ctx.tenant.name, turn.meta.id))
        return turn.meta


def _replayed_meta(replay: dict[str, Any]) -> SessionMeta:
    return SessionMeta(**replay["session"] | {"digests": ()})
