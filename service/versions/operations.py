"""The operations on versions of sessions that routes call."""

from __future__ import annotations

from typing import Any

from service.concurrency import run_off_loop
from service.store.base import SessionMeta
from service.tenants import Tenant
from service.turns.idempotency import RequestContext
from service.turns.session_gate import session_not_found
from service.turns.sessions import Sessions
from service.turns.text_turns import ObserveResult
from service.versions.export_file import pack_session
from service.versions.lineage import kept_tokens_of, with_text
from service.versions.version_turns import ForkTurn, ImportTurn, KeptCompletionTurn, RollbackTurn, UnlearnTurn


class Versions:
    """Operations on the versions of sessions. Every method raises NotFound for a session that does not exist."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._store = sessions.store

    async def log(
        self, tenant: Tenant, session: str, *, before: int | None, limit: int, with_texts: bool = True
    ) -> tuple[list[dict[str, Any]], int | None]:
        """Return up to `limit` log entries below version `before`, newest first, and the next page's `before`."""
        history = await self._store.history(tenant.name, session, undo=False)
        if with_texts and history is not None and history.meta.options.get("keep_text"):
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
        """Make a version with the content of an earlier version. Raises Conflict for a version that is not kept."""
        meta, _ = await self._sessions.run(ctx, RollbackTurn(self._store, session, version, if_match))
        return meta

    async def unlearn(
        self,
        ctx: RequestContext,
        session: str,
        versions: frozenset[int],
        *,
        erase: bool = False,
        if_match: str | None = None,
    ) -> SessionMeta:
        """Make a version as if `versions` had never been learned; `erase` drops all versions before.

        Raises Conflict where neither what relearning needs is kept, nor an episode of each version.
        """
        turn = UnlearnTurn(self._store, session, versions, if_match, erase=erase)
        meta, _ = await self._sessions.run(ctx, turn)
        return meta

    async def learn_kept_text(
        self,
        ctx: RequestContext,
        session: str,
        completion_key: str,
        text: str,
        *,
        is_reply: bool,
        if_match: str | None = None,
    ) -> ObserveResult:
        """Learn what a user kept of a completion; is_reply: of one in a chat.

        Raises NotFound for a completion that is not in the session's log.
        """
        turn = KeptCompletionTurn(self._store, session, completion_key, text, if_match, is_reply=is_reply)
        return await self._sessions.run(ctx, turn)

    async def fork(self, ctx: RequestContext, session: str, new: str, *, if_match: str | None = None) -> SessionMeta:
        """Make a new session that has learned the same. Raises Conflict if a session `new` exists."""
        meta, _ = await self._sessions.run(ctx, ForkTurn(self._store, ctx.tenant, session, new, if_match))
        return meta

    async def export(self, tenant: Tenant, session: str) -> tuple[bytes, SessionMeta]:
        """Return the session as a file that `import_session` reads."""
        stored = await self._store.load(tenant.name, session)
        if stored is None:
            raise session_not_found(session)
        key = self._sessions.gate.limits.export_key
        return await run_off_loop(stored.meta.bytes, pack_session, stored, key), stored.meta

    async def import_session(
        self, ctx: RequestContext, session: str, data: bytes, *, if_match: str | None = None
    ) -> tuple[SessionMeta, bool]:
        """Give a session the content of an export; return the session and whether the session is new.

        Raises BadRequest for a file that is no sound export, Conflict for a file of other slow weights.
        """
        key = self._sessions.gate.limits.export_key
        return await self._sessions.run(ctx, ImportTurn(self._store, ctx.tenant, session, data, key, if_match))
