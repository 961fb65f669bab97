"""Request bodies: all of OpenAI's fields are known, validation is strict, and every fault has a clear message."""

import inspect
import typing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from openai.types import completion_create_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionMessage,
    ChatCompletionToolMessageParam,
)
from openai.types.chat import (
    completion_create_params as chat_create_params,
)
from pydantic import ValidationError

from service.errors import BadRequest
from service.http.faults import explain
from service.http.foreign_fields import CHAT_UNSUPPORTED, COMPLETION_UNSUPPORTED, HINTS
from service.http.generation_schemas import ChatCompletionRequest, CompletionRequest
from service.http.policy_schemas import ActRequest, FeedbackRequest
from service.http.schemas import (
    Body,
    Message,
    ObserveRequest,
    Rollback,
    ScoreRequest,
    SessionOptions,
)

HELLO = [{"role": "user", "content": "hello"}]


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "m", "prompt": "hello"} | fields)


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"model": "m", "messages": HELLO} | fields)


def to_bad_request(error: ValidationError) -> BadRequest:
    """Return the error that the client receives. FastAPI prefixes each location with "body"."""
    return explain([{**detail, "loc": ("body", *detail["loc"])} for detail in error.errors()])


def fields_of(*typed_dicts: Any) -> set[str]:
    return {name for typed_dict in typed_dicts for name in typing.get_type_hints(typed_dict)}


OPENAI_COMPLETION = fields_of(
    completion_create_params.CompletionCreateParamsNonStreaming,
    completion_create_params.CompletionCreateParamsStreaming,
)
OPENAI_CHAT = fields_of(
    chat_create_params.CompletionCreateParamsNonStreaming,
    chat_create_params.CompletionCreateParamsStreaming,
)
OPENAI_MESSAGE = fields_of(ChatCompletionAssistantMessageParam, ChatCompletionToolMessageParam) | set(
    ChatCompletionMessage.model_fields
)


def test_every_field_of_openai_is_known() -> None:
    for request_type, fields in ((CompletionRequest, OPENAI_COMPLETION), (ChatCompletionRequest, OPENAI_CHAT)):
        assert request_type.model_json_schema()["properties"].keys() >= fields
        assert not {name for name in request_type.model_fields if name in HINTS or name in request_type.unsupported}
    assert Message.model_fields.keys() >= OPENAI_MESSAGE


def test_null_is_fine_for_every_optional_field() -> None:
    completion(**dict.fromkeys(OPENAI_COMPLETION - {"model", "prompt"}))
    chat(**dict.fromkeys(OPENAI_CHAT - {"model", "messages"}))
    chat(messages=[dict.fromkeys(OPENAI_MESSAGE) | {"role": "assistant", "content": "a"}])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("store", False),
        ("metadata", {}),
        ("tools", []),
        ("functions", []),
        ("tool_choice", "none"),
        ("function_call", "none"),
        ("response_format", {"type": "text"}),
        ("modalities", ["text"]),
        ("echo", False),
        ("length_penalty", 1),
        ("length_penalty", 1.0),
        ("mirostat", 0),
        ("guided_json", None),
    ],
)
def test_values_that_change_nothing_are_accepted_without_a_word(field: str, value: Any) -> None:
    assert chat(**{field: value}).ignored == []


@pytest.mark.parametrize("field", [*sorted(HINTS), "some_servers_own_field", "k" * 1_000_000])
def test_what_changes_no_answer_is_ignored_and_named(field: str) -> None:
    for value in (True, "high", {"a": "b"}):
        assert chat(**{field: value}).ignored == [field] == completion(**{field: value}).ignored
    assert chat(**{field: None}).ignored == []


def test_what_other_servers_put_into_messages_is_ignored_and_named() -> None:
    part = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}
    messages = [*HELLO, {"role": "assistant", "content": [part], "reasoning_details": "hm"}] * 2
    assert chat(messages=messages).ignored == ["messages.reasoning_details"]
    with pytest.raises(ValidationError):
        ObserveRequest.model_validate({"messages": messages})  # only learns: nothing is ignored


@pytest.mark.parametrize(
    ("field", "meant"),
    [
        ("sesion", "session"),
        ("session_id", "session"),
        ("Session", "session"),
        ("adpat", "adapt"),
        ("lern", "learn"),
        ("recal", "recall"),
        ("on-disconnect", "on_disconnect"),
        ("temprature", "temperature"),
        ("max_token", "max_tokens"),
        ("stream_option", "stream_options"),
    ],
)
def test_a_misspelt_field_is_refused_with_the_right_name(field: str, meant: str) -> None:
    with pytest.raises(BadRequest, match=f"'{field}'.*'{meant}'") as error:
        chat(**{field: "x"})
    assert error.value.param == field


def test_an_unsupported_field_is_refused_by_its_name() -> None:
    for make, unsupported in ((chat, CHAT_UNSUPPORTED), (completion, COMPLETION_UNSUPPORTED)):
        for name in unsupported:
            with pytest.raises(BadRequest, match="not supported") as error:
                make(**{name: {"some": "thing"}})
            assert error.value.param == name
    wrong: dict[str, Any]
    for wrong in ({"echo": 0}, {"mirostat": False}, {"functions": {}}):
        with pytest.raises(BadRequest):
            chat(**wrong)


