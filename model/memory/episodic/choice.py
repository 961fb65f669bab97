"""The choice of the episodes that a sentence reads: few, each about another part of it, the newest of its kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.memory.episodic.lexicon import Words
from model.memory.episodic.search import Floats, Ints

MEANING = 2.0  # weight of the cosine of two texts' vectors, beside the share of the BM25 score that words could have
MIN_RELEVANCE = 0.7  # of the first episode that a sentence reads, and of each further one to the words that are open
MIN_WORDS = 0.3  # the same where no vectors are known
MIN_NEW = 0.2  # share of the sentence's weight that these words have
MIN_SHARED = 0.6  # share of the weight of an older episode's matched words that a newer one in its place has
MIN_CHANGE = 0.45  # relevance of a newer episode that tells a change, in the place of an older one in other words
MAX_CHANGES = 32  # newer episodes that may tell a change, at most, the best first
MIN_SCORE = 0.6  # score of a newer episode in the place of an older one, as a share of the older one's


@dataclass(frozen=True)
class Matches:
    """The matches of the n episodes of a session to a sentence of Q words.

    query: [Q]. weight: [Q]. parts: [n, Q], each word's part in the BM25 score. cosine: [n], of the episode's vector
    and the sentence's; 0 where none is known. ordinals: [n], of the episodes in time.
    """

    query: Words
    weight: Floats
    parts: Floats
    cosine: Floats
    ordinals: Ints

    def relevance(self, is_open: NDArray[np.bool_]) -> Floats:
        """Return how well each episode [n] fits the words of the sentence that are open."""
        relevance: Floats = self.parts[:, is_open].sum(1) / self.weight.sum() + MEANING * self.cosine
        return relevance

    @property
    def min_relevance(self) -> float:
        """Return the relevance from which on an episode is read."""
        return MIN_RELEVANCE if self.cosine.any() else MIN_WORDS

    def new_share(self, is_open: NDArray[np.bool_]) -> Floats:
        """Return the share [n] of the sentence's weight that the open words of each episode have."""
        share: Floats = ((self.parts > 0) & is_open) @ self.weight / self.weight.sum()
        return share


def choose(
    matches: Matches,
    words_at: Callable[[int], Sequence[int]],
    may_read: Callable[[int], bool],
    changes: Callable[[int, int], bool],
    max_episodes: int,
) -> Iterator[tuple[int, float]]:
    """Yield the rows of at most `max_episodes` episodes to read and their relevance, the best first.

    The first one fits the whole sentence. Each further one has words of it that the ones before lack. Where a
    newer episode says anew what a chosen one says, or tells that it has changed, the newer one is read.

    words_at: returns the words of a row. may_read: returns whether a row may be read. changes: returns whether a row
    tells a change of what an older row says. Both are asked for few rows.
    """
    is_open, left = np.ones(len(matches.query), np.bool_), np.ones(len(matches.ordinals), np.bool_)
    read = set[int]()
    while len(read) < max_episodes and left.any() and is_open.any():
        relevance = np.where(left, matches.relevance(is_open), -np.inf)
        if read:
            relevance[matches.new_share(is_open) < MIN_NEW] = -np.inf
        best = np.flatnonzero(relevance == relevance.max())
        row = int(best[np.argmax(matches.ordinals[best])])
        if relevance[row] < matches.min_relevance:
            return
        left[row] = False
        if not may_read(row):
            continue
        for chosen in _newest(matches, row, words_at, may_read, changes):
            if chosen not in read:
                left[chosen] = False
                is_open &= matches.parts[chosen] == 0
                read.add(chosen)
                yield chosen, float(relevance[row])


def _newest(
    matches: Matches,
    row: int,
    words_at: Callable[[int], Sequence[int]],
    may_read: Callable[[int], bool],
    changes: Callable[[int, int], bool],
) -> list[int]:
    """Return what is read in the place of an episode: what says it anew or tells that it has changed, or itself."""
    renewed = _renewed(matches, row, words_at, may_read)
    last = _changed(matches, renewed[0], lambda new, old: may_read(new) and changes(new, old))
    if last == renewed[0] and not (last != row and changes(last, row)):
        return renewed
    return [last]


def _changed(matches: Matches, row: int, changes: Callable[[int, int], bool]) -> int:
    """Return the episode that tells the last change of what an episode says; the episode itself if none does."""
    relevance = matches.relevance(np.ones(len(matches.query), np.bool_))
    newer = np.flatnonzero((matches.ordinals > matches.ordinals[row]) & (relevance >= MIN_CHANGE))
    for other in sorted(newer.tolist(), key=lambda other: -float(relevance[other]))[:MAX_CHANGES]:
        if changes(other, row):
            return _changed(matches, other, changes)
    return row


def _renewed(
    matches: Matches, row: int, words_at: Callable[[int], Sequence[int]], may_read: Callable[[int], bool]
) -> list[int]:
    """Return the newest episode that says anew what an episode says, as far as the sentence asks; else the episode.

    If the newer one lacks words of the sentence that may belong to the older one's value, both are returned.
    """
    matched = matches.parts[row] > 0
    shared = ((matches.parts > 0) & matched) @ matches.weight
    score = matches.relevance(np.ones(len(matches.query), np.bool_))
    newer = (matches.ordinals > matches.ordinals[row]) & (score >= MIN_SCORE * score[row])
    newer &= shared >= MIN_SHARED * (matched @ matches.weight)
    old, asked = words_at(row), frozenset(matches.query.tolist())
    for other in sorted(np.flatnonzero(newer).tolist(), key=lambda other: -int(matches.ordinals[other])):
        new = frozenset(words_at(other))
        value = changed_value(old, new)
        lacking = {place for place, word in enumerate(old) if word in asked - new}
        if value is not None and lacking <= set(value) and may_read(other):
            return [other, row] if lacking else [other]
    return [row]


def changed_value(old: Sequence[int], new: frozenset[int]) -> range | None:
    """Return the places of an older text's words that a newer text gives anew: the longest run that the newer lacks.

    Return None if the newer text is about something else: half of the older one's words must be in the newer one, and
    with the value more than four fifths. "my cat is called Pixel" and "my dog is called Rex" differ in two places.
    """
    value, start, shared = range(0), 0, 0
    for place, word in enumerate(old):
        if word in new:
            start, shared = place + 1, shared + 1
        elif place + 1 - start >= len(value):
            value = range(start, place + 1)
    if shared < len(old) / 2 or shared + len(value) <= 0.8 * len(old):
        return None
    return value
