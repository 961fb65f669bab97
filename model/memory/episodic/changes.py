"""Changes: what tells that something is not as it was takes the place of the older episode that a question finds.

"I moved to Kiel." shares no word with "I live in Bonn.", and both answer "Where do I live?". The words are English.
"""

from __future__ import annotations

from collections.abc import Sequence

from model.memory.episodic.lexicon import Lexicon
from model.memory.episodic.speaker import speaks_of_speaker
from model.memory.episodic.statements import hashes, names_of
from model.memory.episodic.word_tables import WordTables, begun_hash, split_words, word_hash

CHANGES = hashes(
    "anymore became become broke cancel canceled cancelled change changed correction exchange exchanged gave instead"
    " join joined leave left longer move moved new newly now nowadays off postpone postponed promoted quit rather"
    " rebook rebooked relocate relocated rename renamed replace replaced reschedule rescheduled resign resigned retire"
    " retired settle settled shift shifted since sold stop stopped swap swapped switch switched took traded transfer"
    " transferred update updated"
)
# A change of theirs is none of the speaker's, unless the question names them, too.
OTHERS = hashes(
    "aunt boyfriend brother colleague cousin dad daughter father friend girlfriend grandfather grandmother husband"
    " mother mum nephew neighbor neighbour niece parents roommate sister son uncle wife"
)


def tells_change(text: Sequence[int], question: Sequence[int], tables: WordTables, lexicon: Lexicon) -> bool:
    """Return whether a text tells a change, and of whom a question is about: the speaker, or those it names."""
    told, asked = (_words(part, tables) for part in (text, question))
    if CHANGES.isdisjoint(told) or not OTHERS.isdisjoint(told - asked):
        return False
    if speaks_of_speaker(question, tables) and not speaks_of_speaker(text, tables):
        return False
    return names_of(question, tables, lexicon) <= {word_hash(word, tables) for word in split_words(text, tables)}


def _words(text: Sequence[int], tables: WordTables) -> frozenset[int]:
    return frozenset(begun_hash(word, tables) for word in split_words(text, tables))
