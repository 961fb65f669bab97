"""`imprint train --lexicon`: the frequencies of words, by which the words of a question find episodes."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from model.memory.episodic.lexicon import FREQUENCY_WORDS, Lexicon, save_lexicon
from model.memory.episodic.word_tables import hash_bytes
from research.corpus import console, read_text, text_files
from service.errors import CommandError

WORDS = 48_000  # most words
MIN_SPANS = 4  # in which a word occurs
CHARS_OF_A_KIND = 4_000_000  # that words are counted in
CHARS_OF_A_FILE = 400_000


def train_lexicon(paths: Sequence[Path], out: Path, seed: int) -> None:
    """Count the words of texts and write a lexicon to `out`. Raises CommandError."""
    names, frequency = _count_words(_texts_by_kind(paths, seed))
    lexicon = Lexicon.of(np.array([word_hash(name) for name in names], np.uint32), frequency)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_lexicon(lexicon, out)
    console.print(f"{out}: {len(names):,} words, {out.stat().st_size:,} bytes")


def words_in(text: str) -> list[str]:
    """Return the words of a text as `word_tables.words_of` cuts them, without a final "s"."""
    return [word.lower().removesuffix("s") for word in re.findall(r"[^\W_]+", text)]


def word_hash(word: str) -> int:
    """Return the hash by which `word_tables.words_of` knows a word of `words_in`."""
    return hash_bytes(word.encode())[0]


def _texts_by_kind(paths: Sequence[Path], seed: int) -> dict[str, list[str]]:
    """Return parts of the texts of each kind, of `CHARS_OF_A_KIND` characters in total."""
    by_kind: dict[str, list[Path]] = {}
    for file, kind in text_files(paths):
        by_kind.setdefault(kind, []).append(file)
    if not by_kind:
        raise CommandError("found no texts to count words in")
    found = {}
    for kind, its_files in by_kind.items():
        rng, parts, size = random.Random(f"{kind} {seed}"), list[str](), 0
        share = max(20_000, 2 * CHARS_OF_A_KIND // len(its_files))
        for file in rng.sample(its_files, len(its_files)):
            text = read_text(file)
            limit = share if len(its_files) > 1 else CHARS_OF_A_KIND
            start = rng.randrange(max(1, len(text) - limit))
            parts.append(text[start : start + limit])
            if (size := size + len(parts[-1])) >= CHARS_OF_A_KIND:
                break
        found[kind] = parts
    return found


def _count_words(texts: dict[str, list[str]]) -> tuple[list[str], np.ndarray]:
    """Return the most frequent words, and the share [N] of spans of `FREQUENCY_WORDS` words that have each."""
    counts, spans = Counter[str](), 0
    for text in (text for parts in texts.values() for text in parts):
        words = words_in(text)
        for start in range(0, len(words), FREQUENCY_WORDS):
            counts.update(set(words[start : start + FREQUENCY_WORDS]))
            spans += 1
    found = [(word, count) for word, count in counts.most_common(WORDS) if count >= MIN_SPANS]
    return [word for word, _ in found], np.array([count / spans for _, count in found], np.float32)
