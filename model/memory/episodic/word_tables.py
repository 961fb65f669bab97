"""Words from token ids, without decoding: the hash of a word does not depend on how the tokenizer cuts the word.

A word is a run of letters and digits. Its hash is a polynomial over its bytes, in lower case and
without a final "s", so that "cat", " Cat" and " cats" are one word.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

BASE = 16_777_619  # an odd number: the base of the polynomial, modulo 2³²
MASK = 0xFFFFFFFF
FIRST_IDEOGRAPH = 0x2E80  # scripts from this code point on put no spaces between words: each token is a word
NO_BREAK, SENTENCE_END, LINE_END, PARAGRAPH_END = range(4)

Array = NDArray[np.uint32]


@dataclass(frozen=True)
class WordTables:
    """The part that each token of a vocabulary of V tokens has in words; every array is [V].

    is_word: whether the token is part of a word. starts: whether it begins a word. hashes, powers: of its bytes, so
    that a word's hash is `hash * power + hash of the next token`. stem_hashes, stem_powers: without a final "s".
    breaks: `NO_BREAK` to `PARAGRAPH_END`, the end of a text's unit after the token. asks: whether the token ends with a
    question mark. digits: number of digits of a token that has nothing else, else 0. lower: whether it begins with a
    small letter.
    """

    is_word: NDArray[np.bool_]
    starts: NDArray[np.bool_]
    hashes: Array
    powers: Array
    stem_hashes: Array
    stem_powers: Array
    breaks: NDArray[np.uint8]
    asks: NDArray[np.bool_]
    digits: NDArray[np.uint8]
    lower: NDArray[np.bool_]


def build_tables(vocabulary: Sequence[bytes]) -> WordTables:
    """Return the tables of a vocabulary, given the bytes of each token; a special token has no bytes."""
    size = len(vocabulary)
    flags, numbers = np.zeros((4, size), np.bool_), np.zeros((4, size), np.uint32)
    hashes, powers, stem_hashes, stem_powers = numbers
    breaks, digits = np.zeros((2, size), np.uint8)
    tables = WordTables(
        flags[0], flags[1], hashes, powers, stem_hashes, stem_powers, breaks, flags[2], digits, flags[3]
    )
    for token, text in enumerate(vocabulary):
        word = _lower(text.lstrip())
        tables.breaks[token] = _break_after(text)
        tables.asks[token] = text.rstrip().endswith((b"?", "？".encode()))
        if not _is_word(word):
            continue
        tables.is_word[token], tables.digits[token] = True, len(word) if word.isdigit() else 0
        tables.lower[token] = text.decode(errors="ignore").lstrip()[:1].islower()
        tables.starts[token] = text[:1].isspace() or _is_ideograph(word)
        tables.hashes[token], tables.powers[token] = hash_bytes(word)
        tables.stem_hashes[token], tables.stem_powers[token] = hash_bytes(word.removesuffix(b"s"))
    return tables


def hash_bytes(text: bytes) -> tuple[int, int]:
    """Return the polynomial of a text and the power of `BASE` that shifts a polynomial before it."""
    value, power = 0, 1
    for byte in text:
        value, power = (value * BASE + byte + 1) & MASK, (power * BASE) & MASK
    return value, power


def words_of(token_ids: Sequence[int], tables: WordTables) -> list[int]:
    """Return the hash of each word of a token sequence."""
    return [word_hash(word, tables) for word in split_words(token_ids, tables)]


def split_words(token_ids: Sequence[int], tables: WordTables) -> list[list[int]]:
    """Return the tokens of each word of a token sequence."""
    words: list[list[int]] = []
    is_inside = False
    for token in token_ids:
        if tables.is_word[token]:
            if not is_inside or tables.starts[token]:
                words.append([])
            words[-1].append(token)
        is_inside = bool(tables.is_word[token])
    return words


def word_hash(word: Sequence[int], tables: WordTables) -> int:
    """Return the hash of a word, given its tokens."""
    value = begun_hash(word[:-1], tables)
    return (value * int(tables.stem_powers[word[-1]]) + int(tables.stem_hashes[word[-1]])) & MASK


def begun_hash(tokens: Sequence[int], tables: WordTables) -> int:
    """Return the hash of the first tokens of a word, of which nothing is left out."""
    value = 0
    for token in tokens:
        value = longer_hash(value, token, tables)
    return value


def beginnings(word: Sequence[int], tables: WordTables) -> list[int]:
    """Return the hash of each beginning of a word, the shortest first."""
    return list(accumulate(word, lambda value, token: longer_hash(value, token, tables), initial=0))[1:]


def longer_hash(value: int, token: int, tables: WordTables) -> int:
    """Return the hash of the beginning of a word that goes on with a token, given the hash of the tokens before."""
    return (value * int(tables.powers[token]) + int(tables.hashes[token])) & MASK


def cut_spans(token_ids: Sequence[int], start: int, stop: int, tables: WordTables, width: int) -> list[tuple[int, int]]:
    """Return the spans [start, stop) of at most `width` tokens into which a text is cut.

    A span ends at the strongest boundary that lies in its second half, the last of several; without a boundary it is
    full.
    """
    spans = []
    while start < stop:
        end = min(start + width, stop)
        if end < stop:
            breaks = tables.breaks[np.asarray(token_ids[start:end])]
            later = breaks[width // 2 :]
            if later.max(initial=NO_BREAK):
                end = start + width // 2 + int(np.flatnonzero(later == later.max())[-1]) + 1
        spans.append((start, end))
        start = end
    return spans


def sentences(token_ids: Sequence[int], tables: WordTables) -> list[Sequence[int]]:
    """Return the sentences of a text."""
    ends = np.flatnonzero(tables.breaks[np.asarray(token_ids, np.int64)] > NO_BREAK) + 1
    edges = [0, *ends.tolist(), len(token_ids)]
    return [token_ids[start:stop] for start, stop in pairwise(edges) if start < stop]


def is_question(token_ids: Sequence[int], tables: WordTables) -> bool:
    """Return whether a text is one sentence that asks: it ends with a question mark, and no sentence ends before."""
    breaks, asks = (table[np.asarray(token_ids, np.int64)] for table in (tables.breaks, tables.asks))
    (text,) = np.nonzero(breaks < LINE_END)
    return bool(len(text)) and bool(asks[text[-1]]) and not (breaks[: text[-1]] > NO_BREAK).any()


def _break_after(text: bytes) -> int:
    if text.count(b"\n") > 1:
        return PARAGRAPH_END
    if b"\n" in text:
        return LINE_END
    return SENTENCE_END if text.rstrip().endswith((b".", b"!", b"?", *map(str.encode, "。！？"))) else NO_BREAK


def _lower(text: bytes) -> bytes:
    try:
        return text.decode().lower().encode()
    except UnicodeDecodeError:  # a part of a character
        return text.lower()


def _is_word(text: bytes) -> bool:
    """Return whether all characters are letters, marks of letters or digits; parts of characters count as letters."""
    try:
        return bool(text) and all(c.isalnum() or unicodedata.category(c)[0] == "M" for c in text.decode())
    except UnicodeDecodeError:
        return all(byte >= 128 or chr(byte).isalnum() for byte in text)


def _is_ideograph(word: bytes) -> bool:
    return any(ord(character) >= FIRST_IDEOGRAPH for character in word.decode(errors="ignore"))
