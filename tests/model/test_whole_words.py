"""Names and numbers come whole: what a reply that has begun one of an episode's is helped to say."""

from __future__ import annotations

import pytest
import torch

from model.memory.episodic.lexicon import shipped_lexicon
from model.memory.episodic.whole_words import NATS, WholeWords
from model.memory.episodic.word_tables import build_tables

PARTS = [b"", b" Hal", b"Hal", b"uw", b"ick", b" cat", b"s", b" 4", b"4", b"7", b"1", b" is", b"."]
IDS = {part: token for token, part in enumerate(PARTS)}
TABLES = build_tables(PARTS)
ENDS = {token for token, part in enumerate(PARTS) if not part[:1].isalnum()}  # every token but those that go on a word


def ids(text: str) -> list[int]:
    """Return the tokens of parts that "|" separates."""
    return [IDS[part.encode()] for part in text.split("|")]


def helped(episode: str, reply: str) -> set[int]:
    """Return the tokens whose scores are raised after a reply; all of them by the same amount."""
    scores = torch.arange(len(PARTS), dtype=torch.float32)
    raised = WholeWords([ids(episode)], TABLES, shipped_lexicon()).adjust(scores, ids(reply)) - scores
    assert set(raised.tolist()) <= {0.0, NATS}
    return set(raised.nonzero().flatten().tolist())


@pytest.mark.parametrize(
    "episode, reply, expected",
    [
        (" Hal|uw|ick| is| cat|.", " is| Hal", {IDS[b"uw"]}),
        (" Hal|uw|ick| is| cat|.", " is| Hal|uw", {IDS[b"ick"]}),
        (" Hal|uw|ick| is| cat|.", " is| Hal|uw|ick", ENDS),
        (" is| Hal|uw|ick", "Hal", {IDS[b"uw"]}),  # a reply that begins with the name has no space before it
        (" is| 4|7|1|.", " is| 4", {IDS[b"7"]}),
        (" is| 4|7|1|.", " is| 4|7|1", ENDS),
        (" is| 4|7|1|.", ".|4", {IDS[b"7"]}),
        (" is| 4|7|1| is| 4|1|.", " 4", {IDS[b"7"], IDS[b"1"]}),  # two numbers begin alike
        (" is| 4|7|1| is| 4|7|.", " 4|7", {IDS[b"1"]} | ENDS),
    ],
)
def test_a_name_or_number_that_a_reply_has_begun_is_completed_as_an_episode_has_it(
    episode: str, reply: str, expected: set[int]
) -> None:
    assert helped(episode, reply) == expected


@pytest.mark.parametrize(
    "episode, reply",
    [
        (" cat|s| is|.", " cat"),  # a word of the language is not copied
        (" Hal|uw|ick|.", " is"),
        (" Hal|uw|ick|.", " Hal|uw|ick|."),
        (" Hal|uw|ick|.", " Hal|ick"),  # another name
        (" is| 4|7|1|.", ".|7"),  # the middle of a number is not its beginning
    ],
)
def test_nothing_else_is_helped(episode: str, reply: str) -> None:
    scores = torch.randn(len(PARTS))
    assert WholeWords([ids(episode)], TABLES, shipped_lexicon()).adjust(scores, ids(reply)) is scores
