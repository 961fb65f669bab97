"""OpenAI's Responses by the unmodified `openai` client: shapes, tools, and what is kept, learned and erased."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from model.base.config import tiny_config
from service.http.response_schemas import ResponseReply
from service.tenants import new_key
from tests.conftest import Server
from tests.live import Client, Json, assert_success
from tests.service.in_process import InProcessServer
from tests.tiny import build_tiny_base

HELLO = "My cat is Miso."
MORE = "And then what?"
MOOD: Any = {
    "type": "function",
    "name": "mood",
    "description": "Say how you feel.",
    "parameters": {
        "type": "object",
        "properties": {"mood": {"enum": ["glad", "sad"]}},
        "required": ["mood"],
        "additionalProperties": False,
    },
    "strict": True,
}
EVENTS = [
    *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"),
    *("response.output_text.delta", "response.output_text.done", "response.content_part.done"),
    "response.output_item.done",
]
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny base with room for tools in its context."""
    return build_tiny_base(tmp_path_factory.mktemp("responses") / "tiny", tiny_config(max_context=2048))


@pytest.fixture(scope="module")
def server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(str(base), tmp_path_factory.mktemp("responses")).start()
    yield running
    assert running.stop() == 0, running.log.read_text()


@pytest.fixture(scope="module")
def sdk(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as sdk:
        yield sdk


@pytest.fixture
def create(sdk: openai.OpenAI, server: Server) -> Any:
    """Return a function that creates a short greedy response."""

    def create(input: Any = HELLO, **fields: Any) -> Any:
        body: Json = {"model": server.model, "max_output_tokens": 8, "temperature": 0} | fields
        return sdk.responses.create(input=input, **body)

    return create


def raw(input: Any = HELLO, **fields: Any) -> Json:
    return {"model": "tiny", "input": input, "max_output_tokens": 8, "temperature": 0} | fields


def learned(response: Any) -> int:
    """Return the number of tokens that a response has taught."""
    return int(response.model_extra["adaptation"]["tokens_learned"])


def user(text: str) -> Json:
    return {"role": "user", "content": text}


# --- the shape --------------------------------------------------------------------------------------------------------


def test_a_response_is_the_reply_of_a_chat(create: Any, client: Client) -> None:
    chat = client.chat([{"role": "system", "content": "Be brief."}, user(HELLO)])
    response = create(instructions="Be brief.", metadata={"a": "b"})
    (message,) = response.output
    assert response.output_text == message.content[0].text == chat["choices"][0]["message"]["content"]
    assert (response.object, response.model, response.metadata) == ("response", client.model, {"a": "b"})
    ended = {"length": ("incomplete", "max_output_tokens"), "stop": ("completed", None)}
    reason = response.incomplete_details and response.incomplete_details.reason
    assert (response.status, reason) == ended[chat["choices"][0]["finish_reason"]]
    assert message.status == response.status
    usage = response.usage
    assert (usage.input_tokens, usage.output_tokens) == (
        chat["usage"]["prompt_tokens"],
        chat["usage"]["completion_tokens"],
    )
    assert response.model_extra["adaptation"] is None


def test_items_are_the_chat_that_they_spell(create: Any) -> None:
    items = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": HELLO}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
    ]
    assert create(items).output_text == create(HELLO, instructions="Be brief.").output_text


def test_a_reply_has_the_fields_of_openais_model_and_of_ours(client: Client) -> None:
    body = raw(tools=[MOOD], tool_choice="none", text={"format": {"type": "text"}}, truncation="disabled")
    body |= {"reasoning": {"effort": "low"}, "include": ["reasoning.encrypted_content"], "service_tier": "auto"}
    answer = client.post("responses", body)
    reply = assert_success(answer)
    Response.model_validate(reply)
    ResponseReply.model_validate_json(json.dumps(reply), strict=True)
    assert answer.headers["x-imprint-ignored"] == "reasoning, service_tier"


