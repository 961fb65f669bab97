"""The words between routes and sessions: what a turn is asked for, and what it tells."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from model.policies.network import Policy
from model.text.sampling import SamplingParams
from model.text.tokenizer import Tokenizer
from service.engine import (
    Engine,
    Event,
    GenerationParams,
    JobFinished,
    JobStats,
    PolicyRequest,
    Segment,
    TokenOutput,
    TokenScores,
)
from service.engine.types import Alternatives
from service.errors import BadRequest, Conflict
from service.store.base import Option, SessionMeta
from service.turns.learned_tokens import StateDelta
from service.turns.prompts import ChatPrompt, EncodedPrompt, Prompt
from service.turns.session_gate import SessionHandle
from service.types import Adaptation, AdaptMode, LearnMode

FinishReason = Literal["stop", "length"]
Kind = Literal["learn", "rollback", "unlearn", "fork", "import"]


@dataclass(frozen=True)
class GenerationOptions:
    """What to generate. max_tokens None fills the context; logprobs None is off, else alternatives to each token."""

    max_tokens: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    n: int = 1
    echo: bool = False
    logprobs: int | None = None


@dataclass(frozen=True)
class CompletionJob:
    """One completion request. Without a session it is answered by the frozen base; adapt and learn default to the
    session's options."""

    session: str | None
    adapt: AdaptMode | None
    learn: LearnMode | None
    prompts: list[Prompt]
    generation: GenerationOptions
    if_match: str | None = None
    stream: bool = False


@dataclass(frozen=True)
class TokenLogprob:
    """One token and its log-probability (nats; None where nothing predicts it); top: alternatives, likeliest first."""

    token_id: int
    token: bytes
    logprob: float | None
    top: list[tuple[int, bytes, float]]
    text_offset: int


@dataclass(frozen=True)
class Delta:
    """New text of a choice (prompt · n + i)."""

    choice: int
    text: str
    logprobs: list[TokenLogprob]


@dataclass(frozen=True)
class TurnEnd:
    """The last event of a turn, told after its commit."""

    finish_reasons: list[FinishReason]
    prompt_tokens: int
    completion_tokens: int
    adaptation: Adaptation | None


@dataclass(frozen=True)
class TurnRestarted:
    """The turn begins anew; what it said before is void. Never told to a stream."""


@dataclass(frozen=True)
class ObserveResult:
    """loss: nats per token, before they were learned."""

    tokens_learned: int
    rows_written: int
    loss: float | None
    version: int

    @classmethod
    def of(cls, done: Adaptation) -> ObserveResult:
        """What a turn did that only learned."""
        return cls(done.tokens_learned, done.rows_written, done.loss, done.version_to)


@dataclass(frozen=True)
class ScoreResult:
    """Log-probabilities in nats with and without the session's memory; losses are means per token."""

    tokens: list[str]
    logprobs: list[float]
    frozen_logprobs: list[float]
    loss: float | None
    frozen_loss: float | None
    version: int


class Turn:
    """A turn as it goes: the session's meta (None: no session), and what the turn did to it.

    seen, said: digests of the messages it may remember, those of the reply once there is one. result: what is to be
    remembered of its answer, given the session's next meta. content: where it begins, if not where the
    session is.
    """

    def __init__(
        self,
        handle: SessionHandle | None,
        seen_digests: Sequence[str] = (),
        *,
        kind: Kind = "learn",
        of: int | str | None = None,
        state_delta: StateDelta | None = None,
        policy_request: PolicyRequest | None = None,
    ) -> None:
        self.handle = handle
        self.meta = meta = None if handle is None else handle.meta
        self.kind, self.of = kind, of
        self.state_delta = state_delta
        self.policy_request = policy_request
        self.seen_digests = list(seen_digests)
        self.said: Callable[[], list[str]] = list
        self.result: Callable[[SessionMeta], dict[str, Any]] = lambda new: {}
        self.stats = JobStats()
        self.rows_written = 0
        self.completion_tokens = 0
        self._version = 0 if meta is None else meta.version

    def adaptation(self, version: int | None = None) -> Adaptation:
        """version: to which it goes, where that is not yet so."""
        learned = self.stats.tokens_learned
        loss = self.stats.loss_sum / learned if learned else None
        if version is None:
            version = self._version if self.meta is None else self.meta.version
        return Adaptation(learned, self.rows_written, loss, self._version, version)


