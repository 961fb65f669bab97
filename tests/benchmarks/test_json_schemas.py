"""The schemas and the tasks that servers are judged by."""

import asyncio
import json
from typing import Any

import httpx
from jsonschema import Draft202012Validator

from benchmarks.json_schemas import NUM_SCHEMAS, PROMPTS, ServerChats, check_schemas, schemas, verdict
from benchmarks.tool_tasks import HARD_TASKS, HARD_TOOLS, TASKS, TOOLS
from tests.conftest import Server


def test_the_schemas_are_valid_and_all_different() -> None:
    drawn = schemas()
    for schema in drawn:
        Draft202012Validator.check_schema(schema)
    assert len({json.dumps(schema, sort_keys=True) for schema in drawn}) == NUM_SCHEMAS == 200


def test_a_text_that_is_whole_follows_its_schema(server: Server) -> None:
    async def judged() -> Any:
        async with httpx.AsyncClient(base_url=server.url, timeout=None) as http:
            return await check_schemas(ServerChats(http, server.model), schemas(6))

    found = asyncio.run(judged())
    assert len(found) == 6 * len(PROMPTS)
    assert any(not outcome.cut for _, outcome in found)
    whole = [outcome for _, outcome in found if not outcome.cut]
    assert verdict("of all kinds", whole).startswith(f"schemas of all kinds: {len(whole)} of {len(whole)} texts")
    assert not any(outcome.fault.startswith("refused") for _, outcome in found)


def test_each_task_has_an_answer_that_its_form_allows() -> None:
    parameters = [
        {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools} for tools in (TOOLS, HARD_TOOLS)
    ]
    tasks = [*TASKS, *HARD_TASKS]
    assert len(tasks) == len({task.prompt for task in tasks}) == 50 + 24
    for task in tasks:
        if task.schema is not None:
            Draft202012Validator(task.schema).validate(task.expected)
            message = {"content": json.dumps(task.expected)}
        else:
            Draft202012Validator(parameters[task.hard][task.expected["name"]]).validate(task.expected["arguments"])
            called = task.expected | {"arguments": json.dumps(task.expected["arguments"])}
            message = {"content": None, "tool_calls": [{"function": called}]}  # type: ignore[dict-item]
        assert task.answer(message) == task.expected
        others: list[Any] = [{"content": "no"}, {"content": None, "tool_calls": []}, {"content": None}]
        assert [task.answer(other) for other in others] == [None] * 3