@pytest.mark.parametrize("path", ["/v1/responses", "/responses"])
def test_the_events_on_the_wire_are_openais_in_order(client: Client, path: str) -> None:
    answer = client.http.post(path, json=raw(stream=True, conversation="wire"))
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [event.split("\n") for event in answer.text.removesuffix("\n\n").split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in lines]
    assert [name.removeprefix("event: ") for name, _ in lines] == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    *most, last = list(dict.fromkeys(event["type"] for event in events))
    assert most == EVENTS and last == f"response.{events[-1]['response']['status']}"
    for event in events:
        EVENT.validate_python(event)
    deltas = [event["delta"] for event in events if event["type"].endswith("text.delta")]
    (item,) = events[-1]["response"]["output"]
    assert "".join(deltas) == item["content"][0]["text"] and len(deltas) > 1
    assert events[0]["response"]["adaptation"] is None and events[-1]["response"]["adaptation"]["version_to"]


def test_a_stream_adds_up_to_the_response(sdk: openai.OpenAI, create: Any, server: Server) -> None:
    whole = create()
    with sdk.responses.stream(model=server.model, input=HELLO, max_output_tokens=8, temperature=0) as stream:
        events: list[Any] = list(stream)  # the client's final response is that of `response.completed` only
    last = events[-1].response
    assert last.output_text == whole.output_text and last.usage == whole.usage


def test_a_text_follows_a_form(sdk: openai.OpenAI, server: Server, create: Any) -> None:
    class Age(BaseModel):
        age: Literal["7", "12"]

    parsed = sdk.responses.parse(model=server.model, input=HELLO, text_format=Age, max_output_tokens=64, temperature=0)
    assert isinstance(parsed.output_parsed, Age)
    free = create(text={"format": {"type": "json_object"}}, max_output_tokens=600, temperature=0.7)
    assert free.output_text.startswith("{")


# --- tools ------------------------------------------------------------------------------------------------------------


def test_samplers_are_those_of_chats(create: Any, client: Client) -> None:
    """vLLM takes them, and benchmarks send them so that every reply has the same length."""
    assert create(extra_body={"ignore_eos": True, "stop": None}).usage.output_tokens == 8
    fields = {"repetition_penalty": 2.0, "logit_bias": {"40": 100}, "min_tokens": 8}
    text = client.chat([user(HELLO)], **fields)["choices"][0]["message"]["content"]
    assert create(extra_body=fields).output_text == text != create().output_text


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "mood"}])
def test_a_call_and_its_result_go_round(create: Any, choice: Any) -> None:
    first = create(tools=[MOOD], tool_choice=choice, parallel_tool_calls=False, max_output_tokens=200)
    (call,) = first.output
    assert (call.type, call.name, first.status) == ("function_call", "mood", "completed")
    assert json.loads(call.arguments)["mood"] in ("glad", "sad")
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "Noted."}
    resent = create([user(HELLO), call, result], tools=[MOOD])
    continued = create([result], tools=[MOOD], previous_response_id=first.id)
    assert resent.output_text == continued.output_text
    assert resent.usage.input_tokens == continued.usage.input_tokens > first.usage.input_tokens


def test_a_streamed_call_comes_in_pieces(sdk: openai.OpenAI, create: Any, server: Server) -> None:
    fields: Json = {"tools": [MOOD], "tool_choice": "required", "parallel_tool_calls": False}
    whole = create(**fields, max_output_tokens=200)
    events = list(create(**fields, max_output_tokens=200, stream=True))
    for event in events:
        EVENT.validate_python(event.model_dump(exclude_unset=True))
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    (done,) = (event for event in events if event.type == "response.function_call_arguments.done")
    assert "".join(deltas) == done.arguments == whole.output[0].arguments
    (added,) = (event.item for event in events if event.type == "response.output_item.added")
    assert (added.name, added.arguments) == ("mood", "")
    assert events[-1].type == "response.completed" and events[-1].response.output[0].call_id == added.call_id


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_a_response_goes_on_as_if_its_chat_were_sent_again(create: Any, sdk: openai.OpenAI) -> None:
    first = create(instructions="Be brief.")
    history = [user(HELLO), {"role": "assistant", "content": first.output_text}]
    expected = create([*history, user(MORE)])
    second = create(MORE, previous_response_id=first.id)
    assert second.output_text == expected.output_text and second.usage == expected.usage
    assert second.previous_response_id == first.id
    named = create([user(HELLO), {"type": "item_reference", "id": first.output[0].id}, user(MORE)])
    assert named.output_text == expected.output_text
    read = sdk.responses.retrieve(second.id)
    assert read.output_text == second.output_text and read.usage == second.usage
    sdk.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        sdk.responses.retrieve(second.id)
    with pytest.raises(openai.BadRequestError) as gone:
        create(MORE, previous_response_id=second.id)
    assert (gone.value.param, gone.value.code) == ("previous_response_id", "previous_response_not_found")
    assert create(MORE, previous_response_id=first.id).status  # the one before is kept


