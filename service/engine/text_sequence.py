"""One sequence that is being generated: its next tokens, its text, and what is learned of it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor

from model.adaptive_lm import DecodeState
from model.base.kv_cache import KVCache
from model.decode.prompt_lookup import PromptLookup
from model.memory.episodic.whole_words import WholeWords
from model.text.sampling import Sampler
from model.text.tokenizer import Tokenizer
from service.engine.text_stream import TextStream
from service.engine.types import Alternatives, FinishReason, GenerationParams, TokenOutput


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
        token = self.sampler.draw(scores)
        if token in self.sampler.ends:
            self.text.finish()
            self.finish = "length" if self.sampler.failed else "stop"
            return 0
        self.tokens.append(token)
        self._lookup.add(token)
        if self._options.logprobs is not None:
            self._alternatives.append(_alternatives(scores, token, self._options.logprobs))
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
        self._shown_text, self._shown_tokens = self.text.num_released_chars, self.text.num_released_tokens
        return TokenOutput(segment, self.choice, text, tokens, self.finish, self.text.stop)


def _alternatives(scores: Tensor, token: int, top: int) -> Alternatives:
    log_probs = scores.log_softmax(-1)
    best = log_probs.topk(top)
    pairs = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Alternatives(token, float(log_probs[token]), pairs)
