"""The contract of a session store: two Protocols, and the values that callers and stores exchange.

The module implements no store. `service/store/redis/` keeps sessions in Redis or Valkey, `service/store/memory.py` in
this process. A new store touches two files: a module here with a class that satisfies `SessionStore` (`ledger`
included), and `service/wiring.py`, the only place that chooses a store. Every other module names the Protocols alone.
`tests/service/test_store.py` and `test_store_answers.py` state each promise below as a test;
`tests/service/store_backends.py` lists the stores that the tests run on.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from service.store.answers import ResponseStore
from service.store.ledger import QuotaLedger

MAX_LOG_ENTRIES = 512  # newest log entries that a store keeps of a session
BEAT_EVERY_S = 0.5  # seconds between two heartbeats of a server
HEARTBEAT_S = 2.0  # seconds without a heartbeat after which a server counts as dead
TOMBSTONE_S = 86_400  # seconds for which a store bars turns that began before a session was erased
_NAME = re.compile(r"[A-Za-z0-9._~:@+=-]+")

Option = str | int | float | bool
ActionTags = tuple[tuple[int, str], ...]
Slots = NDArray[np.int32]
WriteMode = Literal["always", "unless predict", "never"]


@dataclass(frozen=True)
class SessionMeta:
    """All that a store keeps of a session except for its rows.

    Attributes:
        id: name of the session, unique within its tenant.
        version: number of commits so far; 0 before the first commit.
        model: fingerprint of the slow weights that wrote the rows.
        tokens_learned: number of tokens learned since the session began.
        rows: number of slots that hold a row, all sites together.
        bytes: size of the rows.
        created: unix time in seconds; never changes, and tells a session from a later session of the same id.
        updated: unix time in seconds of the last commit.
        proof_tokens: number of tokens that both loss sums below cover.
        loss_sum: loss in nats over the proof tokens, with the session's memory.
        frozen_loss_sum: loss in nats over the proof tokens, without the memory.
        requests: number of segments that the session has learned from; a long text has several.
        options: the session's own defaults; only `SessionStore.configure` replaces the options of a stored session.
        digests: digests of the chat messages that the session has learned, newest last; 16 hex digits each.
        actions: the highest number that an action of the session ever had; no rollback lowers the number.
        action_tags: (n, tag) of each session from which this one got its first actions, ascending: the tag of the
            actions up to number n. Later actions are the session's own.
    """

    id: str
    version: int
    model: str
    tokens_learned: int
    rows: int
    bytes: int
    created: float
    updated: float
    proof_tokens: int
    loss_sum: float
    frozen_loss_sum: float
    requests: int
    options: dict[str, Option]
    digests: tuple[str, ...]
    actions: int = 0
    action_tags: ActionTags = ()

    @property
    def state_id(self) -> tuple[float, float, int]:
        """Return what identifies the session's content among all contents that a session of this id ever had.

        The version alone does not identify the content: a session may be erased and created again, and a failover of
        the store may lose commits.
        """
        return self.created, self.updated, self.version


@dataclass(frozen=True, eq=False)
class RowBatch:
    """Some rows of one site.

    Attributes:
        slots: `[n]`, int32, strictly increasing, none negative.
        data: `[n, row_bytes]`, uint8: the row of each slot.

    Raises:
        ValueError: an array has another type, shape or order.
    """

    slots: Slots
    data: NDArray[np.uint8]

    def __post_init__(self) -> None:
        if self.slots.ndim != 1 or self.slots.dtype != np.int32:
            raise ValueError(f"slots must be int32 [n], not {self.slots.dtype} {list(self.slots.shape)}")
        if self.data.ndim != 2 or self.data.dtype != np.uint8 or self.data.shape[1] == 0:
            raise ValueError(f"data must be uint8 [n, row_bytes >= 1], not {self.data.dtype} {list(self.data.shape)}")
        if len(self.slots) != len(self.data):
            raise ValueError(f"{len(self.slots)} slots do not match {len(self.data)} rows of data")
        if len(self.slots) and (self.slots[0] < 0 or not (self.slots[1:] > self.slots[:-1]).all()):
            raise ValueError("slots must be strictly increasing, none negative")

    @property
    def row_bytes(self) -> int:
        return int(self.data.shape[1])


@dataclass(frozen=True, eq=False)
class StoredSession:
    """A session at one version; `sites` maps the name of each site that holds a row to all rows of the site."""

    meta: SessionMeta
    sites: dict[str, RowBatch]


@dataclass(frozen=True)
class RetentionConfig:
    """The retention of everything except the latest versions of the sessions.

    Attributes:
        versions: number of versions that a session can go back.
        history_bytes: size of the undo steps that a session may keep; a commit drops the oldest steps beyond it.
        ttl_s: seconds after its last use at which a session expires, unless its option `ttl_s` says otherwise; 0 =
            sessions do not expire.
        lease_s: seconds for which a lease lasts without a renewal.
        wait_s: seconds for which `SessionStore.begin_turn` waits for a lease that another server holds.
    """

    versions: int = 32
    history_bytes: int = 16 * 2**20
    ttl_s: int = 0
    lease_s: float = 10.0
    wait_s: float = 12.0


@dataclass(frozen=True)
class Lease:
    """The right to write to one session; `value` is the owner and a fence, `owner:fence`."""

    tenant: str
    sid: str
    value: str


@dataclass(frozen=True)
class TurnStart:
    """The state that a turn begins with.

    Attributes:
        meta: the session; None if there is none.
        lease: what the turn's commit needs; None if the turn only reads, or if nobody else uses the store.
        record: the answer that an earlier turn recorded for this request; the other attributes are None then.
    """

    meta: SessionMeta | None
    lease: Lease | None = None
    record: bytes | None = None


@dataclass(frozen=True)
class IdempotencyRecord:
    """An answer that a commit stores under `name` for `ttl_s` seconds."""

    name: str
    ttl_s: int
    record: bytes


@dataclass(frozen=True)
class CommitMetadata:
    """The record that a store keeps along with a commit.

    Attributes:
        log: the log entry, of JSON types; the store adds the key `version`. Empty = no entry.
        packed_tokens: the learned tokens, packed, which unlearning needs; empty = not kept.
        idempotency_record: the answer to store; None = none.
        drops_responses: whether the session's kept responses are erased.
        erases_past: whether all undo steps, this commit's included, and what the kept answers say are erased.
    """

    log: Mapping[str, Any] = field(default_factory=dict)
    packed_tokens: bytes = b""
    idempotency_record: IdempotencyRecord | None = None
    drops_responses: bool = False
    erases_past: bool = False


NO_COMMIT_METADATA = CommitMetadata()


@dataclass(frozen=True, eq=False)
class UndoStep:
    """The change that turns `version` back into the version before it.

    Attributes:
        version: the version that the step undoes.
        sites: by site, the rows that the commit replaced; each site that the commit touched is a key.
        cleared_slots: by site, `[n]` int32: the slots that were empty before the commit.
        meta: by name, the fields of `SessionMeta` that the commit replaced; empty for the first commit.
        packed_tokens: `CommitMetadata.packed_tokens` of the commit.
    """

    version: int
    sites: dict[str, RowBatch]
    cleared_slots: dict[str, Slots]
    meta: dict[str, Any]
    packed_tokens: bytes


@dataclass(frozen=True, eq=False)
class History:
    """A session, the newest entries of its log (oldest first), and its undo steps (newest first)."""

    meta: SessionMeta
    log: list[dict[str, Any]]
    undo: list[UndoStep]


def check_name(kind: str, name: str) -> str:
    """Return `name` if it is a valid name of a tenant or a session: no brace, slash or blank.

    Raises ValueError for a name that is not valid; `kind` says in the message what the name is for.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{kind} must match {_NAME.pattern}, not {name!r}")
    return name


