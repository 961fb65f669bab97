"""Names that a reply repeats are learned without rows, and a statement reads only episodes that have a name of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.memory.episodic.borrowed import LEARNED, REPLY, without_rows
from model.memory.episodic.lexicon import shipped_lexicon
from model.memory.episodic.statements import asks_for_help, is_statement, names_of
from model.memory.episodic.word_tables import build_tables, words_of

WORDS = "Hello my name is I am here from please write tell remember what where to at live the team thank you for cannot"
VOCABULARY = [b"", *(f" {word}".encode() for word in WORDS.split()), b" Hal", b"uw", b"ick", b" hal", b" Anna", b" 4"]
VOCABULARY += [b" can", b" help", b" me", b" with", b" drill", b"7", b"1", b".", b"?", b",", b"Hal", b"\n"]
IDS = {part: token for token, part in enumerate(VOCABULARY)}
TABLES, LEXICON = build_tables(VOCABULARY), shipped_lexicon()
tokens = st.lists(st.integers(0, len(VOCABULARY) - 1), max_size=20)


def ids(text: str) -> list[int]:
    """Return the tokens of a text that "|" cuts."""
    return [IDS[part.encode()] for part in text.split("|")]


def borrowed(message: str, reply: str, *, learn: int = REPLY, message_mark: int = 0) -> str:
    """Return the text of the tokens that a reply to a message is learned without."""
    first, second = ids(message), ids(reply)
    marks = [message_mark] * len(first) + [learn] * len(second)
    mask = without_rows(first + second, marks, TABLES, LEXICON)
    assert not any(mask[: len(first)])
    return b"".join(VOCABULARY[token] for token, is_out in zip(first + second, mask, strict=True) if is_out).decode()


@pytest.mark.parametrize("message_mark", [0, LEARNED], ids=["known", "new"])
def test_names_and_numbers_of_a_message_are_not_written_from_its_reply(message_mark: int) -> None:
    message = " I| am| Hal|uw|ick|,| my| 4|7|1| cannot|."
    assert borrowed(message, " Hello| Hal|uw|ick|,| thank| you| for| 4|7|1|.", message_mark=message_mark) == (
        " Haluwick 471"
    )
    assert borrowed(message, "Hal|uw|ick|.", message_mark=message_mark) == "Haluwick"


def test_what_a_reply_says_by_itself_is_written() -> None:
    assert borrowed(" I| am| Hal|uw|ick|.", " Hello|,| the| team| Anna| is| here| for| you|.") == ""
    assert borrowed(" thank| you|.", " thank| you| for| my| name|.") == ""  # words that belong to nobody
    assert borrowed(" I| am| Hal|uw|ick|.", " Hal|uw|ick|.", learn=LEARNED) == ""  # no reply of a chat


@given(tokens, tokens, tokens)
def test_a_token_is_borrowed_by_what_stands_before_alone(message: list[int], reply: list[int], more: list[int]) -> None:
    def mask(*parts: list[int]) -> bytes:
        marks = [[0, REPLY, REPLY][number] for number, part in enumerate(parts) for _ in part]
        return bytes(without_rows([token for part in parts for token in part], marks, TABLES, LEXICON))

    whole = mask(message, reply, more)
    assert whole[: len(message) + len(reply)] == mask(message, reply)


@pytest.mark.parametrize(
    "sentence, states",
    [
        (" my| name| is| Anna|.", True),
        (" Hello|,| I| am| here|.", True),
        (" where| I| live|.", False),
        (" please| write| to| Anna|.", False),
        (" Hello|,| tell| Anna|.", False),
        (" I| cannot| remember| my| name|.", False),
        (" what| is| my| name|?", False),
        (" is| Anna| here|?|\n", False),
        (" my| name", False),  # it may go on, or be words to look for
        (" my| name| is| Anna|.|\n", True),
    ],
)
def test_a_sentence_states_something_unless_it_asks(sentence: str, states: bool) -> None:
    assert is_statement(ids(sentence), TABLES) == states


@pytest.mark.parametrize(
    "sentence, alone",
    [
        (" Hello|,| can| you| help| me|?", True),
        (" please| help|.", True),
        (" can| you| help| me| with| my| drill|?", False),
        (" help| Anna|.", False),
        (" can| you|?", False),
    ],
)
def test_a_sentence_asks_for_help_alone_unless_it_says_with_what(sentence: str, alone: bool) -> None:
    assert asks_for_help(ids(sentence), TABLES) == alone


def test_a_name_is_a_rare_word_with_a_capital_letter_or_a_long_number() -> None:
    def names(sentence: str) -> set[int]:
        return set(names_of(ids(sentence), TABLES, LEXICON))

    (unknown,) = words_of(ids(" Hal|uw|ick"), TABLES)
    (anna,) = words_of(ids(" Anna"), TABLES)
    assert names(" the| team| is| here|.") == set()
    assert names(" Hal|uw|ick|.") == {unknown}
    assert names(" I| am| Anna|.") == {anna}
    assert names(" I| am| 4|7|1|7|.") == set(words_of(ids(" 4|7|1|7"), TABLES))
    assert names(" I| am| 4|7|1|.") == set()  # other things have this number, too
    assert names(" I| am| hal|uw|ick|.") == set()  # "suction" is rare as well
    assert names(" Anna| is| here|.") == set()  # every sentence begins with a capital letter
