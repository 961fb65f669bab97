"""Tasks with one right answer each, half of them calls of tools and half of them objects by a JSON Schema.

Fifty are small, with three tools. Twenty-four are harder: eight tools that resemble each other, times and amounts that
a text does not spell as the answer has them, and objects in lists.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

Json = dict[str, Any]


def _object(properties: Json) -> Json:
    """Return the schema of an object that has all properties and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _tool(name: str, description: str, **properties: Json) -> Json:
    function = {"name": name, "description": description, "parameters": _object(properties)}
    return {"type": "function", "function": function}


CITY: Json = {"type": "string", "description": "The name of a city."}
NUMBER: Json = {"type": "integer"}
TOOLS = [
    _tool("get_weather", "Look up today's weather in a city.", city=CITY),
    _tool("add", "Add two whole numbers.", a=NUMBER, b=NUMBER),
    _tool("set_timer", "Set a kitchen timer.", minutes=NUMBER),
]
DAY: Json = {"enum": ["today", "tomorrow"]}
TIME: Json = {"type": "string", "pattern": "^[0-2][0-9]:[0-5][0-9]$", "description": "As HH:MM, of 24 hours."}
CURRENCY: Json = {"enum": ["EUR", "USD", "GBP"]}
HARD_TOOLS = [
    _tool("get_weather", "Look up the weather in a city.", city=CITY, day=DAY),
    _tool("get_time", "Look up the time of day in a city.", city=CITY),
    _tool("add", "Add two whole numbers.", a=NUMBER, b=NUMBER),
    _tool("subtract", "Subtract b from a.", a=NUMBER, b=NUMBER),
    _tool("set_timer", "Set a timer that rings after a number of minutes.", minutes=NUMBER),
    _tool("set_alarm", "Set an alarm for a time of day.", time=TIME),
    _tool("convert_money", "Convert an amount of money.", amount=NUMBER, source=CURRENCY, target=CURRENCY),
    _tool("book_table", "Book a table at the restaurant.", people=NUMBER, day=DAY, time=TIME),
]


@dataclass(frozen=True)
class Task:
    """A task. schema: of the object that answers it; None = a call of a tool does.

    expected: the object; of a call, its name and its arguments.
    hard: whether the task is one of the harder ones, with their tools.
    """

    prompt: str
    expected: Json
    schema: Json | None = None
    hard: bool = False

    @property
    def kind(self) -> Literal["tools", "schema"]:
        return "tools" if self.schema is None else "schema"

    def body(self, tool_choice: str = "required") -> Json:
        """Return the fields of the request. tool_choice: whether a call is `required`, or up to the model (`auto`)."""
        fields: Json = {"messages": [{"role": "user", "content": self.prompt}]}
        if self.schema is None:
            return fields | {"tools": HARD_TOOLS if self.hard else TOOLS, "tool_choice": tool_choice}
        form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": self.schema}}
        return fields | {"response_format": form}

    def answer(self, message: Json) -> Any:
        """Return the answer that a reply gives; None if it gives none that can be read."""
        with suppress(ValueError, KeyError, IndexError, TypeError):
            if self.schema is None:
                (call,) = message["tool_calls"]
                return {"name": call["function"]["name"], "arguments": json.loads(call["function"]["arguments"])}
            return json.loads(message["content"])
        return None


def _call(prompt: str, name: str, *, hard: bool = False, **arguments: Any) -> Task:
    return Task(prompt, {"name": name, "arguments": arguments}, hard=hard)


def _hard_call(prompt: str, name: str, **arguments: Any) -> Task:
    return _call(prompt, name, hard=True, **arguments)


def _form(prompt: str, properties: Json, *, hard: bool = False, **expected: Any) -> Task:
    return Task(prompt, expected, _object(properties), hard)


def _hard_form(text: str, properties: Json, **expected: Any) -> Task:
    return _form(f"Extract as JSON: {text}", properties, hard=True, **expected)


CITIES = ("Oslo", "Rome", "Lima", "Cairo", "Berlin", "Tokyo", "Paris", "Madrid", "Dublin")
SUMS = ((17, 25), (3, 4), (120, 7), (45, 45), (8, 91), (1000, 24), (6, 13), (250, 250))
TIMERS = (5, 12, 25, 40, 90, 3, 8, 60)
PEOPLE = (
    ("Anna", 31, "Oslo"), ("Ben", 45, "Rome"), ("Clara", 27, "Lima"), ("David", 62, "Cairo"), ("Emma", 19, "Berlin"),
    ("Felix", 38, "Tokyo"), ("Greta", 54, "Paris"), ("Hugo", 23, "Madrid"), ("Ida", 70, "Dublin"),
)  # fmt: skip
MOODS = (
    ("I love this phone, it is wonderful!", "positive"), ("The soup was cold and awful.", "negative"),
    ("What a great concert, we had so much fun.", "positive"), ("The worst hotel I have ever seen.", "negative"),
    ("This book is excellent.", "positive"), ("I hate waiting, the service is terrible.", "negative"),
    ("The garden is beautiful, the food delicious.", "positive"), ("It broke after one day. I am angry.", "negative"),
)  # fmt: skip
ORDERS = (
    ("three apples", "apple", 3), ("five books", "book", 5), ("one lamp", "lamp", 1), ("twelve eggs", "egg", 12),
    ("two chairs", "chair", 2), ("seven pens", "pen", 7), ("four cups", "cup", 4), ("ten bags", "bag", 10),
)  # fmt: skip

