"""Grammars that a generated text must follow: for each step, the tokens that may come next (the package llguidance)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import any_to_lark
from torch import Tensor

from model.text.tokenizer import Tokenizer

# White space between the parts of a JSON text: without a bound, a small model writes nothing else.
JSON_SPACE = "( |\n{1,2}[ \t]{0,20})?"


class GrammarError(Exception):
    """A grammar that is not valid, or too large."""


@dataclass(frozen=True)
class GrammarSource:
    """A grammar as a client writes it.

    text: a JSON Schema, a list of texts as JSON, a regular expression, rules (GBNF or Lark), or the server's own Lark.
    """

    kind: Literal["json_schema", "choice", "regex", "rules", "lark"]
    text: str

    def compiled(self) -> str:
        """Return the grammar in llguidance's own form. Raises GrammarError."""
        try:
            match self.kind:
                case "json_schema":
                    options: Any = {"whitespace_pattern": JSON_SPACE}
                    return LLMatcher.grammar_from_json_schema(self.text, defaults=options)
                case "choice":
                    options = (json.dumps(choice, ensure_ascii=False) for choice in json.loads(self.text))
                    return LLMatcher.grammar_from_lark(f"start: {' | '.join(options)}")
                case "regex":
                    return LLMatcher.grammar_from_regex(self.text)
                case "rules":
                    return LLMatcher.grammar_from_lark(any_to_lark(self.text))
                case "lark":
                    return LLMatcher.grammar_from_lark(self.text)
        except Exception as error:  # the converters raise whatever they meet
            raise GrammarError(str(error)) from error


class Grammar:
    """A compiled grammar; `start` begins a text."""

    def __init__(self, matcher: LLMatcher, token_bytes: Callable[[int], bytes]) -> None:
        self._matcher = matcher
        self._token_bytes = token_bytes

    def start(self) -> GrammarState:
        """Return the state before the first token."""
        return GrammarState(self._matcher.deep_copy(), self._token_bytes)


class GrammarState:
    """The place of one text in its grammar."""

    def __init__(self, matcher: LLMatcher, token_bytes: Callable[[int], bytes]) -> None:
        self._matcher = matcher
        self._token_bytes = token_bytes

    @property
    def failed(self) -> bool:
        """Return whether the grammar has become too large to go on; only an end of text is allowed then."""
        return bool(self._matcher.is_error())

    def allowed(self) -> Tensor:
        """Return which tokens [V] may come next, as booleans.

        An end of text may come where the grammar is complete, and after a failure.
        """
        return torch.from_numpy(np.frombuffer(self._matcher.compute_logit_bias(), np.uint8) > 0)

    def advance(self, token: int) -> bool:
        """Take a token that was allowed; return whether the grammar allowed no other text in its place."""
        forced = self._matcher.compute_ff_bytes().startswith(self._token_bytes(token))
        self._matcher.consume_token(token)
        return forced


class GrammarCompiler:
    """Compiles grammars for the tokens of one model. To make one takes about a second.

    Args:
        tokenizer: of the model.
        vocab_size: number of scores of the model, which may exceed the number of tokens.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        ends = sorted(tokenizer.eos_token_ids) or [tokenizer.start_token_id]
        words = TokenizerWrapper(_Words(tokenizer, vocab_size, ends[0]))
        self._tokens = LLTokenizer(words, n_vocab=vocab_size, eos_token=ends)

    def compile(self, source: GrammarSource) -> Grammar:
        """Return the compiled grammar. Raises GrammarError."""
        matcher = LLMatcher(self._tokens, source.compiled(), log_level=0)
        if not matcher.is_error():
            matcher.compute_logit_bias()  # the first mask costs most, and finds what is too large
        if matcher.is_error():
            raise GrammarError(matcher.get_error().splitlines()[0])
        return Grammar(matcher, self._tokenizer.token_bytes)


class _Words:
    """The tokens of a tokenizer, as llguidance asks for them."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(vocab_size)]
        self.special_token_ids = [
            token_id for token_id, word in enumerate(self.tokens) if word and not tokenizer.text_bytes(token_id)
        ]
        self._tokenizer = tokenizer

    def __call__(self, text: bytes | str) -> Sequence[int]:
        return self._tokenizer.encode_inside(text.decode(errors="replace") if isinstance(text, bytes) else text)
