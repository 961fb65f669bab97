"""The turn that answers a completion request, and what the client gets of it."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any, Literal

from model.text.tokenizer import Tokenizer
from service.engine import Event, TokenOutput, TokenScores
from service.store.base import WriteMode
from service.turns import prompts
from service.turns.commit import TurnOutcome, TurnPlan
from service.turns.completion_job import (
    AdaptPolicy,
    CompletionJob,
    GenerationOptions,
    build_segment,
    num_logprobs,
    recalling,
    with_grammar,
)
from service.turns.loaded_model import LoadedModel
from service.turns.prompts import ChatPrompt, EncodedPrompt
from service.turns.run import Json, Turn
from service.turns.session_gate import SessionHandle, SessionTarget
from service.types import Adaptation, AdaptMode

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token and its log-probability (nats; None where nothing predicts the token).

    top: alternatives (id, bytes, nats), the likeliest first. frozen: the log-probability without memory, where it is
    asked for.
    """

    token_id: int
    token: bytes
    logprob: float | None
    top: list[tuple[int, bytes, float]]
    text_offset: int
    frozen: float | None = None


@dataclass(frozen=True)
class PromptLogprobs:
    """The log-probabilities of the tokens of a prompt.

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
                frozen = block.frozen[number] if block.frozen is not None else None
                yield TokenLogprob(token_id, token, block.adapted[number], top, offset, frozen)
                offset += len(token.decode(errors="ignore"))


@dataclass(frozen=True)
class Delta:
    """New text of a choice; `choice` is prompt · n + index. `prompt_tokens` is that of `TurnEnd`.

    token_ids: the new tokens; none where they are not known, as in an echo.
    """

    choice: int
    text: str
    logprobs: Sequence[TokenLogprob] | PromptLogprobs
    prompt_tokens: int = 0
    token_ids: Sequence[int] = ()


@dataclass(frozen=True)
class TurnEnd:
    """The last event of a completion, sent after the commit.

    Attributes:
        prompt_ms: milliseconds from the start of the work to the first text.
        predicted_ms: milliseconds from the first text to the last one.
        prompt_logprobs: of the tokens of each prompt, if they are asked for.
        stops: for each choice the stop string that ended it, or None.
        session_created: when the session was created; None without a session.
    """

    finish_reasons: list[FinishReason]
    prompt_tokens: int
    completion_tokens: int
    adaptation: Adaptation | None
    prompt_ms: float = 0.0
    predicted_ms: float = 0.0
    prompt_logprobs: Sequence[Sequence[TokenLogprob] | PromptLogprobs] = ()
    stops: Sequence[str | None] = ()
    session_created: float | None = None


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
        asked = "logprobs" if job.generation.prompt_logprobs is None else "prompt_logprobs"
        prompts.require_few_logprobs(num_logprobs(job.generation, encoded, model.context), asked)
        pairs = list(zip(job.prompts, encoded, strict=True))
        options = await with_grammar(job.generation, model)
        segments = [build_segment(options, p, e, policy, model.context) for p, e in pairs]
        self._policy, self._sent = policy, list[Delta]()
        self._output = OutputProcessor(job.generation, encoded, model.tokenizer)
        self._times = [time.perf_counter()]
        recalls = meta is not None and model.keeps_episodes(handle.ctx.tenant, meta.options, job.recall)
        if recalls:
            requests = [model.recall.request(e.token_ids, e.question, chat=isinstance(p, ChatPrompt)) for p, e in pairs]
            limit = job.generation.max_tokens if meta is not None and meta.rows else 0  # empty, it answers as the base
            segments = [recalling(s, r, limit, model.context) for s, r in zip(segments, requests, strict=True)]
        digests = [digest for e in encoded for digest in e.digests] if policy.learn_prompt else []
        frozen = job.generation.prompt_logprobs is not None
        return TurnPlan(
            meta, segments, digests=digests, writes=policy.writes, score_frozen=frozen, keep_episodes=recalls
        )

    def outputs(self, segment: int, event: Event) -> Iterator[Delta]:
        if isinstance(event, TokenOutput):
            self._times[1:] = [*self._times[1:2], time.perf_counter()]  # of the start, the first and the last output
        return self._recorded(self._output.deltas(segment, event))

    def remaining_outputs(self) -> Iterator[Delta]:
        return self._recorded(self._output.remaining())

    def reply_digests(self) -> Sequence[str]:
        chat = self._job.prompts[0]
        if self._policy.adapt != "both" or not isinstance(chat, ChatPrompt):
            return ()
        messages, replies = chat.messages, self._output.texts
        if chat.ending == "continue":
            messages, begun = messages[:-1], messages[-1]["content"]
            replies = [begun + reply for reply in replies]
        return prompts.reply_digests(messages, replies, tools=chat.tools)

    def last_event(self, outcome: TurnOutcome) -> TurnEnd:
        adaptation = None if outcome.meta is None else outcome.adaptation
        start, first, last = self._times[0], self._times[min(1, len(self._times) - 1)], self._times[-1]
        return TurnEnd(
            self._output.finish_reasons,
            self._output.prompt_tokens,
            outcome.completion_tokens,
            adaptation,
            round(1000 * (first - start), 3),
            round(1000 * (last - first), 3),
            self._output.prompt_logprobs(),
            self._output.stops,
            None if outcome.meta is None else outcome.meta.created,
        )

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
    """Makes the text and the log-probabilities of each choice from the engine's events.

    Where more candidates are generated than choices are returned, all deltas come at the end: those of the candidates
    of the highest log-probability per token, the best candidate first.
    """

    def __init__(self, options: GenerationOptions, prompts: Sequence[EncodedPrompt], tokenizer: Tokenizer) -> None:
        self._options = options
        self._prompts = prompts
        self._tokenizer = tokenizer
        self.prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        self._scores: list[list[TokenScores]] = [[] for _ in prompts]
        self._echoed = [not options.echo] * len(prompts)
        candidates = len(prompts) * options.candidates
        self.texts = [""] * candidates
        self.finish_reasons: list[FinishReason] = ["length" if options.max_tokens == 0 else "stop"] * candidates
        self.stops: list[str | None] = [None] * candidates
        self._waiting: list[list[Delta]] | None = None
        if options.candidates > options.n:
            self._waiting = [[] for _ in range(candidates)]
        self._token_logprobs: list[list[float]] = [[] for _ in range(candidates)]

    def deltas(self, prompt: int, event: Event) -> Iterator[Delta]:
        """Yield what an event of prompt number `prompt` adds."""
        if isinstance(event, TokenScores):
            self._scores[prompt].append(event)
        elif isinstance(event, TokenOutput):
            yield from self._passed(self._outputs(prompt, event))

    def remaining(self) -> Iterator[Delta]:
        """Yield the echoes of the prompts after which nothing was generated, and the candidates that were waiting."""
        for prompt in range(len(self._prompts)):
            yield from self._passed(self._echo(prompt))
        if self._waiting is not None:
            yield from self._best_candidates(self._waiting)

    def prompt_logprobs(self) -> list[PromptLogprobs]:
        """Return the log-probabilities of the tokens of each prompt; an empty list if they are not asked for."""
        shown, options = self._options.prompt_logprobs, self._options
        if shown is None:
            return []
        return [
            PromptLogprobs(prompt.token_ids[0], scores, options.scored_top, shown, self._tokenizer.token_bytes)
            for prompt, scores in zip(self._prompts, self._scores, strict=True)
        ]

    def _outputs(self, prompt: int, event: TokenOutput) -> Iterator[Delta]:
        yield from self._echo(prompt)
        candidate = prompt * self._options.candidates + event.choice
        if event.finish is not None:
            self.finish_reasons[candidate] = event.finish
            self.stops[candidate] = event.stop
        if self._waiting is not None:
            self._token_logprobs[candidate] += [entry.logprob or 0.0 for entry in event.tokens]
        if event.text or event.token_ids:
            yield self._delta(candidate, event)

    def _passed(self, deltas: Iterable[Delta]) -> Iterator[Delta]:
        """Yield the deltas, or keep them until it is known which candidates are returned."""
        if self._waiting is None:
            yield from deltas
        else:
            for delta in deltas:
                self._waiting[delta.choice].append(delta)

    def _best_candidates(self, waiting: list[list[Delta]]) -> Iterator[Delta]:
        """Choose the candidates of each prompt, and yield their deltas under the numbers of the choices."""
        means = [sum(each) / max(1, len(each)) for each in self._token_logprobs]
        options, chosen = self._options, list[int]()
        for start in range(0, len(waiting), options.candidates):
            ranked = sorted(range(start, start + options.candidates), key=lambda candidate: -means[candidate])
            chosen += ranked[: options.n]
        self.texts = [self.texts[candidate] for candidate in chosen]
        self.finish_reasons = [self.finish_reasons[candidate] for candidate in chosen]
        self.stops = [self.stops[candidate] for candidate in chosen]
        for choice, candidate in enumerate(chosen):
            yield from (replace(delta, choice=choice) for delta in waiting[candidate])

    def _echo(self, prompt: int) -> Iterator[Delta]:
        if self._echoed[prompt]:
            return
        self._echoed[prompt] = True
        token_ids, shown = self._prompts[prompt].token_ids, self._options.logprobs
        text, logprobs = self._tokenizer.decode(token_ids), list[TokenLogprob]()
        echo: PromptLogprobs | list[TokenLogprob] = logprobs
        if shown is not None:
            top, token_bytes = self._options.scored_top, self._tokenizer.token_bytes
            echo = PromptLogprobs(token_ids[0], self._scores[prompt], top, shown, token_bytes)
        for choice in range(prompt * self._options.candidates, (prompt + 1) * self._options.candidates):
            self.texts[choice] = text
            yield Delta(choice, text, echo, self.prompt_tokens)

    def _delta(self, choice: int, event: TokenOutput) -> Delta:
        offset, logprobs = len(self.texts[choice]), list[TokenLogprob]()
        for entry in event.tokens if self._options.logprobs is not None else ():
            token = self._tokenizer.token_bytes(entry.token_id)
            top = [(i, self._tokenizer.token_bytes(i), p) for i, p in entry.top[: self._options.logprobs]]
            logprobs.append(TokenLogprob(entry.token_id, token, entry.logprob, top, offset))
            offset += len(token.decode(errors="ignore"))
        self.texts[choice] += event.text
        return Delta(choice, event.text, logprobs, self.prompt_tokens, event.token_ids)


def pack_answer(deltas: Iterable[Delta], end: TurnEnd) -> dict[str, Any]:
    """Return a completion's answer as JSON, with the deltas of each choice joined; iterators stand for long lists."""
    texts: dict[int, str] = {}
    token_ids: dict[int, list[int]] = {}
    logprobs: dict[int, list[Sequence[TokenLogprob] | PromptLogprobs]] = {}
    for delta in deltas:
        texts[delta.choice] = texts.get(delta.choice, "") + delta.text
        token_ids.setdefault(delta.choice, []).extend(delta.token_ids)
        logprobs.setdefault(delta.choice, []).append(delta.logprobs)
    packed = {
        choice: [text, map(_pack_token, chain(*logprobs[choice])), token_ids[choice]] for choice, text in texts.items()
    }
    of_prompts = [map(_pack_token, tokens) for tokens in end.prompt_logprobs]
    adaptation = end.adaptation and asdict(end.adaptation)
    return {"choices": packed, "end": vars(end) | {"adaptation": adaptation, "prompt_logprobs": of_prompts}}


