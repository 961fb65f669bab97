"""Names and numbers come whole: a reply that has begun one of those in the episodes it reads completes that one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model.memory.episodic.lexicon import Lexicon
from model.memory.episodic.word_tables import WordTables, beginnings, begun_hash, split_words, word_hash

NATS = 4.0  # added to the score of a token that continues a name or a number as an episode does
END = -1  # stands for every token that does not continue the word


class WholeWords:
    """The names and numbers of texts: words of several tokens that are numbers, or that the lexicon does not know."""

    def __init__(self, texts: Sequence[Sequence[int]], tables: WordTables, lexicon: Lexicon) -> None:
        self._tables = tables
        self._following: defaultdict[int, set[int]] = defaultdict(set)
        for text in texts:
            for word in split_words(text, tables):
                if _is_copied(word, tables, lexicon):
                    for begun, following in zip(beginnings(word, tables), [*word[1:], END], strict=True):
                        self._following[begun].add(following)

    def adjust(self, scores: Tensor, generated: Sequence[int]) -> Tensor:
        """Return the scores [V] of the token after a reply's tokens, higher for what completes the reply's last word.

        The scores are returned as they are if the last word begins no name or number, or if the reply has ended it.
        """
        following = self._following.get(begun_hash(_last_word(generated, self._tables), self._tables))
        if following is None:
            return scores
        bonus = torch.zeros(len(scores), dtype=scores.dtype)
        if END in following:
            bonus[torch.from_numpy(~self._tables.is_word | self._tables.starts)] = NATS
        bonus[[token for token in following if token != END]] = NATS
        return scores + bonus.to(scores.device)


def _last_word(text: Sequence[int], tables: WordTables) -> Sequence[int]:
    """Return the tokens of the word with which a text ends; none if the text ends with another token."""
    start = len(text)
    while start and tables.is_word[text[start - 1]]:
        start -= 1
        if tables.starts[text[start]]:
            break
    return text[start:]


def _is_copied(word: Sequence[int], tables: WordTables, lexicon: Lexicon) -> bool:
    if len(word) < 2:
        return False
    if tables.digits[np.asarray(word)].all():
        return True
    return not lexicon.knows(np.array([word_hash(word, tables)], np.uint32))[0]
