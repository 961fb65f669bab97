"""The plan of one turn: what the engine runs and what the commit consists of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from service.engine import PolicyRequest, Segment
from service.store.base import SessionMeta
from service.turns.state_delta import StateDelta

TurnKind = Literal["learn", "rollback", "unlearn", "fork", "import"]


@dataclass(frozen=True)
class TurnPlan:
    """The plan of one turn.

    Attributes:
        meta: the session as the turn finds or creates it; None = no session, the frozen base answers.
        segments: requests of the base, one after the other; side by side where there is no session.
        policy_request: the request of a policy, instead of segments.
        state_delta: the content that the session begins with, instead of its own.
        digests: digests of the messages that the session has seen after this turn.
        writes: whether the turn may learn.
        score_frozen: whether every score is also taken without memory.
        kind, origin: the log entry's kind and what the entry refers to.
    """

    meta: SessionMeta | None
    segments: Sequence[Segment] = ()
    policy_request: PolicyRequest | None = None
    state_delta: StateDelta | None = None
    digests: Sequence[str] = ()
    writes: bool = True
    score_frozen: bool = False
    kind: TurnKind = "learn"
    origin: int | str | None = None

    @property
    def policy(self) -> str:
        """The policy that the turn asks; "" for text."""
        return "" if self.policy_request is None else self.policy_request.policy

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all segments."""
        return sum(len(segment.token_ids) for segment in self.segments)

    @property
    def runs_jobs(self) -> bool:
        """True if the engine has something to run."""
        return bool(self.segments) or self.policy_request is not None

    @property
    def costs_quota(self) -> bool:
        """True if the turn needs the tenant's quota to allow learning."""
        return self.meta is not None and ((self.writes and self.runs_jobs) or self.kind in ("fork", "import"))

    @property
    def start_meta(self) -> SessionMeta | None:
        """The session's meta with the content that the turn begins with."""
        if self.meta is None or self.state_delta is None:
            return self.meta
        return self.state_delta.apply_to_meta(self.meta)
