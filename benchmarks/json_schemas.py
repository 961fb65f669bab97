"""Structured output and tool calls of a running server, judged: `python -m benchmarks.json_schemas --url URL`.

Default: JSON by 200 schemas, each for 3 prompts; every text that ends must be valid. With `--tasks`: 50 small tasks and
24 harder ones with one right answer each, half of them calls of tools and half of them objects by a schema; any server
of OpenAI's chats can be judged by them, such as llama.cpp's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import httpx
from jsonschema import Draft202012Validator

from benchmarks.stream_timing import first_model_id
from benchmarks.tool_tasks import HARD_TASKS, TASKS, Task

NUM_SCHEMAS = 200
PROMPTS = ("Describe a dog.", "Fill in the form for an order of two books.", "Write something about the weather.")
MAX_TOKENS = 1024
TASK_TOKENS = 96
DEPTH = 2
CONCURRENCY = 16
WORDS = ("name", "age", "city", "price", "tags", "items", "owner", "note", "date", "size", "kind", "is_new")
PATTERNS = ("^[A-Z]{2}[0-9]{4}$", "^[a-z]{1,12}$", "^(yes|no)$", "^[0-9]{5}(-[0-9]{4})?$")
FORMATS = ("date", "time", "date-time", "email", "uuid", "ipv4")

Json = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a request: the answer, and "" or the fault; whether the limit of tokens cut the answer off."""

    answer: str
    fault: str
    cut: bool = False


def schemas(count: int = NUM_SCHEMAS) -> list[Json]:
    """Return different schemas of the kinds that programs write, drawn with a fixed seed."""
    rng = random.Random("schemas")
    found: dict[str, Json] = {}
    while len(found) < count:
        schema = _object(rng, DEPTH)
        found[json.dumps(schema, sort_keys=True)] = schema
    return list(found.values())


def _object(rng: random.Random, depth: int) -> Json:
    names = rng.sample(WORDS, rng.randint(1, 4))
    required = names if rng.random() < 0.7 else names[: rng.randint(0, len(names))]
    schema: Json = {"type": "object", "properties": {name: _value(rng, depth) for name in names}, "required": required}
    if rng.random() < 0.7:
        schema["additionalProperties"] = False
    else:  # free fields would let a small model write on and on
        schema["additionalProperties"] = {"type": "boolean"}
        schema |= {"required": names, "maxProperties": len(names) + 1}
    if rng.random() < 0.2:
        schema["$defs"] = {"part": _leaf(rng)}
        schema["properties"][rng.choice(names)] = {"$ref": "#/$defs/part"}
    return schema


def _value(rng: random.Random, depth: int) -> Json:
    if depth and rng.random() < 0.2:
        inner = _object(rng, depth - 1)
        inner.pop("$defs", None)
        inner["properties"] = {
            name: each if "$ref" not in each else {"type": "null"} for name, each in inner["properties"].items()
        }
        return inner
    if depth and rng.random() < 0.2:
        return {"type": "array", "items": _value(rng, depth - 1), "minItems": rng.randint(0, 2), "maxItems": 3}
    if rng.random() < 0.1:
        return {"anyOf": [_leaf(rng), {"type": "null"}]}
    return _leaf(rng)


def _leaf(rng: random.Random) -> Json:
    low = rng.randint(-50, 50)
    return rng.choice(
        [
            {"type": "string", "maxLength": rng.randint(5, 40)},
            {"type": "string", "minLength": 3, "maxLength": 12},
            {"type": "string", "pattern": rng.choice(PATTERNS)},
            {"type": "string", "format": rng.choice(FORMATS)} | {"maxLength": 40},
            {"type": "integer", "minimum": low, "maximum": low + rng.randint(1, 500)},
            {"type": "number", "minimum": low, "exclusiveMaximum": low + 10},
            {"type": "boolean"},
            {"enum": rng.sample(["red", "green", 7, None, "blue sky", True], 3)},
            {"const": rng.choice(["v1", 3, "fixed text"])},
            {"type": ["integer", "null"], "minimum": 0, "maximum": 99},
        ]
    )