def unpack_answer(packed: dict[str, Any]) -> list[Delta | TurnEnd]:
    """Return the events of an answer that `pack_answer` packed."""
    end = packed["end"]
    deltas = [
        Delta(int(choice), text, [_unpack_token(token) for token in tokens], end["prompt_tokens"], *token_ids)
        for choice, (text, tokens, *token_ids) in packed["choices"].items()  # an earlier release keeps no ids
    ]
    adaptation = None if end["adaptation"] is None else Adaptation.from_record(end["adaptation"])
    of_prompts = [[_unpack_token(token) for token in tokens] for tokens in end.get("prompt_logprobs", ())]
    return [*deltas, TurnEnd(**{**end, "adaptation": adaptation, "prompt_logprobs": of_prompts})]


def _pack_token(entry: TokenLogprob) -> list[Any]:
    top = [[token_id, base64.b64encode(token).decode(), logprob] for token_id, token, logprob in entry.top]
    token = base64.b64encode(entry.token).decode()
    return [entry.token_id, token, entry.logprob, top, entry.text_offset, entry.frozen]


def _unpack_token(packed: list[Any]) -> TokenLogprob:
    token_id, token, logprob, top, text_offset, *frozen = packed  # a record of an earlier release ends here
    alternatives = [(other, base64.b64decode(text), value) for other, text, value in top]
    return TokenLogprob(token_id, base64.b64decode(token), logprob, alternatives, text_offset, *frozen)
