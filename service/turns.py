"""The words between routes and sessions: what a turn is asked for, and what it tells."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from model.sampling import Sampling
from model.tokenizer import Tokenizer
from service.engine import Engine, Event, Stats, Token, TokenScores
from service.engine.job import Alternatives
from service.errors import BadRequest
from service.prompts import Encoded, Prompt
from service.store.types import SessionMeta
from service.tenants import Tenant

Adapt = Literal["both", "observe", "predict"]
Learn = Literal["prompt", "completion", "all"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Generation:
    """What to generate. max_tokens None fills the context; logprobs None is off, else alternatives to each token."""

    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    n: int = 1
    echo: bool = False
    logprobs: int | None = None


@dataclass(frozen=True)
class Ask:
    """One completion request. Without a session it is answered by the frozen base; adapt and learn default to the
    session's options."""

    tenant: Tenant
    session: str | None
    adapt: Adapt | None
    learn: Learn | None
    prompts: list[Prompt]
    generation: Generation
    if_match: str | None = None


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
class Adaptation:
    """What a turn did to its session. loss: nats per learned token, before it was learned."""

    tokens_learned: int
    rows_written: int
    loss: float | None
    version_from: int
    version_to: int


@dataclass(frozen=True)
class TurnEnd:
    """The last event of a turn, told after its commit."""

    finish_reasons: list[FinishReason]
    prompt_tokens: int
    completion_tokens: int
    adaptation: Adaptation | None


@dataclass(frozen=True)
class ObserveResult:
    """loss: nats per token, before they were learned."""

    tokens_learned: int
    rows_written: int
    loss: float | None
    version: int


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
    """A turn as it goes: whose it is, the session's meta (None: no session), and what the turn did to it.

    seen, said: digests of the messages it may remember, those of the reply once there is one.
    """

    def __init__(self, tenant: Tenant, meta: SessionMeta | None, seen: Sequence[str] = ()) -> None:
        self.tenant = tenant
        self.meta = meta
        self.seen = list(seen)
        self.said: Callable[[], list[str]] = list
        self.stats = Stats()
        self.rows_written = 0
        self.completion_tokens = 0
        self._version = 0 if meta is None else meta.version

    def adaptation(self) -> Adaptation:
        learned = self.stats.tokens_learned
        loss = self.stats.loss_sum / learned if learned else None
        version = self._version if self.meta is None else self.meta.version
        return Adaptation(learned, self.rows_written, loss, self._version, version)


@dataclass(frozen=True)
class Policy:
    """What a completion request may do with its session's memory."""

    adapt: Adapt
    learn_prompt: bool
    learn_completion: bool

    @classmethod
    def of(cls, ask: Ask, meta: SessionMeta | None) -> Policy:
        """The request's own words, else the session's options. Raises BadRequest where they contradict the request."""
        options = {} if meta is None else meta.options
        adapt = ask.adapt or options.get("adapt", "both")
        learn = ask.learn or options.get("learn", "prompt")
        writes = meta is not None and adapt != "predict"
        completion = writes and adapt == "both" and learn in ("completion", "all")
        choices = len(ask.prompts) * ask.generation.n
        if completion and choices > 1:
            raise BadRequest(
                f"'learn': {learn!r} (the session's option) needs a single completion, got {choices} asked for.",
                param="learn",
            )
        return cls(adapt, writes and learn in ("prompt", "all"), completion)  # type: ignore[arg-type]


class Answer:
    """Turns the engine's events into the text and the log-probabilities of each choice."""

    def __init__(self, options: Generation, prompts: Sequence[Encoded], tokenizer: Tokenizer) -> None:
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
        elif isinstance(event, Token):
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


@dataclass(frozen=True)
class Served:
    """The model that is served, once it is loaded. fingerprints: of the base and of the memory's slow weights."""

    engine: Engine
    tokenizer: Tokenizer
    fingerprints: dict[str, str]
    context: int
    vocab_size: int

    @property
    def slow_weights(self) -> str:
        """One fingerprint for all that a session's rows depend on."""
        return "sha256:" + hashlib.sha256(json.dumps(self.fingerprints, sort_keys=True).encode()).hexdigest()
