"""Search of episodes: by words (BM25, Robertson and Zaragoza 2009) and by meaning, over the rows of one session.

`counts_reference` is the definition. The compiled kernels read all rows, so that no
index has to be kept, stored or made consistent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from model.memory.episodic.lexicon import Words
from model.memory.episodic.word_tables import MASK, WordTables, words_of
from model.numba_support import cached_njit

K1, B = 1.2, 0.4
PRIOR_EPISODES = 64.0  # a word's frequency in the language counts as much as its frequency in so many episodes
MAX_QUERY_WORDS = 64
FILTER_BITS = 4096  # of a table that tells most words apart from the query's without a search

Ints = NDArray[np.int32]
Floats = NDArray[np.float64]
Vectors = NDArray[np.int8]


def query_words(token_ids: Sequence[int], tables: WordTables) -> Words:
    """Return the distinct words [Q] of a query; of a longer query, those among its last words."""
    found = dict.fromkeys(reversed(words_of(token_ids, tables)))
    return np.array(list(found)[:MAX_QUERY_WORDS], np.uint32)


def match_words(
    tokens: Ints, lengths: Ints, query: Words, frequency: Floats, tables: WordTables
) -> tuple[Floats, Floats]:
    """Return the part [n, Q] of each word of a query in the BM25 score of each episode, and the words' weights [Q].

    tokens: [n, W]. lengths: [n], number of tokens of each episode. query: [Q]. frequency: [Q], of the words in texts.
    A word's weight counts the session's episodes and its frequency together: with few episodes the latter decides.
    """
    counts, sizes = count_words(tokens, lengths, query, tables)
    n = len(tokens)
    having = (counts > 0).sum(0) + PRIOR_EPISODES * np.minimum(0.9, frequency)
    weight = np.log1p((n + PRIOR_EPISODES - having + 0.5) / (having + 0.5))
    norm = K1 * (1 - B + B * sizes / max(1.0, float(sizes.mean())))
    return weight * counts * (K1 + 1) / (counts + norm[:, None]), weight


def cosines(vectors: Vectors, query: Vectors) -> Floats:
    """Return the cosine [n] of each vector [n, d] and a query's [d], all of length 127 or 0."""
    found = np.zeros(len(vectors))
    _dot(vectors, query, found)
    return found / 127.0**2


def count_words(tokens: Ints, lengths: Ints, query: Words, tables: WordTables) -> tuple[NDArray[np.uint8], Ints]:
    """Return how often each episode has each word of the query, [n, Q], and the number of words of each, [n]."""
    order = np.argsort(query)
    may_match = np.zeros(FILTER_BITS, np.bool_)
    may_match[query % FILTER_BITS] = True
    counts = np.zeros((len(tokens), len(query)), np.uint8)
    words, sizes = _hash_words(tokens, lengths, tables)
    _count(words, sizes, query[order], may_match, counts)
    return counts[:, np.argsort(order)], sizes


def counts_reference(tokens: Ints, lengths: Ints, query: Words, tables: WordTables) -> tuple[NDArray[np.uint8], Ints]:
    """Return `count_words` in plain loops."""
    words = [words_of(row[:n].tolist(), tables) for row, n in zip(tokens, lengths, strict=True)]
    counts = [[min(255, row.count(int(word))) for word in query] for row in words]
    return np.array(counts, np.uint8).reshape(len(tokens), len(query)), np.array([len(row) for row in words], np.int32)


def _hash_words(tokens: Ints, lengths: Ints, tables: WordTables) -> tuple[Words, Ints]:
    """Return the words [n, W] of episodes as `words_of` does, and their number [n]."""
    words, sizes = np.zeros(tokens.shape, np.uint32), np.zeros(len(tokens), np.int32)
    _hash(
        tokens,
        lengths,
        tables.is_word,
        tables.starts,
        tables.hashes,
        tables.powers,
        tables.stem_hashes,
        tables.stem_powers,
        words,
        sizes,
    )
    return words, sizes


@cached_njit
def _hash(  # type: ignore[no-untyped-def]
    tokens, lengths, is_word, starts, hashes, powers, stem_hashes, stem_powers, words, sizes
):
    mask = np.uint64(MASK)
    for i in range(len(tokens)):
        stem, value, inside = np.uint64(0), np.uint64(0), False
        for j in range(lengths[i] + 1):
            token = tokens[i, j] if j < lengths[i] else -1
            part = token >= 0 and is_word[token]
            if (not part or starts[token]) and inside:
                words[i, sizes[i]] = np.uint32(stem)
                sizes[i] += 1
            if not part or starts[token]:
                value, inside = np.uint64(0), False
            if part:
                stem = (value * np.uint64(stem_powers[token]) + np.uint64(stem_hashes[token])) & mask
                value = (value * np.uint64(powers[token]) + np.uint64(hashes[token])) & mask
                inside = True


@cached_njit
def _count(words, sizes, query, may_match, counts):  # type: ignore[no-untyped-def]
    for i in range(len(words)):
        for j in range(sizes[i]):
            word = words[i, j]
            if may_match[word % np.uint32(len(may_match))]:
                at = np.searchsorted(query, word)
                if at < len(query) and query[at] == word and counts[i, at] < 255:
                    counts[i, at] += 1


@cached_njit
def _dot(vectors, query, found):  # type: ignore[no-untyped-def]
    for i in range(len(vectors)):
        total = np.int32(0)
        for j in range(len(query)):
            total += np.int32(vectors[i, j]) * np.int32(query[j])
        found[i] = total