def test_content_parts_are_joined_and_developer_is_system() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    message = Message.model_validate({"role": "developer", "content": parts})
    assert message.plain() == {"role": "system", "content": "a b"}
    tool = Message.model_validate({"role": "tool", "content": "7", "tool_call_id": "c1", "name": None})
    assert tool.plain() == {"role": "tool", "content": "7", "tool_call_id": "c1"}
    thought = Message.model_validate({"role": "assistant", "content": "7", "reasoning_content": "3 + 4"})
    assert thought.plain() == {"role": "assistant", "content": "7", "reasoning_content": "3 + 4"}


def test_calls_are_text_of_the_message_and_the_content_may_then_be_missing() -> None:
    call = {"id": "c1", "type": "function", "index": 0, "function": {"name": "f", "arguments": '{"a":1}'}}
    text = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    for content, expected in ({}, text), ({"content": None}, text), ({"content": "So. "}, f"So.\n{text}"):
        message = Message.model_validate({"role": "assistant", "tool_calls": [call]} | content)
        assert message.plain() == {"role": "assistant", "content": expected}
    refused: list[dict[str, Any]] = [{"content": None}, {}, {"tool_calls": []}, {"role": "user", "tool_calls": [call]}]
    for wrong in refused:
        with pytest.raises(ValidationError):
            Message.model_validate({"role": "assistant"} | wrong)


def test_stop_is_a_tuple_whatever_its_form() -> None:
    assert completion(stop="a").stops == ("a",)
    assert completion(stop=["a", "b"]).stops == ("a", "b")
    assert completion(stop=[]).stops == completion(stop=None).stops == ()


