"""Statements: a sentence that tells something, and asks nothing, reads only episodes about what the sentence names.

A message such as "My kettle leaks." is most like what others said of their kettles, and it does not ask about them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import dropwhile

import numpy as np

from model.memory.episodic.lexicon import Lexicon
from model.memory.episodic.word_tables import (
    LINE_END,
    NO_BREAK,
    WordTables,
    begun_hash,
    hash_bytes,
    split_words,
    word_hash,
)

MIN_DIGITS = 4  # a shorter number may well be of something else
MAX_NAME_FREQUENCY = 0.01  # a more frequent word is no name, however it is written


def hashes(text: str) -> frozenset[int]:
    """Return the hashes of words that are divided by spaces, as `begun_hash` returns them."""
    return frozenset(hash_bytes(word.encode())[0] for word in text.split())  # whole: without its "s", "is" is "i"


# Words before the first one that tells what a sentence does.
OPENINGS = hashes("and but hello hey hi just now ok okay please so then thanks well")
# First words of sentences that ask for something.
REQUESTS = hashes(
    "add am answer are book bring call can check choose compare compose compute could count create describe did do does"
    " draft draw email explain fill find finish fix give had has have help how imagine invent is let list look make may"
    " mention message might name order outline pick plan prepare propose put read recall recommend reply repeat rewrite"
    " say search send shall share should show sing solve speak spell state suggest summarise summarize talk teach tell"
    " think translate use was were what when where which who whom whose why will wish would write"
)
# Words that ask for something wherever they stand ("I forgot where I parked.").
RECALLS = hashes("forget forgot forgotten know remember remembered remind tell wonder wondering")

HELP = hashes("help")
# Words of a sentence that asks for help and does not say with what.
HELP_ALONE = (
    OPENINGS
    | HELP
    | hashes(
        "anybody anyone can could i it kindly me need out some somebody someone that this us we will with would you"
    )
)

# First words of questions for what somebody may have told; "how" with a measure after it.
FACT_QUESTIONS = hashes("am are did do does has have is was were what when where which who whose")
HOW, MEASURES = hashes("how"), hashes("big far high large long many much old tall")
ADVICE = hashes("can could may might must need shall should would")  # asks for advice wherever it stands
LISTENER = hashes("you your")


def asks_for_fact(question: Sequence[int], tables: WordTables) -> bool:
    """Return whether a question begins as one for what somebody may have told, and not for advice or help."""
    words = [begun_hash(word, tables) for word in split_words(question, tables)]
    rest = [*dropwhile(OPENINGS.__contains__, words), 0, 0]
    if not ADVICE.isdisjoint(words) or (RECALLS.isdisjoint(words) and not LISTENER.isdisjoint(words)):
        return False
    return rest[0] in FACT_QUESTIONS or (rest[0] in HOW and rest[1] in MEASURES)


def asks_for_help(sentence: Sequence[int], tables: WordTables) -> bool:
    """Return whether a sentence asks for help alone ("Can you help me?"), which everybody asks: it is about nothing."""
    words = {begun_hash(word, tables) for word in split_words(sentence, tables)}
    return words <= HELP_ALONE and not words.isdisjoint(HELP)


def is_statement(sentence: Sequence[int], tables: WordTables) -> bool:
    """Return whether a sentence ends as one that tells something, and neither begins nor asks as one that asks.

    A text without an end, such as "cat's name", is no statement.
    """
    ids = np.asarray(sentence, np.int64)
    (text,) = np.nonzero(tables.breaks[ids] < LINE_END)
    if not len(text) or tables.asks[ids[text[-1]]] or tables.breaks[ids[text[-1]]] == NO_BREAK:
        return False
    words = [begun_hash(word, tables) for word in split_words(sentence, tables)]
    first = next((word for word in words if word not in OPENINGS), None)
    return first not in REQUESTS and RECALLS.isdisjoint(words)


def names_of(sentence: Sequence[int], tables: WordTables, lexicon: Lexicon) -> frozenset[int]:
    """Return the hashes of a sentence's names: rare words that do not begin with a small letter, and long numbers.

    The first word, which has a capital letter anyway, is rare if the lexicon does not know it.
    """
    words = [word for word in split_words(sentence, tables) if not 0 < _num_digits(word, tables) < MIN_DIGITS]
    found = np.array([word_hash(word, tables) for word in words], np.uint32)
    is_small = tables.lower[np.array([word[0] for word in words], np.int64)]
    is_rare = lexicon.frequencies(found) < MAX_NAME_FREQUENCY
    is_rare[:1] = ~lexicon.knows(found[:1])
    return frozenset(found[is_rare & ~is_small].tolist())


def _num_digits(word: Sequence[int], tables: WordTables) -> int:
    """Return the number of digits of a word that is a number, else 0."""
    digits = tables.digits[np.asarray(word)]
    return int(digits.sum()) if digits.all() else 0
