"""Names and terms in a held-out chapter: the suggestions that a writer would accept after the earlier chapters."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model.text.tokenizer import Tokenizer
from research.corpus import read_text, text_files
from research.evaluation.keystrokes import accepted_keys
from research.evaluation.prequential import cut
from research.evaluation.recall.arms import RecallArm, Suggester
from research.evaluation.recall.filler import SUBJECTS, generated_text
from research.evaluation.recall.scenes import Split
from research.evaluation.recall.values import Inventor
from service.errors import CommandError

TAUGHT_REQUESTS = 8
TYPED_REQUESTS = 4
MIN_OCCURRENCES = 4  # of a name that is replaced
MIN_NAMES = 20  # in the held-out requests of a text that serves
MAX_CHARS = 60_000


@dataclass(frozen=True)
class Chapter:
    """A text whose names are invented: requests that are learned, requests that are typed afterwards, and the names."""

    name: str
    taught: list[list[int]]
    typed: list[list[int]]
    names: frozenset[str]


TypedWord = tuple[bool, int, int]  # is a name of the earlier chapters, characters, keys saved


def chapter(paths: Sequence[Path], tokenizer: Tokenizer, window: int, seed: int, split: Split) -> Chapter:
    """Return the first text with enough names that can be replaced, or a generated text without paths.

    window: tokens of a request
    Raises CommandError if no text has both.
    """
    inventor = Inventor(seed, split)
    if not paths:
        names = [inventor.first_name() for _ in SUBJECTS]
        text = generated_text(random.Random(f"chapter {seed}"), 600)
        for subject, name in zip(SUBJECTS, names, strict=True):
            text = re.sub(subject, name, text, flags=re.IGNORECASE)
        return _cut("generated text", text, names, tokenizer, window)
    for file, _ in text_files(paths):
        text, names = renamed(read_text(file)[:MAX_CHARS], inventor)
        found = _cut(file.stem, text, names, tokenizer, window)
        typed = re.findall(r"\w+", " ".join(tokenizer.decode(request) for request in found.typed))
        if sum(word in found.names for word in typed) >= MIN_NAMES and len(found.typed) == TYPED_REQUESTS:
            return found
    raise CommandError(
        f"no text has {TAUGHT_REQUESTS + TYPED_REQUESTS} requests of {window} tokens and {MIN_NAMES} names in the last"
        f" {TYPED_REQUESTS}"
    )


def renamed(text: str, inventor: Inventor) -> tuple[str, list[str]]:
    """Return a text with invented names in the stead of its own, and the invented names.

    A name is a capitalised word that often follows a word in lower case, and is never in lower case itself.
    """
    inner = Counter(re.findall(r"(?<=[a-z,] )[A-Z][a-z]{2,}\b", text))
    lower = set(re.findall(r"\b[a-z]+\b", text))
    old = [name for name, times in inner.items() if times >= MIN_OCCURRENCES and name.lower() not in lower]
    new = {name: inventor.first_name() for name in sorted(old)}
    return re.sub(r"\b[A-Z][a-z]+\b", lambda match: new.get(match[0], match[0]), text), list(new.values())


def typed_words(arm: RecallArm, book: Chapter, tokenizer: Tokenizer) -> list[TypedWord]:
    """Return the words of the held-out chapter with the keys that an arm's suggestions save.

    Raises TypeError for an arm that suggests nothing.
    """
    if not isinstance(arm, Suggester):
        raise TypeError(f"{arm.name} suggests nothing")
    found = list[TypedWord]()
    for request in book.typed:
        shown = [tokenizer.token_bytes(token) for token in arm.guess(request)]
        for word, saved in accepted_keys([tokenizer.token_bytes(token) for token in request], shown):
            text = word.decode("utf-8", errors="replace").strip()
            found.append((text in book.names, len(text), saved))
    return found


def _cut(name: str, text: str, names: Sequence[str], tokenizer: Tokenizer, window: int) -> Chapter:
    """Return the text as requests; names that the earlier chapters lack are left out."""
    ids = tokenizer.encode(text)[int(tokenizer.add_bos) :]
    requests = cut(ids, window, TAUGHT_REQUESTS + TYPED_REQUESTS)
    taught = requests[:TAUGHT_REQUESTS]
    known = set(re.findall(r"\w+", " ".join(tokenizer.decode(request) for request in taught)))
    return Chapter(name, taught, requests[TAUGHT_REQUESTS:], frozenset(known & set(names)))
