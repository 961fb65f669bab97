"""Search of episodes by words: BM25 (Robertson and Zaragoza 2009) over the rows of one session.

`counts_reference` is the definition of the word counts; the compiled kernel reads 16,384 episodes in about two
milliseconds, so that no index has to be kept, stored or made consistent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from model.memory.episodic.word_tables import MASK, WordTables, words_of
from model.numba_support import cached_njit

K1, B = 1.2, 0.4
PRIOR_EPISODES = 64.0  # a word's frequency in the language counts as much as its frequency in so many episodes
PRIOR_WORDS = 48.0  # number of words of an episode, for the prior
FIRST_MERGE = 256  # the tokens before are single bytes
ZIPF = 11.0  # the harmonic number of a vocabulary: Zipf's law gives the word of rank r the frequency 1 / (r · ZIPF)
MAX_QUERY_WORDS = 64
FILTER_BITS = 4096  # of a table that tells most words apart from the query's without a search

Ints = NDArray[np.int32]
Floats = NDArray[np.float64]


def query_words(token_ids: Sequence[int], tables: WordTables) -> tuple[NDArray[np.uint32], Floats]:
    """Return the distinct words [Q] of a query, and the prior probability [Q] that an episode has each.

    Of a longer query, the last `MAX_QUERY_WORDS` words count.
    """
    ranks: dict[int, int] = {}
    for word, token in reversed(words_of(token_ids, tables)):
        ranks[word] = min(token, ranks.get(word, token))
        if len(ranks) == MAX_QUERY_WORDS:
            break
    rank = np.maximum(1.0, np.array(list(ranks.values()), np.float64) - FIRST_MERGE)
    return np.array(list(ranks), np.uint32), np.minimum(0.9, PRIOR_WORDS / (rank * ZIPF))


def score_episodes(
    tokens: Ints, lengths: Ints, query: NDArray[np.uint32], prior: Floats, tables: WordTables
) -> tuple[Floats, Floats]:
    """Return the BM25 score [n] of episodes for a query, and the share [n] of the query's weight that each covers.

    tokens: [n, W]. lengths: [n], number of tokens of each episode. query, prior: [Q], as `query_words` returns them.
    A word's weight counts the session's episodes and the prior together: with few episodes the prior decides.
    """
    counts, sizes = count_words(tokens, lengths, query, tables)
    n, found = len(tokens), counts > 0
    frequency = found.sum(0) + PRIOR_EPISODES * prior
    weight = np.log1p((n + PRIOR_EPISODES - frequency + 0.5) / (frequency + 0.5))
    norm = K1 * (1 - B + B * sizes / max(1.0, float(sizes.mean())))
    score = (weight * counts * (K1 + 1) / (counts + norm[:, None])).sum(1)
    return score, (found * weight).sum(1) / max(1e-9, float(weight.sum()))


def count_words(
    tokens: Ints, lengths: Ints, query: NDArray[np.uint32], tables: WordTables
) -> tuple[NDArray[np.uint8], Ints]:
    """Return how often each episode has each word of the query, [n, Q], and the number of words of each, [n]."""
    order = np.argsort(query)
    may_match = np.zeros(FILTER_BITS, np.bool_)
    may_match[query % FILTER_BITS] = True
    counts = np.zeros((len(tokens), len(query)), np.uint8)
    sizes = np.zeros(len(tokens), np.int32)
    _count(
        tokens,
        lengths,
        query[order],
        may_match,
        tables.is_word,
        tables.starts,
        tables.hashes,
        tables.powers,
        tables.stem_hashes,
        tables.stem_powers,
        counts,
        sizes,
    )
    return counts[:, np.argsort(order)], sizes


def counts_reference(
    tokens: Ints, lengths: Ints, query: NDArray[np.uint32], tables: WordTables
) -> tuple[NDArray[np.uint8], Ints]:
    """Return `count_words` in plain loops."""
    words = [[w for w, _ in words_of(row[:n].tolist(), tables)] for row, n in zip(tokens, lengths, strict=True)]
    counts = [[min(255, row.count(int(word))) for word in query] for row in words]
    return np.array(counts, np.uint8).reshape(len(tokens), len(query)), np.array([len(row) for row in words], np.int32)


@cached_njit
def _count(  # type: ignore[no-untyped-def]
    tokens, lengths, query, may_match, is_word, starts, hashes, powers, stem_hashes, stem_powers, counts, sizes
):
    mask = np.uint64(MASK)
    for i in range(len(tokens)):
        stem, value, inside = np.uint64(0), np.uint64(0), False
        for j in range(lengths[i] + 1):
            token = tokens[i, j] if j < lengths[i] else -1
            part = token >= 0 and is_word[token]
            if (not part or starts[token]) and inside:
                sizes[i] += 1
                if may_match[stem % np.uint64(len(may_match))]:
                    at = np.searchsorted(query, np.uint32(stem))
                    if at < len(query) and query[at] == np.uint32(stem) and counts[i, at] < 255:
                        counts[i, at] += 1
            if not part or starts[token]:
                value, inside = np.uint64(0), False
            if part:
                stem = (value * np.uint64(stem_powers[token]) + np.uint64(stem_hashes[token])) & mask
                value = (value * np.uint64(powers[token]) + np.uint64(hashes[token])) & mask
                inside = True
