"""The unmodified `anthropic` client works, and gets the texts that OpenAI's routes give."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types import MessageParam
from jsonschema import validate

from service.errors import StoreUnavailable
from service.http.routes.anthropic import MessageReply
from service.tenants import new_key
from service.turns import prompts
from service.turns.sessions import Sessions
from tests.live import Client, Json, assert_success
from tests.service.in_process import InProcessServer

HELLO: list[MessageParam] = [{"role": "user", "content": "My cat is Miso."}]
SYSTEM = "Be brief."
AS_CHAT: list[Any] = [{"role": "system", "content": SYSTEM}, *HELLO]
SCHEMA: Json = {
    "type": "object",
    "properties": {"age": {"enum": [7, 12]}},
    "required": ["age"],
    "additionalProperties": False,
}
SLEEP: Any = {"name": "sleep", "input_schema": {"type": "object", "properties": {"hours": {"enum": [1, 2]}}}}
SLEEP["input_schema"] |= {"required": ["hours"], "additionalProperties": False}
USE: Json = {"type": "tool_use", "id": "toolu_1", "name": "sleep", "input": {"hours": 1}}
RESULT: Json = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "Done."}]}
EVENTS = ["message_start", "content_block_start", "content_block_delta", "content_block_stop"]
EVENTS += ["message_delta", "message_stop"]


@pytest.fixture
def peer(memory_server: InProcessServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=memory_server.url, api_key="none", max_retries=0) as peer:
        yield peer


@pytest.fixture
def send(peer: anthropic.Anthropic, client: Client) -> Any:
    """Return a function that calls `peer.messages.create` with the model and a short greedy chat.

    The newest client has no arguments for samplers.
    """

    def create(messages: Any = HELLO, **fields: Any) -> Any:
        body: Any = {"model": client.model, "max_tokens": 8, "system": SYSTEM} | fields
        body["extra_body"] = {"temperature": 0} | fields.get("extra_body", {})
        return peer.messages.create(messages=messages, **body)

    return create


def raw(messages: Any = HELLO, **fields: Any) -> Json:
    """Return the body of a request as JSON."""
    return {"model": "tiny", "max_tokens": 8, "messages": messages, "temperature": 0} | fields


def text_of(message: Any) -> str:
    (block,) = message.content
    assert block.type == "text"
    return str(block.text)


def test_a_message_is_the_reply_of_openais_route(send: Any, client: Client) -> None:
    message, whole = send(), client.chat(AS_CHAT)
    assert text_of(message) == whole["choices"][0]["message"]["content"]
    assert (message.type, message.role, message.model) == ("message", "assistant", client.model)
    assert message.stop_reason == {"length": "max_tokens", "stop": "end_turn"}[whole["choices"][0]["finish_reason"]]
    usage = message.usage
    assert (usage.input_tokens, usage.output_tokens) == (
        whole["usage"]["prompt_tokens"],
        whole["usage"]["completion_tokens"],
    )
    assert message.stop_sequence is None and message.id.startswith("msg_")


def test_blocks_of_text_are_the_text_that_they_join_to(send: Any) -> None:
    blocks = [{"type": "text", "text": "My cat "}, {"type": "text", "text": "is Miso.", "cache_control": {"type": "x"}}]
    system = [{"type": "text", "text": SYSTEM, "cache_control": {"type": "ephemeral"}}]
    assert text_of(send([{"role": "user", "content": blocks}], system=system)) == text_of(send())
    in_messages = send([{"role": "system", "content": SYSTEM}, *HELLO], system=anthropic.NOT_GIVEN)
    assert text_of(in_messages) == text_of(send())


def test_a_last_message_of_the_assistant_goes_on(send: Any, client: Client) -> None:
    begun: list[Any] = [*HELLO, {"role": "assistant", "content": "She is"}]
    fields: Json = {"continue_final_message": True, "add_generation_prompt": False}
    expected = client.chat([AS_CHAT[0], *begun], **fields)["choices"][0]["message"]["content"]
    assert text_of(send(begun)) == expected


def test_a_stream_adds_up_to_the_message(peer: anthropic.Anthropic, send: Any, client: Client) -> None:
    whole = send()
    with peer.messages.stream(
        model=client.model, max_tokens=8, system=SYSTEM, messages=HELLO, extra_body={"temperature": 0}
    ) as stream:
        texts = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert texts == text_of(final) == text_of(whole)
    assert final.usage == whole.usage and final.stop_reason == whole.stop_reason


def test_the_events_on_the_wire_are_anthropics_in_order(client: Client) -> None:
    answer = client.post("messages", raw(stream=True, session="anthropic-wire"))
    assert answer.headers["content-type"].startswith("text/event-stream") and answer.text.endswith("\n\n")
    lines = [event.split("\n") for event in answer.text.removesuffix("\n\n").split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in lines]
    assert [name.removeprefix("event: ") for name, _ in lines] == [event["type"] for event in events]
    assert list(dict.fromkeys(event["type"] for event in events)) == EVENTS
    start, delta = events[0]["message"], events[-2]
    assert start["content"] == [] and start["stop_reason"] is None and start["usage"]["output_tokens"] == 0
    assert start["usage"]["input_tokens"] == delta["usage"]["input_tokens"] > 0
    assert delta["delta"]["stop_reason"] and delta["usage"]["output_tokens"] > 0
    assert delta["adaptation"]["version_to"] == 1


@pytest.mark.parametrize("stream", [False, True])
def test_the_stop_sequence_that_ended_the_text_is_named(send: Any, stream: bool) -> None:
    free = text_of(send(max_tokens=16))
    stop = [char for char in free if char not in "\N{REPLACEMENT CHARACTER} "][-1]
    stopped = send(max_tokens=16, stop_sequences=["never said", stop], stream=stream)
    if stream:
        *_, delta, _ = stopped
        assert (delta.delta.stop_reason, delta.delta.stop_sequence) == ("stop_sequence", stop)
    else:
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)
        assert text_of(stopped) == free[: free.index(stop)]


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "sleep"}])
def test_a_call_and_its_result_go_round(roomy_server: InProcessServer, choice: Any) -> None:
    fields: Any = {"model": roomy_server.model, "max_tokens": 200, "tools": [SLEEP], "extra_body": {"temperature": 0}}
    choice = choice | {"disable_parallel_tool_use": True}
    with anthropic.Anthropic(base_url=roomy_server.url, api_key="none", max_retries=0) as peer:
        called = peer.messages.create(messages=HELLO, tool_choice=choice, **fields)
        (use,) = called.content
        assert use.type == "tool_use" and use.name == "sleep" and use.input in ({"hours": 1}, {"hours": 2})
        assert called.stop_reason == "tool_use"
        with peer.messages.stream(messages=HELLO, tool_choice=choice, **fields) as stream:
            pieces = [event.partial_json for event in stream if event.type == "input_json"]
            final = stream.get_final_message()
        assert json.loads("".join(pieces)) == use.input
        assert final.content[0].type == "tool_use" and final.content[0].input == use.input
        assert (final.stop_reason, final.usage) == ("tool_use", called.usage)
        result: Any = {"type": "tool_result", "tool_use_id": use.id, "content": "Done."}
        history: Any = [*HELLO, {"role": "assistant", "content": called.content}, {"role": "user", "content": [result]}]
        answered = peer.messages.create(messages=history, **fields)
        assert answered.usage.input_tokens > called.usage.input_tokens
        counted = peer.messages.count_tokens(model=roomy_server.model, messages=history, tools=[SLEEP])
        assert counted.input_tokens == answered.usage.input_tokens
    with Client(roomy_server.url, roomy_server.model) as client:
        arguments = json.dumps(use.input)
        call = {"id": "c", "type": "function", "function": {"name": "sleep", "arguments": arguments}}
        chat: Any = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]
        chat.append({"role": "tool", "tool_call_id": "c", "content": "Done."})
        function = {"name": "sleep", "parameters": SLEEP["input_schema"]}
        whole = client.chat(chat, tools=[{"type": "function", "function": function}])
    assert whole["usage"]["prompt_tokens"] == answered.usage.input_tokens, "the prompt is that of OpenAI's shape"


def test_a_streamed_prompt_is_encoded_once(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, encode = list[Any](), prompts.encode

    def count(*args: Any, **more: Any) -> Any:
        encoded.append(args[0])
        return encode(*args, **more)

    monkeypatch.setattr(prompts, "encode", count)
    answer = client.post("messages", raw(stream=True))
    start = json.loads(answer.text.split("\n")[1].removeprefix("data: "))
    assert start["message"]["usage"]["input_tokens"] > 0 and len(encoded) == 1


def test_samplers_are_those_of_openais_route(client: Client) -> None:
    fields: Json = {"temperature": 1.5, "top_p": 0.5, "top_k": 1}
    message = assert_success(client.post("messages", raw(**fields)))
    assert message["content"][0]["text"] == client.chat(HELLO, **fields)["choices"][0]["message"]["content"]  # type: ignore[arg-type]
    MessageReply.model_validate_json(json.dumps(message), strict=True)


def test_a_schema_is_followed(send: Any) -> None:
    form = {"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}}
    validate(json.loads(text_of(send(max_tokens=40, output_config=form))), SCHEMA)


def test_tokens_are_counted_as_they_are_used(peer: anthropic.Anthropic, send: Any, client: Client) -> None:
    counted = peer.messages.count_tokens(model=client.model, messages=HELLO, system=SYSTEM)
    assert counted.input_tokens == send().usage.input_tokens
    long = peer.messages.count_tokens(model=client.model, messages=[{"role": "user", "content": "cat " * 2000}])
    assert long.input_tokens > 2000  # more than the context is counted too


def test_a_session_is_named_by_model_header_or_field_and_learns_each_message_once(send: Any, client: Client) -> None:
    first = send(model=f"{client.model}@anthropic")
    assert first.model_extra["adaptation"]["version_to"] == 1
    learned = client.session("anthropic")["tokens_learned"]
    history = [*HELLO, {"role": "assistant", "content": first.content}, {"role": "user", "content": "ok"}]
    send(history, model=f"{client.model}@anthropic")
    grown = client.session("anthropic")["tokens_learned"] - learned
    assert 0 < grown < learned  # the new message only
    same = [*AS_CHAT, {"role": "assistant", "content": text_of(first)}, history[-1]]
    assert client.chat(same, session="anthropic")["adaptation"]["tokens_learned"] == 0  # known in OpenAI's shape too
    send(extra_headers={"X-Imprint-Session": "claude-header"}, metadata={"user_id": "ada"})
    assert client.version("claude-header") == 1
    reply = send(extra_body={"session": "claude-header", "adapt": "predict"})
    assert reply.model_extra["adaptation"]["version_to"] == 1


def test_a_user_id_names_no_session(tiny_base: Path) -> None:
    server = InProcessServer(tiny_base, user_sessions=True)
    try:
        with Client(server.url, server.model) as client:
            answer = client.post("messages", raw(metadata={"user_id": "ada"}, thinking={"type": "disabled"}))
            assert assert_success(answer)["adaptation"] is None
            assert answer.headers["x-imprint-ignored"] == "metadata, thinking"
            assert assert_success(client.http.get("/v1/sessions"))["data"] == []
    finally:
        server.stop()


def test_a_repeated_key_learns_once(client: Client) -> None:
    answers = [
        client.post("messages", raw(session="claude-key"), **{"Idempotency-Key": "claude-key"}) for _ in range(2)
    ]
    first, second = map(assert_success, answers)
    assert first == second and answers[1].headers["Idempotent-Replayed"] == "true"
    assert client.version("claude-key") == 1


@pytest.mark.parametrize(
    ("body", "status", "kind", "words"),
    [
        ({"model": "claude"}, 404, "not_found_error", "claude"),
        ({"max_tokens": None}, 400, "invalid_request_error", "'max_tokens'"),
        ({"max_tokens": 0}, 400, "invalid_request_error", "'max_tokens'"),
        ({"messages": []}, 400, "invalid_request_error", "'messages'"),
        ({"messages": [{"role": "tool", "content": "a"}]}, 400, "invalid_request_error", "'messages.0.role'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            400,
            "invalid_request_error",
            "'messages.0.content.0.type'",
        ),
        ({"messages": [{"role": "user", "content": "cat " * 2000}]}, 400, "invalid_request_error", "512 tokens"),
        ({"tools": [{"name": "a", "type": "bash_1"}]}, 400, "invalid_request_error", "'tools.0.type'"),
        ({"tools": [{"name": "a"}]}, 400, "invalid_request_error", "'tools.0.input_schema'"),
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "'tool_choice'"),
        ({"tool_choice": {"type": "tool"}}, 400, "invalid_request_error", "'tool_choice.name'"),
        ({"messages": [{"role": "user", "content": [USE]}]}, 400, "invalid_request_error", "'messages.0.content.0'"),
        (
            {"messages": [{"role": "user", "content": [RESULT]}]},
            400,
            "invalid_request_error",
            "'messages.0.content.0.tool_use_id'",
        ),
        ({"stop_sequences": [""]}, 400, "invalid_request_error", "'stop_sequences.0'"),
        ({"temperature": -1}, 400, "invalid_request_error", "'temperature'"),
        ({"stop": ["a"]}, 400, "invalid_request_error", "Unknown field 'stop'"),
        ({"n": 2}, 400, "invalid_request_error", "Unknown field 'n'"),
        ({"sesion": "ada"}, 400, "invalid_request_error", "did you mean 'session'"),
        ({"adapt": "predict"}, 400, "invalid_request_error", "needs a session"),
        ({"output_config": {"format": {"type": "xml"}}}, 400, "invalid_request_error", "'output_config.format"),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_anthropics_shape(
    client: Client, body: Json, status: int, kind: str, words: str, stream: bool
) -> None:
    answer = client.post("messages", raw() | {"stream": stream} | body)
    assert answer.status_code == status, answer.text
    error = answer.json()
    assert error.keys() == {"type", "error", "request_id"} and error["type"] == "error"
    assert error["error"]["type"] == kind and words in error["error"]["message"]
    assert error["request_id"] == answer.headers["x-request-id"]


def test_the_clients_errors_are_its_own(send: Any) -> None:
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        send(model="claude")
    with pytest.raises(anthropic.BadRequestError, match=r"'tools\.0\.input_schema'"):
        send(tools=[{"name": "a", "input_schema": {"type": "array"}}])


@pytest.mark.parametrize(
    ("path", "last"),
    [
        ("/v1/messages", 'event: error\ndata: {"type": "error", "error": {"type": "overloaded_error", '),
        ("/api/chat", '{"error": "The store is away."}\n'),
    ],
)
def test_an_error_in_the_middle_of_a_stream_is_its_last_event(
    client: Client, monkeypatch: pytest.MonkeyPatch, path: str, last: str
) -> None:
    generate = Sessions.generate

    async def break_off(*args: Any) -> Any:
        events = await generate(*args)

        async def broken() -> Any:
            async with aclosing(events):
                yield await anext(events)
                raise StoreUnavailable("The store is away.")

        return broken()

    monkeypatch.setattr(Sessions, "generate", break_off)
    body = raw(stream=True) if "messages" in path else {"model": client.model, "messages": HELLO}
    answer = client.http.post(path, json=body)
    assert answer.status_code == 200
    events = answer.text.splitlines(keepends=True)
    assert "".join(events[-3:] if "messages" in path else events[-1:]).startswith(last)


def test_a_key_comes_in_either_header(tiny_base: Path) -> None:
    (key, line), (other, _) = new_key("acme"), new_key("acme")
    server = InProcessServer(tiny_base, api_keys=line)
    try:
        body: Any = {"model": server.model, "max_tokens": 4, "messages": HELLO}
        for given in ({"api_key": key}, {"auth_token": key, "api_key": None}):
            with anthropic.Anthropic(base_url=server.url, max_retries=0, **given) as peer:
                assert peer.messages.create(**body).usage.output_tokens
        with anthropic.Anthropic(base_url=server.url, max_retries=0, api_key=other) as peer:
            with pytest.raises(anthropic.AuthenticationError, match="not known") as found:
                peer.messages.create(**body)
            assert found.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]
        models = f"{server.url}/v1/models"
        for headers, status in (
            ([("x-api-key", key)], 200),
            ([("x-api-key", key), ("x-api-key", key)], 401),
            ([("Authorization", f"Bearer {other}"), ("x-api-key", key)], 401),
            ([], 401),
        ):
            assert httpx.get(models, headers=headers).status_code == status, headers
    finally:
        server.stop()
