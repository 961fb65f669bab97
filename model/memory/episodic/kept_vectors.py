"""The vectors by which episodes are found by meaning, kept for the sessions that asked last.

A vector depends on the tokens of its episode alone, so nothing has to be stored or told: a session whose vectors
are not kept gets the same ones again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import numpy as np
from numpy.typing import NDArray

from model.memory.episodic.lexicon import Lexicon
from model.memory.episodic.search import Ints, Vectors, text_vectors
from model.memory.episodic.word_tables import WordTables
from model.numba_support import cached_njit

MAX_BYTES = 64 * 2**20  # of all sessions together

_Kept = tuple[NDArray[np.uint64], Vectors]  # the stamps of episodes in ascending order, and their vectors


class KeptVectors:
    """The vectors of the episodes of sessions, each made once while its session is kept."""

    def __init__(self, tables: WordTables, lexicon: Lexicon, max_bytes: int = MAX_BYTES) -> None:
        self._tables, self._lexicon, self._max_bytes = tables, lexicon, max_bytes
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()
        self._bytes_held = 0

    def of(self, owner: Hashable, tokens: Ints, lengths: Ints) -> Vectors:
        """Return the vectors [n, d] of a session's episodes, given their tokens [n, W] and lengths [n]."""
        stamps = np.zeros(len(tokens), np.uint64)
        _stamp(tokens, lengths, stamps)
        vectors = np.zeros((len(tokens), self._lexicon.vectors.shape[1]), np.int8)
        is_new = np.ones(len(tokens), np.bool_)
        if (kept := self._kept.get(owner)) is not None and len(kept[0]):
            places = np.minimum(np.searchsorted(kept[0], stamps), len(kept[0]) - 1)
            is_new = kept[0][places] != stamps
            vectors[~is_new] = kept[1][places[~is_new]]
        if is_new.any():
            vectors[is_new] = text_vectors(tokens[is_new], lengths[is_new], self._tables, self._lexicon)
            self._keep(owner, stamps, vectors)
        else:
            self._kept.move_to_end(owner)
        return vectors

    def forget(self, owner: Hashable) -> None:
        """Drop the vectors of a session."""
        if (kept := self._kept.pop(owner, None)) is not None:
            self._bytes_held -= sum(part.nbytes for part in kept)

    def _keep(self, owner: Hashable, stamps: NDArray[np.uint64], vectors: Vectors) -> None:
        self.forget(owner)
        order = np.argsort(stamps)
        self._kept[owner] = stamps[order], vectors[order]
        self._bytes_held += stamps.nbytes + vectors.nbytes
        while self._bytes_held > self._max_bytes:
            self.forget(next(iter(self._kept)))


@cached_njit
def _stamp(tokens, lengths, stamps):  # type: ignore[no-untyped-def]
    """Write a hash of the tokens of each row: FNV-1a, 64 bits, over whole tokens."""
    for i in range(len(tokens)):
        value = np.uint64(14695981039346656037)
        for j in range(lengths[i]):
            value = (value ^ np.uint64(tokens[i, j])) * np.uint64(1099511628211)
        stamps[i] = value
