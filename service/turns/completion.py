"""The turn that answers a completion request: what the request asks, what the turn runs, what the client gets."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import Any, Literal

from model.text.sampling import SamplingParams
from model.text.tokenizer import Tokenizer
from service.engine import Event, GenerationParams, Segment, TokenOutput, TokenScores
from service.engine.types import Alternatives
from service.errors import BadRequest
from service.store.base import SessionMeta, WriteMode
from service.turns import prompts
from service.turns.commit import TurnOutcome, TurnPlan
from service.turns.loaded_model import LoadedModel
from service.turns.prompts import ChatPrompt, EncodedPrompt, Prompt
from service.turns.run import Json, Turn
from service.turns.session_gate import SessionHandle, SessionTarget
from service.types import Adaptation, AdaptMode, LearnMode

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class GenerationOptions:
    """Options of a generation. max_tokens: None fills the context; logprobs: alternatives a token, None = off."""

    max_tokens: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    n: int = 1
    echo: bool = False
    logprobs: int | None = None


@dataclass(frozen=True)
class CompletionJob:
    """One completion request. Without a session the frozen base answers; adapt and learn default to the session's
    options."""

    session: str | None
    adapt: AdaptMode | None
    learn: LearnMode | None
    prompts: list[Prompt]
    generation: GenerationOptions
    if_match: str | None = None
    stream: bool = False
    recall: bool | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token and its log-probability (nats; None where nothing predicts the token).

    top: alternatives (id, bytes, nats), the likeliest first.
    """

    token_id: int
    token: bytes
    logprob: float | None
    top: list[tuple[int, bytes, float]]
    text_offset: int


@dataclass(frozen=True)
class EchoLogprobs:
    """The log-probabilities of the tokens of an echoed prompt.

    Each is made when it is read: all of them, as objects, take twenty times the memory of `scores`, and hold the
    interpreter's lock while they are freed.

    Attributes:
        first: the first token, which nothing predicts.
        scores: of the other tokens.
        top: number of alternatives for each token in `scores`.
        shown: number of them to show.
        token_bytes: returns the bytes of a token.
    """

    first: int
    scores: Sequence[TokenScores]
    top: int
    shown: int
    token_bytes: Callable[[int], bytes]

    def __len__(self) -> int:
        return 1 + sum(len(block.token_ids) for block in self.scores)

    def __iter__(self) -> Iterator[TokenLogprob]:
        token = self.token_bytes(self.first)
        yield TokenLogprob(self.first, token, None, [], 0)
        offset = len(token.decode(errors="ignore"))
        for block in self.scores:
            for number, token_id in enumerate(block.token_ids):
                token, likeliest = self.token_bytes(token_id), range(number * self.top, number * self.top + self.shown)
                top = [(block.top_ids[i], self.token_bytes(block.top_ids[i]), block.top_logprobs[i]) for i in likeliest]
                yield TokenLogprob(token_id, token, block.adapted[number], top, offset)
                offset += len(token.decode(errors="ignore"))


@dataclass(frozen=True)
class Delta:
    """New text of a choice; `choice` is prompt · n + index."""

    choice: int
    text: str
    logprobs: Sequence[TokenLogprob] | EchoLogprobs


@dataclass(frozen=True)
class TurnEnd:
    """The last event of a completion, sent after the commit."""

    finish_reasons: list[FinishReason]
    prompt_tokens: int
    completion_tokens: int
    adaptation: Adaptation | None


@dataclass(frozen=True)
class AdaptPolicy:
    """The permissions of a completion request on its session's memory."""

    adapt: AdaptMode
    learn_prompt: bool
    learn_completion: bool

    @classmethod
    def of(cls, job: CompletionJob, meta: SessionMeta | None) -> AdaptPolicy:
        """Return what the request asks for, else what the session's options say.

        Raises BadRequest where the options contradict the request.
        """
        options = {} if meta is None else meta.options
        adapt = job.adapt or str(options.get("adapt", "both"))
        learn = job.learn or str(options.get("learn", "prompt"))
        writes = meta is not None and adapt != "predict"
        completion = writes and adapt == "both" and learn in ("completion", "all")
        choices = len(job.prompts) * job.generation.n
        if completion and choices > 1:
            raise BadRequest(
                f"'learn': {learn!r} (the session's option) needs a single completion, got {choices} asked for.",
                param="learn",
            )
        return cls(adapt, writes and learn in ("prompt", "all"), completion)  # type: ignore[arg-type]

    @property
    def writes(self) -> bool:
        return self.learn_prompt or self.learn_completion


