"""Sorts of facts that people tell of themselves, of others and of things: statements, questions, replies and values.

A value {v} is drawn from a list or invented. {P} and {p} stand for whose fact it is ("My", "my", "Ilvara's"), {n} for a
noun.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from research.evaluation.recall.values import Inventor

Draw = Callable[[random.Random, Inventor], str]
Noun = tuple[str, tuple[str, ...], str, Draw]  # the noun, other words for it, how it is asked for, its value


def _of(*values: str) -> Draw:
    return lambda rng, _: rng.choice(values)


CITY = _of("Lyon", "Porto", "Vienna", "Leeds", "Osaka", "Denver", "Riga", "Cork", "Bergen", "Madrid", "Austin", "Hanoi",
           "Quito", "Perth", "Ghent", "Turin", "Krakow", "Dakar", "Malmö", "Zagreb", "Boston", "Graz", "Lima", "Oslo",
           "Bristol", "Seville", "Nagoya", "Halifax", "Basel", "Sofia")  # fmt: skip
COUNTRY = _of("Portugal", "Japan", "Kenya", "Peru", "Iceland", "Vietnam", "Morocco", "Canada", "Greece", "Norway",
              "Chile", "Scotland", "Mexico", "Georgia", "Slovenia", "New Zealand")  # fmt: skip
NAME = _of("Anna", "Omar", "Lucy", "Henrik", "Mei", "Carlos", "Fatima", "Ivan", "Sofia", "Ben", "Priya", "Noah",
           "Clara", "Yusuf", "Elena", "Marek", "Ruth", "Diego", "Hana", "Oscar", "Nadia", "Peter", "Aisha", "Leo",
           "Greta", "Samuel", "Ines", "Victor", "Zoe", "Arjun")  # fmt: skip
FAMILY = _of("Novak", "Fischer", "Okoye", "Lindqvist", "Marino", "Tanaka", "Brandt", "Costa", "Haddad", "Kowalski",
             "Moreau", "Petrov", "Singh", "Vargas", "Whitfield", "Jensen", "Ahmed", "Doyle")  # fmt: skip
JOB = _of("teacher", "carpenter", "dentist", "translator", "bus driver", "data analyst", "gardener", "lawyer", "cook",
          "pilot", "librarian", "plumber", "photographer", "vet", "midwife", "geologist", "barber", "accountant",
          "firefighter", "beekeeper", "welder", "architect")  # fmt: skip
FOOD = _of("lasagne", "sushi", "pancakes", "falafel", "mushroom risotto", "fish and chips", "goulash", "pad thai",
           "tacos", "onion soup", "dumplings", "apple pie", "paella", "lentil curry", "pizza",
           "carrot cake")  # fmt: skip
AVOIDED = _of("peanuts", "shellfish", "milk", "gluten", "eggs", "pollen", "penicillin", "cats", "soy", "wasp stings",
              "strawberries", "olives", "mushrooms", "celery", "raisins", "blue cheese")  # fmt: skip
COLOUR = _of("green", "dark blue", "yellow", "purple", "orange", "grey", "red", "white", "turquoise",
             "black")  # fmt: skip
WEEKDAY = _of("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
SPORT = _of("tennis", "swimming", "climbing", "rowing", "yoga", "football", "cycling", "judo", "badminton",
            "running", "fencing", "volleyball")  # fmt: skip
HOBBY = _of("pottery", "chess", "bird watching", "knitting", "gardening", "woodworking", "astronomy", "baking",
            "stamp collecting", "model trains", "watercolours", "karaoke")  # fmt: skip
INSTRUMENT = _of("piano", "violin", "flute", "drums", "guitar", "trumpet", "organ", "clarinet",
                 "accordion")  # fmt: skip
SUBJECT = _of("biology", "history", "physics", "law", "economics", "medicine", "philosophy", "mathematics",
              "linguistics", "computer science", "architecture", "geography")  # fmt: skip
LANGUAGE = _of("Spanish", "Korean", "Italian", "Arabic", "Polish", "Swedish", "Turkish", "Hindi", "Dutch",
               "Greek")  # fmt: skip
DRINK = _of("black coffee", "green tea", "ginger ale", "oat milk cappuccino", "apple juice", "sparkling water",
            "red wine", "hot chocolate", "peppermint tea", "dark beer")  # fmt: skip
PLACE = _of("the kitchen drawer", "the blue box under the bed", "the garage", "the top shelf", "my desk", "the cellar",
            "the glove compartment", "the hall cupboard", "the safe", "a jar in the pantry", "the shed")  # fmt: skip
BREED = _of("beagle", "poodle", "border collie", "greyhound", "terrier", "labrador", "dachshund")  # fmt: skip
TOOL = _of("PostgreSQL", "Rust", "Kubernetes", "Django", "SQLite", "TypeScript", "Terraform", "Kafka", "Go", "Vue",
           "Ansible", "Redis")  # fmt: skip
MONTH = _of("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
            "November", "December")  # fmt: skip


def _invented(kind: str) -> Draw:
    return lambda rng, inventor: getattr(inventor, kind)()


def _number(low: int, high: int, suffix: str = "") -> Draw:
    return lambda rng, _: f"{rng.randint(low, high)}{suffix}"


def _digits(rng: random.Random, inventor: Inventor) -> str:
    return inventor.number(rng.randint(3, 12))


def _date(rng: random.Random, inventor: Inventor) -> str:
    return rng.choice(("{d} {m}", "{m} {d}", "the {d}th of {m}")).format(d=rng.randint(4, 19), m=MONTH(rng, inventor))


def _clock(rng: random.Random, _: Inventor) -> str:
    return rng.choice(("half past {h}", "{h} o'clock", "a quarter to {h}", "{h}:15", "{h}:40")).format(
        h=rng.randint(2, 11)
    )


def _code(rng: random.Random, inventor: Inventor) -> str:
    word = rng.choice(("amber", "falcon", "maple", "quartz", "velvet", "otter", "copper", "delta"))
    return rng.choice(
        (
            f"{word}-{rng.randint(100, 9999)}",
            f"{rng.choice('ABDEGHKMPRT')}{rng.randint(10000, 999999)}",
            f"{word.title()}{rng.randint(10, 99)}",
            str(rng.randint(1000, 999999)),
        )
    )


def _phone(rng: random.Random, _: Inventor) -> str:
    return " ".join(str(rng.randint(100, 999)) for _ in range(rng.randint(2, 4)))


def person(rng: random.Random, inventor: Inventor) -> str:
    return f"{NAME(rng, inventor)} {FAMILY(rng, inventor)}" if rng.random() < 0.6 else inventor.person()


def first_name(rng: random.Random, inventor: Inventor) -> str:
    return NAME(rng, inventor) if rng.random() < 0.5 else inventor.first_name()


def _town(rng: random.Random, inventor: Inventor) -> str:
    return CITY(rng, inventor) if rng.random() < 0.6 else inventor.town()


# What belongs to someone: the noun of the statement, other nouns for it in questions, how it is asked for, the value.
# What the probes of `imprint eval --recall` ask for is left out.
NOUNS: tuple[Noun, ...] = (
    ("rabbit", ("bunny", "pet"), "name", first_name), ("dog", ("puppy", "pet"), "name", first_name),
    ("parrot", ("bird", "pet"), "name", first_name), ("horse", ("mare",), "name", first_name),
    ("cousin", ("relative",), "name", first_name), ("brother", ("sibling",), "name", first_name),
    ("older brother", ("brother",), "name", first_name), ("wife", ("spouse", "partner"), "name", first_name),
    ("husband", ("spouse", "partner"), "name", first_name), ("girlfriend", ("partner",), "name", first_name),
    ("daughter", ("child", "girl"), "name", first_name), ("son", ("child", "boy"), "name", first_name),
    ("mother", ("mum", "mom"), "name", first_name), ("father", ("dad",), "name", first_name),
    ("grandmother", ("granny", "grandma"), "name", first_name), ("uncle", (), "name", first_name),
    ("neighbour", ("person next door",), "name", person), ("boss", ("manager", "supervisor"), "name", person),
    ("landlord", (), "name", person), ("doctor", ("physician", "GP"), "name", person),
    ("vet", ("animal doctor",), "name", person), ("lawyer", ("attorney",), "name", person),
    ("piano teacher", ("music teacher",), "name", person), ("best friend", ("closest friend",), "name", person),
    ("flatmate", ("roommate",), "name", first_name), ("hairdresser", ("barber",), "name", first_name),
    ("accountant", ("tax adviser",), "name", person), ("babysitter", (), "name", first_name),
    ("insurer", ("insurance company",), "what", _invented("company")), ("bank", (), "what", _invented("company")),
    ("favourite colour", ("preferred colour",), "what", COLOUR), ("comfort food", ("guilty pleasure",), "what", FOOD),
    ("favourite drink", ("drink of choice",), "what", DRINK), ("hobby", ("pastime",), "what", HOBBY),
    ("favourite sport", (), "what", SPORT), ("holiday town", ("holiday place",), "what", _town),
    ("new flat", ("new apartment",), "where", _invented("street")),
    ("office", ("workplace",), "where", _invented("street")),
    ("parking space", ("parking spot",), "what", _digits), ("phone number", ("number",), "what", _phone),
    ("membership number", ("member id",), "what", _digits), ("shoe size", (), "what", _number(35, 47)),
    ("blood group", ("blood type",), "what", _of("0 positive", "B negative", "AB positive", "A positive")),
    ("name day", (), "when", _date), ("wedding day", ("anniversary",), "when", _date),
    ("camera", (), "what", _invented("product")), ("laptop", ("computer",), "what", _invented("product")),
    ("bike", ("bicycle",), "what", _invented("product")), ("ringtone", (), "what", INSTRUMENT),
    ("job", ("profession", "occupation"), "what", JOB), ("room number", ("room",), "what", _digits),
    ("license plate", ("number plate",), "what", _code), ("passport number", (), "what", _code),
    ("insurance number", ("policy number",), "what", _digits), ("dream destination", (), "what", COUNTRY),
)  # fmt: skip
# What belongs to nobody in particular: with "the".
THINGS: tuple[Noun, ...] = (
    ("wifi password", ("password of the wifi", "internet password"), "what", _code),
    ("door code", ("entry code",), "what", _code), ("alarm code", (), "what", _digits),
    ("meeting room", ("room for the meeting",), "what", _number(2, 400)),
    ("staging server", ("test server",), "what", _code), ("admin user", ("admin account",), "name", first_name),
    ("next release", ("release",), "when", _date), ("deadline", ("due date",), "when", _date),
    ("team meeting", ("weekly meeting",), "when", WEEKDAY), ("delivery", ("parcel",), "when", WEEKDAY),
    ("dentist appointment", ("appointment at the dentist",), "when", _clock),
    ("flight", ("plane",), "when", _clock), ("train", (), "when", _clock),
    ("budget", (), "what", lambda rng, _: f"{rng.randint(2, 90) * 100} euros"),
    ("rent", ("monthly rent",), "what", lambda rng, _: f"{rng.randint(40, 250) * 10} euros"),
    ("invoice number", (), "what", _digits), ("order number", ("order id",), "what", _digits),
    ("project manager", ("head of the project",), "name", person), ("plumber", (), "name", person),
    ("spare key", ("second key",), "where", PLACE), ("first aid kit", (), "where", PLACE),
    ("database", (), "what", TOOL), ("backend language", ("language of the backend",), "what", TOOL),
    ("codename", ("code name",), "what", _invented("product")), ("venue", ("place of the party",), "where", _town),
    ("conference", (), "where", _town), ("main supplier", ("supplier",), "what", _invented("company")),
)  # fmt: skip
SAID = {  # of a noun by how it is asked: statements
    "name": ("{P} {n} is called {v}.", "{P} {n}'s name is {v}.", "The name of {p} {n} is {v}.", "{P} {n} is {v}."),
    "what": ("{P} {n} is {v}.", "{P} {n} is {v}.", "{P} {n}: {v}.", "{v} is {p} {n}."),
    "when": ("{P} {n} is on {v}.", "{P} {n} is {v}.", "{P} {n} is set for {v}."),
    "where": ("{P} {n} is in {v}.", "{P} {n} can be found in {v}.", "{P} {n} is now in {v}."),
}
ASKED = {
    "name": (
        "What is {p} {n} called?",
        "What's the name of {p} {n}?",
        "Who is {p} {n}?",
        "What is {p} {n}'s name?",
        "Can you tell me the name of {p} {n}?",
        "How is {p} {n} called again?",
        "I forgot {p} {n}'s name.",
    ),
    "what": (
        "What is {p} {n}?",
        "What's {p} {n}?",
        "Which is {p} {n}?",
        "Do you know {p} {n}?",
        "Tell me {p} {n}.",
        "What was {p} {n} again?",
        "Please remind me of {p} {n}.",
        "I need {p} {n}.",
    ),
    "when": (
        "When is {p} {n}?",
        "What day is {p} {n}?",
        "Do you remember when {p} {n} is?",
        "What time is {p} {n}?",
        "Remind me when {p} {n} is.",
    ),
    "where": (
        "Where is {p} {n}?",
        "Where can I find {p} {n}?",
        "Where did I say {p} {n} is?",
        "In which place is {p} {n}?",
    ),
}
REPLIED = {
    "name": "{Y} {n} is called {v}.", "what": "{Y} {n} is {v}.", "when": "{Y} {n} is on {v}.",
    "where": "{Y} {n} is in {v}.",
}  # fmt: skip


@dataclass(frozen=True)
class Verb:
    """Statements, questions and the reply about what the user or another person, {N}, does."""

    draw: Draw
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    reply: str
    statements_of: tuple[str, ...] = ()
    questions_of: tuple[str, ...] = ()
    reply_of: str = ""


VERBS = (
    Verb(_town, ("I live in {v}.", "I moved to {v} last year.", "My flat is in {v}.", "We live in {v} now."),
               ("Where do I live?", "Which city do I live in?", "What town am I based in?", "Where is my home?"),
               "You live in {v}.", ("{N} lives in {v}.", "{N} moved to {v}.", "{N} has a house in {v}."),
               ("Where does {N} live?", "Which town does {N} live in?", "Where can I visit {N}?"), "{N} lives in {v}."),
    Verb(_town, ("I was born in {v}.", "I come from {v}.", "I grew up in {v}."),
               ("Where was I born?", "Where am I from?", "Where did I grow up?"), "You are from {v}.",
               ("{N} comes from {v}.", "{N} was born in {v}."), ("Where is {N} from?", "Where was {N} born?"),
               "{N} is from {v}."),
    Verb(JOB, ("I work as a {v}.", "I am a {v}.", "I earn my living as a {v}."),
               ("What do I do for work?", "What is my profession?", "How do I earn my money?"), "You work as a {v}.",
               ("{N} works as a {v}.", "{N} is a {v}."), ("What does {N} do?", "What is {N}'s job?"), "{N} is a {v}."),
    Verb(_invented("company"), ("I work at {v}.", "I work for {v}.", "I have a new job at {v}."),
               ("Where do I work?", "Who do I work for?", "Which company am I with?"), "You work at {v}.",
               ("{N} works for {v}.", "{N} started at {v}."), ("Where does {N} work?", "Who does {N} work for?"),
               "{N} works at {v}."),
    Verb(AVOIDED, ("I am allergic to {v}.", "I can't have {v}.", "I get ill from {v}."),
               ("What am I allergic to?", "What must I avoid?", "Which allergy do I have?"), "You are allergic to {v}.",
               ("{N} is allergic to {v}.", "{N} cannot stand {v}."), ("What is {N} allergic to?",
               "What should {N} avoid?"), "{N} is allergic to {v}."),
    Verb(FOOD, ("I love {v}.", "I could eat {v} every day.", "I really like {v}."),
               ("What food do I love?", "What do I like to eat?", "What should I order for myself?"), "You love {v}.",
               ("{N} loves {v}.", "{N} likes {v} most."), ("What does {N} like to eat?", "What could I cook for {N}?"),
               "{N} likes {v}."),
    Verb(AVOIDED, ("I hate {v}.", "I don't like {v}.", "I can't stand {v}."),
               ("What do I hate?", "What don't I like?", "What do I dislike?"), "You do not like {v}.",
               ("{N} hates {v}.", "{N} doesn't like {v}."), ("What does {N} hate?", "What does {N} dislike?"),
               "{N} does not like {v}."),
    Verb(DRINK, ("I always drink {v}.", "In the morning I have {v}.", "I'd like {v}, as always."),
               ("What do I usually drink?", "What do I drink?", "Which drink do I take?"), "You drink {v}.",
               ("{N} only drinks {v}.",), ("What does {N} drink?",), "{N} drinks {v}."),
    Verb(SPORT, ("I do {v} twice a week.", "I took up {v}.", "I go to {v} after work."),
               ("Which sport do I do?", "What sport did I take up?", "What do I do to keep fit?"), "You do {v}.",
               ("{N} is good at {v}.",), ("What is {N} good at?", "Which sport does {N} do?"), "{N} does {v}."),
    Verb(HOBBY, ("I spend my weekends with {v}.", "I am into {v}.", "I enjoy {v}."),
               ("What do I enjoy?", "What do I do on weekends?", "What am I into?"), "You enjoy {v}.",
               ("{N} is crazy about {v}.",), ("What is {N} crazy about?", "What is {N}'s hobby?"), "{N} enjoys {v}."),
    Verb(INSTRUMENT, ("I play the {v}.", "I am learning the {v}.", "I practise the {v} every evening."),
               ("What do I play?", "Which instrument do I play?", "Which instrument am I learning?"),
               "You play the {v}.", ("{N} plays the {v}.",), ("Which instrument does {N} play?", "What does {N} play?"),
               "{N} plays the {v}."),
    Verb(SUBJECT, ("I studied {v}.", "I have a degree in {v}.", "I am studying {v}."),
               ("What did I study?", "What is my degree in?", "Which subject do I study?"), "You studied {v}.",
               ("{N} studies {v}.",), ("What does {N} study?", "Which subject does {N} study?"), "{N} studies {v}."),
    Verb(LANGUAGE, ("I am learning {v}.", "I speak {v} at home.", "I take lessons in {v}."),
               ("Which language am I learning?", "What language do I speak?", "Which lessons do I take?"),
               "You speak {v}.", ("{N} speaks {v}.",), ("Which language does {N} speak?",), "{N} speaks {v}."),
    Verb(_number(18, 90), ("I am {v} years old.", "I'm {v}.", "I turned {v} this spring."),
               ("How old am I?", "What is my age?", "Do you know my age?"), "You are {v} years old.",
               ("{N} is {v} years old.", "{N} just turned {v}."), ("How old is {N}?", "What is {N}'s age?"),
               "{N} is {v} years old."),
    Verb(_number(2, 9), ("I have {v} grandchildren.", "We have {v} grandchildren."),
               ("How many grandchildren do I have?",), "You have {v} grandchildren.",
               ("{N} has {v} cousins.",), ("How many cousins does {N} have?",), "{N} has {v} cousins."),
    Verb(BREED, ("I have a {v}.", "We got a {v} last week.", "I own a {v}."),
               ("What kind of dog do I have?", "Which breed is my dog?", "What pet do I have?", "Do I have a pet?"),
               "You have a {v}.", ("{N} has a {v}.",), ("What dog does {N} have?",), "{N} has a {v}."),
    Verb(_invented("product"), ("I drive a {v}.", "I bought a {v}.", "I ordered a {v}."),
               ("What do I drive?", "What did I buy?", "Which model did I get?"), "You have a {v}.",
               ("{N} drives a {v}.",), ("What does {N} drive?", "Which car does {N} drive?"), "{N} drives a {v}."),
    Verb(COUNTRY, ("We are going to {v} in summer.", "I am travelling to {v} next month.", "I booked a trip to {v}."),
               ("Where am I travelling?", "Where do we go on holiday?", "Which country is my trip to?"),
               "You are going to {v}.", ("{N} is on holiday in {v}.",), ("Where is {N} on holiday?", "Where is {N}?"),
               "{N} is in {v}."),
    Verb(_clock, ("I get up at {v}.", "My shift starts at {v}.", "I start work at {v}."),
               ("When do I start?", "At what time does my day start?", "When does my shift start?"),
               "You start at {v}.", ("{N} arrives at {v}.", "{N} comes at {v}."), ("When does {N} come?",
               "What time does {N} arrive?"), "{N} arrives at {v}."),
    Verb(WEEKDAY, ("I have my day off on {v}.", "I work from home on {v}.", "I see my therapist on {v}."),
               ("Which day am I at home?", "Which day is it, the one that I told you?"), "It is {v}.",
               ("{N} is away on {v}.", "{N} visits us on {v}."), ("Which day is {N} away?", "When does {N} visit us?"),
               "It is on {v}."),
    Verb(PLACE, ("I keep the passport in {v}.", "I put the charger in {v}.", "I hid the present in {v}."),
               ("Where did I put it?", "Where do I keep it?", "Where is it?"), "It is in {v}.",
               ("{N} left the umbrella in {v}.",), ("Where did {N} leave the umbrella?",),
               "It is in {v}."),
    Verb(TOOL, ("We use {v} at work.", "Our team writes everything in {v}.", "I am learning {v} at the moment."),
               ("What do we use at work?", "What does our team use?", "What am I learning?"), "You use {v}.",
               ("{N} knows {v} best.",), ("What does {N} know best?", "What could {N} help me with?"),
               "{N} knows {v}."),
    Verb(first_name, ("I am married to {v}.", "I am engaged to {v}.", "I live together with {v}."),
               ("Who am I married to?", "Who is my partner?", "Who do I live with?"), "It is {v}.",
               ("{N} is married to {v}.",), ("Who is {N} married to?", "What is the name of {N}'s partner?"),
               "{N} is married to {v}."),
    Verb(first_name, ("I lent my ladder to {v}.", "I lent the tent to {v}.", "{v} has my drill."),
               ("Who has it?", "Who did I lend it to?"), "{v} has it.",
               ("{N} owes money to {v}.",), ("Who does {N} owe money to?",), "{N} owes money to {v}."),
    Verb(_number(50, 120, " kg"), ("I weigh {v}.",), ("How heavy am I?", "What do I weigh?"), "You weigh {v}.",
               ("{N} weighs {v}.",), ("How much does {N} weigh?",), "{N} weighs {v}."),
    Verb(first_name, ("Please call me {v}.", "My name is {v}.", "I'm {v}.", "Hi, I am {v}."),
               ("What is my name?", "Who am I?", "What am I called?", "Do you know my name?"), "Your name is {v}.",
               ("{N}'s nickname is {v}.",), ("What is {N}'s nickname?",), "{N}'s nickname is {v}."),
)  # fmt: skip
