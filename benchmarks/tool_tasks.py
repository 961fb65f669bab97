"""Fifty small tasks with one right answer each: 25 calls of one of three tools, and 25 objects by a JSON Schema."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

Json = dict[str, Any]


def _tool(name: str, description: str, **properties: Json) -> Json:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


CITY: Json = {"type": "string", "description": "The name of a city."}
NUMBER: Json = {"type": "integer"}
TOOLS = [
    _tool("get_weather", "Look up today's weather in a city.", city=CITY),
    _tool("add", "Add two whole numbers.", a=NUMBER, b=NUMBER),
    _tool("set_timer", "Set a kitchen timer.", minutes=NUMBER),
]


@dataclass(frozen=True)
class Task:
    """A task. schema: of the object that answers it; None = a call of a tool does.

    expected: the object; of a call, its name and its arguments.
    """

    prompt: str
    expected: Json
    schema: Json | None = None

    @property
    def kind(self) -> Literal["tools", "schema"]:
        return "tools" if self.schema is None else "schema"

    def body(self, tool_choice: str = "required") -> Json:
        """Return the fields of the request. tool_choice: whether a call is `required`, or up to the model (`auto`)."""
        fields: Json = {"messages": [{"role": "user", "content": self.prompt}]}
        if self.schema is None:
            return fields | {"tools": TOOLS, "tool_choice": tool_choice}
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


def _call(prompt: str, name: str, **arguments: Any) -> Task:
    return Task(prompt, {"name": name, "arguments": arguments})


def _form(prompt: str, properties: Json, **expected: Any) -> Task:
    schema: Json = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return Task(prompt, expected, schema)


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