PERSON = {"name": {"type": "string", "maxLength": 20}, "age": NUMBER, "city": {"type": "string", "maxLength": 20}}
MOOD = {"sentiment": {"enum": ["positive", "negative"]}}
ORDER = {"item": {"enum": [item for _, item, _ in ORDERS]}, "quantity": NUMBER}
TASKS = (
    *(_call(f"What is the weather in {city} today?", "get_weather", city=city) for city in CITIES),
    *(_call(f"What is {a} plus {b}? Use a tool.", "add", a=a, b=b) for a, b in SUMS),
    *(_call(f"Please set a timer for {minutes} minutes.", "set_timer", minutes=minutes) for minutes in TIMERS),
    *(
        _form(
            f"{name} is {age} years old and lives in {city}. Extract the person as JSON.",
            PERSON, name=name, age=age, city=city,
        )
        for name, age, city in PEOPLE
    ),
    *(_form(f"Classify the sentiment of this review as JSON: {text}", MOOD, sentiment=mood) for text, mood in MOODS),
    *(
        _form(f"Write this order as JSON with item and quantity: I want {words}.", ORDER, item=item, quantity=count)
        for words, item, count in ORDERS
    ),
)  # fmt: skip

GOODS: Json = {"enum": ["apple", "banana", "egg", "lamp", "pear"]}
PARTS = {"type": "array", "items": _object({"item": GOODS, "quantity": NUMBER}), "maxItems": 4}
DATE: Json = {"type": "string", "format": "date"}
HARD_TASKS = (
    _hard_call("Wake me tomorrow at a quarter past seven in the morning.", "set_alarm", time="07:15"),
    _hard_call("I need an alarm for half past nine in the evening.", "set_alarm", time="21:30"),
    _hard_call("The cake must leave the oven in an hour and a half. Let it ring then.", "set_timer", minutes=90),
    _hard_call("Ring in two hours.", "set_timer", minutes=120),
    _hard_call("I had 40 eggs and took 12 away. How many are left?", "subtract", a=40, b=12),
    _hard_call("What is 300 minus 45?", "subtract", a=300, b=45),
    _hard_call("There are 18 girls and 14 boys in the class. How many children are that?", "add", a=18, b=14),
    _hard_call("Do I need an umbrella in Lima tomorrow?", "get_weather", city="Lima", day="tomorrow"),
    _hard_call("How late is it in Tokyo now?", "get_time", city="Tokyo"),
    _hard_call("How many dollars are 50 euros?", "convert_money", amount=50, source="EUR", target="USD"),
    _hard_call("I have 20 pounds and want euros.", "convert_money", amount=20, source="GBP", target="EUR"),
    _hard_call("A table for my wife and me, tonight at eight.", "book_table", people=2, day="today", time="20:00"),
    _hard_form(
        "I want two apples and three pears, but no bananas.",
        {"order": PARTS}, order=[{"item": "apple", "quantity": 2}, {"item": "pear", "quantity": 3}],
    ),
    _hard_form(
        "Send one lamp and a dozen eggs.",
        {"order": PARTS}, order=[{"item": "lamp", "quantity": 1}, {"item": "egg", "quantity": 12}],
    ),
    _hard_form("The meeting of 5 March 2024 is moved to 7 March 2024.", {"new_date": DATE}, new_date="2024-03-07"),
    _hard_form("Born on the first of May 1990 in Rome.", {"born": DATE}, born="1990-05-01"),
    _hard_form("The train leaves at twenty to six in the evening.", {"departure": TIME}, departure="17:40"),
    _hard_form("We open at nine in the morning and close at half past six.", {"closes": TIME}, closes="18:30"),
    _hard_form("Four pens at 3 euros each.", {"quantity": NUMBER, "total_euros": NUMBER}, quantity=4, total_euros=12),
    _hard_form("Ben is three years older than Ida, who is 20.", {"age_of_ben": NUMBER}, age_of_ben=23),
    _hard_form("Anna, not Clara, paid the bill of 45 euros.", {"payer": {"enum": ["Anna", "Clara"]}}, payer="Anna"),
    _hard_form("I do not mind the rain, I love it.", {"likes_rain": {"type": "boolean"}}, likes_rain=True),
    _hard_form(
        "Felix (38) and Greta (54) live in Paris.",
        {"ages": {"type": "array", "items": NUMBER, "maxItems": 4}, "city": {"type": "string", "maxLength": 20}},
        ages=[38, 54], city="Paris",
    ),
    _hard_form(
        "Call me on 555-0142 after six, not on 555-0199.",
        {"phone": {"type": "string", "pattern": "^555-[0-9]{4}$"}}, phone="555-0142",
    ),
)  # fmt: skip
