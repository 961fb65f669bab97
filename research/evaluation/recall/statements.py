"""Statements about invented things: numbers, asked by their cue and by a question, and corrections of a value.

A topic has one line a split: a statement, a correction and a question. {s} stands for the thing, {v} for the value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from research.evaluation.recall.scenes import SPLITS, Question, Scene, Split, user
from research.evaluation.recall.values import Inventor

DIGITS = range(3, 13)
STATEMENTS_IN_A_SCENE = 20

Lines = tuple[str, str, str]  # statement, correction, question


@dataclass(frozen=True)
class Topic:
    """Statements about things of one sort, with the lines of each split in the order of SPLITS."""

    name: str
    lines: tuple[Lines, Lines, Lines]

    def of(self, split: Split) -> Lines:
        """Return the lines of a split."""
        return self.lines[SPLITS.index(split)]


NUMBERS = (
    Topic("gate", (
        ("The {s} gate opens with {v}.", "The {s} gate opens with {v}, not as before.", "How do I open the {s} gate?"),
        ("The code of the {s} gate is {v}.", "The code of the {s} gate is {v} from today.",
         "Which code opens the gate at {s}?"),
        ("To get past the {s} gate, type {v}.", "To get past the {s} gate, type {v}; the old one is void.",
         "What must be typed at the {s} gate?"))),
    Topic("invoice", (
        ("{s} sent invoice {v}.", "{s} sent invoice {v} instead.", "Which invoice did {s} send?"),
        ("The invoice from {s} has the number {v}.", "The invoice from {s} has the number {v} after the change.",
         "What is the number of the {s} invoice?"),
        ("On the bill of {s} stands the reference {v}.", "On the bill of {s} stands the reference {v} now.",
         "Which reference is on the bill of {s}?"))),
    Topic("telephone", (
        ("{s} can be called on {v}.", "{s} can be called on {v} since the move.", "How can I call {s}?"),
        ("The telephone number of {s} is {v}.", "The telephone number of {s} is {v} by now.",
         "Which number do I dial for {s}?"),
        ("Ring {s} at {v}.", "Ring {s} at {v} from Monday.", "At which number does {s} answer?"))),
    Topic("serial", (
        ("Serial number of the {s} pump: {v}.", "Serial number of the {s} pump: {v} (replaced).",
         "What is the serial number of the {s} pump?"),
        ("The {s} pump bears the serial number {v}.", "The {s} pump bears the serial number {v} since its repair.",
         "Which serial number does the pump from {s} have?"),
        ("Engraved on the {s} pump is {v}.", "Engraved on the {s} pump is {v}, as I saw today.",
         "What is engraved on the pump of {s}?"))),
    Topic("parcel", (
        ("The parcel for {s} is tracked under {v}.", "The parcel for {s} is tracked under {v} again.",
         "Under what number is the parcel for {s} tracked?"),
        ("The tracking number of the {s} parcel is {v}.", "The tracking number of the {s} parcel is {v} after all.",
         "How do I track the parcel to {s}?"),
        ("Look for the {s} box with label {v}.", "Look for the {s} box with label {v}, the new one.",
         "Which label is on the {s} box?"))),
    Topic("members", (
        ("The {s} society counts {v} members.", "The {s} society counts {v} members this year.",
         "How many members does the {s} society count?"),
        ("The number of visitors of the {s} museum was {v}.", "The number of visitors of the {s} museum was {v}, as"
         " counted again.", "How many people visited the museum of {s}?"),
        ("Tickets sold for the {s} games: {v}.", "Tickets sold for the {s} games: {v}, says the office.",
         "How many tickets were sold for the games in {s}?"))),
)  # fmt: skip
CORRECTIONS = (
    Topic("lead", (
        ("Project {s} is led by {v}.", "Project {s} is led by {v} now.", "Who leads project {s}?"),
        ("The head of project {s} is {v}.", "The head of project {s} is {v} since today.",
         "Who is in charge of project {s}?"),
        ("Reports about project {s} go to {v}.", "Reports about project {s} go to {v} from now on.",
         "Who gets the reports about project {s}?"))),
    Topic("deadline", (
        ("The work on {s} must end on {v}.", "The work on {s} must end on {v} instead.", "When must {s} be done?"),
        ("The deadline for {s} is {v}.", "The deadline for {s} is {v} after the delay.",
         "By which day does {s} have to be finished?"),
        ("Hand in the papers for {s} on {v}.", "Hand in the papers for {s} on {v}, as was decided today.",
         "When are the papers for {s} due?"))),
    Topic("venue", (
        ("The {s} meeting takes place in {v}.", "The {s} meeting takes place in {v} this time.",
         "Where does the {s} meeting take place?"),
        ("The {s} conference will be held in {v}.", "The {s} conference will be held in {v}, not where I said before.",
         "In which town is the {s} conference?"),
        ("For the {s} congress we travel to {v}.", "For the {s} congress we travel to {v} after all.",
         "Where do we travel for the {s} congress?"))),
    Topic("supplier", (
        ("Parts for the {s} come from {v}.", "Parts for the {s} come from {v} now.", "Who delivers parts for the {s}?"),
        ("The supplier of the {s} plant is {v}.", "The supplier of the {s} plant is {v} by the new contract.",
         "Which company supplies the {s} plant?"),
        ("The {s} works buy from {v}.", "The {s} works buy from {v} since last month.",
         "Where do the {s} works buy?"))),
    Topic("price", (
        ("One {s} costs {v} crowns.", "One {s} costs {v} crowns now.", "What does one {s} cost?"),
        ("The price of the {s} boat is {v} crowns.", "The price of the {s} boat is {v} crowns as of today.",
         "How much does the {s} boat cost?"),
        ("They ask for the {s} carpet {v} crowns.", "They ask for the {s} carpet {v} crowns at present.",
         "How much is asked for the {s} carpet?"))),
    Topic("address", (
        ("The {s} office is at {v}.", "The {s} office is at {v} after the move.", "Where is the {s} office?"),
        ("The address of the {s} clinic is {v}.", "The address of the {s} clinic is {v} since it moved.",
         "In which street is the {s} clinic?"),
        ("You find the {s} bakery in {v}.", "You find the {s} bakery in {v} from this week.",
         "What street is the {s} bakery in?"))),
)  # fmt: skip

# The values of the topics of CORRECTIONS.
DRAWS: Mapping[str, Callable[[Inventor], str]] = {
    "lead": Inventor.person,
    "deadline": Inventor.day,
    "venue": Inventor.town,
    "supplier": Inventor.company,
    "price": lambda inventor: inventor.number(4),
    "address": Inventor.street,
}


def number_scenes(count: int, seed: int, split: Split) -> list[Scene]:
    """Return scenes of `count` numbers in all, of 3 to 12 digits, each asked by its cue and by a question."""
    inventor = Inventor(seed, split)
    items = []
    for number in range(count):
        topic, digits = NUMBERS[number % len(NUMBERS)], DIGITS[number % len(DIGITS)]
        sizes = next(label for last, label in ((5, "3–5 digits"), (8, "6–8"), (12, "9–12")) if digits <= last)
        items.append((topic, inventor.town(), [inventor.number(digits)], sizes))
    return _scenes(items, inventor, "numbers")


def correction_scenes(count: int, seed: int, split: Split) -> list[Scene]:
    """Return scenes of `count` statements in all, each corrected later: every third one twice."""
    inventor = Inventor(seed, split)
    items = []
    for number in range(count):
        topic = CORRECTIONS[number % len(CORRECTIONS)]
        draw = DRAWS[topic.name]
        values = [draw(inventor)]
        while len(values) < (3 if number % 3 == 2 else 2):
            if (value := draw(inventor)) not in values:
                values.append(value)
        label = "corrected twice" if len(values) == 3 else "corrected"
        items.append((topic, inventor.town(), values, label))
    return _scenes(items, inventor, "corrections")


def _scenes(items: Sequence[tuple[Topic, str, list[str], str]], inventor: Inventor, name: str) -> list[Scene]:
    """Return scenes of the items (topic, thing, values from the oldest to the newest, sort)."""
    scenes = []
    for start in range(0, len(items), STATEMENTS_IN_A_SCENE):
        part = items[start : start + STATEMENTS_IN_A_SCENE]
        requests, questions = list[str](), list[Question]()
        for turn in range(max(len(values) for _, _, values, _ in part)):
            for topic, thing, values, _ in inventor.rng.sample(part, len(part)):
                if turn < len(values):
                    line = topic.of(inventor.split)[min(turn, 1)]
                    requests.append(line.format(s=thing, v=values[turn]))
        for topic, thing, values, sort in part:
            others = tuple(v for other, _, vs, _ in part for v in vs if other is topic and v not in values)
            statement, correction, question = topic.of(inventor.split)
            evidence = (statement if len(values) == 1 else correction).format(s=thing, v=values[-1])
            outdated = values[-2] if len(values) > 1 else ""
            for template, way in ((statement.split(" {v}")[0], "by cue"), (question, "by question")):
                text, wording, label = template.format(s=thing), f"{topic.name} {way}", f"{sort} {way}"
                questions.append(
                    Question(text, values[-1], evidence, label, others, outdated, wording, is_cue=way == "by cue")
                )
        chats = tuple((user(text),) for text in requests)
        title = f"{name}-{inventor.split}-{start // STATEMENTS_IN_A_SCENE}"
        scenes.append(Scene(title, chats, tuple(inventor.rng.sample(questions, len(questions))), max_tokens=24))
    return scenes