class CompletionTurn(Turn[Delta | TurnEnd]):
    """Answers a completion request: `Delta`s, then one `TurnEnd`."""

    def __init__(self, job: CompletionJob) -> None:
        self._job = job
        if job.session is not None:
            modes: dict[AdaptMode | None, WriteMode] = {None: "unless predict", "predict": "never"}
            self.target = SessionTarget(job.session, modes.get(job.adapt, "always"), job.if_match)

    def replayed(self, record: Json) -> Iterable[Delta | TurnEnd]:
        return unpack_answer(record)

    async def plan(self, handle: SessionHandle, model: LoadedModel) -> TurnPlan:
        job, meta = self._job, None
        if job.session is not None:
            meta = handle.meta or model.new_meta(job.session, {})
            model.require_model(meta)
        policy, known_digests = AdaptPolicy.of(job, meta), () if meta is None else meta.digests
        encoded = [await prompts.encode_async(p, model.tokenizer, known_digests, reply=True) for p in job.prompts]
        prompts.require_few_logprobs(num_logprobs(job.generation, encoded, model.context), "logprobs")
        pairs = list(zip(job.prompts, encoded, strict=True))
        segments = [build_segment(job.generation, p, e, policy, model.context) for p, e in pairs]
        self._policy, self._sent = policy, list[Delta]()
        self._output = OutputProcessor(job.generation, encoded, model.tokenizer)
        self._prompt_tokens = sum(len(e.token_ids) for e in encoded)
        recalls = meta is not None and model.keeps_episodes(handle.ctx.tenant, meta.options, job.recall)
        if recalls:
            requests = [model.recall.request(e.token_ids, e.question, chat=isinstance(p, ChatPrompt)) for p, e in pairs]
            segments = [replace(s, recall=request) for s, request in zip(segments, requests, strict=True)]
        digests = [digest for e in encoded for digest in e.digests] if policy.learn_prompt else []
        return TurnPlan(meta, segments, digests=digests, writes=policy.writes, keep_episodes=recalls)

    def outputs(self, segment: int, event: Event) -> Iterator[Delta]:
        return self._recorded(self._output.deltas(segment, event))

    def remaining_outputs(self) -> Iterator[Delta]:
        return self._recorded(self._output.remaining())

    def reply_digests(self) -> Sequence[str]:
        chat = self._job.prompts[0]
        if self._policy.adapt != "both" or not isinstance(chat, ChatPrompt):
            return ()
        return prompts.reply_digests(chat.messages, self._output.texts)

    def last_event(self, outcome: TurnOutcome) -> TurnEnd:
        adaptation = None if outcome.meta is None else outcome.adaptation
        return TurnEnd(self._output.finish_reasons, self._prompt_tokens, outcome.completion_tokens, adaptation)

    def record(self, last: Delta | TurnEnd) -> Json:
        assert isinstance(last, TurnEnd)
        return pack_answer(self._sent, last)

    def _recorded(self, deltas: Iterable[Delta]) -> Iterator[Delta]:
        """Yield the deltas; keep them for the record if the turn may commit one."""
        for delta in deltas:
            if self._policy.writes:
                self._sent.append(delta)
            yield delta


class OutputProcessor:
    """Makes the text and the log-probabilities of each choice from the engine's events."""

    def __init__(self, options: GenerationOptions, prompts: Sequence[EncodedPrompt], tokenizer: Tokenizer) -> None:
        self._options = options
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._scores: list[list[TokenScores]] = [[] for _ in prompts]
        self._echoed = [not options.echo] * len(prompts)
        choices = len(prompts) * options.n
        self.texts = [""] * choices
        self.finish_reasons: list[FinishReason] = ["length" if options.max_tokens == 0 else "stop"] * choices

    def deltas(self, prompt: int, event: Event) -> Iterator[Delta]:
        """Yield what an event of prompt number `prompt` adds."""
        if isinstance(event, TokenScores):
            self._scores[prompt].append(event)
        elif isinstance(event, TokenOutput):
            yield from self._echo(prompt)
            choice = prompt * self._options.n + event.choice
            if event.finish is not None:
                self.finish_reasons[choice] = event.finish
            if event.text or event.tokens:
                yield self._delta(choice, event.text, event.tokens)

    def remaining(self) -> Iterator[Delta]:
        """Yield the echoes of the prompts after which nothing was generated."""
        for prompt in range(len(self._prompts)):
            yield from self._echo(prompt)

    def _echo(self, prompt: int) -> Iterator[Delta]:
        if self._echoed[prompt]:
            return
        self._echoed[prompt] = True
        token_ids, shown = self._prompts[prompt].token_ids, self._options.logprobs
        text, logprobs = self._tokenizer.decode(token_ids), list[TokenLogprob]()
        echo: EchoLogprobs | list[TokenLogprob] = logprobs
        if shown is not None:
            echo = EchoLogprobs(token_ids[0], self._scores[prompt], max(1, shown), shown, self._tokenizer.token_bytes)
        for choice in range(prompt * self._options.n, (prompt + 1) * self._options.n):
            self.texts[choice] = text
            yield Delta(choice, text, echo)

    def _delta(self, choice: int, text: str, tokens: Sequence[Alternatives]) -> Delta:
        offset, logprobs = len(self.texts[choice]), []
        for entry in tokens:
            token = self._tokenizer.token_bytes(entry.token_id)
            top = [(i, self._tokenizer.token_bytes(i), p) for i, p in entry.top[: self._options.logprobs]]
            logprobs.append(TokenLogprob(entry.token_id, token, entry.logprob, top, offset))
            offset += len(token.decode(errors="ignore"))
        self.texts[choice] += text
        return Delta(choice, text, logprobs)


