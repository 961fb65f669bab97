"""The speaker: whether a text speaks of the person who says it, or of what belongs to somebody it names.

"What is my locker number?" finds "Ilvara's locker has the number 32570." by nearly all its words. Words are English.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from model.memory.episodic.statements import hashes
from model.memory.episodic.word_tables import WordTables, begun_hash, split_words

SPEAKER = hashes("i me mine my myself our ours us we")
NAMED_OWNER = re.compile(
    r"\b(?!(?:Every|Here|How|It|Let|Nobody|Someone|Somebody|That|There|This|Today|What|When|Where|Who|Why)\b)"
    r"[A-ZÀ-Þ][\w-]*['’]s?(?!\w)"
)


def speaks_of_speaker(text: Sequence[int], tables: WordTables) -> bool:
    """Return whether a text has a word for the person who says it."""
    return not SPEAKER.isdisjoint(begun_hash(word, tables) for word in split_words(text, tables))


def names_owner(text: str) -> bool:
    """Return whether a text names somebody to whom something belongs ("Ilvara's locker", "Mr. Jones' car")."""
    return NAMED_OWNER.search(text) is not None
