"""instructor: a response model by tools, by a JSON Schema and by JSON mode; lists and streams of partial models."""

# /// script
# dependencies = ["instructor"]
# ///

from typing import Any, Literal

import instructor
import openai
from pydantic import BaseModel


class City(BaseModel):
    """A city."""

    name: Literal["Oslo", "Rome"]
    hills: bool


def _client(url: str, mode: Any) -> Any:
    return instructor.from_openai(openai.OpenAI(base_url=f"{url}/v1", api_key="none"), mode=mode)


def _ask(url: str, model: str, mode: Any, response_model: Any = City, **fields: Any) -> Any:
    return _client(url, mode).chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Name a city."}],
        response_model=response_model,
        max_tokens=256,
        **fields,
    )


def check_tools(url: str, model: str) -> None:
    assert isinstance(_ask(url, model, instructor.Mode.TOOLS), City)


def check_json_schema(url: str, model: str) -> None:
    assert isinstance(_ask(url, model, instructor.Mode.JSON_SCHEMA), City)


def check_strict_tools(url: str, model: str) -> None:
    assert isinstance(_ask(url, model, instructor.Mode.TOOLS_STRICT), City)


def check_a_stream_of_a_partial_model(url: str, model: str) -> None:
    parts = list(_ask(url, model, instructor.Mode.TOOLS, instructor.Partial[City], stream=True))
    assert parts[-1].name in ("Oslo", "Rome")


def check_responses_with_tools(url: str, model: str) -> None:
    client = _client(url, instructor.Mode.RESPONSES_TOOLS)
    city = client.responses.create(model=model, input="Name a city.", response_model=City, max_output_tokens=256)
    assert isinstance(city, City)
