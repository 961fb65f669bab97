"""One job on the device: its segments block by block, its sequences token by token. Only the engine's thread runs
it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from model.adaptive_lm import AdaptiveLM, DecodeState, Scores
from model.base.kv_cache import KVCache
from model.decode.prompt_lookup import PromptLookup
from model.text.sampling import Sampler
from model.text.tokenizer import Tokenizer
from service.engine.memory_job import MemoryJob
from service.engine.resident import ResidentSessions
from service.engine.text_stream import TextStream
from service.engine.types import (
    Alternatives,
    Event,
    FinishReason,
    GenerationParams,
    Job,
    JobFinished,
    Segment,
    TokenOutput,
    TokenScores,
)


class TextSequence:
    """One choice being generated. Its next scores come from `decode_state`; a drawn token in `pending` is decoded
    first."""

    def __init__(
        self,
        choice: int,
        cache: KVCache,
        decode_state: DecodeState,
        prompt: Sequence[int],
        options: GenerationParams,
        tokenizer: Tokenizer,
    ) -> None:
        self.choice = choice
        self.cache = cache
        self.decode_state = decode_state
        self.pending: int | None = None
        self.tokens: list[int] = []
        self.finish: FinishReason | None = None
        self.text = TextStream(tokenizer.stream(), options.stop)
        self.learned = 0
        self.learn_decode_state = decode_state
        self._options = options
        self._eos = tokenizer.eos_token_ids
        self.sampler = Sampler(options.sampling, choice=choice)
        self._lookup = PromptLookup(prompt)
        self._alternatives: list[Alternatives] = []
        self._shown_text = 0
        self._shown_tokens = 0

    def input_tokens(self, rows: int) -> list[int]:
        """What the next step is to take in: the token that was drawn last, if any, and up to `rows` tokens in all,
        where the others are a guess."""
        if self.pending is None:
            return []
        # The last token of all is not taken in any more.
        max_draft_tokens = min(rows, self._options.max_tokens - len(self.tokens)) - 1
        return [self.pending, *self._lookup.draft_tokens(max_draft_tokens)] if max_draft_tokens > 0 else [self.pending]

    def accept(self, scores: Tensor) -> int:
        """Draws the next token from scores [V] and notes what follows from it; returns the number of tokens added."""
        token = self.sampler.draw(scores)
        if token in self._eos:
            self.text.finish()
            self.finish = "stop"
            return 0
        self.tokens.append(token)
        self._lookup.add(token)
        if self._options.logprobs is not None:
            self._alternatives.append(_alternatives(scores, token, self._options.logprobs))
        if self.text.push(token):
            self.finish = "stop"
        elif len(self.tokens) == self._options.max_tokens:
            self.text.finish()
            self.finish = "length"
        self.pending = token
        return 1

    def show(self, segment: int) -> TokenOutput | None:
        """What may be shown since the last call."""
        text = self.text.text[self._shown_text : self.text.released]
        tokens = self._alternatives[self._shown_tokens : self.text.tokens_released]
        if not text and not tokens and self.finish is None:
            return None
        self._shown_text, self._shown_tokens = self.text.released, self.text.tokens_released
        return TokenOutput(segment, self.choice, text, tokens, self.finish)


class TextJob(MemoryJob):
    """A text job's way through the engine. Raises what the model raises; `close` then, to leave nothing behind."""

    def __init__(self, job: Job, lm: AdaptiveLM, tokenizer: Tokenizer) -> None:
        super().__init__(job)
        self.sequences: list[TextSequence] = []
        self._lm = lm
        self._tokenizer = tokenizer
        self._block = lm.memory.config.block
        self._segment = -1
        self._position = 0
        self._cache: KVCache | None = None
        self._frozen_cache: KVCache | None = None
        self._decode_state: DecodeState | None = None
        self._learned_completions: dict[int, list[int]] = {}

    @property
    def num_sequences(self) -> int:
        return max((s.generate.n if s.generate else 1) for s in self.job.segments)

    @property
    def num_tokens(self) -> int:
        return max(self._capacity(s) * (s.generate.n if s.generate else 1) for s in self.job.segments)

    @property
    def wants_block(self) -> bool:
        return self._prefilling or any(self._learnable(sequence) for sequence in self.sequences)

    @property
    def done(self) -> bool:
        return self._segment == len(self.job.segments)

    def start(self, resident: ResidentSessions) -> None:
        """Takes its session's memory and begins its first segment. Raises PoolFullError."""
        super().start(resident)
        self._next_segment()

    def close(self, resident: ResidentSessions, *, commit: bool) -> None:
        """Ends the turn: its draft becomes the session, or is forgotten."""
        super().close(resident, commit=commit)
        self._cache = self._frozen_cache = None
        self.sequences = []

    def finished(self) -> JobFinished:
        return replace(super().finished(), learned_completions=self._learned_completions)

    def block(self, resident: ResidentSessions) -> Iterator[Event]:
        """Runs one block: of the prompt, or of what was generated and is to be learned."""
        if self._prefilling:
            yield from self._prefill(resident)
        else:
            self._learn(next(s for s in self.sequences if self._learnable(s)), resident)
        self.advance()

    def advance(self) -> None:
        """Goes on to the next segment, or to the end, if this one is complete."""
        complete = not self._prefilling and all(s.finish and not self._learnable(s) for s in self.sequences)
        if complete and not self.done:
            self._next_segment()

    def decodable(self) -> list[TextSequence]:
        """The sequences whose next token is due."""
        return [] if self.wants_block else [s for s in self.sequences if s.finish is None]

    def accept(
        self,
        sequence: TextSequence,
        draft_tokens: Sequence[int],
        decode_states: Sequence[DecodeState],
        scores: Sequence[Tensor],
    ) -> Iterator[Event]:
        """The next tokens of a sequence, from the carries and the scores [V] where it stands and after each token of
        the guess: as long as that is right, and one more."""
        for offset, (decode_state, row) in enumerate(zip(decode_states, scores, strict=True)):
            sequence.decode_state, sequence.pending = decode_state, None
            if offset:  # the step itself counted the first row
                sequence.cache.length += 1
            self.stats.completion_tokens += sequence.accept(row)
            shown = sequence.show(self._segment)
            if shown is not None:
                yield shown
            self.advance()
            if sequence.finish or self.wants_block or sequence.pending not in draft_tokens[offset : offset + 1]:
                break

    @property
    def _prefilling(self) -> bool:
        return 0 <= self._segment < len(self.job.segments) and self._position < len(self._current_segment.token_ids)

    @property
    def _current_segment(self) -> Segment:
        return self.job.segments[self._segment]

    def _capacity(self, segment: Segment) -> int:
        return len(segment.token_ids) + (segment.generate.max_tokens if segment.generate else 0)

    def _next_segment(self) -> None:
        for sequence in self.sequences:
            if sequence.learned:
                self._learned_completions[self._segment] = sequence.tokens[: sequence.learned]
        self._segment += 1
        self._position = 0
        self._decode_state, self.sequences = None, []
        self._cache = self._frozen_cache = None
        if not self.done:
            self._cache = self._lm.new_cache(self._capacity(self._current_segment))
            if self._wants_frozen and self._lm.needs_frozen_cache:
                self._frozen_cache = self._lm.new_cache(self._capacity(self._current_segment))

    @property
    def _wants_frozen(self) -> bool:
        return self.job.frozen or (self._current_segment.learn is not None and self.job.in_proof_sample(self._segment))

    def _prefill(self, resident: ResidentSessions) -> Iterator[Event]:
        assert self._cache is not None
        segment, start = self._current_segment, self._position
        part = slice(start, min(start + self._block, len(segment.token_ids)))
        self._decode_state, scores = self._lm.block(
            segment.token_ids[part],
            self._cache,
            resident.pool,
            self._index,
            decode_state=self._decode_state,
            score=None if segment.score is None else segment.score[part],
            learn=None if segment.learn is None else segment.learn[part],
            draft=self._draft,
            frozen=self._wants_frozen,
            frozen_cache=self._frozen_cache,
            top=segment.top,
        )
        self._position = part.stop
        self.stats.prompt_tokens += part.stop - part.start
        if scores is not None:
            self._count(scores)
            if segment.score is not None:
                yield self._token_scores(part, segment.score, scores)
        if not self._prefilling:
            self.stats.segments_learned += int(segment.learn is not None and any(segment.learn))
            if segment.generate is not None and segment.generate.max_tokens:
                self.sequences = self._start_sequences(segment.generate)

    def _token_scores(self, part: slice, score: Sequence[bool], scores: Scores) -> TokenScores:
        positions = [i for i in range(part.start, part.stop) if score[i] and i > 0]
        tokens = [self._current_segment.token_ids[i] for i in positions]
        adapted = scores.adapted.tolist()
        frozen = scores.frozen.tolist() if self.job.frozen and scores.frozen is not None else None
        alternatives = []
        if scores.top is not None:
            values, ids = scores.top[0].tolist(), scores.top[1].tolist()
            alternatives = [
                Alternatives(token, logprob, list(zip(ids[n], values[n], strict=True)))
                for n, (token, logprob) in enumerate(zip(tokens, adapted, strict=True))
            ]
        return TokenScores(self._segment, tokens, adapted, frozen, alternatives)

    def _start_sequences(self, options: GenerationParams) -> list[TextSequence]:
        assert self._cache is not None and self._decode_state is not None
        capacity = self._capacity(self._current_segment)
        caches = [self._cache, *(self._cache.fork(capacity) for _ in range(options.n - 1))]
        prompt = self._current_segment.token_ids
        return [
            TextSequence(i, cache, self._decode_state, prompt, options, self._tokenizer)
            for i, cache in enumerate(caches)
        ]

    def _learnable(self, sequence: TextSequence) -> bool:
        """Whether a block of released tokens waits to be learned; at the end, any released token."""
        generate = self._current_segment.generate if not self.done else None
        if generate is None or not generate.learn or self._draft is None:
            return False
        waiting = sequence.text.tokens_released - sequence.learned
        return waiting >= self._block or (sequence.finish is not None and waiting > 0)

    def _learn(self, sequence: TextSequence, resident: ResidentSessions) -> None:
        """Learns a block of a completion as if it were a prompt's: in one forward of its own, over the same positions.

        That forward replaces the keys and values of decoding, whose bits depend on the batch they were made in.
        """
        count = min(self._block, sequence.text.tokens_released - sequence.learned)
        cache, length = sequence.cache, sequence.cache.length
        cache.truncate(len(self._current_segment.token_ids) + sequence.learned)
        decode_state, scores = self._lm.block(
            sequence.tokens[sequence.learned : sequence.learned + count],
            cache,
            resident.pool,
            self._index,
            decode_state=sequence.learn_decode_state,
            learn=[True] * count,
            draft=self._draft,
            frozen=self._wants_frozen,
            frozen_cache=self._frozen_cache,
        )
        if scores is not None:
            self._count(scores)
        sequence.learned += count
        sequence.learn_decode_state = decode_state
        cache.length = max(cache.length, length)
        if sequence.learned == len(sequence.tokens):
            sequence.decode_state, sequence.pending = decode_state, None

    def _count(self, scores: Scores) -> None:
        if self._draft is None:
            return
        learned = int(scores.learned.sum())
        loss = -float(scores.adapted[scores.learned].double().sum())
        self.stats.tokens_learned += learned
        self.stats.loss_sum += loss
        if scores.frozen is not None:
            self.stats.proof_tokens += learned
            self.stats.proof_loss_sum += loss
            self.stats.proof_frozen_loss_sum -= float(scores.frozen[scores.learned].double().sum())


def _alternatives(scores: Tensor, token: int, top: int) -> Alternatives:
    log_probs = scores.log_softmax(-1)
    best = log_probs.topk(top)
    pairs = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Alternatives(token, float(log_probs[token]), pairs)
