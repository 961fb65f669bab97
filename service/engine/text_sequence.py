"""One sequence that is being generated: its next tokens, its text as far as it may be shown, and what is learned."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from torch import Tensor

from model.adaptive_lm import DecodeState
from model.base.kv_cache import KVCache
from model.decode.prompt_lookup import PromptLookup
from model.memory.episodic.whole_words import WholeWords
from model.text.sampling import Sampler
from model.text.tokenizer import DecodeStream, Tokenizer
from service.engine.types import Alternatives, FinishReason, GenerationParams, TokenOutput

LINE_START = re.compile(r"\n([ \t]*)(?=[^ \t\r\n])")


class TextSequence:
    """One sequence that is being generated.

    The next scores come from `decode_state`; a drawn token in `pending` is decoded first.
    """

    def __init__(
        self,
        choice: int,
        cache: KVCache,
        decode_state: DecodeState,
        prompt: Sequence[int],
        options: GenerationParams,
        tokenizer: Tokenizer,
        learn_from: tuple[KVCache, DecodeState] | None = None,
        whole_words: WholeWords | None = None,
    ) -> None:
        """For a sequence that reads episodes: learn_from: the cache and the state after the prompt to learn from, as
        what is learned must not depend on episodes; whole_words: of the episodes."""
        self.choice = choice
        self.cache = cache
        self.decode_state = decode_state
        self.pending: int | None = None
        self.tokens: list[int] = []
        self.finish: FinishReason | None = None
        self.text = TextStream(tokenizer.stream(), options.stop, options.sampling.min_tokens, options.min_indent)
        self._began = 0.0
        self.num_learned = 0
        self.learn_cache, self.learn_decode_state = learn_from or (cache, decode_state)
        self._whole_words = whole_words
        self._options = options
        self.sampler = Sampler(options.sampling, choice=choice, prompt=prompt, eos=tokenizer.eos_token_ids)
        self._lookup = PromptLookup(prompt)
        self._alternatives: list[Alternatives] = []
        self._shown_text = 0
        self._shown_tokens = 0

    def input_tokens(self, rows: int) -> list[int]:
        """Return the inputs of the next step: the pending token, if any, and drafted tokens, up to `rows` in all."""
        if self.pending is None:
            return []
        # The sequence's last token is no input of any step.
        max_draft_tokens = min(rows, self._options.max_tokens - len(self.tokens)) - 1
        return [self.pending, *self._lookup.draft_tokens(max_draft_tokens)] if max_draft_tokens > 0 else [self.pending]

    def whole_word_scores(self, scores: Tensor, draft_tokens: Sequence[int] = ()) -> Tensor:
        """Return scores [V] after the sequence's tokens and draft tokens, higher for what completes a name or number
        of an episode."""
        return scores if self._whole_words is None else self._whole_words.adjust(scores, [*self.tokens, *draft_tokens])

    def draw_next(self, scores: Tensor) -> int:
        """Draw the next token from scores [V]; return the number of tokens added."""
        told = self.sampler.log_probs(scores) if self._options.as_drawn else scores
        token = self.sampler.draw(scores)
        if token in self.sampler.ends:
            self.text.finish()
            self.finish = "length" if self.sampler.failed else "stop"
            return 0
        self.tokens.append(token)
        self._lookup.add(token)
        if self._options.logprobs is not None:
            self._alternatives.append(_alternatives(told, token, self._options.logprobs))
        self._began = self._began or time.monotonic()
        if self.text.push(token):
            self.finish = "stop"
        elif len(self.tokens) == self._options.max_tokens or self._is_late():
            self.text.finish()
            self.finish = "length"
        self.pending = token
        return 1

    def _is_late(self) -> bool:
        """Return whether a text of more than one line has taken its time."""
        limit = self._options.max_ms
        return limit is not None and time.monotonic() - self._began > limit / 1000 and "\n" in self.text.text

    def marks(self, count: int) -> list[int]:
        """Return the marks of the first `count` tokens that are learned: 0 for those that a grammar forced."""
        return [0 if forced else self._options.learn for forced in self.sampler.forced[:count]]

    def show(self, segment: int) -> TokenOutput | None:
        """Return the text and the tokens that may be shown since the last call; None if there are none."""
        text = self.text.text[self._shown_text : self.text.num_released_chars]
        tokens = self._alternatives[self._shown_tokens : self.text.num_released_tokens]
        if not text and not tokens and self.finish is None:
            return None
        token_ids = self.tokens[self._shown_tokens : self.text.num_released_tokens]
        self._shown_text, self._shown_tokens = self.text.num_released_chars, self.text.num_released_tokens
        return TokenOutput(segment, self.choice, text, tokens, self.finish, self.text.stop, token_ids)


def _alternatives(scores: Tensor, token: int, top: int) -> Alternatives:
    log_probs = scores.log_softmax(-1)
    best = log_probs.topk(top)
    pairs = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Alternatives(token, float(log_probs[token]), pairs)


class TextStream:
    """The text of one sequence.

    Attributes:
        text: all text that may ever be shown.
        num_released_chars: number of characters of `text` that may be shown now.
        stop: the stop string that ended the text, or None.
    """

    def __init__(self, decode: DecodeStream, stops: tuple[str, ...], min_tokens: int = 0, min_indent: int = 0) -> None:
        """min_tokens: number of tokens in whose text nothing is looked for that ends it. min_indent: white space with
        which each line after the first begins; the text ends before another line, unless the line is blank."""
        self._decode = decode
        self._stops = [_StopSearch(stop) for stop in stops]
        self._min_tokens, self._min_indent = min_tokens, min_indent
        self._num_indented = 0  # characters up to the last line that is known to be indented
        self._num_tokens = 0
        # For each token, the length of the text after the token. A token in the middle of a character ends with the
        # token that completes the character.
        self._text_ends: list[int] = []
        self._num_undecoded = 0
        self.text = ""
        self.num_released_chars = 0
        self.stop: str | None = None

    @property
    def num_released_tokens(self) -> int:
        """Number of tokens whose whole text is released."""
        count = len(self._text_ends)
        while count and self._text_ends[count - 1] > self.num_released_chars:
            count -= 1
        return count

    def push(self, token_id: int) -> bool:
        """Add a token; return whether a stop string is complete, or a line that is not indented has begun.

        The text then ends before the string or the line, and all of the text is released.
        """
        piece = self._decode.step(token_id)
        self._num_undecoded += 1
        self._num_tokens += 1
        return bool(piece) and self._extend(piece)

    def finish(self) -> None:
        """End the sequence: release the text that was held back."""
        if self._num_undecoded:
            self._extend(self._decode.flush())
        self.num_released_chars = len(self.text)

    def _extend(self, piece: str) -> bool:
        before = len(self.text)
        self.text += piece
        self._text_ends += [len(self.text)] * self._num_undecoded
        self._num_undecoded = 0
        if self._num_tokens <= self._min_tokens:
            self.num_released_chars = self._num_indented = len(self.text)
            return False
        ends = [(search, search.find(piece)) for search in self._stops]
        starts: list[tuple[int, str | None]]
        starts = [(before + end - len(search.stop), search.stop) for search, end in ends if end is not None]
        if self._min_indent and (outdent := self._find_outdent()) is not None:
            starts.append((outdent, None))
        if starts:
            start, self.stop = min(starts, key=lambda found: found[0])
            self.text = self.text[:start]
            self.num_released_chars = len(self.text)
            return True
        held_back = max((search.num_matched for search in self._stops), default=0)
        if self._min_indent:
            held_back = max(held_back, len(self.text) - len(self.text.rstrip()))
        self.num_released_chars = max(self.num_released_chars, len(self.text) - held_back)
        return False

    def _find_outdent(self) -> int | None:
        """Return the end of the text before its first line with less white space than asked; None if there is none."""
        for line in LINE_START.finditer(self.text, self._num_indented):
            if len(line[1]) < self._min_indent:
                return len(self.text[: line.start()].rstrip("\r\n"))
            self._num_indented = line.end()
        return None


class _StopSearch:
    """Looks for one stop string in a text that grows, each character once (Knuth, Morris and Pratt 1977).

    Attributes:
        num_matched: characters at the end of the text that may be the beginning of the stop string.
    """

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0
        self._borders = [0]  # for each beginning of the string, the longest shorter beginning that is its end too
        for character in stop[1:]:
            self._borders.append(self._extended(self._borders[-1], character))

    def find(self, piece: str) -> int | None:
        """Add a piece of text; return the length of the piece up to the end of the string, if the string is there."""
        for index, character in enumerate(piece):
            self.num_matched = self._extended(self.num_matched, character)
            if self.num_matched == len(self.stop):
                return index + 1
        return None

    def _extended(self, matched: int, character: str) -> int:
        while matched and self.stop[matched] != character:
            matched = self._borders[matched - 1]
        return matched + (self.stop[matched] == character)
