"""Borrowed words: what a reply repeats of its conversation belongs to that conversation.

A reply to Ada about her kettle names both. Written as rows, the two names would turn up in the reply to the next
customer. So a borrowed token is learned, and kept in an episode, but no row is written of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from model.memory.episodic.lexicon import Lexicon
from model.memory.episodic.word_tables import WordTables, beginnings, longer_hash, split_words, word_hash

LEARNED, REPLY = 1, 2  # marks of the tokens to learn: of any text, and of a reply in a chat
MAX_FREQUENCY = 0.01  # in texts, of a word that can be borrowed: a more frequent one belongs to nobody


def without_rows(token_ids: Sequence[int], learn: Sequence[int], tables: WordTables, lexicon: Lexicon) -> bytearray:
    """Return 1 for each token of a request of which no row is written, whether it is learned or not.

    These are the tokens of replies that begin or continue a word of the conversation before. Whether a token is one
    depends on the tokens before it alone.
    """
    borrowed, known, start = bytearray(len(token_ids)), set[int](), 0
    while start < len(token_ids):
        is_reply = learn[start] == REPLY
        stop = start + 1
        while stop < len(token_ids) and (learn[stop] == REPLY) == is_reply:
            stop += 1
        part = token_ids[start:stop]
        if is_reply:
            borrowed[start:stop] = bytes(value in known for value in _begun(part, tables))
        else:
            known |= _beginnings(part, tables, lexicon)
        start = stop
    return borrowed


def _beginnings(text: Sequence[int], tables: WordTables, lexicon: Lexicon) -> set[int]:
    """Return the hashes of all beginnings of the words of a text that can be borrowed."""
    words = split_words(text, tables)
    rare = lexicon.frequencies(np.array([word_hash(word, tables) for word in words], np.uint32)) < MAX_FREQUENCY
    return {value for word, is_rare in zip(words, rare, strict=True) if is_rare for value in beginnings(word, tables)}


def _begun(text: Sequence[int], tables: WordTables) -> list[int]:
    """Return for each token the hash of its word up to the token; −1 for a token that is no part of a word."""
    hashes, value = list[int](), -1
    for token in text:
        if not tables.is_word[token]:
            value = -1
        else:
            value = longer_hash(0 if value < 0 or tables.starts[token] else value, token, tables)
        hashes.append(value)
    return hashes
