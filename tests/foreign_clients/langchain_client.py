"""LangChain: tools, structured output by each of its methods, agents, Responses and embeddings."""

# /// script
# dependencies = ["langchain", "langchain-openai", "langchain-ollama"]
# ///

from typing import Any, Literal

from langchain.agents import create_agent
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import StructuredTool
from langchain_ollama import ChatOllama, OllamaEmbeddings
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel


class City(BaseModel):
    """A city."""

    name: Literal["Oslo", "Rome"]
    hills: bool


def weather(city: Literal["Oslo", "Rome"]) -> str:
    """Look up the weather of a city."""
    return f"It rains in {city}."


def _chat(url: str, model: str, **fields: Any) -> Any:
    return ChatOpenAI(**{"base_url": f"{url}/v1", "api_key": "none", "model": model, "max_tokens": 96} | fields)


def check_a_chat_and_a_stream(url: str, model: str) -> None:
    chat = _chat(url, model)
    assert chat.invoke("Say hello.").content
    assert "".join(chunk.content for chunk in chat.stream("Say hello."))


def check_bind_tools_and_a_round(url: str, model: str) -> None:
    tool = StructuredTool.from_function(weather)
    ask = HumanMessage("What is the weather in Rome?")
    reply = _chat(url, model).bind_tools([tool], tool_choice="any").invoke([ask])
    assert reply.tool_calls and reply.tool_calls[0]["name"] == "weather"
    results = [ToolMessage(tool.invoke(call["args"]), tool_call_id=call["id"]) for call in reply.tool_calls]
    assert _chat(url, model).invoke([ask, reply, *results]).content


def check_streamed_calls(url: str, model: str) -> None:
    bound = _chat(url, model).bind_tools([StructuredTool.from_function(weather)], tool_choice="weather")
    whole = None
    for chunk in bound.stream("What is the weather in Rome?"):
        whole = chunk if whole is None else whole + chunk
    assert whole is not None and whole.tool_calls[0]["args"]["city"] in ("Oslo", "Rome")


def check_with_structured_output_by_json_schema(url: str, model: str) -> None:
    assert isinstance(_chat(url, model).with_structured_output(City).invoke("Name a city."), City)


def check_with_structured_output_by_function_calling(url: str, model: str) -> None:
    chat = _chat(url, model).with_structured_output(City, method="function_calling")
    assert isinstance(chat.invoke("Name a city."), City)


def check_with_structured_output_by_json_mode(url: str, model: str) -> None:
    chat = _chat(url, model, max_tokens=512).with_structured_output(None, method="json_mode")
    assert isinstance(chat.invoke("Write a JSON object with a city's name."), dict)


def check_an_agent_runs_to_its_end(url: str, model: str) -> None:
    agent = create_agent(_chat(url, model), tools=[weather], response_format=City)
    state = agent.invoke({"messages": [{"role": "user", "content": "Name a city."}]}, {"recursion_limit": 12})
    assert isinstance(state["structured_response"], City)


def check_responses(url: str, model: str) -> None:
    chat = _chat(url, model, use_responses_api=True)
    first = chat.invoke("Say hello.")
    assert first.text and first.response_metadata["id"].startswith("resp_")
    assert chat.invoke("Again.", previous_response_id=first.response_metadata["id"]).text
    assert isinstance(chat.with_structured_output(City).invoke("Name a city."), City)


def check_completions_and_embeddings(url: str, model: str) -> None:
    fields: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": "none", "model": model}
    assert OpenAI(max_tokens=8, **fields).invoke("My cat")
    assert len(OpenAIEmbeddings(check_embedding_ctx_length=False, **fields).embed_documents(["My cat.", "A"])) == 2


def check_ollamas_package(url: str, model: str) -> None:
    chat = ChatOllama(base_url=url, model=model, num_predict=64)
    assert chat.invoke("Say hello.").content
    assert isinstance(chat.with_structured_output(City).invoke("Name a city."), City)
    assert len(OllamaEmbeddings(base_url=url, model=model).embed_documents(["My cat.", "A dog."])) == 2
