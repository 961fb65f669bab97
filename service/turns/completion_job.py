"""The request of a completion, checked and in the server's own types, and the segments that answer it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from model.episodes import RecallRequest
from model.memory.episodic.borrowed import LEARNED, REPLY
from model.text.grammar import GrammarError, GrammarSource
from model.text.infill import Cut
from model.text.sampling import SamplingParams
from service.concurrency import LARGE, run_off_loop
from service.engine import GenerationParams, Segment
from service.errors import BadRequest
from service.store.base import SessionMeta
from service.turns.loaded_model import LoadedModel
from service.turns.prompts import ChatPrompt, EncodedPrompt, Prompt
from service.types import AdaptMode, LearnMode

MAX_FOLLOWED = 8  # tokens before a gap: the memory's longest n-gram


@dataclass(frozen=True)
class GenerationOptions:
    """Options of a generation.

    Attributes:
        max_tokens: None, or more than the context has room for, fills the context.
        best_of: number of texts from which the best `n` are returned; None = `n`.
        logprobs: alternatives for each token; None = no log-probabilities.
        prompt_logprobs: alternatives for each token of the prompt; None = no log-probabilities of the prompt.
        grammar: the grammar that the text must follow, and the field that has it.
        max_ms, min_indent, as_drawn: as in `GenerationParams`.
    """

    max_tokens: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    n: int = 1
    echo: bool = False
    logprobs: int | None = None
    best_of: int | None = None
    prompt_logprobs: int | None = None
    grammar: tuple[GrammarSource, str] | None = None
    max_ms: int | None = None
    min_indent: int = 0
    as_drawn: bool = False

    @property
    def candidates(self) -> int:
        """Return the number of texts that are generated for each prompt."""
        return self.best_of or self.n

    @property
    def scores_prompt(self) -> bool:
        return (self.echo and self.logprobs is not None) or self.prompt_logprobs is not None

    @property
    def scored_top(self) -> int:
        """Return the number of alternatives that are computed for each scored token of a prompt."""
        return max(1, self.logprobs or 0, self.prompt_logprobs or 0) if self.scores_prompt else 0


@dataclass(frozen=True)
class CompletionJob:
    """One completion request. Without a session the frozen base answers; adapt and learn default to the session's
    options.

    cut: what a prompt around a gap had no room for; None for a prompt of another kind.
    """

    session: str | None
    adapt: AdaptMode | None
    learn: LearnMode | None
    prompts: list[Prompt]
    generation: GenerationOptions
    if_match: str | None = None
    stream: bool = False
    recall: bool | None = None
    cut: Cut | None = None


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
        choices = len(job.prompts) * job.generation.candidates
        if completion and choices > 1:
            raise BadRequest(
                f"'learn': {learn!r} (the session's option) needs a single completion, got {choices} asked for.",
                param="learn",
            )
        return cls(adapt, writes and learn in ("prompt", "all"), completion)  # type: ignore[arg-type]

    @property
    def writes(self) -> bool:
        return self.learn_prompt or self.learn_completion


async def with_grammar(options: GenerationOptions, model: LoadedModel) -> GenerationOptions:
    """Return the options with their grammar compiled. Raises BadRequest for a grammar that is not valid."""
    if options.grammar is None:
        return options
    source, param = options.grammar
    try:
        grammar = await run_off_loop(LARGE, model.grammars.compile, source)
    except GrammarError as error:
        raise BadRequest(f"'{param}' is no grammar that this server can follow: {error}."[:500], param=param) from error
    return replace(options, sampling=replace(options.sampling, grammar=grammar))


def num_logprobs(options: GenerationOptions, encoded: Sequence[EncodedPrompt], context: int) -> int:
    """Return the largest number of tokens whose log-probabilities the answer to a request may hold."""
    lengths = [len(prompt.token_ids) for prompt in encoded]
    of_prompts = 0 if options.prompt_logprobs is None else sum(lengths)
    if options.logprobs is None and options.candidates == options.n:
        return of_prompts
    most = context if options.max_tokens is None else options.max_tokens
    generated = sum(min(most, max(0, context - length)) for length in lengths)
    return of_prompts + options.candidates * (generated + (sum(lengths) if options.echo else 0))


def build_segment(
    options: GenerationOptions, prompt: Prompt, encoded: EncodedPrompt, policy: AdaptPolicy, context: int
) -> Segment:
    """Return the engine's request that answers a prompt.

    The completion is as long as there is room for at most. Raises BadRequest for a prompt that leaves no room.
    """
    count, param = len(encoded.token_ids), "messages" if isinstance(prompt, ChatPrompt) else "prompt"
    max_tokens = 0 if policy.adapt == "observe" else options.max_tokens
    room = context - count
    if room < 0 or (room == 0 and max_tokens != 0):
        raise BadRequest(
            f"'{param}' and completion may hold {context} tokens together (the model's context), "
            f"got {param} of {count} tokens.",
            param=param,
            code="context_length_exceeded",
        )
    generate = None
    if policy.adapt != "observe":
        generate = GenerationParams(
            max_tokens=room if max_tokens is None else min(room, max_tokens),
            sampling=options.sampling,
            stop=options.stop,
            n=options.candidates,
            logprobs=0 if options.logprobs is None and options.candidates > options.n else options.logprobs,
            learn=policy.learn_completion and (REPLY if isinstance(prompt, ChatPrompt) else LEARNED),
            follows=_before_gap(prompt, encoded),
            max_ms=options.max_ms,
            min_indent=options.min_indent,
            as_drawn=options.as_drawn,
        )
    return Segment(
        encoded.token_ids,
        learn=encoded.learn if policy.learn_prompt else None,
        score=[True] * count if options.scores_prompt else None,
        top=options.scored_top,
        generate=generate,
    )


def recalling(segment: Segment, recall: RecallRequest | None, limit: int | None, context: int) -> Segment:
    """Return a segment that recalls.

    A completion that would fill the context leaves room for what it may recall, unless half of its own room would go.
    """
    generate, room = segment.generate, context - len(segment.token_ids)
    if recall is not None and generate is not None and (limit is None or limit >= room):
        left = room - recall.max_cached_tokens
        if left >= room // 2:
            generate = replace(generate, max_tokens=left)
    return replace(segment, generate=generate, recall=recall)


def _before_gap(prompt: Prompt, encoded: EncodedPrompt) -> tuple[int, ...]:
    """Return the last tokens before the gap of a prompt that has one; none for any other prompt."""
    if isinstance(prompt, ChatPrompt) or encoded.question is None:
        return ()
    start, stop = encoded.question
    return tuple(encoded.token_ids[max(start, stop - MAX_FOLLOWED) : stop])