@dataclass(frozen=True)
class AdaptPolicy:
    """What a completion request may do with its session's memory."""

    adapt: AdaptMode
    learn_prompt: bool
    learn_completion: bool

    @classmethod
    def of(cls, completion_job: CompletionJob, meta: SessionMeta | None) -> AdaptPolicy:
        """The request's own words, else the session's options. Raises BadRequest where they contradict the request."""
        options = {} if meta is None else meta.options
        adapt = completion_job.adapt or str(options.get("adapt", "both"))
        learn = completion_job.learn or str(options.get("learn", "prompt"))
        writes = meta is not None and adapt != "predict"
        completion = writes and adapt == "both" and learn in ("completion", "all")
        choices = len(completion_job.prompts) * completion_job.generation.n
        if completion and choices > 1:
            raise BadRequest(
                f"'learn': {learn!r} (the session's option) needs a single completion, got {choices} asked for.",
                param="learn",
            )
        return cls(adapt, writes and learn in ("prompt", "all"), completion)  # type: ignore[arg-type]


class OutputProcessor:
    """Turns the engine's events into the text and the log-probabilities of each choice."""

    def __init__(self, options: GenerationOptions, prompts: Sequence[EncodedPrompt], tokenizer: Tokenizer) -> None:
        self._options = options
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._scores: list[list[Alternatives]] = [[] for _ in prompts]
        self._echoed = [not options.echo] * len(prompts)
        choices = len(prompts) * options.n
        self.texts = [""] * choices
        self.finish_reasons: list[FinishReason] = ["length" if options.max_tokens == 0 else "stop"] * choices

    def deltas(self, prompt: int, event: Event) -> Iterator[Delta]:
        """What an event of the prompt of this number adds."""
        if isinstance(event, TokenScores):
            self._scores[prompt] += event.alternatives
        elif isinstance(event, TokenOutput):
            yield from self._echo(prompt)
            choice = prompt * self._options.n + event.choice
            if event.finish is not None:
                self.finish_reasons[choice] = event.finish
            if event.text or event.tokens:
                yield self._delta(choice, event.text, event.tokens)

    def rest(self) -> Iterator[Delta]:
        """The echoes of prompts after which nothing was generated."""
        for prompt in range(len(self._prompts)):
            yield from self._echo(prompt)

    def _echo(self, prompt: int) -> Iterator[Delta]:
        if self._echoed[prompt]:
            return
        self._echoed[prompt] = True
        token_ids = self._prompts[prompt].token_ids
        scores: list[Alternatives] = []
        if self._options.logprobs is not None:
            scores = [Alternatives(token_ids[0], None), *self._scores[prompt]]
        for choice in range(prompt * self._options.n, (prompt + 1) * self._options.n):
            yield self._delta(choice, self._tokenizer.decode(token_ids), scores)

    def _delta(self, choice: int, text: str, tokens: Sequence[Alternatives]) -> Delta:
        offset, logprobs = len(self.texts[choice]), []
        for one in tokens:
            token = self._tokenizer.token_bytes(one.token_id)
            top = [(i, self._tokenizer.token_bytes(i), p) for i, p in one.top[: self._options.logprobs]]
            logprobs.append(TokenLogprob(one.token_id, token, one.logprob, top, offset))
            offset += len(token.decode(errors="ignore"))
        self.texts[choice] += text
        return Delta(choice, text, logprobs)


def segment(
    completion_job: CompletionJob, prompt: Prompt, encoded: EncodedPrompt, policy: AdaptPolicy, context: int
) -> Segment:
    """The request of the engine that answers a prompt. Raises BadRequest for one that the context has no room for."""
    options, count = completion_job.generation, len(encoded.token_ids)
    param = "messages" if isinstance(prompt, ChatPrompt) else "prompt"
    wanted = 0 if policy.adapt == "observe" else options.max_tokens
    if count + (wanted or 0) > context or (wanted is None and count == context):
        asked = f"{count} tokens" if not wanted else f"{count} tokens and 'max_tokens' {wanted}"
        raise BadRequest(
            f"'{param}' and completion may hold {context} tokens together (the model's context), "
            f"got {param} of {asked}.",
            param=param,
            code="context_length_exceeded",
        )
    generate = None
    if policy.adapt != "observe":
        generate = GenerationParams(
            max_tokens=context - count if wanted is None else wanted,
            sampling=options.sampling,
            stop=options.stop,
            n=options.n,
            logprobs=options.logprobs,
            learn=policy.learn_completion,
        )
    scored = options.echo and options.logprobs is not None
    return Segment(
        encoded.token_ids,
        learn=encoded.learn if policy.learn_prompt else None,
        score=[True] * count if scored else None,
        top=max(1, options.logprobs or 0) if scored else 0,
        generate=generate,
    )


def next_meta(meta: SessionMeta, done: JobFinished, digests: tuple[str, ...]) -> SessionMeta:
    """The meta of the version that `done` makes of a session."""
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
    )


