"""Facts that change in other words ("I live in Bonn." … "I moved to Kiel."), and questions about what was never told.

A topic has one line a split: a statement, a change, something that only sounds like one, and a question. {v} stands for
the value. What only sounds like a change names a value of the same sort, and leaves the statement true.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from research.evaluation.recall.scenes import SPLITS, Question, Scene, Split, user
from research.evaluation.recall.values import Inventor

UNKNOWN = "not told me"  # in the answer to a question about what was never told

Lines = tuple[str, str, str, str]  # statement, change, what only sounds like one, question


@dataclass(frozen=True)
class Topic:
    """A fact about the user, with the lines of each split in the order of SPLITS."""

    name: str
    draw: Callable[[Inventor], str]
    lines: tuple[Lines, Lines, Lines]


TOPICS = (
    Topic("home", Inventor.town, (
        ("I live in {v}.", "I moved to {v}.", "I spent last weekend in {v}.", "Where do I live?"),
        ("My home is in {v}.", "We have settled in {v} since the spring.", "My parents want to see {v}.",
         "In which town is my home?"),
        ("My workshop is in {v}.", "The lease ran out, and my new workshop is in {v}.", "The film is set in {v}.",
         "Where is my workshop?"))),
    Topic("boss", Inventor.person, (
        ("My boss is {v}.", "My boss left; now {v} runs the team.", "I had lunch with {v}.", "Who is my boss?"),
        ("My coach is {v}.", "I am trained by {v} now, since my coach left.", "{v} asked me for a stapler.",
         "Who is my coach?"),
        ("{v} is the head of my department.", "There was a reshuffle and {v} took over my department.",
         "{v} from another department called.", "Who heads my department?"))),
    Topic("appointment", Inventor.day, (
        ("My dentist appointment is on {v}.", "The dentist moved my appointment to {v}.",
         "The dentist is closed on {v}.", "When is my dentist appointment?"),
        ("My exam takes place on {v}.", "They have put my exam off until {v}.", "The exam of my sister was on {v}.",
         "When is my exam?"),
        ("My flight leaves on {v}.", "The airline rebooked me, so I fly on {v}.", "My father flies home on {v}.",
         "On which day do I fly?"))),
    Topic("employer", Inventor.company, (
        ("I work for {v}.", "I quit and started at {v}.", "My brother applied at {v}.", "Who do I work for?"),
        ("My employer is {v}.", "Since Monday I am on the payroll of {v}.", "I bought a lamp from {v}.",
         "Which company is my employer?"),
        ("I earn my money at {v}.", "I changed jobs and joined {v}.", "There is an advert of {v} on the bus.",
         "Where do I earn my money?"))),
    Topic("car", Inventor.product, (
        ("I drive a {v}.", "I sold the car and bought a {v}.", "My uncle once rented a {v}.", "What do I drive?"),
        ("My car is a {v}.", "My old car broke down, so a {v} stands in the garage now.",
         "A {v} was parked in front of my car.", "Which car do I have?"),
        ("I get to work in a {v}.", "I traded it in and go to work in a {v} instead.", "A {v} overtook me.",
         "What do I drive to work?"))),
    Topic("cat", Inventor.first_name, (
        ("My cat is called {v}.", "We renamed the cat, she is {v} from now on.", "The neighbour's dog is called {v}.",
         "What is my cat called?"),
        ("The name of my goldfish is {v}.", "My goldfish goes by {v} now and not by the old name.",
         "My niece, whose name is {v}, fed the goldfish.", "What is the name of my goldfish?"),
        ("My donkey has the name {v}.", "The farm gave my donkey another name, {v}.", "Another donkey there is {v}.",
         "What name does my donkey have?"))),
    Topic("telephone", lambda inventor: inventor.number(7), (
        ("My phone number is {v}.", "I have a new phone number now, please use {v}.",
         "The plumber has the phone number {v}.", "What is my phone number?"),
        ("My extension at work is {v}.", "They changed my extension, it is {v} today.",
         "The extension of the canteen is {v}.", "What is my extension?"),
        ("You reach me under {v}.", "My number was switched to {v}.", "The bank can be called under {v}.",
         "Under which number can I be reached?"))),
    Topic("instrument", Inventor.instrument, (
        ("I am learning the {v}.", "I gave that up and am learning the {v} instead.", "My cousin plays the {v}.",
         "Which instrument am I learning?"),
        ("I rehearse the {v} each evening.", "I no longer rehearse that, my new instrument is the {v}.",
         "The man upstairs rehearses the {v}.", "What do I rehearse in the evening?"),
        ("My instrument in the band is the {v}.", "The band made me switch to the {v}.", "We need a {v} in the band.",
         "What do I play in the band?"))),
    Topic("dish", Inventor.dish, (
        ("My favourite dish is {v}.", "These days I like {v} better than my old favourite dish.",
         "The canteen served {v} today.", "What is my favourite dish?"),
        ("The food that I like best is {v}.", "I have changed my mind, {v} is what I like best.",
         "My aunt cannot stand {v}.", "Which food do I like best?"),
        ("For my birthday I want {v}.", "I would rather have {v} for my birthday now.", "The baker sells {v}.",
         "What do I want for my birthday?"))),
    Topic("club", Inventor.town, (
        ("Our club meets in {v}.", "Our club has moved its meetings to {v}.", "A club from {v} wrote to us.",
         "Where does our club meet?"),
        ("The family reunion is in {v}.", "We had to shift the family reunion to {v}.",
         "A part of the family comes from {v}.", "Where is the family reunion?"),
        ("My course is held in {v}.", "My course was relocated, we meet in {v}.", "The teacher of my course likes {v}.",
         "Where is my course held?"))),
)  # fmt: skip


def change_scenes(count: int, seed: int, split: Split) -> list[Scene]:
    """Return scenes of `count` statements in all: half of them change, the others meet what only sounds like it."""
    inventor = Inventor(seed, split)
    groups = enumerate(_topics(count, inventor))
    return [_scene(topics, inventor, f"changes-{split}-{number}") for number, topics in groups]


def untold_scenes(count: int, seed: int, split: Split) -> list[Scene]:
    """Return scenes of `count` questions in all, about half of whose subjects nothing was told."""
    inventor = Inventor(seed, split)
    groups = enumerate(_topics(count, inventor))
    return [_untold_scene(topics, inventor, f"untold-{split}-{number}") for number, topics in groups]


def _topics(count: int, inventor: Inventor) -> Iterator[list[Topic]]:
    """Yield the topics of each scene, `count` in all."""
    for start in range(0, count, len(TOPICS)):
        yield inventor.rng.sample(TOPICS, min(len(TOPICS), count - start))


def _untold_scene(topics: Sequence[Topic], inventor: Inventor, name: str) -> Scene:
    """Return a scene in which the first half of the topics is told."""
    told, requests, questions = topics[: len(topics) // 2], list[str](), list[Question]()
    values = [topic.draw(inventor) for topic in told]
    for number, topic in enumerate(topics):
        statement, _, _, text = topic.lines[SPLITS.index(inventor.split)]
        if number < len(told):
            requests.append(statement.format(v=values[number]))
            questions.append(Question(text, values[number], requests[-1], "told", wording=topic.name))
        else:
            questions.append(Question(text, UNKNOWN, "", "untold", wording=topic.name))
    return _in_order(name, requests, questions, inventor)


def _scene(topics: Sequence[Topic], inventor: Inventor, name: str) -> Scene:
    """Return a scene of one statement a topic, and after all of them a change or what sounds like one of each."""
    statements, later, questions = list[str](), list[str](), list[Question]()
    for number, topic in enumerate(topics):
        statement, change, sound, text = topic.lines[SPLITS.index(inventor.split)]
        old = topic.draw(inventor)
        while (new := topic.draw(inventor)) == old:
            pass
        first, second = statement.format(v=old), (sound if number % 2 else change).format(v=new)
        statements.append(first)
        later.append(second)
        others = (new,) if number % 2 else ()
        right, evidence, outdated = (old, first, "") if number % 2 else (new, second, old)
        label = "sounds like a change" if number % 2 else "changed"
        questions.append(Question(text, right, evidence, label, others, outdated, topic.name))
    return _in_order(name, [*statements, *inventor.rng.sample(later, len(later))], questions, inventor)


def _in_order(name: str, requests: Sequence[str], questions: Sequence[Question], inventor: Inventor) -> Scene:
    chats = tuple((user(text),) for text in requests)
    return Scene(name, chats, tuple(inventor.rng.sample(questions, len(questions))), max_tokens=24)
