"""The turns that change which content a session has: roll back, unlearn, fork, import, learn a kept completion.

Each is one turn and makes one version.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace

from model.memory.episodic.borrowed import LEARNED, REPLY
from service.concurrency import run_off_loop
from service.engine import Segment, TabularRequest
from service.errors import BadRequest, Conflict
from service.store.base import History, SessionMeta, SessionStore
from service.tenants import Tenant
from service.turns.action_ids import inherited_tags
from service.turns.commit import TurnOutcome, TurnPlan
from service.turns.loaded_model import LoadedModel
from service.turns.prompts import TextPrompt, message_digests, require_fits
from service.turns.run import Json, Turn
from service.turns.session_gate import SessionHandle, SessionTarget, require_match, session_not_found, version_conflict
from service.turns.state_delta import full_state_delta, state_delta_at, unpack_learned_tokens, without_episodes
from service.turns.text_turns import LearningTurn
from service.versions.export_file import read_export, unpack_session
from service.versions.lineage import completion_entry, find_base, plan_unlearn, prompt_tokens_of
from service.versions.relearning import relearning_steps
from service.versions.removal import removal_delta


class VersionTurn(Turn[tuple[SessionMeta, bool]]):
    """A turn whose only event is the session's meta after the turn, and whether the turn created the session.

    A subclass plans the new content.
    """

    def __init__(self, store: SessionStore, target: SessionTarget) -> None:
        self.target = target
        self._store, self._session, self._created = store, target.session, False

    def replayed(self, record: Json) -> Iterable[tuple[SessionMeta, bool]]:
        meta = SessionMeta(**record["session"] | {"digests": ()})
        return [(meta, meta.version == 1)]

    def last_event(self, outcome: TurnOutcome) -> tuple[SessionMeta, bool]:
        assert outcome.meta is not None
        return outcome.meta, self._created

    def record(self, last: tuple[SessionMeta, bool]) -> Json:
        return {"session": asdict(replace(last[0], digests=()))}


class RollbackTurn(VersionTurn):
    """Makes a version with the content of an earlier version."""

    def __init__(self, store: SessionStore, session: str, version: int, if_match: str | None) -> None:
        super().__init__(store, SessionTarget(session, if_match=if_match, may_create=False, even_if_full=True))
        self._version = version

    async def plan(self, handle: SessionHandle, model: LoadedModel) -> TurnPlan:
        history = await load_history(self._store, handle)
        delta = state_delta_at(history, self._version)
        return TurnPlan(handle.meta, state_delta=delta, kind="rollback", origin=self._version)


class UnlearnTurn(VersionTurn):
    """Makes a version as if `versions` had never been learned: goes back before them and learns later tokens again.

    Where what this needs is not kept, the rows that came from the versions' episodes are cleared instead. The chat
    messages of the unlearned versions stay known, so that a client that resends them does not teach them again.

    erase: whether all earlier versions are dropped, so that nobody can go back to what was unlearned.
    """

    def __init__(
        self, store: SessionStore, session: str, versions: frozenset[int], if_match: str | None, *, erase: bool = False
    ) -> None:
        super().__init__(store, SessionTarget(session, if_match=if_match, may_create=False, even_if_full=True))
        self._versions, self._erase = versions, erase

    async def plan(self, handle: SessionHandle, model: LoadedModel) -> TurnPlan:
        history = await load_history(self._store, handle)
        policy = model.require_loaded_model(history.meta)
        if policy:
            plan = await self._plan_examples(handle, model, history, policy)
        else:
            try:
                plan = self._plan_relearning(handle, model, history)
            except Conflict as conflict:
                plan = await self._plan_removal(handle, model, history, conflict)
        origin = sorted(self._versions) if len(self._versions) > 1 else min(self._versions)
        return replace(plan, kind="unlearn", origin=origin, erases_past=self._erase)

    async def _plan_examples(
        self, handle: SessionHandle, model: LoadedModel, history: History, policy: str
    ) -> TurnPlan:
        """Return the plan that goes back and learns the stored examples again that came later. Raises Conflict."""
        base, later = find_base(history, self._versions)
        plan = TurnPlan(handle.meta, state_delta=state_delta_at(history, base))
        if not later:
            return plan
        if policy not in model.tabular:
            raise Conflict(
                f"'version' {min(self._versions)} can't be unlearned: {policy!r} keeps no rewards, only what it "
                "made of them. The newest versions can be taken back.",
                param="version",
                code="text_not_kept",
            )
        stored = await self._store.load(handle.ctx.tenant.name, history.meta.id)
        if stored is None or stored.meta.state_id != history.meta.state_id:
            raise version_conflict(history.meta.id)
        config = model.engine.memory_config(policy)
        steps = await run_off_loop(stored.meta.bytes, relearning_steps, stored, config, history, self._versions, later)
        return replace(plan, policy_request=TabularRequest(policy, steps, ("",) * len(steps)))

    async def _plan_removal(
        self, handle: SessionHandle, model: LoadedModel, history: History, conflict: Conflict
    ) -> TurnPlan:
        """Return the plan that clears rows. Raises `conflict` if a version has no episode of its own in the session.

        What a fork or an import brought is one version, of many texts: nobody means all of them.
        """
        is_foreign = any(e["version"] in self._versions and e["kind"] in ("fork", "import") for e in history.log)
        stored = None if is_foreign else await self._store.load(handle.ctx.tenant.name, history.meta.id)
        if stored is None:
            raise conflict
        config = model.engine.memory_config()
        delta = await run_off_loop(stored.meta.bytes, removal_delta, stored, config, self._versions)
        if delta is None:
            raise conflict
        return TurnPlan(handle.meta, state_delta=delta)

    def _plan_relearning(self, handle: SessionHandle, model: LoadedModel, history: History) -> TurnPlan:
        """Return the plan that goes back and learns again. Raises Conflict if what this needs is not kept."""
        base, kept_tokens = plan_unlearn(history, self._versions)
        delta = state_delta_at(history, base)
        delta = replace(delta, meta=delta.meta | {"digests": history.meta.digests})
        without_episodes = {entry["version"] for entry in history.log if entry.get("recall") is False}
        segments = [
            replace(segment, version=version, keep_episodes=version not in without_episodes)
            for version, packed in kept_tokens
            for segment in unpack_learned_tokens(packed)
        ]
        keep = model.keeps_episodes(handle.ctx.tenant, history.meta.options)
        return TurnPlan(handle.meta, segments, state_delta=delta, keep_episodes=keep)


class ForkTurn(VersionTurn):
    """Makes a new session that has learned what another session has learned."""

    def __init__(self, store: SessionStore, tenant: Tenant, source: str, new: str, if_match: str | None) -> None:
        super().__init__(store, SessionTarget(new))
        self._tenant, self._source, self._if_match = tenant, source, if_match

    async def plan(self, handle: SessionHandle, model: LoadedModel) -> TurnPlan:
        stored = await self._store.load(self._tenant.name, self._source)
        if stored is None:
            raise session_not_found(self._source)
        require_match(self._if_match, stored.meta)
        if handle.meta is not None:
            raise Conflict(f"Session {self._session!r} exists already.", param="id", code="session_exists")
        source = stored.meta
        meta = model.new_meta(self._session, source.options)
        meta = replace(meta, model=source.model, actions=source.actions)
        tags = inherited_tags(source.id, source.created, source.actions, source.action_tags)
        content, sites = asdict(source) | {"action_tags": tags}, stored.sites
        if not model.keeps_episodes(self._tenant, meta.options):
            content, sites = without_episodes(content, sites)
        delta = full_state_delta(content, sites, {}, meta.version + 1)
        return TurnPlan(meta, state_delta=delta, kind="fork", origin=self._source)


class ImportTurn(VersionTurn):
    """Gives a session the content of an export file, in place of what the session had."""

    def __init__(
        self, store: SessionStore, tenant: Tenant, session: str, data: bytes, key: str, if_match: str | None
    ) -> None:
        super().__init__(store, SessionTarget(session, if_match=if_match))
        self._tenant, self._data, self._key = tenant, data, key

    async def plan(self, handle: SessionHandle, model: LoadedModel) -> TurnPlan:
        manifest, arrays = await run_off_loop(len(self._data), read_export, self._data, self._key)
        new = model.new_meta(self._session, {})
        policy = model.require_loaded_model(replace(new, model=manifest["model"]))
        config = model.engine.memory_config(policy)
        vocab_size = model.row_vocab_size(policy)
        manifest, sites = await run_off_loop(len(self._data), unpack_session, manifest, arrays, config, vocab_size)
        self._created = handle.meta is None
        stored = None if self._created else await self._store.load(self._tenant.name, self._session)
        meta = handle.meta or model.new_meta(self._session, {}, policy)
        model.require_model(meta, policy)
        tags = inherited_tags(manifest["id"], manifest["created"], manifest["actions"], manifest["action_tags"])
        manifest |= {"action_tags": tags}
        meta = replace(meta, actions=max(meta.actions, manifest["actions"]))
        if not model.keeps_episodes(self._tenant, meta.options):
            manifest, sites = without_episodes(manifest, sites)
        old_sites = stored.sites if stored else {}
        delta = await run_off_loop(len(self._data), full_state_delta, manifest, sites, old_sites, meta.version + 1)
        origin = f"{manifest['id']} v{manifest['version']}"
        return TurnPlan(meta, state_delta=delta, kind="import", origin=origin)


class KeptCompletionTurn(LearningTurn):
    """Learns what a user kept of a completion, after the completion's prompt where the session keeps texts."""

    def __init__(
        self,
        store: SessionStore,
        session: str,
        completion_key: str,
        text: str,
        if_match: str | None,
        *,
        is_reply: bool,
    ) -> None:
        self.target = SessionTarget(session, if_match=if_match, may_create=False)
        self._store, self._completion_key, self._text = store, completion_key, text
        self._mark = REPLY if is_reply else LEARNED

    async def plan(self, handle: SessionHandle, model: LoadedModel) -> TurnPlan:
        assert handle.meta is not None
        model.require_model(handle.meta)
        tokenizer, max_tokens = model.tokenizer, model.context - 1
        require_fits(TextPrompt(self._text), tokenizer, max_tokens, "text")
        history = await load_history(self._store, handle)
        completion = completion_entry(history, self._completion_key)
        prompt = prompt_tokens_of(history, completion) or [tokenizer.start_token_id]
        learned = await run_off_loop(len(self._text), tokenizer.encode, self._text)
        learned = learned[tokenizer.add_bos :]
        if len(learned) > max_tokens:
            raise BadRequest(f"'text' may have {max_tokens} tokens, got {len(learned)}.", param="text")
        prompt = prompt[len(learned) - max_tokens - 1 :]
        segment = Segment(prompt + learned, learn=[0] * len(prompt) + [self._mark] * len(learned))
        digests = list(message_digests([{"role": "assistant", "content": self._text}]))
        keep = model.keeps_episodes(handle.ctx.tenant, handle.meta.options, completion.get("recall"))
        return TurnPlan(handle.meta, [segment], digests=digests, keep_episodes=keep)


async def load_history(store: SessionStore, handle: SessionHandle) -> History:
    """Return the history of an acquired session. Raises VersionConflict if another replica changed the session."""
    assert handle.meta is not None
    history = await store.history(handle.ctx.tenant.name, handle.meta.id, undo=True)
    if history is None or history.meta.state_id != handle.meta.state_id:
        raise version_conflict(handle.meta.id)
    return history
