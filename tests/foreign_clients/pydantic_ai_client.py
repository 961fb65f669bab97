"""pydantic-ai: output types by each of its modes, tools, streams; by chat completions and by Responses."""

# /// script
# dependencies = ["pydantic-ai-slim[openai]"]
# ///

import asyncio
from typing import Any, Literal

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.exceptions import UsageLimitExceeded
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings
from pydantic_ai.usage import UsageLimits

REQUIRED = ModelSettings(max_tokens=96, extra_body={"tool_choice": "required"})


class City(BaseModel):
    """A city."""

    name: Literal["Oslo", "Rome"]
    hills: bool


def _agent(url: str, model: str, kind: Any = OpenAIChatModel, **fields: Any) -> Any:
    provider = OpenAIProvider(base_url=f"{url}/v1", api_key="none")
    return Agent(kind(model, provider=provider), model_settings=ModelSettings(max_tokens=96), **fields)


def check_a_text(url: str, model: str) -> None:
    assert _agent(url, model).run_sync("Say hello.").output


def check_an_output_type_as_a_tool(url: str, model: str) -> None:
    assert isinstance(_agent(url, model, output_type=ToolOutput(City)).run_sync("Name a city.").output, City)


def check_an_output_type_as_a_schema(url: str, model: str) -> None:
    assert isinstance(_agent(url, model, output_type=NativeOutput(City)).run_sync("Name a city.").output, City)


def check_an_output_type_in_the_prompt(url: str, model: str) -> None:
    agent = _agent(url, model, output_type=PromptedOutput(City), retries=3)
    try:
        assert isinstance(agent.run_sync("Name a city.").output, City)
    except Exception as error:  # JSON mode forces an object, not this one's fields: a small base may miss them
        assert "retries" in str(error), error


def check_a_tool_is_called_and_its_result_is_used(url: str, model: str) -> None:
    called = []

    def weather(city: Literal["Oslo", "Rome"]) -> str:
        """Look up the weather of a city."""
        called.append(city)
        return "It rains."

    agent = _agent(url, model, tools=[weather])
    try:  # a base that must call in each turn never ends by itself
        agent.run_sync(
            "What is the weather in Rome?", model_settings=REQUIRED, usage_limits=UsageLimits(request_limit=2)
        )
    except UsageLimitExceeded:
        assert len(called) >= 2 and {*called} <= {"Oslo", "Rome"}
        return
    raise AssertionError("no call was required")


def check_a_stream_of_text_and_of_an_output(url: str, model: str) -> None:
    async def run() -> None:
        async with _agent(url, model).run_stream("Say hello.") as result:
            assert [text async for text in result.stream_text()]
        async with _agent(url, model, output_type=NativeOutput(City)).run_stream("Name a city.") as result:
            assert isinstance(await result.get_output(), City)

    asyncio.run(run())


def check_a_second_turn_has_the_first_ones_messages(url: str, model: str) -> None:
    agent = _agent(url, model)
    first = agent.run_sync("Say hello.")
    assert agent.run_sync("Again.", message_history=first.all_messages()).output


def check_responses(url: str, model: str) -> None:
    assert _agent(url, model, OpenAIResponsesModel).run_sync("Say hello.").output
    for output in (NativeOutput(City), ToolOutput(City)):
        agent = _agent(url, model, OpenAIResponsesModel, output_type=output)
        assert isinstance(agent.run_sync("Name a city.").output, City)