@pytest.mark.parametrize("field", ["max_tokens", "n", "seed", "temperature", "top_p", "presence_penalty"])
@pytest.mark.parametrize("value", [True, "1", [1], {}, float("nan"), float("inf")], ids=repr)
def test_only_a_number_is_accepted_as_a_number(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as error:
        completion(**{field: value})
    assert to_bad_request(error.value).param == field


def test_limits_are_inclusive() -> None:
    completion(temperature=0, top_p=1, n=16, logprobs=20, max_tokens=0, presence_penalty=-2, frequency_penalty=2)
    completion(temperature=100, seed=2**63 - 1, stop=["a" * 1024] * 32, logit_bias={"0": -100, "1": 100}, best_of=16)
    completion(top_k=-1, top_p=0, min_p=1, typical_p=1, repetition_penalty=10, repeat_last_n=-1, prompt_logprobs=20)
    completion(seed=-(2**63), session="a" * 128, prompt=["a"] * 128)
    chat(top_logprobs=20, logprobs=True, max_tokens=5, max_completion_tokens=5)


@pytest.mark.parametrize("session", ["a", "7", "user@example.com", "a.b_c~d:e+f=g-h", "A" * 128])
def test_session_ids(session: str) -> None:
    assert completion(session=session).session == session


@pytest.mark.parametrize("value", [2**64, 10**5000], ids=["2**64", "10**5000"])
def test_an_enormous_integer_has_a_short_message(value: int) -> None:
    with pytest.raises(ValidationError) as error:
        completion(seed=value)
    assert len(to_bad_request(error.value).message) < 200


def test_a_body_of_faults_yields_few_errors() -> None:
    """Each error holds its input: a body of a million faults must not become a million errors."""
    for faulty in (
        {f"unknown{i}": 1 for i in range(10_000)},
        {"stop": [1] * 10_000},
        {"prompt": ["a"] + [True] * 10_000},
        {"prompt": [1] + [None] * 10_000},
        {"prompt": ["a", 1] + [True] * 10_000},
        {"prompt": [["a"] + [None] * 10_000]},
        {"logit_bias": {f"x{i}": 1 for i in range(10_000)}},
    ):
        with pytest.raises(ValidationError) as error:
            completion(**faulty)
        assert error.value.error_count() <= 64
    with pytest.raises(ValidationError) as error:
        chat(messages=[{}] * 10_000)
    assert error.value.error_count() <= 64


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
REQUESTS: list[type[Body]] = [
    CompletionRequest,
    ChatCompletionRequest,
    ObserveRequest,
    ScoreRequest,
    SessionOptions,
]


@pytest.mark.parametrize("request_type", REQUESTS, ids=lambda request_type: request_type.__name__)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_json_is_accepted_or_refused_with_a_message(request_type: type[Body], data: st.DataObject) -> None:
    known = st.dictionaries(st.sampled_from(sorted(request_type.model_fields)), JSON, max_size=6)
    body = data.draw(known | JSON)
    try:
        request_type.model_validate(body)
    except ValidationError as error:
        bad_request = to_bad_request(error)
        assert bad_request.status == 400 and bad_request.message
        bad_request.body()
    except BadRequest as bad_request:
        assert bad_request.param is not None


def test_models_have_docstrings_for_the_openapi_page() -> None:
    for request_type in REQUESTS:
        assert inspect.getdoc(request_type)


ONE_FIELD_NEEDS_ANOTHER: list[tuple[type[Body], dict[str, Any]]] = [
    (CompletionRequest, {"stream_options": {"include_usage": True}}),
    (CompletionRequest, {"stream_options": {"include_usage": True}, "stream": False}),
    (CompletionRequest, {"stream_options": {"include_usage": True}, "stream": True}),
    (CompletionRequest, {"stream_options": None}),
    (ChatCompletionRequest, {"stream_options": {}, "stream": None}),
    (ChatCompletionRequest, {"top_logprobs": 1}),
    (ChatCompletionRequest, {"top_logprobs": 0.0, "logprobs": False}),
    (ChatCompletionRequest, {"top_logprobs": 1, "logprobs": True}),
    (ObserveRequest, {}),
    (ObserveRequest, {"text": "a", "messages": None}),
    (ObserveRequest, {"text": "a", "messages": HELLO}),
    (ObserveRequest, {"text": "a", "model": "m"}),
    (ObserveRequest, {"messages": HELLO, "label": 0}),
    (ObserveRequest, {"messages": HELLO}),
    (ObserveRequest, {"features": [1.0]}),
    (ObserveRequest, {"features": [1.0], "label": 0.0, "model": "m"}),
    (ActRequest, {"regret": 0.5}),
    (ActRequest, {"action_id": "act-1", "reward": None}),
    (ActRequest, {"action_id": "act-1", "regret": 0.5, "reward": 1}),
    (FeedbackRequest, {"action_id": "act-1"}),
    (FeedbackRequest, {"action_id": "act-1", "reward": 1, "text": None}),
    (FeedbackRequest, {"action_id": "act-1", "reward": 1, "text": "a"}),
    (FeedbackRequest, {"completion_id": "cmpl-" + "0" * 32}),
    (FeedbackRequest, {"completion_id": "cmpl-" + "0" * 32, "text": "a"}),
    (FeedbackRequest, {"completion_id": "cmpl-" + "0" * 32, "text": "a", "regret": 1}),
    (CompletionRequest, {"logit_bias": {"a": 1}}),
    (CompletionRequest, {"logit_bias": {str(token): 1 for token in range(1025)}}),
    (CompletionRequest, {"prompt": []}),
    (CompletionRequest, {"prompt": ["a", 1, "b"]}),
    (CompletionRequest, {"prompt": ["a", [1, "b"], [2]]}),
    (CompletionRequest, {"prompt": ["a", True]}),
    (CompletionRequest, {"prompt": ["a", "b"]}),
    (CompletionRequest, {"prompt": [1, 2]}),
    (CompletionRequest, {"prompt": [[1, 2], ["a"]]}),
    (CompletionRequest, {"prompt": [[1, 2], [[1]]]}),
    (CompletionRequest, {"prompt": [1, [2], "a"]}),
    (CompletionRequest, {"prompt_logprobs": 1, "stream": True}),
    (CompletionRequest, {"prompt_logprobs": 1, "stream": False}),
    (CompletionRequest, {"n_predict": -1, "max_tokens": 1}),
    (CompletionRequest, {"n_probs": 0, "logprobs": 1}),
    (CompletionRequest, {"n_probs": 1, "logprobs": 1}),
    (CompletionRequest, {"max_tokens": -1}),
    (CompletionRequest, {"messages": HELLO}),
    (CompletionRequest, {"suffix": ""}),
    (CompletionRequest, {"anything": "else"}),
    (ChatCompletionRequest, {"max_tokens": -1}),
    (ChatCompletionRequest, {"max_tokens": 0}),
    (ChatCompletionRequest, {"max_completion_tokens": 0.0}),
    (ChatCompletionRequest, {"n_predict": 1, "max_completion_tokens": 1}),
    (ChatCompletionRequest, {"n_predict": 1, "max_tokens": 1}),
    (ChatCompletionRequest, {"response_format": {"type": "text"}}),
    (ChatCompletionRequest, {"response_format": {"type": "json_object"}}),
    (ChatCompletionRequest, {"store": True, "length_penalty": 1.0}),
    (ChatCompletionRequest, {"length_penalty": True}),
    (SessionOptions, {"ttl_s": 0.0}),
    (SessionOptions, {"ttl_s": -1}),
    (Rollback, {"version": 2**53}),
]
REQUIRED: dict[type[Body], dict[str, Any]] = {
    CompletionRequest: {"model": "m", "prompt": "hello"},
    ChatCompletionRequest: {"model": "m", "messages": HELLO},
    ActRequest: {"observation": [1.0]},
}


@pytest.mark.parametrize(("request_type", "fields"), ONE_FIELD_NEEDS_ANOTHER, ids=lambda value: str(value)[:60])
def test_the_description_allows_what_the_validator_takes(request_type: type[Body], fields: dict[str, Any]) -> None:
    body = REQUIRED.get(request_type, {}) | fields
    try:
        request_type.model_validate(body)
        is_taken = True
    except (ValidationError, BadRequest):
        is_taken = False
    validator = Draft202012Validator(request_type.model_json_schema())
    assert validator.is_valid(body) == is_taken
