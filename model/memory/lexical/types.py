"""The tensors that the equations of the lexical memory pass to one another, and the constants that all backends share.

Letters in shapes are those of model/memory/README.md: n tokens, k cells per token, P rows per cell, K = k·P candidates
per token, d hidden size, d_k numbers in a key, R n-gram sizes, H heads, V vocabulary, C cells, S sessions.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

NGRAM_SIZES = (2, 4, 8)  # a row has one hash for the last 2, one for the last 4, one for the last 8 tokens
MAX_GAMMA = 1.0 - 1e-6  # γ stays below 1: no memory makes a token impossible
KEY_SCALE = 254  # integer steps in 1.0; the components of a key lie between −0.5 and 0.5
QUERY_SCALE = 32767  # integer steps in 1.0; products of queries and keys, and their sums, are whole and below 2²⁴
SIMILARITY_STEP = 1.0 / (KEY_SCALE * QUERY_SCALE)
HASH_MULTIPLIER = -7046029254386353131  # 2⁶⁴ / φ: odd, so its powers spread tokens over 64 bits


class LexicalRows(NamedTuple):
    """Cells of lexical rows.

    ages: int32 [..., P]; 0 is an empty row, and a younger row has a higher age. tokens: int32 [..., P].
    ngram_hashes: int16 [..., P, R], hashes of the tokens before the row's token. keys: int8 [..., P, d_k].
    """

    ages: Tensor
    tokens: Tensor
    ngram_hashes: Tensor
    keys: Tensor


class RowMatches(NamedTuple):
    """The K rows in the cells of each of n contexts, compared with this context (equation L3).

    tokens: long [n, K]. cosines: [n, K], the cosine of the row's key and the context's key. ngram_matches: long [n, K],
    the number of n-grams of the context that the row repeats. missing: bool [n, K], True where a row is empty.
    """

    tokens: Tensor
    cosines: Tensor
    ngram_matches: Tensor
    missing: Tensor


class Candidates(NamedTuple):
    """The result of a lexical read before the gate (equation L4).

    tokens: long [n, K]; a token may occur more than once. shares: [n, H, K], p_mem of each head as shares of these
    tokens; the shares sum to 1, or are all 0 where no row was found. gate_features: [n, (4 + R)·H], inputs of the gate.
    ngram_matches: long [n], the number of n-grams that the best match of the first head repeats.
    """

    tokens: Tensor
    shares: Tensor
    gate_features: Tensor
    ngram_matches: Tensor


class AddressWeights(NamedTuple):
    """Slow weights of equations L1 and L2: key_weight [d, d_k], key_bias [d_k] and centres [C, d_k]."""

    key_weight: Tensor
    key_bias: Tensor
    centres: Tensor


class HeadParams(NamedTuple):
    """Slow weights of equation L4: sharpness τ [H], prior α [H] (exponent of p_LM), and bonus [H, R], one for each
    n-gram that a row repeats."""

    sharpness: Tensor
    prior: Tensor
    bonus: Tensor


class GateWeights(NamedTuple):
    """Slow weights of equation L5, a network of one hidden layer: weight [E, G], bias [G], out_weight [G, 1 + H] and
    out_bias [1 + H]."""

    weight: Tensor
    bias: Tensor
    out_weight: Tensor
    out_bias: Tensor


class GatedMixture(NamedTuple):
    """The result of equation L5: p_mem as shares [n, K], the weight γ [n] that counts, and the weight [n] that would
    count if the session's guards were open."""

    shares: Tensor
    gamma: Tensor
    unguarded_gamma: Tensor
