"""Finding texts that a question needs: BM25 over words, sentence embeddings, and the fusion of several rankings."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from model.text.sentence_encoder import SentenceEncoder

K1, B = 1.2, 0.75  # the parameters of BM25 (Robertson and Zaragoza 2009)
FUSION_OFFSET = 60  # of reciprocal rank fusion (Cormack et al. 2009)
FUSED_RANKS = 100  # ranks of each index that a fusion takes into account
_STOP_WORDS = """
    a about after all also am an and any are as at be been before being but by can could d did do does for from get had
    has have having he her here hers him his how i if in into is it its itself just ll m me more most my no not now of
    on one only or other our out over re s she should so some such t than that the their them then there these they this
    those through to too under until up ve very was we were what when where which while who whom why will with would you
    your yours
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())


class Index(Protocol):
    """Texts that are ranked by how well they fit a query."""

    def add(self, text: str) -> None:
        """Append a text; its number is the count of earlier texts."""
        ...

    def rank(self, query: str, limit: int) -> list[int]:
        """Return the numbers of at most `limit` texts, best first; of equals, the newest first."""
        ...


def terms(text: str) -> list[str]:
    """Return the words of a text in lower case without stop words."""
    return [word for word in re.findall(r"\w+", text.lower()) if word not in STOP_WORDS]


class BM25:
    """Okapi BM25 with an inverted index. Texts without a word of the query are never found."""

    def __init__(self) -> None:
        self._lengths: list[int] = []
        self._postings: dict[str, list[tuple[int, int]]] = {}  # by word: (number of the text, count)
        self._total = 0

    def add(self, text: str) -> None:
        counts = Counter(terms(text))
        for word, count in counts.items():
            self._postings.setdefault(word, []).append((len(self._lengths), count))
        self._lengths.append(counts.total())
        self._total += counts.total()

    def rank(self, query: str, limit: int) -> list[int]:
        scores: dict[int, float] = {}
        size = len(self._lengths)
        for word in terms(query):
            postings = self._postings.get(word, [])
            rarity = math.log(1 + (size - len(postings) + 0.5) / (len(postings) + 0.5))
            for number, count in postings:
                norm = 1 - B + B * self._lengths[number] * size / self._total
                scores[number] = scores.get(number, 0.0) + rarity * count * (K1 + 1) / (count + K1 * norm)
        return sorted(scores, key=lambda number: (-scores[number], -number))[:limit]


class Newest:
    """Texts from the newest to the oldest, whatever the query."""

    def __init__(self) -> None:
        self._count = 0

    def add(self, text: str) -> None:
        self._count += 1

    def rank(self, query: str, limit: int) -> list[int]:
        return list(range(self._count - 1, -1, -1))[:limit]


class Embeddings:
    """Texts ranked by the cosine of their vectors to the query's."""

    def __init__(self, encoder: SentenceEncoder) -> None:
        self._encoder = encoder
        self._waiting: list[str] = []
        self._vectors: np.ndarray | None = None

    def add(self, text: str) -> None:
        self._waiting.append(text)

    def rank(self, query: str, limit: int) -> list[int]:
        if self._waiting:
            new = np.stack([self._vector(text) for text in self._waiting])
            self._vectors = new if self._vectors is None else np.concatenate([self._vectors, new])
            self._waiting = []
        if self._vectors is None:
            return []
        scores = self._vectors @ self._vector(query)
        order = np.lexsort((-np.arange(len(scores)), -scores))
        return [int(number) for number in order[:limit]]

    def _vector(self, text: str) -> np.ndarray:
        return self._encoder(text).astype(np.float32) / 127.0


class Fused:
    """Several indices, fused by the sum of reciprocal ranks."""

    def __init__(self, indices: Sequence[Index]) -> None:
        self._indices = indices

    def add(self, text: str) -> None:
        for index in self._indices:
            index.add(text)

    def rank(self, query: str, limit: int) -> list[int]:
        scores: dict[int, float] = {}
        for index in self._indices:
            for rank, number in enumerate(index.rank(query, FUSED_RANKS), start=1):
                scores[number] = scores.get(number, 0.0) + 1 / (FUSION_OFFSET + rank)
        return sorted(scores, key=lambda number: (-scores[number], -number))[:limit]
