"""A text job on the device: segments block by block, sequences token by token. Only the engine's thread runs a job."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from model.adaptive_lm import AdaptiveLM, DecodeState, Scores
from model.base.kv_cache import KVCache
from model.episodes import Episode, RecallRequest, Span
from model.recall import ReadingWeight
from model.text.tokenizer import Tokenizer
from service.engine.resident import MemoryJob, ResidentSessions
from service.engine.text_sequence import TextSequence
from service.engine.types import (
    Event,
    GenerationParams,
    JobFinished,
    JobRequest,
    LearnedCompletion,
    Segment,
    TokenScores,
)

EPISODES_A_BLOCK = 4  # that are encoded and written between two steps of other jobs


class _Reading:
    """The second pass over a prompt, from the block on in which its episodes are read: nothing is learned from it.

    start: the first token of that block. parts: the ranges of tokens that the pass has still to run. cache: of the
    prompt with the episodes. scores: whether the pass scores the prompt, each block before the block is learned.
    weight: of these scores beside those of the first pass.
    """

    def __init__(self, episodes: list[Episode], recall: RecallRequest, length: int, block: int) -> None:
        self.episodes = episodes
        self.recall = recall
        self.scores = recall.query is None
        self.weight = ReadingWeight()
        self.start = recall.at // block * block
        self.num_tokens = recall.cached_tokens(episodes)
        self.parts = deque(recall.parts(self.start, length, block))
        self.cache: KVCache | None = None
        self.decode_state: DecodeState | None = None


class TextJob(MemoryJob):
    """A text request on the engine. Methods raise what the model raises; `close` cleans up after any error.

    Attributes:
        num_sequences: number of sequences that the job may decode at once.
        num_tokens: number of tokens of the key-value cache that the job may need.
        sequences: the sequences of the current segment.
    """

    def __init__(self, request: JobRequest, lm: AdaptiveLM, tokenizer: Tokenizer) -> None:
        super().__init__(request)
        counts = [segment.generate.n if segment.generate else 1 for segment in request.segments]
        self.num_sequences = max(counts)
        self.num_tokens = max(
            _capacity(segment) * n + _reading_capacity(segment, n)
            for segment, n in zip(request.segments, counts, strict=True)
        )
        self.sequences: list[TextSequence] = []
        self._lm = lm
        self._tokenizer = tokenizer
        self._block = lm.memory.config.block
        self._segment = -1
        self._position = 0
        self._cache: KVCache | None = None
        self._frozen_cache: KVCache | None = None
        self._decode_state: DecodeState | None = None
        self._without_rows: Sequence[int] = ()
        self._learned_completions: dict[int, LearnedCompletion] = {}
        self._reading: _Reading | None = None
        self._recalled: list[Episode] = []
        self._spans: deque[Span] = deque()  # that are to be written as episodes
        self._completions_kept = False

    @property
    def wants_block(self) -> bool:
        """True if the job's next step is a block rather than decoding."""
        return self._prefilling or bool(self._spans) or any(self._learnable(sequence) for sequence in self.sequences)

    @property
    def done(self) -> bool:
        """True if all segments are complete."""
        return self._segment == len(self.request.segments)

    def start(self, resident: ResidentSessions) -> None:
        """Acquire the session's memory and begin the first segment. Raises PoolFullError."""
        super().start(resident)
        self._next_segment()

    def close(self, resident: ResidentSessions, *, commit: bool) -> None:
        """Commit the draft or roll the draft back, release the session, and free the caches."""
        super().close(resident, commit=commit)
        self._cache = self._frozen_cache = self._reading = None
        self.sequences = []

    def finished(self) -> JobFinished:
        return replace(super().finished(), learned_completions=self._learned_completions, recalled=self._recalled)

    def block(self, resident: ResidentSessions) -> Iterator[Event]:
        """Run one block of the prompt, or learn one block of a completion; yield the events."""
        if self._prefilling:
            yield from self._prefill(resident)
        elif self._spans:
            self._write_episodes()
        else:
            self._learn(next(s for s in self.sequences if self._learnable(s)), resident)
        self.advance()

    def advance(self) -> None:
        """Begin the next segment, or end the job, if the current segment is complete."""
        if self.done or self._prefilling or not all(s.finish and not self._learnable(s) for s in self.sequences):
            return
        if not self._completions_kept:
            self._completions_kept = True
            self._keep_completions()
        if not self._spans:
            self._next_segment()

    def decodable(self) -> list[TextSequence]:
        """Return the sequences whose next token is due."""
        return [] if self.wants_block else [s for s in self.sequences if s.finish is None]

    def draw_tokens(
        self,
        sequence: TextSequence,
        draft_tokens: Sequence[int],
        decode_states: Sequence[DecodeState],
        scores: Sequence[Tensor],
    ) -> Iterator[Event]:
        """Draw the next tokens of a sequence: one, and one more after each drafted token that equals the drawn token.

        `decode_states` and `scores` ([V] each) are those of the sequence's end and after each drafted token. Yields
        what may be shown.
        """
        for offset, (decode_state, row) in enumerate(zip(decode_states, scores, strict=True)):
            sequence.decode_state, sequence.pending = decode_state, None
            if offset:  # the step itself counted the first row
                sequence.cache.length += 1
            self.stats.completion_tokens += sequence.draw_next(row)
            shown = sequence.show(self._segment)
            if shown is not None:
                yield shown
            self.advance()
            if sequence.finish or self.wants_block or sequence.pending not in draft_tokens[offset : offset + 1]:
                break

    @property
    def _prefilling(self) -> bool:
        if not 0 <= self._segment < len(self.request.segments):
            return False
        reading = self._reading
        return self._position < len(self._current_segment.token_ids) or (reading is not None and bool(reading.parts))

    @property
    def _current_segment(self) -> Segment:
        return self.request.segments[self._segment]

    def _keep_completions(self) -> None:
        for sequence in self.sequences:
            if sequence.num_learned:
                learned = sequence.tokens[: sequence.num_learned]
                completion = LearnedCompletion(learned, sequence.marks(sequence.num_learned))
                self._learned_completions[self._segment] = completion
                self._keep_episodes(*completion, len(self._current_segment.token_ids))

    def _next_segment(self) -> None:
        self._segment += 1
        self._completions_kept = False
        self._position = 0
        self._decode_state, self.sequences = None, []
        self._cache = self._frozen_cache = self._reading = None
        if not self.done:
            self._reading = self._recall(self._current_segment)
            self._without_rows = self._find_without_rows()
            self._cache = self._lm.new_cache(_capacity(self._current_segment))
            if self._wants_frozen and self._lm.needs_frozen_cache:
                self._frozen_cache = self._lm.new_cache(_capacity(self._current_segment))

    def _find_without_rows(self, reply: Sequence[int] = (), marks: Sequence[int] = ()) -> Sequence[int]:
        """Return which tokens of the segment, and of a reply after it with its marks, are learned without a row."""
        token_ids, episodes = self._current_segment.token_ids, self._lm.episodes
        learn = self._current_segment.learn or bytearray(len(token_ids))
        if episodes is None or self._draft is None:
            return bytearray(len(token_ids) + len(reply))
        if not reply:  # a long prompt is not copied
            return episodes.without_rows(token_ids, learn)
        return episodes.without_rows([*token_ids, *reply], [*learn, *marks])

    @property
    def _wants_frozen(self) -> bool:
        return self.request.frozen or (
            self._current_segment.learn is not None and self.request.in_proof_sample(self._segment)
        )

    def _prefill(self, resident: ResidentSessions) -> Iterator[Event]:
        """Run one block of the prompt; then one block of the second pass, if the prompt reads episodes."""
        if self._position < len(self._current_segment.token_ids):
            yield from self._prefill_block(resident)
            if self._position == len(self._current_segment.token_ids):
                self._prompt_learned(self._current_segment)
        else:
            self._read_block(resident)
        generate = self._current_segment.generate
        if not self._prefilling and generate is not None and generate.max_tokens:
            self.sequences = self._start_sequences(generate)

    def _prompt_learned(self, segment: Segment) -> None:
        if segment.learn is not None and any(segment.learn):
            self.stats.segments_learned += 1
            self._keep_episodes(segment.token_ids, segment.learn, 0)

    def _keep_episodes(self, token_ids: Sequence[int], learn: Sequence[int], offset: int) -> None:
        """Cut the learned runs of a token sequence, whose first token is number `offset` of the segment, into the spans
        that are kept as episodes."""
        segment = self._current_segment
        keeps = self.request.keep_episodes and segment.keep_episodes
        if self._lm.episodes is not None and self._draft is not None and keeps:
            self._spans.extend(self._lm.episodes.cut(token_ids, learn, offset))

    def _write_episodes(self) -> None:
        """Write some of the spans that are to be kept: encoding many would hold up the other jobs."""
        assert self._lm.episodes is not None and self._draft is not None
        spans = [self._spans.popleft() for _ in range(min(EPISODES_A_BLOCK, len(self._spans)))]
        version = self._current_segment.version or self.request.version
        self._lm.episodes.write(self._draft, spans, version=version)

    def _recall(self, segment: Segment) -> _Reading | None:
        """Choose the episodes that a segment reads, of those that the session has before the segment."""
        recall, memory = segment.recall, self.request.memory
        if recall is None or memory is None or self._pool is None or self._lm.episodes is None:
            return None
        if recall.query is not None and not _max_tokens(segment):
            return None
        room = self._lm.backbone.config.max_context - _capacity(segment)
        episodes = self._lm.episodes.find(self._pool, self._index, segment.token_ids, recall, room)
        self._recalled += [episode for episode in episodes if episode.ordinal]
        return _Reading(episodes, recall, len(segment.token_ids), self._block) if episodes else None

    def _read_block(self, resident: ResidentSessions) -> Scores | None:
        """Run one block of the second pass, and append the episodes where the pass has reached their place.

        Return the scores of the block, if the pass scores the prompt.
        """
        reading, memory, episodes = self._reading, self.request.memory, self._lm.episodes
        assert reading is not None and reading.cache is not None and memory is not None and episodes is not None
        start, stop = reading.parts.popleft()
        if start == reading.recall.at:
            episodes.append(reading.cache, memory.key, reading.episodes, reading.recall)
        segment = self._current_segment
        reading.decode_state, scores = self._lm.block(
            segment.token_ids[start:stop],
            reading.cache,
            resident.pool,
            self._index,
            decode_state=reading.decode_state,
            score=segment.score[start:stop] if reading.scores and segment.score is not None else None,
        )
        return scores

    def _prefill_block(self, resident: ResidentSessions) -> Iterator[Event]:
        assert self._cache is not None
        reading = self._reading
        if reading is not None and self._position == reading.start:
            capacity = _capacity(self._current_segment) + reading.num_tokens
            reading.cache, reading.decode_state = self._cache.fork(capacity), self._decode_state
        segment, start, recalled = self._current_segment, self._position, None
        part = slice(start, min(start + self._block, len(segment.token_ids)))
        while reading is not None and reading.scores and reading.parts and reading.parts[0][1] <= part.stop:
            recalled = self._read_block(resident)
        self._decode_state, scores = self._lm.block(
            segment.token_ids[part],
            self._cache,
            resident.pool,
            self._index,
            decode_state=self._decode_state,
            score=None if segment.score is None else segment.score[part],
            learn=None if segment.learn is None else segment.learn[part],
            without_rows=self._without_rows[part],
            draft=self._draft,
            score_frozen=self._wants_frozen,
            frozen_cache=self._frozen_cache,
            top=segment.top,
        )
        self._position = part.stop
        self.stats.prompt_tokens += part.stop - part.start
        if scores is not None:
            self._count(scores)
            if segment.score is not None:
                if reading is not None and recalled is not None:
                    scores = replace(scores, adapted=reading.weight.mix(recalled.adapted, scores.adapted))
                yield self._token_scores(part, segment.score, scores)

    def _token_scores(self, part: slice, score: Sequence[int], scores: Scores) -> TokenScores:
        positions = [i for i in range(part.start, part.stop) if score[i] and i > 0]
        tokens = [self._current_segment.token_ids[i] for i in positions]
        has_frozen = self.request.frozen and scores.frozen is not None
        top_logprobs, top_ids = scores.top or (None, None)
        return TokenScores(
            self._segment,
            array("i", tokens),
            _floats(scores.adapted),
            _floats(scores.frozen) if has_frozen else None,
            array("i", () if top_ids is None else top_ids.flatten().tolist()),
            _floats(top_logprobs),
        )

    def _start_sequences(self, options: GenerationParams) -> list[TextSequence]:
        assert self._cache is not None and self._decode_state is not None
        cache, decode_state, learn_from, whole_words = self._cache, self._decode_state, None, None
        capacity, reading = _capacity(self._current_segment), self._reading
        if reading is not None:
            assert reading.cache is not None and reading.decode_state is not None and self._lm.episodes is not None
            whole_words = self._lm.episodes.whole_words(reading.episodes)
            learn_from = (cache, decode_state)
            capacity += reading.num_tokens
            cache, decode_state = reading.cache, replace(reading.decode_state, trust=decode_state.trust)
        if options.follows:
            learn_from = learn_from or (cache, decode_state)
            decode_state = decode_state.following(options.follows)
        caches = [cache, *(cache.fork(capacity) for _ in range(options.n - 1))]
        prompt = self._current_segment.token_ids
        return [
            TextSequence(i, cache, decode_state, prompt, options, self._tokenizer, learn_from, whole_words)
            for i, cache in enumerate(caches)
        ]

    def _learnable(self, sequence: TextSequence) -> bool:
        """Return whether a block of released tokens waits to be learned; at the end, whether any token waits."""
        generate = self._current_segment.generate if not self.done else None
        if generate is None or not generate.learn or self._draft is None:
            return False
        waiting = sequence.text.num_released_tokens - sequence.num_learned
        return waiting >= self._block or (sequence.finish is not None and waiting > 0)

    def _learn(self, sequence: TextSequence, resident: ResidentSessions) -> None:
        """Learn a block of a completion in one forward pass of its own, as a block of a prompt is learned.

        The forward pass replaces the keys and values of decoding at the same positions, because the bits of decoding
        depend on the batch.
        """
        count = min(self._block, sequence.text.num_released_tokens - sequence.num_learned)
        marks = sequence.marks(sequence.num_learned + count)
        cache, length = sequence.learn_cache, sequence.learn_cache.length
        cache.truncate(len(self._current_segment.token_ids) + sequence.num_learned)
        decode_state, scores = self._lm.block(
            sequence.tokens[sequence.num_learned : sequence.num_learned + count],
            cache,
            resident.pool,
            self._index,
            decode_state=sequence.learn_decode_state,
            learn=marks[-count:],
            without_rows=self._find_without_rows(sequence.tokens[: len(marks)], marks)[-count:],
            draft=self._draft,
            score_frozen=self._wants_frozen,
            frozen_cache=self._frozen_cache,
        )
        if scores is not None:
            self._count(scores)
        sequence.num_learned += count
        sequence.learn_decode_state = decode_state
        cache.length = max(cache.length, length)
        if cache is sequence.cache and sequence.num_learned == len(sequence.tokens):
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


def _floats(values: Tensor | None) -> array[float]:
    return array("d", () if values is None else values.flatten().tolist())


def _capacity(segment: Segment) -> int:
    return len(segment.token_ids) + _max_tokens(segment)


def _max_tokens(segment: Segment) -> int:
    return segment.generate.max_tokens if segment.generate else 0


def _reading_capacity(segment: Segment, n: int) -> int:
    """Return the number of tokens of the caches that read episodes, n of them; the prompt is learned from another."""
    return 0 if segment.recall is None else (_capacity(segment) + segment.recall.max_cached_tokens) * n
