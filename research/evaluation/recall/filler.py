"""Other text that a session learns between the statements and the questions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model.text.tokenizer import Tokenizer
from research.corpus import mixed_requests

FILLER_WINDOW = 512  # tokens of a request
SUBJECTS = ("the committee", "a farmer", "the weather", "the harbour", "an old bridge", "the library", "a passenger",
            "the market", "a teacher", "the orchestra", "the garden", "a carpenter", "the railway", "a sailor",
            "the museum", "the council", "a baker", "the valley")  # fmt: skip
VERBS = ("waited for", "remembered", "changed", "followed", "surprised", "needed", "avoided", "described", "welcomed",
         "carried", "repaired", "lost", "found", "praised", "ignored", "measured")  # fmt: skip
OBJECTS = ("the evening train", "a heavy box", "some warm bread", "the new timetable", "a long letter",
           "the empty square", "two wooden chairs", "the morning paper", "a quiet corner", "the broken clock",
           "a wet umbrella", "the narrow stairs", "an open window", "the last ferry", "a list of repairs")  # fmt: skip
ENDINGS = ("after the rain", "before noon", "without a word", "for the third time", "in spite of the noise",
           "near the station", "as everybody expected", "with great care", "at the end of the week",
           "while nobody looked")  # fmt: skip


@dataclass(frozen=True)
class Filler:
    """One request of other text and its number of tokens."""

    text: str
    tokens: int


def fillers(paths: Sequence[Path], tokenizer: Tokenizer, tokens: int, seed: int) -> list[Filler]:
    """Return requests of `tokens` tokens in total: texts of all kinds, interleaved, or generated text without paths.

    Raises CommandError if a text cannot be read.
    """
    if paths:
        requests = mixed_requests(paths, tokenizer, FILLER_WINDOW, tokens)
        return [Filler(tokenizer.decode(request), len(request)) for request in requests]
    rng, found, total = random.Random(f"filler {seed}"), [], 0
    while total < tokens:
        text = generated_text(rng, sentences=FILLER_WINDOW // 14)
        found.append(Filler(text, len(tokenizer.encode(text))))
        total += found[-1].tokens
    return found


def generated_text(rng: random.Random, sentences: int) -> str:
    """Return paragraphs of five sentences of ordinary words, about nobody in particular."""
    made = []
    for _ in range(sentences):
        parts = (rng.choice(SUBJECTS), rng.choice(VERBS), rng.choice(OBJECTS), rng.choice(ENDINGS))
        sentence = " ".join(parts) + "."
        made.append(sentence[0].upper() + sentence[1:])
    return "\n\n".join(" ".join(made[i : i + 5]) for i in range(0, len(made), 5))
