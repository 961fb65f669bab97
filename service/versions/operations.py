"""A session's versions: going back, going two ways, taking away, bringing along. Each is one turn and one version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from service.engine import Segment
from service.errors import BadRequest, Conflict, VersionConflict
from service.store.base import History, SessionMeta
from service.tenants import Tenant
from service.turns.learned_tokens import content_at, lessons_of, prompt_of, told, unpack_lesson, whole_content, without
from service.turns.prompts import message_digests
from service.turns.session_gate import Held, known, require_match, unknown
from service.turns.sessions import Call, Sessions
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
            raise unknown(session)
        lessons, decode = lessons_of(history), self._sessions.served.tokenizer.decode
        entries = [entry for entry in reversed(history.log) if before is None or entry["version"] < before]
        page = [told(entry, lessons, decode) for entry in entries[:limit]]
        return page, page[-1]["version"] if len(entries) > limit else None

    async def rollback(self, call: Call, session: str, version: int, *, if_match: str | None = None) -> SessionMeta:
        """A new version with the content of an earlier one. Raises Conflict for one that is not kept."""

        async def turn_once() -> SessionMeta:
            async with self._gate.hold(call, session, if_match=if_match, may_create=False) as held:
                if held.replay is not None:
                    return _answered(held.replay)
                history = await self._history(held, session)
                turn = Turn(held, kind="rollback", of=version, content=content_at(history, version))
                return await self._settle(turn)

        return await self._gate.turn(turn_once)

    async def unlearn(self, call: Call, session: str, version: int, *, if_match: str | None = None) -> SessionMeta:
        """A new version as if `version` had never been learned: goes back to before it, and learns what came later
        again. Its chat messages stay known, so that a client that resends them does not teach them again.

        Raises Conflict where something that this needs is not kept."""

        async def turn_once() -> SessionMeta:
            async with self._gate.hold(call, session, if_match=if_match, may_create=False) as held:
                if held.replay is not None:
                    return _answered(held.replay)
                history = await self._history(held, session)
                self._sessions.served.require_any(history.meta)
                base, lessons = without(history, version)
                content = content_at(history, base)
                content = replace(content, meta=content.meta | {"digests": history.meta.digests})
                turn = Turn(held, kind="unlearn", of=version, content=content)
                return await self._settle(turn, [part for lesson in lessons for part in unpack_lesson(lesson)])

        return await self._gate.turn(turn_once)

    async def keep(
        self, call: Call, session: str, answer: str, text: str, *, if_match: str | None = None
    ) -> ObserveResult:
        """Learns what a user kept of an answer, behind its prompt where the session keeps texts. Raises NotFound for an
        answer that is not in its log."""

        async def turn_once() -> ObserveResult:
            async with self._gate.hold(call, session, if_match=if_match, may_create=False) as held:
                if held.replay is not None:
                    return ObserveResult(**held.replay)
                served = self._sessions.served
                served.require_own(known(held))
                tokenizer, most = served.tokenizer, self._sessions.context - 1
                prompt = prompt_of(await self._history(held, session), answer) or [tokenizer.start_token_id]
                learned = tokenizer.encode(text)[tokenizer.add_bos :]
                if len(learned) > most:
                    raise BadRequest(f"'text' may have {most} tokens, got {len(learned)}.", param="text")
                prompt = prompt[len(learned) - most - 1 :]
                part = Segment(prompt + learned, learn=[False] * len(prompt) + [True] * len(learned))
                turn = Turn(held, seen=list(message_digests([{"role": "assistant", "content": text}])))
                turn.result = lambda new: asdict(ObserveResult.of(turn.adaptation(new.version)))
                async for _ in self._sessions.run([part], turn, write=True):
                    pass
                return ObserveResult.of(turn.adaptation())

        return await self._gate.turn(turn_once)

    async def fork(self, call: Call, session: str, new: str, *, if_match: str | None = None) -> SessionMeta:
        """A new session that has learned the same. Raises Conflict if there is one of that id."""

        async def turn_once() -> SessionMeta:
            async with self._gate.hold(call, new) as held:
                if held.replay is not None:
                    return _answered(held.replay)
                stored = await self._store.load(call.tenant.name, session)
                if stored is None:
                    raise unknown(session)
                require_match(if_match, stored.meta)
                if held.meta is not None:
                    raise Conflict(f"Session {new!r} exists already.", param="id", code="session_exists")
                meta = self._sessions.served.new_meta(new, stored.meta.options)
                held.meta = replace(meta, model=stored.meta.model)
                content = whole_content(asdict(stored.meta), stored.sites, {})
                return await self._settle(Turn(held, kind="fork", of=session, content=content))

        return await self._gate.turn(turn_once)

    async def export(self, tenant: Tenant, session: str) -> tuple[bytes, SessionMeta]:
        """The session as a file that `bring` takes."""
        stored = await self._store.load(tenant.name, session)
        if stored is None:
            raise unknown(session)
        return pack_session(stored, self._gate.limits.export_key), stored.meta

    async def bring(
        self, call: Call, session: str, data: bytes, *, if_match: str | None = None
    ) -> tuple[SessionMeta, bool]:
        """Gives a session what an export holds, in place of what it had; returns it and whether it is new.

        Raises BadRequest for a file that is no sound export, Conflict for one of other slow weights."""
        served = self._sessions.served

        async def turn_once() -> tuple[SessionMeta, bool]:
            async with self._gate.hold(call, session, if_match=if_match) as held:
                if held.replay is not None:
                    return _answered(held.replay), held.replay["session"]["version"] == 1
                manifest, arrays = read_export(data, self._gate.limits.export_key)
                policy = served.require_any(replace(served.new_meta(session, {}), model=manifest["model"]))
                vocab_size = served.policies[policy].config.actions if policy else served.vocab_size
                manifest, sites = unpack_session(manifest, arrays, served.engine.memory_config(policy), vocab_size)
                new = held.meta is None
                stored = None if new else await self._store.load(call.tenant.name, session)
                if held.meta is None:
                    held.meta = served.new_meta(session, {}, policy)
                served.require_own(held.meta, policy)
                content = whole_content(manifest, sites, stored.sites if stored else {})
                origin = f"{manifest['id']} v{manifest['version']}"
                return await self._settle(Turn(held, kind="import", of=origin, content=content)), new

        return await self._gate.turn(turn_once)

    async def _history(self, held: Held, session: str) -> History:
        history = await self._store.history(held.call.tenant.name, session, undo=True)
        if history is None or history.meta.stamp != known(held).stamp:
            raise VersionConflict(f"Session {session!r} was changed by somebody else during this turn.")
        return history

    async def _settle(self, turn: Turn, parts: Sequence[Segment] = ()) -> SessionMeta:
        """Runs a turn to its end."""
        turn.result = lambda new: {"session": asdict(replace(new, digests=()))}
        async for _ in self._sessions.run(parts, turn, write=True):
            pass
        assert turn.held is not None and turn.meta is not None
        if not parts:  # what the device holds is of an earlier version
            self._sessions.served.engine.forget((turn.held.call.tenant.name, turn.meta.id))
        return turn.meta


def _answered(replay: dict[str, Any]) -> SessionMeta:
    return SessionMeta(**replay["session"] | {"digests": ()})