class SessionStore(Protocol):
    """The durable sessions of all tenants, with versioned commits. Any number of servers may share one store.

    Rules for all methods:

    - Atomic: a method that changes a session changes all that it names or nothing, and no reader sees a part of the
      change. Exactly one of several concurrent commits of the same version succeeds.
    - No aliasing: a store neither changes nor keeps its arguments, and the caller owns what a method returns.
    - Time: leases, records, tombstones and sessions expire by the store's own clock, never by a server's.
    - Room: `StoreFull` only comes from methods that add to the store: `create`, `configure`, and `begin_turn` with a
      lease and `commit` without `even_if_full`. All other methods also work on a full store.
    - Refusals: `StoreRefused` if the store refuses a command that a method needs. A method that has changed a session
      does not raise for what fails afterwards, such as the list: the change happened.
    - Damage: `EngineError` with code `damaged_session` from `begin_turn`, `load`, `commit`, `create` and `history` for
      a session of which a part is missing or changed; the message says which part.
    - Errors: `ValueError` for a tenant or session id that `check_name` refuses. `StoreUnavailable` if the store does
      not answer; the caller needs no repair when the store comes back. `StoreFull` if the store has no room for a
      write; nothing is written then. `EngineError` with code `unknown_store_format` for a session that a later
      release has written; such a session is left unchanged.
    - Cancelling a call that reads has no effect. Cancelling a call that writes leaves its outcome open: shield the
      call.

    A lease gives its holder the right to write. A commit needs the newest fence, not an unexpired lease: a lease that
    has expired still commits as long as nobody has taken another one.
    """

    @property
    def ledger(self) -> QuotaLedger:
        """The tenants' accounts, kept in the same store."""
        ...

    @property
    def responses(self) -> ResponseStore: ...

    # --- a turn ----------------------------------------------------------------------------------------------------

    async def begin_turn(
        self, tenant: str, sid: str, *, write: WriteMode, names: Sequence[str] = (), even_if_full: bool = False
    ) -> TurnStart:
        """Begin a turn: return the recorded answer, or else the session and a lease.

        A record under one of `names` ends the call and changes nothing. Otherwise the call restarts the time after
        which the session expires and, if the turn may write, takes a lease with a new fence, which is larger than all
        fences before. The call waits up to `wait_s` for a lease that another server holds; it replaces a lease that
        this server holds. Not idempotent: each call takes a new fence.

        Args:
            write: "always" takes a lease; "unless predict" takes one unless the session's option `adapt` is
                "predict"; "never" takes none. A store that only one server uses takes none either.
            names: the names under which the request may have been answered before, in order of preference.
            even_if_full: take the lease also if the store has no room.

        Raises:
            SessionBusy: another server held the lease all the time.
        """
        ...

    async def heartbeat(self) -> None:
        """Tell the other servers that this server runs, every `BEAT_EVERY_S`, for ever.

        Whoever waits in `begin_turn` takes a lease at once whose owner has called this method and has been silent for
        `HEARTBEAT_S`. The fence keeps an owner that was only paused from committing.
        """
        ...

    async def renew(self, lease: Lease) -> bool:
        """Extend a lease to `lease_s` from now; return whether the lease was still held. Takes back no lost lease."""
        ...

    async def release(self, lease: Lease) -> None:
        """Give a lease back. Idempotent; no effect on a lease that has expired or that another server has taken."""
        ...

    async def load(self, tenant: str, sid: str) -> StoredSession | None:
        """Return the session with all its rows, both of one version; None if there is no such session.

        Changes nothing that a caller can see. A store may rewrite a session of an older format.

        Raises:
            EngineError: the rows cannot be read (code `damaged_session`).
        """
        ...

    async def commit(
        self,
        tenant: str,
        meta: SessionMeta,
        sites: Mapping[str, RowBatch],
        *,
        cleared_slots: Mapping[str, Slots] | None = None,
        lease: Lease | None = None,
        commit_metadata: CommitMetadata = NO_COMMIT_METADATA,
        even_if_full: bool = False,
    ) -> None:
        """Take the session from version `meta.version - 1` to `meta.version`, and release the lease.

        One atomic step writes the rows, the meta, the log entry, the undo step and the idempotency record, drops undo
        steps and log entries beyond the limits, and restarts the time after which the session expires. Rows and sites
        that the call does not name stay unchanged, and so do the options of a session that is stored already. A site
        that has no row left is forgotten, and its rows may then have another size.

        The step is durable when the call returns. The store itself repeats a commit whose reply was lost, and applies
        the commit once. For the caller the call is not idempotent: a second call raises VersionConflict.

        Args:
            meta: the new meta; version 1 creates the session if `create` has not.
            sites: the touched rows, by site.
            cleared_slots: slots to empty, by site; only of sites that are keys of `sites`. A slot that also has a row
                in `sites` is emptied.
            lease: from `begin_turn`; None only if nobody else can write.
            even_if_full: commit also if the store has no room; for commits that take little, such as a rollback.

        Raises:
            VersionConflict: the stored session is at another version or was created at another time, or another
                server has taken the lease; nothing was written.
            Conflict: the session was erased after the turn began (code `session_erased`); nothing was written.
            EngineError: the rows of a site have another size than the stored rows; nothing was written.
            StoreUnavailable: nothing was written, or the outcome is unknown; load the session before the next turn.
        """
        ...

    # --- sessions --------------------------------------------------------------------------------------------------

    async def meta(self, tenant: str, sid: str) -> SessionMeta | None:
        """Return the session without its rows; None if there is no such session. Changes nothing."""
        ...

    async def create(self, tenant: str, meta: SessionMeta, lease: Lease | None = None) -> SessionMeta:
        """Store a session without rows unless there is one of that id; return what is stored then. Idempotent.

        Keeps the lease. Raises VersionConflict and Conflict for a lost lease and an erased session, as `commit` does.
        """
        ...

    async def configure(self, tenant: str, sid: str, options: Mapping[str, Option]) -> SessionMeta:
        """Replace the session's options, and nothing else; return the session. Idempotent.

        Restarts the time after which the session expires, by the new options.

        Raises:
            NotFound: there is no such session.
        """
        ...

    async def delete(self, tenant: str, sid: str, *, version: int | None = None) -> bool:
        """Erase the session with its rows, log, undo steps, idempotency records, kept responses and lease.

        Leaves a tombstone for `TOMBSTONE_S`, also if there was no session: a lease from before the call neither
        commits nor creates the session. Tells every listener of `erased`. Idempotent except for the returned value.

        Args:
            version: the version that the session must have (0: there is no session); None = any.

        Returns:
            Whether there was a session.

        Raises:
            VersionConflict: the session is not at `version`; nothing was erased.
        """
        ...

    def erased(self) -> AsyncIterator[tuple[str, str] | None]:
        """Yield the tenant and the id of each session that any server erases.

        Yields None when erasures may have been missed: at the beginning, and after each loss of the connection. Never
        ends; waits for a store that does not answer.
        """
        ...

    async def history(self, tenant: str, sid: str, *, undo: bool, entries: int = MAX_LOG_ENTRIES) -> History | None:
        """Return the session, its newest `entries` log entries, and its undo steps if `undo` is set.

        All parts are of one version. None if there is no such session. Changes nothing.
        """
        ...

    async def list(self, tenant: str, *, after: str = "", limit: int = 100) -> list[SessionMeta]:
        """Return up to `limit` sessions with ids after `after`, in the order of the ids' bytes.

        Fewer than `limit` sessions mean the end. Lists each session that exists during the whole call.
        """
        ...

    async def count(self, tenant: str) -> int:
        """Return the number of the tenant's sessions; may include expired sessions until `list` or `restore_list`."""
        ...

    async def memory(self) -> tuple[int, int]:
        """Return the bytes of memory that the store uses, and may use; 0 for what is unknown or unlimited."""
        ...

    async def restore_list(self) -> int:
        """Make the list name the sessions that exist, and no others; return how many it had lost, say, with keys."""
        ...

    async def check_rights(self) -> None:
        """Return if the server has every right that the other methods need; write nothing.

        Raises:
            StoreRefused: a right is missing; `__cause__` names the command.
        """
        ...

    async def may_evict(self) -> bool:
        """Return whether the store, when its memory is full, may forget keys of sessions by itself."""
        ...

    async def close(self) -> None:
        """Release the connections. The sessions stay."""
        ...