def score_result(tokens: Sequence[bytes], scored: Sequence[TokenScores], version: int) -> ScoreResult:
    """What the scores of all of a text's tokens say."""

    def mean_loss(log_probs: Sequence[float]) -> float | None:
        return -sum(log_probs) / len(log_probs) if log_probs else None

    adapted = [value for event in scored for value in event.adapted]
    frozen = [value for event in scored for value in event.frozen or ()]
    words = [token.decode(errors="replace") for token in tokens]
    return ScoreResult(words, adapted, frozen, mean_loss(adapted), mean_loss(frozen), version)


def pack_answer(deltas: Iterable[Delta], end: TurnEnd) -> dict[str, Any]:
    """A completion request's answer as JSON; of a choice's deltas, one is made."""
    texts: dict[int, str] = {}
    tokens: dict[int, list[TokenLogprob]] = {}
    for delta in deltas:
        texts[delta.choice] = texts.get(delta.choice, "") + delta.text
        tokens.setdefault(delta.choice, []).extend(delta.logprobs)
    packed = {choice: [texts[choice], [_pack_token(one) for one in tokens[choice]]] for choice in texts}
    return {"choices": packed, "end": asdict(end)}


def unpack_answer(packed: dict[str, Any]) -> tuple[list[Delta], TurnEnd]:
    deltas = [
        Delta(int(choice), text, [_unpack_token(one) for one in tokens])
        for choice, (text, tokens) in packed["choices"].items()
    ]
    end = packed["end"]
    adaptation = None if end["adaptation"] is None else Adaptation(**end["adaptation"])
    return deltas, TurnEnd(**{**end, "adaptation": adaptation})


def _pack_token(one: TokenLogprob) -> list[Any]:
    top = [[token_id, base64.b64encode(token).decode(), logprob] for token_id, token, logprob in one.top]
    return [one.token_id, base64.b64encode(one.token).decode(), one.logprob, top, one.text_offset]


def _unpack_token(packed: list[Any]) -> TokenLogprob:
    token_id, token, logprob, top, text_offset = packed
    others = [(other, base64.b64decode(text), value) for other, text, value in top]
    return TokenLogprob(token_id, base64.b64decode(token), logprob, others, text_offset)


@dataclass(frozen=True)
class LoadedModel:
    """What is served, once it is loaded. fingerprints: of the base and of the memory's slow weights. policies: by name,
    and of which slow weights each is."""

    engine: Engine
    tokenizer: Tokenizer
    fingerprints: dict[str, str]
    context: int
    vocab_size: int
    policies: dict[str, Policy] = field(default_factory=dict)
    policy_fingerprints: dict[str, str] = field(default_factory=dict)

    @property
    def slow_weights(self) -> str:
        """One fingerprint for all that a session's rows depend on."""
        return "sha256:" + hashlib.sha256(json.dumps(self.fingerprints, sort_keys=True).encode()).hexdigest()

    def policy_of(self, model: str) -> str | None:
        """The policy of such slow weights, or "" if they are those of text; None: they are not served."""
        if model == self.slow_weights:
            return ""
        return next((name for name, mine in self.policy_fingerprints.items() if mine == model), None)

    def require_model(self, meta: SessionMeta, policy: str = "") -> None:
        """Raises Conflict for a session of other slow weights than text's or a policy's."""
        mine = self.policy_fingerprints[policy] if policy else self.slow_weights
        if meta.model != mine:
            other = self.policy_of(meta.model)
            trained_by = f"policy {other!r}" if other else "the model of text" if other == "" else "other slow weights"
            asked = f"policy {policy!r}" if policy else "the model of text"
            raise Conflict(
                f"Session {meta.id!r} was learned by {trained_by} ({meta.model[:23]}…), not by {asked} ({mine[:23]}…), "
                "and cannot be read with the latter.",
                code="model_mismatch",
            )

    def require_loaded_model(self, meta: SessionMeta) -> str:
        """The policy that a session is of, or "" if of text. Raises Conflict if its slow weights are not served."""
        policy_of = self.policy_of(meta.model)
        if policy_of is None:
            self.require_model(meta)
        return policy_of or ""

    def new_meta(self, name: str, options: dict[str, Option], policy: str = "") -> SessionMeta:
        """A session that has learned nothing."""
        now = time.time()
        return SessionMeta(
            id=name,
            version=0,
            model=self.policy_fingerprints[policy] if policy else self.slow_weights,
            tokens_learned=0,
            rows=0,
            bytes=0,
            created=now,
            updated=now,
            proof_tokens=0,
            loss_sum=0.0,
            frozen_loss_sum=0.0,
            requests=0,
            options=options,
            digests=(),
        )
