"""Tools in chats: OpenAI's client calls them, and what a session learns of calls, results and schemas."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import jsonschema
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from model.base.config import tiny_config
from tests.conftest import Server
from tests.live import Client, Json, assert_success, chunks
from tests.tiny import TEXT, build_tiny_base


def tool(name: str, **properties: Json) -> Json:
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": TEXT[:40], "parameters": schema}}


MOOD = tool("mood", mood={"enum": ["glad", "sad"]}, lives={"type": "integer", "minimum": 1, "maximum": 9})
SLEEP = tool("sleep", hours={"enum": [1, 2, 3]})
TOOLS = [MOOD, SLEEP]
SCHEMAS = {each["function"]["name"]: each["function"]["parameters"] for each in TOOLS}
USER = {"role": "user", "content": "What does the fox say?"}
ONE_CALL: Json = {"tool_choice": "required", "parallel_tool_calls": False}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield a server of a tiny base with room for tools in its context."""
    folder = tmp_path_factory.mktemp("tools")
    running = Server(str(build_tiny_base(folder / "tiny", tiny_config(max_context=2048))), folder / "data").start()
    yield running
    assert running.stop() == 0, running.log.read_text()


@pytest.fixture(scope="module")
def sdk(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def api(server: Server) -> Iterator[Client]:
    with Client(server.url, server.model) as client:
        yield client


def chat(api: Client, messages: Sequence[Any], **fields: Any) -> Json:
    body = {"model": api.model, "messages": messages, "max_tokens": 200, "temperature": 0, "tools": TOOLS}
    return assert_success(api.post("chat/completions", body | fields))


def calls_of(reply: Json, choice: int = 0) -> list[Json]:
    """Return the calls of a reply, each of which is checked against its tool's schema."""
    calls: list[Json] = reply["choices"][choice]["message"]["tool_calls"]
    for call in calls:
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS[call["function"]["name"]])
    return calls


def result(call: Json, content: str = "The dog sleeps.") -> Json:
    return {"role": "tool", "tool_call_id": call["id"], "content": content}


# What clients get.


def test_a_required_call_is_valid_in_each_choice_of_openais_shape(api: Client) -> None:
    reply = chat(api, [USER], **ONE_CALL, n=3, temperature=2, seed=1)
    ChatCompletion.model_validate(reply)
    ids = [call["id"] for choice in range(3) for call in calls_of(reply, choice)]
    assert len(set(ids)) == 3 and all(id.startswith("call_") for id in ids)
    for choice in reply["choices"]:
        assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    assert reply["usage"]["completion_tokens"] > 3 * len('{"mood":"sad"}') / 10


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "function", "function": {"name": "sleep"}},
        {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "sleep"}}]},
        },
    ],
    ids=lambda choice: str(choice["type"]),
)
def test_a_named_tool_is_called(api: Client, choice: Json) -> None:
    for seed in range(3):
        reply = chat(api, [USER], tool_choice=choice, parallel_tool_calls=False, temperature=2, seed=seed)
        assert [call["function"]["name"] for call in calls_of(reply)] == ["sleep"]


def test_a_stream_has_the_calls_of_the_whole_reply(api: Client) -> None:
    fields: Json = ONE_CALL | {"n": 2, "temperature": 2, "seed": 5}
    whole = chat(api, [USER], **fields)
    body = {"model": api.model, "messages": [USER], "max_tokens": 200, "tools": TOOLS, "stream": True} | fields
    with api.http.stream("POST", "/v1/chat/completions", json=body) as response:
        events = list(chunks(response))
    found: list[Json] = [{}, {}]
    for event in events:
        ChatCompletionChunk.model_validate(event)
        (choice,) = event["choices"]
        for call in choice["delta"].get("tool_calls", ()):
            assert call["index"] == 0
            first = found[choice["index"]].setdefault("function", call["function"]) is call["function"]
            assert ("id" in call) == ("name" in call["function"]) == first
            if not first:
                found[choice["index"]]["function"]["arguments"] += call["function"]["arguments"]
    assert [each["function"] for each in found] == [calls_of(whole, n)[0]["function"] for n in range(2)]
    assert len(events) > 10, "the arguments come in pieces"
    assert [event["choices"][0]["finish_reason"] for event in events[-2:]] == ["tool_calls"] * 2


def test_a_reply_may_be_text_and_tools_that_may_not_be_called_are_not_in_the_prompt(api: Client) -> None:
    without = chat(api, [USER], tools=None)
    none = chat(api, [USER], tool_choice="none")
    assert none["choices"] == without["choices"] and none["usage"] == without["usage"]
    auto = chat(api, [USER], max_tokens=8)
    assert auto["usage"]["prompt_tokens"] > without["usage"]["prompt_tokens"]
    assert auto["choices"][0]["message"]["content"] and auto["choices"][0]["message"]["tool_calls"] is None
    assert auto["choices"][0]["finish_reason"] in ("length", "stop")


