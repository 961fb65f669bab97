"""Personal facts: what a user says of themselves and of other people, corrections, and questions in other words.

A template has one line a split, so that no split shares a wording with another: a statement, a correction and three
questions. {P} and {p} stand for whose fact it is ("My", "my", "Ilvara's"), {v} for the value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from research.evaluation.recall.scenes import Question, Scene, Split, user
from research.evaluation.recall.values import Inventor

FACTS_OF_A_PERSON = 10
PEOPLE_IN_A_SCENE = 5


@dataclass(frozen=True)
class Wording:
    """The templates of one split for an attribute: a statement, a correction and three questions."""

    statement: str
    correction: str
    questions: tuple[str, str, str]

    @property
    def cue(self) -> str:
        """Return the statement up to the value."""
        return self.statement.split(" {v}")[0]


@dataclass(frozen=True)
class Attribute:
    """A fact that people have, with the wordings of each split."""

    name: str
    draw: Callable[[Inventor], str]
    wordings: dict[Split, Wording]


def _attribute(name: str, draw: Callable[[Inventor], str], train: Wording, dev: Wording, review: Wording) -> Attribute:
    return Attribute(name, draw, {"train": train, "dev": dev, "review": review})


ATTRIBUTES = (
    _attribute(
        "sister", Inventor.first_name,
        Wording("{P} sister is called {v}.", "I got that wrong: {p} sister's name is {v}.",
                ("What is the name of {p} sister?", "Who is {p} sister?", "How is {p} sister called?")),
        Wording("The name of {p} younger sister is {v}.", "Sorry, correction: {p} younger sister is really named {v}.",
                ("What is {p} sister called?", "Can you tell me {p} sister's name?",
                 "If {p} sister came in, by which name would I greet her?")),
        Wording("By the way, {p} only sister goes by {v}.", "Actually that changed, {p} only sister now goes by {v}.",
                ("Do you remember what {p} sister goes by?", "What name does {p} sister have?",
                 "Remind me of {p} sister's first name.")),
    ),
    _attribute(
        "cat", Inventor.first_name,
        Wording("{P} cat is named {v}.", "No, {p} cat is named {v} now.",
                ("What is {p} cat's name?", "Which name does {p} cat have?", "What do people call {p} cat?")),
        Wording("{P} grey cat answers to {v}.", "Let me correct that: {p} grey cat answers to {v}.",
                ("What is {p} cat called?", "How should I call {p} pet if I want it to come?",
                 "What is the name of {p} cat?")),
        Wording("There is a cat in {p} house whose name is {v}.",
                "I made a mistake about the cat: the one in {p} house has the name {v}.",
                ("Tell me the name of {p} cat.", "What's the cat at {p} house called?", "Who purrs at {p} house?")),
    ),
    _attribute(
        "street", Inventor.street,
        Wording("{P} flat is in {v}.", "That is out of date: {p} flat is in {v}.",
                ("In which street is {p} flat?", "Which street is {p} home in?", "Where is {p} flat?")),
        Wording("{P} home address is in {v}.", "There was a move: {p} home address is in {v} now.",
                ("Which street does {p} mail go to?", "What is {p} home address?", "On which street is {p} house?")),
        Wording("You can find {p} front door on {v}.", "Since last week you can find {p} front door on {v}.",
                ("To which street must a taxi go to reach {p} home?", "What street is {p} home on?",
                 "Where would I ring {p} doorbell?")),
    ),
    _attribute(
        "employer", Inventor.company,
        Wording("{P} employer is {v}.", "Not any more: {p} employer is {v}.",
                ("Who is {p} employer?", "Which company is {p} employer?", "What firm pays {p} wages?")),
        Wording("{P} current job is at {v}.", "Update: {p} current job is at {v}.",
                ("Which company is {p} job at?", "What is the name of {p} workplace?", "Who pays {p} salary?")),
        Wording("{P} office belongs to {v}.", "A new contract was signed, so {p} office belongs to {v}.",
                ("For which firm is {p} work done?", "Where is {p} work?", "Name {p} employer.")),
    ),
    _attribute(
        "birthplace", Inventor.town,
        Wording("{P} place of birth is {v}.", "I was mistaken, {p} place of birth is {v}.",
                ("What is {p} place of birth?", "In which town is {p} birthplace?", "Where was {p} cradle?")),
        Wording("{P} birthplace is the town of {v}.", "I had that wrong: {p} birthplace is the town of {v}.",
                ("What is {p} home town?", "Which town is {p} birthplace?", "Where did {p} life begin?")),
        Wording("{P} life started in {v}.", "The papers say something else: {p} life started in {v}.",
                ("What town is on {p} birth certificate?", "Which town is {p} home town by birth?",
                 "Which town saw {p} first day?")),
    ),
    _attribute(
        "locker", lambda inventor: inventor.number(5),
        Wording("{P} locker has the number {v}.", "The lockers were moved: {p} locker has the number {v}.",
                ("What is {p} locker number?", "Which locker is {p} own?", "What number has {p} locker?")),
        Wording("{P} locker number is {v}.", "It was changed today, {p} locker number is {v}.",
                ("Which number is on {p} locker?", "What number has {p} locker got?",
                 "I stand before the lockers. Which one is {p} locker?")),
        Wording("At the gym {p} locker is {v}.", "From now on at the gym {p} locker is {v}.",
                ("Which gym locker is {p} own one?", "What's the number of {p} gym locker?",
                 "Where are {p} gym clothes, by number?")),
    ),
    _attribute(
        "dish", Inventor.dish,
        Wording("{P} favourite meal is {v}.", "Tastes change: {p} favourite meal is {v}.",
                ("What is {p} favourite meal?", "Which meal is {p} favourite?", "What is the best meal in {p} eyes?")),
        Wording("{P} favourite dish is {v}.", "I should correct this: {p} favourite dish is {v}.",
                ("What food is {p} favourite?", "What should I cook for {p} birthday?",
                 "Which dish is {p} favourite one?")),
        Wording("Nothing makes {p} mouth water like {v}.", "These days nothing makes {p} mouth water like {v}.",
                ("What is {p} best-loved food?", "Which dish makes {p} mouth water?", "What is {p} dinner wish?")),
    ),
    _attribute(
        "allergy", Inventor.allergy,
        Wording("{P} allergy is to {v}.", "The test is back: {p} allergy is to {v}.",
                ("What is {p} allergy to?", "Which thing sets off {p} allergy?", "What is {p} allergy?")),
        Wording("{P} doctor found an allergy to {v}.", "A second test says that {p} doctor found an allergy to {v}.",
                ("Which allergy does {p} doctor know of?", "What should be kept away because of {p} allergy?",
                 "What did {p} allergy test show?")),
        Wording("{P} skin comes out in a rash from {v}.",
                "It was the wrong cause; {p} skin comes out in a rash from {v}.",
                ("What causes {p} rash?", "What should not touch {p} skin?", "What gives rise to {p} rash?")),
    ),
    _attribute(
        "birthday", Inventor.day,
        Wording("{P} birthday is on {v}.", "That was the wrong day: {p} birthday is on {v}.",
                ("When is {p} birthday?", "On which day is {p} birthday?", "What is the date of {p} birthday?")),
        Wording("{P} birthday party is always on {v}.", "Please correct the calendar: {p} birthday party is on {v}.",
                ("What date is {p} birthday?", "When should I send a card for {p} birthday?",
                 "On which date is {p} birthday party?")),
        Wording("Candles are lit for {p} birthday every {v}.",
                "I mixed up the dates. Candles are lit for {p} birthday every {v}.",
                ("Which date is marked for {p} birthday?", "When do we bake {p} birthday cake?",
                 "Tell me {p} date of birth.")),
    ),
    _attribute(
        "instrument", Inventor.instrument,
        Wording("{P} instrument is the {v}.", "No longer: {p} instrument is the {v}.",
                ("What is {p} instrument?", "Which instrument is {p} own?", "What is played by {p} hands?")),
        Wording("{P} music lessons are for the {v}.", "There was a change: {p} music lessons are for the {v}.",
                ("Which instrument are {p} lessons for?", "What instrument is {p} hobby?",
                 "What can be heard through the wall during {p} music practice?")),
        Wording("In the orchestra {p} part is the {v}.", "After the audition {p} part is the {v}.",
                ("What is {p} part in the orchestra?", "Which instrument is in {p} music case?",
                 "What does {p} orchestra seat stand for?")),
    ),
    _attribute(
        "car", Inventor.product,
        Wording("{P} car is a {v}.", "It was sold; {p} car is a {v}.",
                ("What is {p} car?", "Which car is {p} own?", "What model is {p} car?")),
        Wording("{P} car is a second-hand {v}.", "I need to correct the model: {p} car is a {v}.",
                ("What make is {p} car?", "Which model is {p} car?", "What kind of vehicle stands in {p} garage?")),
        Wording("On weekdays {p} drive is in a {v}.", "The old one broke, so on weekdays {p} drive is in a {v}.",
                ("What vehicle is {p} weekday drive in?", "Which car is on {p} insurance?",
                 "What model of car is {p} weekday one?")),
    ),
    _attribute(
        "dentist", Inventor.person,
        Wording("{P} dentist is Dr {v}.", "After the move {p} dentist is Dr {v}.",
                ("Who is {p} dentist?", "What is {p} dentist called?", "Which dentist is {p} own?")),
        Wording("{P} teeth are looked after by Dr {v}.", "New dentist: {p} teeth are looked after by Dr {v}.",
                ("What is the name of {p} dentist?", "Which doctor takes care of {p} teeth?",
                 "Who should be called about {p} toothache?")),
        Wording("The drill over {p} teeth is in the hands of Dr {v}.",
                "That practice closed. The drill over {p} teeth is in the hands of Dr {v}.",
                ("Who treats {p} teeth?", "With whom is {p} dental appointment?", "Which dentist has {p} X-rays?")),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """One attribute of one person: `old` is the value before the correction, empty without one."""

    attribute: Attribute
    owner: str  # "my", or "Ilvara Vorasted's"
    value: str
    old: str


def invent_scenes(people: int, seed: int, split: Split, facts: int = FACTS_OF_A_PERSON) -> list[Scene]:
    """Return scenes of PEOPLE_IN_A_SCENE people each: the user, and people the user speaks of.

    Every person has `facts` facts, of which one is corrected later. A fact has one statement, three questions and one
    cue, the statement up to the value.
    """
    inventor = Inventor(seed, split)
    scenes = []
    for start in range(0, people, PEOPLE_IN_A_SCENE):
        count = min(PEOPLE_IN_A_SCENE, people - start)
        owners = ["my", *(f"{inventor.person()}'s" for _ in range(count - 1))]
        known = [fact for owner in owners for fact in _facts(inventor, owner, facts)]
        scenes.append(_scene(inventor, known, f"people-{split}-{start // PEOPLE_IN_A_SCENE}"))
    return scenes


def _facts(inventor: Inventor, owner: str, count: int) -> list[Fact]:
    attributes = inventor.rng.sample(ATTRIBUTES, min(count, len(ATTRIBUTES)))
    facts = []
    for number, attribute in enumerate(attributes):
        value = attribute.draw(inventor)
        old = ""
        while number == 0 and (old := attribute.draw(inventor)) == value:
            pass
        facts.append(Fact(attribute, owner, value, old))
    return facts


def _scene(inventor: Inventor, facts: list[Fact], name: str) -> Scene:
    split = inventor.split
    order = inventor.rng.sample(facts, len(facts))
    statements = [_statement(fact, split, fact.old or fact.value) for fact in order]
    corrections = [_correction(fact, split) for fact in order if fact.old]
    requests = tuple((user(text),) for text in statements + corrections)
    questions = [question for fact in facts for question in _questions(fact, facts, split)]
    return Scene(name, requests, tuple(inventor.rng.sample(questions, len(questions))))


def _statement(fact: Fact, split: Split, value: str) -> str:
    return _fill(fact.attribute.wordings[split].statement, fact.owner, value)


def _correction(fact: Fact, split: Split) -> str:
    return _fill(fact.attribute.wordings[split].correction, fact.owner, fact.value)


def _questions(fact: Fact, facts: list[Fact], split: Split) -> list[Question]:
    wording = fact.attribute.wordings[split]
    evidence = _correction(fact, split) if fact.old else _statement(fact, split, fact.value)
    same = [other for other in facts if other.attribute is fact.attribute and other.owner != fact.owner]
    others = tuple(value for other in same for value in (other.value, other.old) if value not in ("", fact.value))
    label = ("self" if fact.owner == "my" else "other") + (" corrected" if fact.old else "")

    def question(text: str, number: int) -> Question:
        name = f"{fact.attribute.name}/{number}"
        return Question(text, fact.value, evidence, label, others, fact.old, name)

    found = [question(_fill(text, fact.owner), number) for number, text in enumerate(wording.questions)]
    cue = _fill(wording.cue, fact.owner)
    return [*found, Question(cue, fact.value, evidence, f"{label} cue", others, fact.old, "cue", is_cue=True)]


def _fill(template: str, owner: str, value: str = "") -> str:
    """Return a sentence about an owner, with a capital letter at its beginning."""
    text = template.format(P=owner, p=owner, v=value)
    return text[0].upper() + text[1:]