class ServerChats:
    """The chats of one server."""

    def __init__(self, http: httpx.AsyncClient, model: str) -> None:
        self._http, self._model = http, model
        self._limit = asyncio.Semaphore(CONCURRENCY)

    async def json_of(self, schema: Json, prompt: str, seed: int) -> Outcome:
        """Ask for JSON that follows a schema, and check the answer."""
        form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
        messages = [{"role": "user", "content": prompt}]
        reply = await self._ask(messages=messages, response_format=form, seed=seed, max_tokens=MAX_TOKENS)
        if "error" in reply:
            return Outcome("", f"refused: {reply['error']['message']}")
        choice = reply["choices"][0]
        text, cut = choice["message"]["content"], choice["finish_reason"] == "length"
        try:
            faults = [error.message for error in Draft202012Validator(schema).iter_errors(json.loads(text))]
        except ValueError as error:
            faults = [str(error)]
        return Outcome(text, faults[0] if faults else "", cut)

    async def task(self, task: Task, tool_choice: str) -> Outcome:
        """Give a task, and check the answer."""
        reply = await self._ask(**task.body(tool_choice), temperature=0, max_tokens=TASK_TOKENS)
        if "error" in reply:
            return Outcome("", f"refused: {reply['error']['message']}")
        message = reply["choices"][0]["message"]
        answer = task.answer(message)
        return Outcome(json.dumps(message), "" if answer == task.expected else f"not {task.expected!r}: {answer!r}")

    async def _ask(self, **fields: Any) -> Json:
        async with self._limit:
            reply = await self._http.post("/v1/chat/completions", json={"model": self._model} | fields)
        answer: Json = reply.json()
        return answer


async def check_schemas(chats: ServerChats, cases: Sequence[Json]) -> list[tuple[Json, Outcome]]:
    """Return the outcome of each schema for each prompt."""
    asked = [(schema, prompt) for schema in cases for prompt in PROMPTS]
    outcomes = await asyncio.gather(*(chats.json_of(schema, prompt, i) for i, (schema, prompt) in enumerate(asked)))
    return [(schema, outcome) for (schema, _), outcome in zip(asked, outcomes, strict=True)]


def is_closed(schema: Any) -> bool:
    """Return whether no object of a schema may have names that the schema lacks, as OpenAI's strict form requires."""
    inner = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    open_here = isinstance(schema, dict) and isinstance(schema.get("additionalProperties"), dict)
    return not open_here and all(map(is_closed, inner))


def verdict(kind: str, outcomes: Sequence[Outcome]) -> str:
    """Return how many texts by schemas of a kind ended, and how many of those are valid."""
    ended = [outcome for outcome in outcomes if not outcome.cut]
    valid = sum(not outcome.fault for outcome in ended)
    return (
        f"schemas {kind}: {valid} of {len(ended)} texts that ended are valid;"
        f" {len(outcomes) - len(ended)} of {len(outcomes)} were cut off after {MAX_TOKENS} tokens"
    )


async def print_tasks(chats: ServerChats, read: bool) -> None:
    """Print how many tasks get the right answer: calls that are required, calls that the model may make, objects."""
    runs = (("tools", "required"), ("tools", "auto"), ("schema", ""))
    for (name, found), (kind, choice) in product((("", TASKS), ("hard ", HARD_TASKS)), runs):
        tasks = [task for task in found if task.kind == kind]
        outcomes = await asyncio.gather(*(chats.task(task, choice) for task in tasks))
        right = sum(not each.fault for each in outcomes)
        print(f"{name}{kind}{choice and f', {choice}'}: {right} of {len(tasks)} right", flush=True)
        for task, outcome in zip(tasks, outcomes, strict=True):
            if outcome.fault or read:
                print(f"- {task.prompt} {outcome.fault or 'ok'}")


async def measure(url: str, *, tasks: bool, count: int, read: bool) -> None:
    """Print the rates, and what failed."""
    model = await first_model_id("the server", url)
    print(model)
    async with httpx.AsyncClient(base_url=url, timeout=None) as http:
        chats = ServerChats(http, model)
        if tasks:
            await print_tasks(chats, read)
            return
        found = await check_schemas(chats, schemas(count))
        print(verdict("with closed objects", [outcome for schema, outcome in found if is_closed(schema)]))
        print(verdict("with free names", [outcome for schema, outcome in found if not is_closed(schema)]))
        for schema, outcome in found:
            if outcome.fault or read:
                print(f"- {json.dumps(schema)}\n  {outcome.answer[:400]!r} {outcome.fault[:200] or 'ok'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="Address of the server.")
    parser.add_argument("--tasks", action="store_true", help="Judge the tasks instead of the schemas.")
    parser.add_argument("--count", type=int, default=NUM_SCHEMAS, help="Number of schemas.")
    parser.add_argument("--read", action="store_true", help="Print all answers, not only those that failed.")
    args = parser.parse_args()
    asyncio.run(measure(args.url, tasks=args.tasks, count=args.count, read=args.read))


if __name__ == "__main__":
    main()