def test_a_call_that_is_cut_off_ends_by_length(api: Client) -> None:
    (choice,) = chat(api, [USER], **ONE_CALL, max_tokens=45)["choices"]
    assert choice["finish_reason"] == "length"
    arguments = choice["message"]["tool_calls"][0]["function"]["arguments"]
    with pytest.raises(ValueError):
        json.loads(arguments)


def test_beside_a_response_format_a_reply_is_calls_or_follows_it(api: Client) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [{"a": 1}, {"a": 2}]}}}
    for seed in range(4):
        (choice,) = chat(api, [USER], response_format=form, temperature=2, seed=seed)["choices"]
        if choice["message"]["content"] is not None:
            assert json.loads(choice["message"]["content"]) in ({"a": 1}, {"a": 2})
        else:
            assert choice["message"]["tool_calls"]


def test_the_package_runs_a_loop_and_parses_arguments_into_its_own_types(sdk: openai.OpenAI, server: Server) -> None:
    class Nap(BaseModel):
        hours: bool

    fields: Any = {"model": server.model, "tools": [openai.pydantic_function_tool(Nap)], "temperature": 0}
    called = fields | ONE_CALL | {"messages": [USER], "max_tokens": 100}
    message = sdk.chat.completions.parse(**called).choices[0].message
    (call,) = message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Nap)
    with sdk.chat.completions.stream(**called) as stream:
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert streamed.function.parsed_arguments == call.function.parsed_arguments
    messages: Any = [USER, message, {"role": "tool", "tool_call_id": call.id, "content": "2"}]
    answered = sdk.chat.completions.create(messages=messages, max_tokens=8, **fields)
    assert answered.choices[0].message.content


def test_the_prompt_of_a_chat_with_tools_can_be_read_and_counted(api: Client) -> None:
    body = {"messages": [USER], "tools": TOOLS}
    prompt = assert_success(api.http.post("/apply-template", json=body))["prompt"]
    assert all(json.dumps(each["function"]["parameters"]) in prompt for each in TOOLS)
    count = assert_success(api.http.post("/tokenize", json=body))["count"]
    assert count == chat(api, [USER], max_tokens=1)["usage"]["prompt_tokens"]


# What a session learns.


def learned(reply: Json) -> int:
    return int(reply["adaptation"]["tokens_learned"])


def test_schemas_are_not_learned(api: Client) -> None:
    plain = chat(api, [USER], tools=None, session="plain")
    assert learned(plain) == learned(chat(api, [USER], **ONE_CALL, session="schemas")) > 0


@pytest.mark.parametrize("learn", ["prompt", "all"])
def test_a_resent_call_and_its_result_teach_nothing(api: Client, learn: str) -> None:
    """The client has parsed the arguments, and writes the call in its own way and under its own id."""
    session, greet = f"loop-{learn}", {"role": "user", "content": "And the dog?"}
    first = chat(api, [USER], **ONE_CALL, session=session, learn=learn)
    (call,) = calls_of(first)
    arguments = json.loads(call["function"]["arguments"])
    spelt = json.dumps(dict(reversed(arguments.items())), indent=1)
    again = {"id": "c1", "function": {"name": call["function"]["name"], "arguments": spelt}}
    history = [USER, {"role": "assistant", "content": None, "tool_calls": [again]}, result(again)]
    answered = chat(api, history, session=session)
    assert learned(answered) == 0
    answer = {"role": "assistant", "content": answered["choices"][0]["message"]["content"]}
    more = chat(api, [*history, answer, greet], session=session, max_tokens=1)
    assert learned(more) == learned(chat(api, [greet], session=f"only-{learn}", max_tokens=1)) > 0


def test_results_are_learned_by_choice_and_then_once(api: Client) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "sleep", "arguments": '{"hours": 2}'}}
    history = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, result(call)]
    counts = [
        learned(chat(api, history, session="results", max_tokens=1, **fields))
        for fields in ({}, {}, {"learn_tool_results": True}, {"learn_tool_results": True})
    ]
    tokens = assert_success(api.http.post("/tokenize", json={"content": "The dog sleeps."}))["count"]
    assert counts[0] > tokens and counts[1:] == [0, tokens, 0]
    observed = [
        assert_success(api.post("sessions/observed/observe", {"messages": history} | fields))["tokens_learned"]
        for fields in ({}, {"learn_tool_results": True}, {"learn_tool_results": True})
    ]
    assert observed == [counts[0], tokens, 0]


def test_forced_tokens_of_a_call_are_no_evidence(api: Client) -> None:
    reply = chat(api, [USER], **ONE_CALL, session="forced", learn="completion")
    assert 0 < learned(reply) < reply["usage"]["completion_tokens"] / 2


def test_a_retry_gets_the_calls_of_the_first_answer(api: Client) -> None:
    body = {"model": api.model, "messages": [USER], "tools": TOOLS, "session": "retry", "max_tokens": 200} | ONE_CALL
    first, again = (assert_success(api.post("chat/completions", body, **{"Idempotency-Key": "k1"})) for _ in range(2))
    assert calls_of(first) == calls_of(again) and first["id"] == again["id"]
