"""Prompts that ask for the text between two texts, with the special tokens that a base was trained with for this
(fill in the middle, Bavarian et al. 2022)."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from model.text.tokenizer import Tokenizer

# The names of the tokens of a family of bases: before the text that precedes the gap, before the text that follows it,
# before the gap's text; then, where the family has them, before a repository's name and before a file's.
FAMILIES: tuple[tuple[str, str, str, str, str], ...] = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|repo_name|>", "<|file_sep|>"),  # Qwen2.5-Coder
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "", "<|file_separator|>"),  # CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<repo_name>", "<file_sep>"),  # StarCoder 2
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<reponame>", "<filename>"),  # StarCoder, Granite
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>", "", ""),  # SantaCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", "", ""),  # DeepSeek-Coder
    ("▁<PRE>", "▁<SUF>", "▁<MID>", "", ""),  # CodeLlama
)
# Other tokens with which a base ends the text of a gap.
ENDS = ("<|endoftext|>", "<|fim_pad|>", "<fim_pad>", "<fim-pad>", "<|cursor|>", "▁<EOT>", "<｜end▁of▁sentence｜>")
REPOSITORY = "repository\n"
FILE = "file\n"
SNIPPET = "\n\n--- snippet ---\n\n"  # what llama.cpp writes between texts for bases without a token for files
PREFIX_SHARE = 0.75  # of the room that prefix and suffix share where both are too long


@dataclass(frozen=True)
class Snippet:
    """Other text that may help, such as a part of another file."""

    text: str
    filename: str


@dataclass(frozen=True)
class Cut:
    """The numbers of tokens that were left out because a prompt had no room for them."""

    prefix: int = 0
    suffix: int = 0
    extra: int = 0

    def __bool__(self) -> bool:
        return self.prefix + self.suffix + self.extra > 0


@dataclass(frozen=True)
class FilledPrompt:
    """The tokens of a prompt whose continuation is the text of a gap.

    prefix, suffix: the ranges [start, stop) of the tokens of the texts around the gap. cut: what was left out.
    """

    token_ids: array[int]
    prefix: tuple[int, int]
    suffix: tuple[int, int]
    cut: Cut


@dataclass(frozen=True)
class InfillTokens:
    """The special tokens of a base for filling in the middle; `repository` and `file` are None where it has none.

    ends: tokens that end the text of a gap.
    """

    prefix: int
    suffix: int
    middle: int
    repository: int | None
    file: int | None
    ends: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> InfillTokens | None:
        """Return the tokens of a base; None for a base that was not trained for filling in the middle.

        Of the families whose three tokens the tokenizer has, the one with the most of the other two counts.
        """
        found = [[tokenizer.token_id(name) if name else None for name in names] for names in FAMILIES]
        known = [ids for ids in found if None not in ids[:3]]
        if not known:
            return None
        best = max(known, key=lambda ids: len(ids) - ids.count(None))
        prefix, suffix, middle, repository, file = best
        assert prefix is not None and suffix is not None and middle is not None
        ends = {*best, *map(tokenizer.token_id, ENDS)} - {None}
        return cls(prefix, suffix, middle, repository, file, frozenset(i for i in ends if i is not None))

    def prompt(
        self, tokenizer: Tokenizer, prefix: str, suffix: str, extra: Sequence[Snippet], room: int
    ) -> FilledPrompt:
        """Return the prompt of at most `room` tokens whose continuation is the text between `prefix` and `suffix`.

        What does not fit is cut as llama.cpp does: the prefix keeps its end, the suffix its beginning, and `extra`,
        which comes first, has what room they leave and keeps its end.
        """
        before, after = (encode_plain(tokenizer, text) for text in (prefix, suffix))
        opening = [tokenizer.bos_token_id] if tokenizer.add_bos and tokenizer.bos_token_id is not None else []
        around = max(0, room - len(opening) - 3)
        kept_before = min(len(before), max(round(PREFIX_SHARE * around), around - len(after)))
        kept_after = min(len(after), around - kept_before)
        others = array("i", [token for part in self._extra(tokenizer, extra) for token in part])
        kept_others = min(len(others), around - kept_before - kept_after)
        token_ids = array("i", [*opening, *others[len(others) - kept_others :], self.prefix])
        start = len(token_ids)
        token_ids.extend(before[len(before) - kept_before :])
        end = len(token_ids)
        token_ids.append(self.suffix)
        token_ids.extend(after[:kept_after])
        token_ids.append(self.middle)
        cut = Cut(len(before) - kept_before, len(after) - kept_after, len(others) - kept_others)
        return FilledPrompt(token_ids, (start, end), (end + 1, len(token_ids) - 1), cut)

    def find_prefix(self, token_ids: Sequence[int]) -> tuple[int, int] | None:
        """Return the range of the tokens before the gap in a prompt that a client has filled in; None in any other."""
        if not token_ids or token_ids[-1] != self.middle:
            return None
        places = {token: position for position, token in enumerate(token_ids) if token in (self.prefix, self.suffix)}
        start, end = places.get(self.prefix), places.get(self.suffix)
        if start is None or end is None:
            return None
        return start + 1, end if end > start else len(token_ids) - 1

    def _extra(self, tokenizer: Tokenizer, extra: Sequence[Snippet]) -> Iterator[Sequence[int]]:
        """Yield the tokens of other texts, as a repository of files where the base has the tokens for it."""
        if not extra:
            return
        if self.repository is not None:
            yield [self.repository, *tokenizer.encode_inside(REPOSITORY)]
        for snippet in extra:
            if self.file is None:
                yield tokenizer.encode_inside(SNIPPET)
            else:
                yield [self.file, *encode_plain(tokenizer, f"{snippet.filename}\n")]
            yield encode_plain(tokenizer, snippet.text)
        if self.file is not None:
            yield [self.file, *tokenizer.encode_inside(FILE)]


@lru_cache(maxsize=8)
def infill_tokens(tokenizer: Tokenizer) -> InfillTokens | None:
    """Return the tokens of a base as `InfillTokens.of` does; they are looked up once."""
    return InfillTokens.of(tokenizer)


_NAMES = re.compile("|".join(re.escape(name) for name in sorted({*sum(FAMILIES, ()), *ENDS} - {""}, reverse=True)))


def encode_plain(tokenizer: Tokenizer, text: str) -> array[int]:
    """Return the tokens of a text, in which the name of a token for filling in the middle is plain text.

    Source files that spell these names would otherwise end or move the gap.
    """
    token_ids, start = array("i"), 0
    for match in _NAMES.finditer(text):
        cut = match.start() + 1
        token_ids.extend(_encode_part(tokenizer, text[start:cut]))
        start = cut
    token_ids.extend(_encode_part(tokenizer, text[start:]))
    return token_ids


def _encode_part(tokenizer: Tokenizer, text: str) -> array[int]:
    token_ids = tokenizer.encode_array(text)
    return token_ids[1:] if tokenizer.add_bos else token_ids