def num_logprobs(options: GenerationOptions, encoded: Sequence[EncodedPrompt], context: int) -> int:
    """Return the largest number of tokens whose log-probabilities the answer to a request may hold."""
    if options.logprobs is None:
        return 0
    lengths = [len(prompt.token_ids) for prompt in encoded]
    most = context if options.max_tokens is None else options.max_tokens
    generated = sum(min(most, max(0, context - length)) for length in lengths)
    return options.n * (generated + (sum(lengths) if options.echo else 0))


def build_segment(
    options: GenerationOptions, prompt: Prompt, encoded: EncodedPrompt, policy: AdaptPolicy, context: int
) -> Segment:
    """Return the engine's request that answers a prompt.

    Raises BadRequest for a prompt and completion longer than `context` tokens.
    """
    count, param = len(encoded.token_ids), "messages" if isinstance(prompt, ChatPrompt) else "prompt"
    max_tokens = 0 if policy.adapt == "observe" else options.max_tokens
    if count + (max_tokens or 0) > context or (max_tokens is None and count == context):
        asked = f"{count} tokens" if not max_tokens else f"{count} tokens and 'max_tokens' {max_tokens}"
        raise BadRequest(
            f"'{param}' and completion may hold {context} tokens together (the model's context), "
            f"got {param} of {asked}.",
            param=param,
            code="context_length_exceeded",
        )
    generate = None
    if policy.adapt != "observe":
        generate = GenerationParams(
            max_tokens=context - count if max_tokens is None else max_tokens,
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


def pack_answer(deltas: Iterable[Delta], end: TurnEnd) -> dict[str, Any]:
    """Return a completion's answer as JSON, with the deltas of each choice joined; iterators stand for long lists."""
    texts: dict[int, str] = {}
    logprobs: dict[int, list[Sequence[TokenLogprob] | EchoLogprobs]] = {}
    for delta in deltas:
        texts[delta.choice] = texts.get(delta.choice, "") + delta.text
        logprobs.setdefault(delta.choice, []).append(delta.logprobs)
    packed = {choice: [texts[choice], map(_pack_token, chain(*logprobs[choice]))] for choice in texts}
    return {"choices": packed, "end": asdict(end)}


def unpack_answer(packed: dict[str, Any]) -> list[Delta | TurnEnd]:
    """Return the events of an answer that `pack_answer` packed."""
    deltas = [
        Delta(int(choice), text, [_unpack_token(token) for token in tokens])
        for choice, (text, tokens) in packed["choices"].items()
    ]
    end = packed["end"]
    adaptation = None if end["adaptation"] is None else Adaptation.from_record(end["adaptation"])
    return [*deltas, TurnEnd(**{**end, "adaptation": adaptation})]


def _pack_token(entry: TokenLogprob) -> list[Any]:
    top = [[token_id, base64.b64encode(token).decode(), logprob] for token_id, token, logprob in entry.top]
    return [entry.token_id, base64.b64encode(entry.token).decode(), entry.logprob, top, entry.text_offset]


def _unpack_token(packed: list[Any]) -> TokenLogprob:
    token_id, token, logprob, top, text_offset = packed
    alternatives = [(other, base64.b64decode(text), value) for other, text, value in top]
    return TokenLogprob(token_id, base64.b64decode(token), logprob, alternatives, text_offset)