def test_a_conversation_is_a_session_that_learns_each_message_once(create: Any, client: Client) -> None:
    first = create(conversation="talk")
    assert first.conversation.id == "talk" and first.model_extra["adaptation"]["version_to"] == 1
    second = create(MORE, conversation={"id": "talk"}, stream=False)
    assert second.usage.input_tokens > first.usage.input_tokens, "the chat goes on"
    assert 0 < learned(second) < len(MORE) + 1, "the new message only"
    assert learned(create("Ok.", previous_response_id=first.id)) > 0, "the session of the response learns"
    assert client.version("talk") == 3
    resent = client.chat([user(HELLO), {"role": "assistant", "content": first.output_text}], session="talk")
    assert resent["adaptation"]["tokens_learned"] == 0, "it is known in the shape of chats too"
    alone = create(MORE, extra_body={"session": "talk", "adapt": "predict"})
    assert alone.usage.input_tokens < second.usage.input_tokens, "a session alone does not go on with its chat"


def test_without_a_session_nothing_is_learned(create: Any, client: Client) -> None:
    before = assert_success(client.http.get("/v1/sessions"))["data"]
    create(MORE, previous_response_id=create().id)
    assert assert_success(client.http.get("/v1/sessions"))["data"] == before


@pytest.mark.parametrize("named", ["conversation", "session", "header"])
def test_store_false_learns_and_keeps_nothing(create: Any, client: Client, named: str) -> None:
    create(conversation="quiet")
    version = client.version("quiet")
    ways: dict[str, Json] = {
        "conversation": {"conversation": "quiet"},
        "session": {"extra_body": {"session": "quiet"}},
        "header": {"extra_headers": {"X-Imprint-Session": "quiet"}},
    }
    response = create("It rains.", store=False, **ways[named])
    assert response.model_extra["store"] is False and learned(response) == 0
    assert client.version("quiet") == version
    with pytest.raises(openai.BadRequestError, match="not found"):
        create(MORE, previous_response_id=response.id)
    assert "It rains." not in json.dumps(create(MORE, conversation="quiet").model_dump())


def test_a_request_that_reads_keeps_no_response_unless_it_says_so(create: Any, client: Client) -> None:
    create(conversation="reader")
    for fields, kept in (({}, False), ({"store": True}, True)):
        reads: Json = {"conversation": "reader", "extra_body": {"adapt": "predict"}} | fields
        response = create(MORE, **reads)
        assert response.model_extra["store"] is kept
        assert (client.http.get(f"/v1/responses/{response.id}").status_code == 200) is kept
    assert client.version("reader") == 1


def test_responses_go_with_their_session_and_with_what_is_unlearned(create: Any, client: Client) -> None:
    for undo in ("rollback", "erase"):
        response = create(conversation="gone")
        create(MORE, previous_response_id=response.id)
        if undo == "erase":
            assert_success(client.http.delete("/v1/sessions/gone"))
        else:
            assert_success(client.post("sessions/gone/rollback", {"version": 0}))
        assert client.http.get(f"/v1/responses/{response.id}").status_code == 404
        with pytest.raises(openai.BadRequestError, match="not found"):
            create(MORE, previous_response_id=response.id)
    fresh, alone = create(MORE, conversation="gone"), create(MORE)
    assert fresh.usage.input_tokens == alone.usage.input_tokens, "no chat is left to go on with"


@pytest.mark.parametrize("stream", [False, True])
def test_a_repeated_key_learns_once_and_gets_the_same_response(client: Client, stream: bool) -> None:
    key = f"responses-{stream}"
    answers = [client.post("responses", raw(conversation=key, stream=stream), **{"Idempotency-Key": key}) for _ in "ab"]
    first, second = (json.loads(answer.text.strip().rsplit("data: ", 1)[-1]) for answer in answers)
    assert first.get("response", first) == second.get("response", second)
    assert answers[1].headers["Idempotent-Replayed"] == "true"
    assert client.version(key) == 1


