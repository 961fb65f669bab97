"""litellm: chats by its providers `openai` and `hosted_vllm`, tools, schemas, Responses, and Anthropic's shape."""

# /// script
# dependencies = ["litellm"]
# ///

import asyncio
import json
import os
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would look for prices on the internet

import litellm
from pydantic import BaseModel

HELLO = [{"role": "user", "content": "Say hello."}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Look up the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


class City(BaseModel):
    name: str
    hills: bool


def _ask(url: str, model: str, provider: str = "openai", messages: list[Any] = HELLO, **fields: Any) -> Any:
    base = {"model": f"{provider}/{model}", "api_base": f"{url}/v1", "api_key": "none", "max_tokens": 64}
    return litellm.completion(**base | {"messages": messages} | fields)


def _round_of_a_tool(url: str, model: str, provider: str) -> None:
    ask = [{"role": "user", "content": "What is the weather in Rome?"}]
    # A small base that may go on with calls goes on to the limit.
    tools = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
    reply = _ask(url, model, provider, ask, **tools).choices[0]
    (call,) = reply.message.tool_calls[:1]
    assert reply.finish_reason == "tool_calls" and call.function.name == "weather", reply
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
    results = [{"role": "tool", "tool_call_id": each.id, "content": "It rains."} for each in reply.message.tool_calls]
    after = _ask(url, model, provider, [*ask, reply.message, *results], tools=[WEATHER], tool_choice="none")
    assert after.choices[0].message.content


def check_a_chat_and_a_stream_of_provider_openai(url: str, model: str) -> None:
    assert _ask(url, model).choices[0].message.content
    chunks = list(_ask(url, model, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert chunks[-1].usage.completion_tokens


def check_a_session_is_taught_by_a_field_of_the_body(url: str, model: str) -> None:
    reply = _ask(url, model, extra_body={"session": "litellm"})
    assert reply.model_extra["adaptation"]["tokens_learned"] > 0, reply


def check_a_round_of_a_tool_of_provider_openai(url: str, model: str) -> None:
    _round_of_a_tool(url, model, "openai")


def check_a_round_of_a_tool_of_provider_hosted_vllm(url: str, model: str) -> None:
    _round_of_a_tool(url, model, "hosted_vllm")


def check_a_streamed_call(url: str, model: str) -> None:
    chunks = list(_ask(url, model, tools=[WEATHER], tool_choice="required", stream=True))
    whole = litellm.stream_chunk_builder(chunks)
    (call,) = whole.choices[0].message.tool_calls[:1]
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")


def check_a_pydantic_model_of_both_providers(url: str, model: str) -> None:
    for provider in ("openai", "hosted_vllm"):
        reply = _ask(url, model, provider, response_format=City, max_tokens=256)
        City.model_validate_json(reply.choices[0].message.content)


def check_parameters_of_vllm(url: str, model: str) -> None:
    reply = _ask(url, model, "hosted_vllm", extra_body={"guided_choice": ["yes", "no"], "top_k": 5, "min_p": 0.1})
    assert reply.choices[0].message.content in ("yes", "no")


def check_responses(url: str, model: str) -> None:
    fields: dict[str, Any] = {"model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": "none"}
    reply = litellm.responses(input="Say hello.", max_output_tokens=16, **fields)
    assert reply.output[0].content[0].text
    events = list(litellm.responses(input="Say hello.", max_output_tokens=16, stream=True, **fields))
    assert events[-1].type in ("response.completed", "response.incomplete")


def check_embeddings(url: str, model: str) -> None:
    reply = litellm.embedding(
        model=f"openai/{model}", input=["My cat.", "My dog."], api_base=f"{url}/v1", api_key="none"
    )
    assert len(reply.data) == 2


def check_completions(url: str, model: str) -> None:
    reply = litellm.text_completion(
        model=f"text-completion-openai/{model}", prompt="My cat", max_tokens=8, api_base=f"{url}/v1", api_key="none"
    )
    assert reply.choices[0].text


def check_anthropics_shape_bridged_to_a_chat(url: str, model: str) -> None:
    fields: dict[str, Any] = {"model": f"hosted_vllm/{model}", "api_base": f"{url}/v1", "api_key": "none"}
    tool = {"name": "weather", "description": "Look up.", "input_schema": WEATHER["function"]["parameters"]}
    call = litellm.anthropic.messages.acreate(
        messages=HELLO, max_tokens=64, tools=[tool], tool_choice={"type": "any"}, **fields
    )
    reply = asyncio.run(call)
    assert any(block["type"] == "tool_use" for block in reply["content"]), reply


def check_anthropics_own_route(url: str, model: str) -> None:
    reply = _ask(url, model, "anthropic", api_base=url)
    assert reply.choices[0].message.content


def check_ollamas_own_route(url: str, model: str) -> None:
    for provider in ("ollama", "ollama_chat"):
        assert _ask(url, model, provider, api_base=url).choices[0].message.content
    vectors = litellm.embedding(model=f"ollama/{model}", input=["My cat."], api_base=url)
    assert len(vectors.data) == 1
