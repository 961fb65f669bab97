"""The scores of an answer: right, wrong but fluent, another's, outdated; and F1 of words."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass

from research.evaluation.recall.scenes import Question

ARTICLES = ("a", "an", "the")
_COMMON = """
    i you your my his her their it its he she they we our this that these those as sorry yes no sure of course dr mr mrs
    ms monday tuesday wednesday thursday friday saturday sunday ai smollm hugging face please thank thanks
"""
COMMON = frozenset(_COMMON.split())  # in lower case: words that answers capitalise without naming a value


@dataclass(frozen=True)
class Verdict:
    """The scores of one answer.

    right: the answer contains the value, and not the value that a correction replaced
    fluent_error: the answer is not right and names another value of the same sort
    others_value: the answer contains a value that belongs to another person
    outdated: the answer contains the value that a correction replaced
    found: a text that was put before the model is the evidence or holds the value; None for an arm that puts none
    f1: F1 of the words of the answer against those of the value
    """

    right: bool
    fluent_error: bool
    others_value: bool
    outdated: bool
    found: bool | None
    f1: float


def normalise(text: str) -> str:
    """Return a text in lower case without punctuation, articles and repeated spaces; digits of one number join."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub(r"(?<=\d)[ ,.\-](?=\d)", "", text)
    text = re.sub(r"['’]s\b", "", text)
    found = re.sub(r"[^\w\s]", " ", text).split()
    return " ".join(word for word in found if word not in ARTICLES)


def contains(text: str, value: str) -> bool:
    """Return whether a text contains a value as whole words, after `normalise`. An empty value is never contained."""
    needle = normalise(value)
    return bool(needle) and f" {needle} " in f" {normalise(text)} "


def score_answer(question: Question, answer: str, spans: tuple[str, ...] | None = None) -> Verdict:
    """Return the scores of an answer.

    spans: texts that were put before the model; None if the arm puts none
    """
    outdated = contains(answer, question.outdated)
    right = contains(answer, question.answer) and not outdated
    others_value = any(contains(answer, value) for value in question.others if value != question.answer)
    fluent_error = not right and (others_value or outdated or names_value(question, answer))
    found = None
    if spans is not None:
        found = any(span in question.evidence or contains(span, question.answer) for span in spans)
    return Verdict(right, fluent_error, others_value, outdated, found, f1(answer, question.answer))


def names_value(question: Question, answer: str) -> bool:
    """Return whether an answer names a value that looks like the question's: a number, a name or a like phrase.

    A number looks like a number, and a name like any capitalised word that is neither in the question nor common. A
    value in lower case has no such mark: then only another value of the scene counts (see `score_answer`).
    """
    known = set(normalise(question.text).split())
    if re.search(r"\d", question.answer):
        return any(number not in known for number in re.findall(r"\d{2,}", normalise(answer)))
    if question.answer[0].islower():
        return False
    inner = re.findall(r"(?<![.!?:] )(?<!^)\b[A-Z][\w'’]+", answer)
    return any(normalise(name) not in known | COMMON for name in inner)


def f1(answer: str, gold: str) -> float:
    """Return the harmonic mean of precision and recall of the answer's words, after `normalise`."""
    given, wanted = normalise(answer).split(), normalise(gold).split()
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted)) if common else 0.0