def test_no_tenant_finds_the_responses_of_another(base: Path) -> None:
    keys = {name: new_key(name) for name in ("acme", "other")}
    server = InProcessServer(base, api_keys=",".join(line for _, line in keys.values()))
    try:
        mine, theirs = (Client(server.url, server.model, keys[name][0]) for name in keys)
        with mine, theirs:
            for fields in ({}, {"conversation": "ada"}):
                reply = assert_success(mine.post("responses", raw(**fields)))
                assert_success(theirs.post("responses", raw(**fields)))
                assert theirs.http.get(f"/v1/responses/{reply['id']}").status_code == 404
                assert theirs.http.delete(f"/v1/responses/{reply['id']}").status_code == 404
                assert theirs.post("responses", raw(previous_response_id=reply["id"])).status_code == 400
                assert mine.http.get(f"/v1/responses/{reply['id']}").json() == reply
    finally:
        server.stop()


def test_a_server_that_keeps_none_says_so(base: Path) -> None:
    server = InProcessServer(base, response_ttl_s=0)
    try:
        with Client(server.url, server.model) as client:
            for _ in range(2):
                reply = assert_success(client.post("responses", raw(conversation="ada")))
                assert reply["store"] is False and reply["adaptation"]["version_to"]
            assert client.http.get(f"/v1/responses/{reply['id']}").status_code == 404
    finally:
        server.stop()


# --- errors -----------------------------------------------------------------------------------------------------------

CALL: Json = {"type": "function_call", "call_id": "c", "name": "mood", "arguments": "{}"}


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"input": None}, "input", "string or a list"),
        ({"input": []}, "input", "at least 1 item"),
        ({"input": [{"type": "web_search_call"}]}, "input.0", "function_call_output"),
        ({"input": [user([{"type": "input_image", "image_url": "x"}])]}, "input.0.content.0.type", "input_text"),  # type: ignore[arg-type]
        ({"input": [CALL | {"type": "function_call_output", "output": "a"}]}, "input.0.call_id", "call before it"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0.id", "msg_1"),
        ({"input": "cat " * 3000}, "input", "2048 tokens"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "not found"),
        ({"previous_response_id": "resp_1", "conversation": "a"}, "previous_response_id", "not two"),
        ({"conversation": "no/name"}, "conversation", "got"),
        ({"conversation": "a", "session": "a"}, "session", "not two"),
        ({"conversation": "a", "store": False, "adapt": "both"}, "adapt", "learns nothing"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "function"),
        ({"tools": [MOOD], "tool_choice": {"type": "function", "name": "sleep"}}, "tool_choice", "sleep"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema", "required"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": 1}}}}, "text.format", "grammar"),
        ({"background": True}, "background", "not supported"),
        ({"truncation": "auto"}, "truncation", "not supported"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "not supported"),
        ({"top_logprobs": 2}, "top_logprobs", "not supported"),
        ({"include": ["message.output_text.logprobs"]}, "include.0", "not supported"),
        ({"max_output_tokens": 0}, "max_output_tokens", "at least 1"),
        ({"messages": [user("a")]}, "messages", "Unknown field"),
        ({"sesion": "ada"}, "sesion", "did you mean 'session'"),
        ({"adapt": "predict"}, "adapt", "needs a session"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_fault_is_a_400_that_names_the_field(
    client: Client, server: Server, body: Json, param: str, words: str
) -> None:
    for stream in (False, True):
        answer = client.post("responses", raw(stream=stream) | body)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"] == param and words in error["message"], error


def test_a_response_of_another_session_does_not_go_on(create: Any) -> None:
    first = create(conversation="one")
    with pytest.raises(openai.BadRequestError, match="session 'one'"):
        create(MORE, previous_response_id=first.id, extra_body={"session": "two"})


def test_a_chat_that_is_too_long_to_keep_is_refused_unless_it_is_not_kept(client: Client, server: Server) -> None:
    long = raw("a", instructions="b" * 1_100_000)
    assert client.post("responses", long).json()["error"]["param"] == "input"
    assert "2048 tokens" in client.post("responses", long | {"store": False}).json()["error"]["message"]
