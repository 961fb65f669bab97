"""The texts from which stored rows of the lexical memory come, told by each row's token and n-gram hashes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from model.memory.lexical.layout import AGE_AND_TOKEN_BYTES
from model.memory.lexical.ops import hash_ngrams
from model.memory.lexical.types import NGRAM_SIZES

HASH_BYTES = 2
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bit of a token or a hash is lost

Names = NDArray[np.uint64]


def rows_of_texts(
    data: NDArray[np.uint8], texts: Iterable[Sequence[int]], others: Iterable[Sequence[int]]
) -> NDArray[np.bool_]:
    """Return which stored rows [n, row_bytes] come from `texts`, or may come from them.

    A row that has a token of a text after the n-grams after which the text has it counts, also where another text has
    the same. What came before a text is not known, so the rows of its first two tokens are told by the token alone: a
    row with such a token counts if the `others`, the session's other texts, do not explain it.

    texts, others: token ids that were learned one after the other
    """
    tokens, hashes = _stored(data)
    wanted, ours = _contexts(texts)
    first = np.isin(tokens, wanted[~ours.any(1)]) & ~_are_explained(tokens, hashes, *_contexts(others))
    return first | _are_explained(tokens, hashes, wanted, ours)


def _stored(data: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int16]]:
    """Return the tokens [n] and the n-gram hashes [n, R] of stored rows."""
    head = AGE_AND_TOKEN_BYTES + HASH_BYTES * len(NGRAM_SIZES)
    tokens = np.ascontiguousarray(data[:, 4:AGE_AND_TOKEN_BYTES]).view("<i4")[:, 0]
    return tokens.astype(np.int64), np.ascontiguousarray(data[:, AGE_AND_TOKEN_BYTES:head]).view("<i2")


def _contexts(texts: Iterable[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int16]]:
    """Return all tokens [m] of texts, and the hashes [m, R] of the n-grams before each; 0 where one is not known."""
    longest = max(NGRAM_SIZES)
    stream = [part for text in texts for part in ([-1] * longest, text)]
    ids = torch.tensor([token for part in stream for token in part] or [-1] * longest, dtype=torch.long)
    hashes = hash_ngrams(ids[:-1]) if len(ids) > longest else torch.zeros(0, len(NGRAM_SIZES))
    tokens = ids[longest:]
    is_token = tokens >= 0
    return tokens[is_token].numpy(), hashes[is_token].numpy().astype(np.int16)


def _are_explained(
    tokens: NDArray[np.int64], hashes: NDArray[np.int16], others: NDArray[np.int64], contexts: NDArray[np.int16]
) -> NDArray[np.bool_]:
    """Return which rows [n] have a token of a text after the n-grams after which the text has it, as far as known."""
    known, found = (contexts != 0).sum(1), np.zeros(len(tokens), np.bool_)
    for ngrams in range(1, len(NGRAM_SIZES) + 1):
        at = known == ngrams
        found |= np.isin(_names(tokens, hashes[:, :ngrams]), _names(others[at], contexts[at, :ngrams]))
    return found


def _names(tokens: NDArray[np.int64], hashes: NDArray[np.int16]) -> Names:
    """Return one number [n] for each token and its hashes [n, r]; two different ones are practically never equal."""
    names: Names = tokens.astype(np.uint64)
    for column in hashes.T:
        names = names * _FACTOR + column.astype(np.uint16)
    return names
