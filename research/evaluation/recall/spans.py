"""Cutting texts into spans: a message or a paragraph, or sentences of it, of at most SPAN_TOKENS tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

SPAN_TOKENS = 64


def cut_text(text: str, count: Callable[[str], int], limit: int = SPAN_TOKENS) -> Iterator[str]:
    """Yield the paragraphs of a text, cut at sentences, and between words where a sentence is too long.

    count: returns the number of tokens of a text
    """
    for paragraph in re.split(r"\n\s*\n", text):
        if (paragraph := paragraph.strip()) == "":
            continue
        if count(paragraph) <= limit:
            yield paragraph
            continue
        span = ""
        for piece in _pieces(paragraph, count, limit):
            joined = f"{span} {piece}" if span else piece
            if span and count(joined) > limit:
                yield span
                joined = piece
            span = joined
        if span:
            yield span


def _pieces(paragraph: str, count: Callable[[str], int], limit: int) -> Iterator[str]:
    """Yield the sentences and lines of a paragraph, the long ones in parts of some words each."""
    for sentence in re.split(r"(?<=[.!?])\s+|\n", paragraph):
        parts = sentence.split(" ")
        if count(sentence) <= limit:
            yield sentence
        else:
            step = max(1, limit // 4)  # a word rarely has more than four tokens
            yield from (" ".join(parts[i : i + step]) for i in range(0, len(parts), step))
