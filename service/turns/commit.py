"""The plan of a turn, and the commit that follows from what the turn ran: plain functions of values."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from service.engine import JobFinished, JobStats, PolicyRequest, Segment, TabularRequest
from service.engine.stored_rows import as_batches
from service.metrics import Metrics
from service.store.base import SessionMeta
from service.turns import prompts
from service.turns.idempotency import RequestContext
from service.turns.state_delta import StateDelta, digest, pack_learned_tokens
from service.types import Adaptation, Recalled

TurnKind = Literal["learn", "rollback", "unlearn", "fork", "import"]


@dataclass(frozen=True)
class TurnPlan:
    """The plan of one turn.

    Attributes:
        meta: the session as the turn finds or creates it; None = no session, the frozen base answers.
        segments: requests of the base, one after the other; side by side where there is no session.
        policy_request: the request of a policy, instead of segments.
        state_delta: the content that the session begins with, instead of its own.
        digests: digests of the messages that this turn adds to what the session has seen.
        writes: whether the turn may learn.
        score_frozen: whether every score is also taken without memory.
        kind, origin: the log entry's kind and what the entry refers to.
        keep_episodes: whether what the turn learns is kept as episodes.
        erases_past: whether the commit drops all versions to which the session could be rolled back.
        source: where the learned text comes from, for the log.
    """

    meta: SessionMeta | None
    segments: Sequence[Segment] = ()
    policy_request: PolicyRequest | TabularRequest | None = None
    state_delta: StateDelta | None = None
    digests: Sequence[str] = ()
    writes: bool = True
    score_frozen: bool = False
    kind: TurnKind = "learn"
    origin: int | str | list[int] | None = None
    keep_episodes: bool = False
    erases_past: bool = False
    source: str | None = None

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


@dataclass(frozen=True)
class Commit:
    """The content of one commit.

    Attributes:
        meta: the session's meta at the new version.
        state_delta: the rows to write and the slots to clear.
        log: the log entry, without its version.
        packed_tokens: the learned tokens, where unlearning needs them; empty = not kept.
        tokens: number of tokens learned.
        even_if_full: whether a store that has no room takes the commit, too.
        drops_responses: whether the session's kept responses go: they have what the session has not learned any more.
        erases_past: whether all versions to which the session could be rolled back go.
    """

    meta: SessionMeta
    state_delta: StateDelta
    log: dict[str, Any]
    packed_tokens: bytes
    tokens: int
    even_if_full: bool = False
    drops_responses: bool = False
    erases_past: bool = False


@dataclass(frozen=True)
class TurnOutcome:
    """The outcome of a turn. meta: the session after the turn, None without a session."""

    meta: SessionMeta | None
    adaptation: Adaptation
    completion_tokens: int


def build_commit(
    ctx: RequestContext, plan: TurnPlan, jobs: Sequence[JobFinished], reply_digests: Sequence[str]
) -> Commit | None:
    """Return what to commit of a turn; None if the turn changed nothing."""
    meta, done = plan.start_meta, _session_job(jobs)
    if meta is None:
        return None
    digests = prompts.merge_digests(meta.digests, [*plan.digests, *reply_digests])
    learned = done.rows or done.stats.tokens_learned or not set(digests) <= set(meta.digests)
    if plan.state_delta is None and not learned:
        return None
    tokens, rows = pack_learned_tokens(plan.segments, done.learned_completions), as_batches(done.rows)
    new, stats = next_meta(meta, done, digests), done.stats
    log: dict[str, Any] = {
        "kind": plan.kind,
        "time": new.updated,
        "digest": digest(tokens),
        "tokens": stats.tokens_learned,
        "rows": done.rows_written,
        "loss": _mean_loss(stats),
        "request_id": ctx.request_id,
    }
    if not plan.keep_episodes and plan.segments:
        log["recall"] = False
    if plan.origin is not None:
        log["of"] = plan.origin
    if plan.source is not None:
        log["source"] = plan.source
    if stats.completion_tokens and len(plan.segments) == 1:
        log["answer"] = [ctx.id, len(plan.segments[0].token_ids)]
    return Commit(
        new,
        StateDelta({}, rows, {}) if plan.state_delta is None else plan.state_delta.with_rows(rows),
        log,
        tokens if new.options.get("keep_text") and plan.kind == "learn" else b"",
        stats.tokens_learned,
        even_if_full=plan.kind in ("rollback", "unlearn"),
        drops_responses=plan.kind != "learn",
        erases_past=plan.erases_past,
    )


def next_meta(meta: SessionMeta, done: JobFinished, digests: tuple[str, ...]) -> SessionMeta:
    """Return the meta of the version that a finished job makes of a session."""
    stats = done.stats
    return replace(
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
        actions=max(meta.actions, stats.action),
    )


def outcome_of(
    plan: TurnPlan,
    jobs: Sequence[JobFinished],
    commit: Commit | None,
    decode: Callable[[Sequence[int]], str],
    times: Mapping[int, float],
) -> TurnOutcome:
    """Return what a turn did, as its last event tells it.

    decode: returns the text of tokens. times: when the versions were made that taught what was recalled.
    """
    done, completion_tokens = _session_job(jobs), sum(job.stats.completion_tokens for job in jobs)
    before = 0 if plan.meta is None else plan.meta.version
    meta = plan.meta if commit is None else commit.meta
    after = before if meta is None else meta.version
    learned = done.stats.tokens_learned
    recalled = [
        Recalled(e.version, e.offset, e.score, decode(e.token_ids), times.get(e.version)) for e in done.recalled
    ]
    adaptation = Adaptation(learned, done.rows_written, _mean_loss(done.stats), before, after, recalled)
    return TurnOutcome(meta, adaptation, completion_tokens)


def record_jobs(metrics: Metrics, jobs: Sequence[JobFinished]) -> None:
    """Count the tokens of the jobs of a turn."""
    for done in jobs:
        metrics.tokens_prefilled_total.inc(done.stats.prompt_tokens)
        metrics.tokens_predicted_total.inc(done.stats.completion_tokens)
        metrics.episodes_recalled_total.inc(len(done.recalled))


def record_commit(
    metrics: Metrics,
    policy_request: PolicyRequest | TabularRequest | None,
    commit: Commit,
    jobs: Sequence[JobFinished],
) -> None:
    """Count what a committed turn learned and what the learning was worth."""
    done, new = _session_job(jobs), commit.meta
    stats = done.stats
    if policy_request is None:
        metrics.tokens_learned_total.inc(stats.tokens_learned)
    else:
        metrics.observe_rewards(
            policy_request.policy,
            num_before=new.tokens_learned - stats.tokens_learned,
            num_learned=stats.tokens_learned,
            reward_sum=stats.rewards,
            regret=policy_request.regret,
        )
        metrics.observe_decided(policy_request.policy, stats.decided)
    metrics.rows_written_total.inc(done.rows_written)
    metrics.guards_shut_total.inc(max(0, done.num_guards_closed))
    metrics.guards_opened_total.inc(max(0, -done.num_guards_closed))
    metrics.proof_tokens_total.inc(stats.proof_tokens)
    metrics.proof_loss_nats_total.inc(stats.proof_loss_sum)
    metrics.proof_frozen_loss_nats_total.inc(stats.proof_frozen_loss_sum)
    if stats.proof_tokens:
        gain = (new.frozen_loss_sum - new.loss_sum) / new.proof_tokens
        metrics.session_gain_nats_per_token.observe(gain)


def _session_job(jobs: Sequence[JobFinished]) -> JobFinished:
    """Return the one job of a session's turn; an empty job for a turn that ran none."""
    return jobs[0] if jobs else JobFinished(JobStats(), {})


def _mean_loss(stats: JobStats) -> float | None:
    return stats.loss_sum / stats.tokens_learned if stats.tokens_learned else None
