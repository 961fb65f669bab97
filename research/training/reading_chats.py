"""Invented chats in which a reply reads episodes: what was said before, a message, and the reply that fits it.

The facts are put together from tables (`reading_facts`), so that a reader of episodes learns to read, not the facts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from model.recall import UNTOLD
from research.evaluation.recall.values import Inventor
from research.training.reading_facts import (
    ASKED,
    NOUNS,
    REPLIED,
    SAID,
    THINGS,
    VERBS,
    Noun,
    Verb,
    first_name,
    person,
)

COMMON_FIRST = (
    *("My", "The", "We", "Our", "You", "Your", "It", "Please", "What", "What's", "Which", "Who", "Where", "When"),
    *("How", "Do", "Can", "Tell", "In", "At", "Remind"),
)
SHARES = (45, 15, 40)  # of facts about `NOUNS`, `THINGS` and `VERBS`
NOT_TOLD = "I do not know. You have not told me."
OPENINGS = (
    "",
    "",
    "",
    "",
    "By the way, ",
    "Just so you know, ",
    "For the record: ",
    "Please note: ",
    "Remember: ",
    "I think I mentioned it: ",
)
CLOSINGS = (
    "",
    "",
    "",
    "",
    "",
    " Please remember that.",
    " Isn't that nice?",
    " It took me a while to get used to it.",
    " I thought you should know.",
    " That is important to me.",
    " It has been like that for years.",
)
CORRECTED = (
    "Actually, {s}",
    "Correction: {s}",
    "I was wrong: {s}",
    "That has changed: {s}",
    "Sorry, {s}",
    "No, {s}",
    "Update: {s}",
    "Not any more. Now {s}",
)
ASKING = ("", "", "", "", "", "Hey, ", "Quick question: ", "Hello! ", "Sorry, ")
ACKNOWLEDGED = ("Thank you, I will remember that {s}", "Noted: {s}", "Good to know: {s}", "Got it, {s}", "I see, {s}")
OTHER_STATEMENTS = (
    "The weather was awful yesterday.", "I had a long day.", "The bus was late again.", 
    "I cleaned the whole kitchen today.",
    "There was a power cut in the evening.", "I need to buy milk and bread.", "The film last night was quite good.",
    "My back hurts a bit.", "We had guests over the weekend.", "I should sleep more.", "The garden needs water.",
    "I am looking for a good recipe.", "The printer does not work.", "I got a lot of mail today.",
)  # fmt: skip
UNRELATED = (
    "What is the capital of France?", "How do I boil an egg?", "Tell me a short joke.", "What is photosynthesis?",
    "Write a haiku about the sea.", "How far away is the moon?", "Give me three tips for better sleep.",
    "What is the difference between a virus and a bacterium?", "How do I tie a tie?", "What does HTTP stand for?",
    "Suggest a name for a bakery.", "What is a good way to learn a language?", "Why is the sky blue?",
    "How do I remove a coffee stain?", "Who wrote Romeo and Juliet?", "What is 12 times 12?",
    "Explain inflation simply.",
    "What can I cook with potatoes?", "How many continents are there?", "Write a sentence with the word lantern.",
    "What is machine learning?", "How do I change a bicycle tyre?", "What are the primary colours?",
    "Give me an idea for a birthday party.", "How does a refrigerator work?", "What is the largest ocean?",
    "Translate 'good morning' into French.", "What should I pack for a hike?", "How do plants grow?",
    "Write a short poem about rain.", "What is a prime number?", "Tell me about the Roman Empire.",
    "How do I write a cover letter?", "What is the boiling point of water?", "Recommend a classic novel.",
    "How can I save money?", "What is a black hole?", "How do I make pancakes?", "Name five mammals.",
    "Summarise the story of Cinderella.", "What is yoga good for?", "How do I stop hiccups?", "Hello!", "Thank you!",
    "How are you?", "Can you help me?", "What can you do?", "Good morning.",
)  # fmt: skip
# Questions of a speaker that ask for nothing the speaker could have told.
OF_THE_SPEAKER = (
    "What should I cook tonight?", "What can I do about my headache?", "What is a good present for my mother?",
    "Which book should I read next?", "What do I need for my trip to the sea?", "Where can I learn to swim?",
    "When should I plant my tomatoes?", "Who can help me with my taxes?", "What is wrong with my sentence?",
    "Do I need a visa for Japan?", "Is my idea any good?", "Are my shoes too small if they hurt?",
    "What do you think of my plan?", "What should I wear to my interview?", "Which plants suit my balcony?",
    "Do I have to pay for the museum?", "What could I write in my letter?", "Did I spell this word right?",
    "What is the best way to clean my oven?", "Where do I find the settings?", "What do I do if my dog eats chocolate?",
    "Am I allowed to swim after lunch?", "What does my dream about water mean?", "Is it bad for me to skip breakfast?",
    "When do I use a comma?", "What should I know before I buy a car?", "Do my plants need more light?",
    "Which language should I learn?", "What can we play with our children?", "Who are you and what can you do for me?",
)  # fmt: skip


@dataclass(frozen=True)
class ReadingChat:
    """A chat to learn from.

    episodes: texts that the reply reads, oldest first. history: earlier messages, of user and assistant in turn.
    reply: the reply, or None if the base's own reply without episodes is to be kept.
    """

    episodes: tuple[str, ...]
    history: tuple[str, ...]
    message: str
    reply: str | None


def _inside(sentence: str) -> str:
    """Return a sentence as it stands after other words: a common first word begins with a small letter."""
    common = sentence.split()[0] in COMMON_FIRST
    return sentence[0].lower() + sentence[1:] if common else sentence


@dataclass(frozen=True)
class _Fact:
    """A fact about an owner: a new value, a statement of a value, a question, and the reply with a value."""

    table: Sequence[Noun] | Sequence[Verb]
    row: int
    owner: str
    draw: Callable[[], str]
    statement: Callable[[str], str]
    question: Callable[[], str]
    reply: Callable[[str], str]

    def is_same(self, other: _Fact) -> bool:
        """Return whether both facts answer one question."""
        return self.table is other.table and (self.row, self.owner) == (other.row, other.owner)


class ReadingChats:
    """Draws chats, reproducibly. untold: only such in which nothing was found."""

    def __init__(self, seed: int, *, untold: bool = False) -> None:
        self._only_untold = untold
        self._rng, self._seed, self._drawn = random.Random(seed), seed, 0
        self._inventor = Inventor(seed, "train")

    def draw(self, count: int) -> list[ReadingChat]:
        """Return the next chats."""
        return [self._draw() for _ in range(count)]

    def _draw(self) -> ReadingChat:
        self._drawn += 1
        self._inventor = Inventor(self._seed * 1_000_003 + self._drawn, "train")
        if self._only_untold:
            return self._untold(self._fact())
        kinds = (self._answering, self._renewing, self._declining, self._acknowledging, self._general)
        kind = self._rng.choices(kinds, (54, 14, 8, 10, 14))[0]
        return kind(self._fact())

    def _answering(self, fact: _Fact) -> ReadingChat:
        """Return a chat that asks for what one of the episodes says."""
        value = fact.draw()
        episodes = [*self._distractors(fact), self._statement(fact.statement(value))]
        self._rng.shuffle(episodes)
        return self._chat(episodes, self._question(fact), fact.reply(value))

    def _renewing(self, fact: _Fact) -> ReadingChat:
        """Return a chat that asks for what a later episode says otherwise than an earlier one."""
        value, old = fact.draw(), fact.draw()
        while old == value:
            old = fact.draw()
        correction = self._rng.choice(CORRECTED).format(s=_inside(fact.statement(value)))
        episodes = self._distractors(fact)
        episodes.insert(self._rng.randint(0, len(episodes)), self._statement(fact.statement(old)))
        return self._chat([*episodes, correction], self._question(fact), fact.reply(value))

    def _declining(self, fact: _Fact) -> ReadingChat:
        """Return a chat that asks for what no episode says: one tells the same of another owner."""
        other = self._other(fact)
        episodes = [*self._distractors(fact), self._statement(other.statement(other.draw()))]
        self._rng.shuffle(episodes)
        return self._chat(episodes, self._question(fact), NOT_TOLD)

    def _untold(self, fact: _Fact) -> ReadingChat:
        """Return a chat of a speaker who asks for what was never told, or for something general; nothing was found."""
        if self._rng.random() < 0.4:
            return self._chat([UNTOLD], self._rng.choice(OF_THE_SPEAKER), None)
        while fact.owner not in ("my", "I"):
            fact = self._fact()
        return self._chat([UNTOLD], self._question(fact), NOT_TOLD)

    def _acknowledging(self, fact: _Fact) -> ReadingChat:
        """Return a chat whose message is itself a statement."""
        value = fact.draw()
        episodes = self._distractors(fact) or [self._statement(self._rng.choice(OTHER_STATEMENTS))]
        return self._chat(episodes, self._statement(fact.statement(value)), self._acknowledged(fact, value))

    def _general(self, fact: _Fact) -> ReadingChat:
        """Return a chat that asks for something general."""
        facts = [fact, *(self._fact() for _ in range(self._rng.randrange(3)))]
        episodes = [self._statement(each.statement(each.draw())) for each in facts]
        return self._chat(episodes, self._rng.choice(UNRELATED), None)

    def _chat(self, episodes: Sequence[str], message: str, reply: str | None) -> ReadingChat:
        return ReadingChat(tuple(episodes), self._history(), message, reply)

    def _history(self) -> tuple[str, ...]:
        if self._rng.random() < 0.7:
            return ()
        fact = self._fact()
        value = fact.draw()
        if self._rng.random() < 0.5:
            return self._statement(fact.statement(value)), self._acknowledged(fact, value)
        return fact.question(), fact.reply(value)

    def _statement(self, said: str) -> str:
        opening = self._rng.choice(OPENINGS)
        return opening + (_inside(said) if opening.endswith(", ") else said) + self._rng.choice(CLOSINGS)

    def _question(self, fact: _Fact) -> str:
        opening, asked = self._rng.choice(ASKING), fact.question()
        question = opening + (_inside(asked) if opening.endswith(", ") else asked)
        if self._rng.random() < 0.08:  # as people type
            return question.rstrip("?.") if self._rng.random() < 0.5 else question.lower()
        return question

    def _acknowledged(self, fact: _Fact, value: str) -> str:
        return self._rng.choice(ACKNOWLEDGED).format(s=_inside(fact.reply(value)))

    def _distractors(self, fact: _Fact) -> list[str]:
        """Return statements that do not answer the question for a fact, some of them about the same sort of fact."""
        drawn = [
            self._other(fact) if self._rng.random() < 0.4 else self._fact()
            for _ in range(self._rng.choice((0, 0, 1, 1, 2, 3)))
        ]
        return [self._statement(other.statement(other.draw())) for other in drawn if not other.is_same(fact)]

    def _other(self, fact: _Fact) -> _Fact:
        """Return the same sort of fact of another owner."""
        if isinstance(fact.table[0], Verb):
            return self._verb(fact.row, of_user=False)
        return self._noun(THINGS if fact.table is THINGS else NOUNS, fact.row, of_user=False)

    def _fact(self) -> _Fact:
        rng, of_user = self._rng, self._rng.random() < 0.6
        table = rng.choices((NOUNS, THINGS, VERBS), SHARES)[0]
        row = rng.randrange(len(table))
        return self._verb(row, of_user=of_user) if table is VERBS else self._noun(table, row, of_user=of_user)  # type: ignore[arg-type]

    def _another(self) -> str:
        return first_name(self._rng, self._inventor) if self._rng.random() < 0.6 else person(self._rng, self._inventor)

    def _noun(self, table: Sequence[Noun], row: int, *, of_user: bool) -> _Fact:
        rng, (noun, others, way, draw) = self._rng, table[row]
        if table is THINGS:
            owner = "the" if of_user else f"the {self._inventor.product().split()[0]}"
        else:
            owner = "my" if of_user else f"{self._another()}'s"
        first = owner[0].upper() + owner[1:]
        whose = "Your" if owner == "my" else first

        def statement(value: str) -> str:
            text = rng.choice(SAID[way]).format(P=first, p=owner, n=noun, v=value)
            return text[0].upper() + text[1:]

        def question() -> str:
            word = rng.choice(others) if others and rng.random() < 0.45 else noun
            return rng.choice(ASKED[way]).format(p=owner, n=word)

        def reply(value: str) -> str:
            return REPLIED[way].format(Y=whose, n=noun, v=value)

        return _Fact(table, row, owner, lambda: draw(rng, self._inventor), statement, question, reply)

    def _verb(self, row: int, *, of_user: bool) -> _Fact:
        rng, verb = self._rng, VERBS[row]
        owner = "I" if of_user else self._another()
        statements, questions = (
            (verb.statements, verb.questions) if of_user else (verb.statements_of, verb.questions_of)
        )
        reply = verb.reply if of_user else verb.reply_of
        return _Fact(
            VERBS,
            row,
            owner,
            lambda: verb.draw(rng, self._inventor),
            lambda value: rng.choice(statements).format(N=owner, v=value),
            lambda: rng.choice(questions).format(N=owner),
            lambda value: reply.format(N=owner, v=value),
        )
