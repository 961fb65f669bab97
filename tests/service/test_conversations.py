"""OpenAI's conversations and lists of items by the unmodified `openai` client: a conversation is a session."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.conversations import Conversation, ConversationItem
from openai.types.responses import ResponseItem
from pydantic import TypeAdapter

from service.turns.responses import MAX_KEPT_CHARS
from tests.live import Client, Json, assert_error, assert_success
from tests.service.in_process import InProcessServer

CAT = {"type": "message", "role": "user", "content": "My cat is Miso."}
CALL = {"type": "function_call", "call_id": "call_1", "name": "mood", "arguments": '{"mood": "glad"}'}
RESULT = {"type": "function_call_output", "call_id": "call_1", "output": "glad"}
SYSTEM = {"type": "message", "role": "system", "content": [{"type": "input_text", "text": "Be brief."}]}
ITEMS: list[Any] = [SYSTEM, CAT, CALL, RESULT]


@pytest.fixture
def sdk(memory_server: InProcessServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=memory_server.url, api_key="none", max_retries=0) as sdk:
        yield sdk


def texts(items: Any) -> list[str]:
    """Return what each item of a list says."""
    return [
        item.content[0].text if item.type == "message" else getattr(item, "arguments", None) or item.output
        for item in items
    ]


def respond(sdk: openai.OpenAI, client: Client, input: Any = "Hello.", **fields: Any) -> Any:
    return sdk.responses.create(model=client.model, input=input, max_output_tokens=4, temperature=0, **fields)


def test_a_conversation_begins_with_items_and_goes_on_with_responses(sdk: openai.OpenAI, client: Client) -> None:
    conversation = sdk.conversations.create(items=ITEMS)
    Conversation.model_validate(conversation.model_dump(), strict=True)
    assert client.session(conversation.id)["version"] == 0
    response = respond(sdk, client, conversation=conversation.id)
    listed = sdk.conversations.items.list(conversation.id, order="asc").data
    expected = ["Be brief.", "My cat is Miso.", CALL["arguments"], "glad", "Hello.", response.output_text]
    assert texts(listed) == expected
    for item in listed:
        TypeAdapter(ConversationItem).validate_python(item.model_dump())
        assert sdk.conversations.items.retrieve(str(item.id), conversation_id=conversation.id) == item
    assert listed[-1].id == response.output[0].id
    assert sdk.conversations.retrieve(conversation.id) == conversation
    assert client.session(conversation.id)["version"] == 1  # items and input are learned with the first response


def test_added_items_are_what_the_next_response_answers(sdk: openai.OpenAI, client: Client) -> None:
    conversation = sdk.conversations.create().id
    first = respond(sdk, client, conversation=conversation)
    added = sdk.conversations.items.create(conversation, items=[CAT]).data  # type: ignore[list-item]
    assert texts(added) == ["My cat is Miso."]
    sent: list[Any] = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": first.output_text},
        *[CAT, {"role": "user", "content": "And then?"}],
    ]
    second = respond(sdk, client, "And then?", conversation=conversation)
    assert second.usage.input_tokens == respond(sdk, client, sent).usage.input_tokens
    referenced: list[Any] = [{"type": "item_reference", "id": added[0].id}]
    assert respond(sdk, client, referenced).output_text == respond(sdk, client, "My cat is Miso.").output_text


def test_the_items_before_a_response_are_listed_page_by_page(sdk: openai.OpenAI, client: Client) -> None:
    response = respond(sdk, client, ITEMS)
    first = sdk.responses.input_items.list(response.id, limit=3)
    assert texts(first.data) == ["glad", CALL["arguments"], "My cat is Miso."] and first.has_more
    rest = sdk.responses.input_items.list(response.id, limit=3, after=first.data[-1].id)
    assert texts(rest.data) == ["Be brief."] and not rest.has_more
    assert texts(sdk.responses.input_items.list(response.id, limit=3)) == [*texts(first.data), *texts(rest.data)]
    for item in first.data:
        TypeAdapter(ResponseItem).validate_python(item.model_dump())


def test_a_session_is_a_conversation_and_goes_when_the_conversation_is_erased(
    sdk: openai.OpenAI, client: Client
) -> None:
    client.observe("carla", "My cat is Miso.")
    assert sdk.conversations.retrieve("carla").object == "conversation"
    assert sdk.conversations.items.list("carla").data == []
    assert sdk.conversations.delete("carla").deleted
    for call in (sdk.conversations.retrieve, sdk.conversations.delete, sdk.conversations.items.list):
        with pytest.raises(openai.NotFoundError):
            call("carla")


def test_what_a_client_added_is_no_response(sdk: openai.OpenAI, client: Client) -> None:
    conversation = sdk.conversations.create(items=[CAT]).id  # type: ignore[list-item]
    (item,) = sdk.conversations.items.list(conversation).data
    assert item.id is not None
    name = "resp_" + item.id.removeprefix("msg_").replace(".i0", "")
    with pytest.raises(openai.NotFoundError):
        sdk.responses.retrieve(name)
    with pytest.raises(openai.NotFoundError):
        sdk.conversations.items.retrieve(item.id, conversation_id="another")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("conversations", {"items": [RESULT]}, "items.0.call_id"),
        ("conversations", {"items": [{"type": "item_reference", "id": "msg_1"}]}, "items.0.id"),
        ("conversations", {"items": [CAT | {"content": "a" * MAX_KEPT_CHARS}]}, "items"),
        ("conversations", {"items": [{"type": "image"}]}, "items.0"),
        ("conversations", {"item": []}, "item"),
        ("conversations/dora/items", {"items": []}, "items"),
    ],
)
def test_a_fault_is_a_400_that_names_the_field(client: Client, path: str, body: Json, param: str) -> None:
    assert_success(client.http.put("/v1/sessions/dora"))
    before = client.http.get("/v1/sessions?limit=1000").json()["data"]
    assert assert_error(client.post(path, body), 400, None)["param"] == param
    assert client.http.get("/v1/sessions?limit=1000").json()["data"] == before, "no session stays of a bad request"


def test_a_page_after_an_unknown_item_is_refused(client: Client) -> None:
    assert_success(client.http.put("/v1/sessions/dora"))
    error = assert_error(client.http.get("/v1/conversations/dora/items?after=msg_1"), 400, None)
    assert error["param"] == "after"
