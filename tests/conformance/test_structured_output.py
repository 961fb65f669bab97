"""Cases of structured output, by the names of OpenAI, vLLM and llama.cpp, and what a session learns of it."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import openai
import pytest
from pydantic import BaseModel

from tests.conformance.conftest import HELLO, Ask
from tests.conftest import Server
from tests.live import Client, assert_success, chunks

SCHEMA = {
    "type": "object",
    "properties": {"mood": {"enum": ["glad", "sad"]}, "lives": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["mood", "lives"],
    "additionalProperties": False,
}
STRICT = {"type": "json_schema", "json_schema": {"name": "cat", "schema": SCHEMA, "strict": True}}
LONG = {"max_tokens": 200}


def text(reply: Any) -> str:
    choice = reply["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": STRICT},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        {"guided_json": SCHEMA},
        {"json_schema": SCHEMA},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_text_follows_its_schema(chat: Ask, complete: Ask, fields: dict[str, Any]) -> None:
    for send in (chat, complete):
        reply = send(**fields, **LONG, temperature=2, seed=3)
        jsonschema.validate(json.loads(text(reply)), SCHEMA)
        assert reply["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_regex": "[a-c]{3}[0-9]"}, "[a-c]{3}[0-9]"),
        ({"structured_outputs": {"regex": "x+y"}, "logit_bias": {"91": 5}}, "x+y"),
        ({"grammar": 'root ::= "a" [0-9] "b"'}, "a[0-9]b"),
        ({"guided_grammar": 'root ::= "a" [0-9] "b"'}, "a[0-9]b"),
    ],
    ids=str,
)
def test_a_text_follows_its_rules(chat: Ask, complete: Ask, fields: dict[str, Any], pattern: str) -> None:
    for send in (chat, complete):
        assert re.fullmatch(pattern, text(send(**fields, **LONG)))


def test_log_probabilities_are_finite_beside_a_grammar(chat: Ask) -> None:
    (choice,) = chat(structured_outputs={"choice": ["yes", "no"]}, logprobs=True, top_logprobs=5)["choices"]
    listed = [each["logprob"] for token in choice["logprobs"]["content"] for each in token["top_logprobs"]]
    assert listed and min(listed) >= -9999


def test_json_mode_writes_an_object(chat: Ask) -> None:
    reply = chat(response_format={"type": "json_object"}, max_tokens=400, temperature=0)
    if reply["choices"][0]["finish_reason"] == "stop":
        assert isinstance(json.loads(text(reply)), dict)
    else:
        assert text(reply).lstrip().startswith("{")


def test_several_choices_and_a_stream_follow_the_schema_too(api: Client, chat: Ask) -> None:
    for choice in chat(response_format=STRICT, n=4, **LONG)["choices"]:
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
    body = {"model": api.model, "messages": HELLO, "response_format": STRICT, "stream": True} | LONG
    with api.http.stream("POST", "/v1/chat/completions", json=body) as response:
        pieces = [event["choices"][0]["delta"].get("content") or "" for event in chunks(response)]
    jsonschema.validate(json.loads("".join(pieces)), SCHEMA)


def test_the_package_parses_into_its_own_types(server: Server) -> None:
    class Cat(BaseModel):
        is_asleep: bool
        lives: int

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as sdk:
        parsed = sdk.chat.completions.parse(
            model=server.model,
            messages=HELLO,  # type: ignore[arg-type]
            response_format=Cat,
            max_tokens=300,
            temperature=0,
            extra_body={"top_k": 3},
        )
    if parsed.choices[0].finish_reason == "stop":
        assert isinstance(parsed.choices[0].message.parsed, Cat)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "grammar"}}, "response_format"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"guided_json": 5}, "guided_json"),
        ({"response_format": {"type": "json_object", "schema": 123}}, "response_format"),
        ({"guided_regex": "a" * 70_000}, "guided_regex"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"guided_regex": "a", "min_tokens": 1}, "min_tokens"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_is_no_grammar_is_refused(refused: Any, fields: dict[str, Any], param: str) -> None:
    for path in ("completions", "chat/completions"):
        assert refused(path, fields)["param"] == param


def test_forced_tokens_are_no_evidence(api: Client) -> None:
    """Of "fox NN dog" only the digits could have been other text; the rest is neither learned nor learned again."""

    def learned(session: str, **fields: Any) -> int:
        body = {"model": api.model, "prompt": "The", "max_tokens": 40, "session": session, "learn": "completion"}
        reply = assert_success(api.post("completions", body | {"seed": 1} | fields))
        return int(reply["adaptation"]["tokens_learned"])

    assert learned("forced", guided_choice=["the only way it can be"]) == 0
    assert 0 < learned("half-forced", guided_regex="fox [0-9]{2} dog") <= 2


def test_a_session_that_learned_structured_output_is_learned_again_as_it_was(api: Client) -> None:
    api.http.put("/v1/sessions/relearned", json={"keep_text": True})
    body = {"model": api.model, "prompt": "The", "max_tokens": 40, "session": "relearned", "learn": "all", "seed": 1}
    assert_success(api.post("completions", body | {"prompt": "Something to unlearn, all of it."}))
    second = assert_success(api.post("completions", body | {"guided_regex": "fox [0-9]{2} dog"}))["adaptation"]
    assert_success(api.post("sessions/relearned/unlearn", {"version": 1}))
    session = api.session("relearned")
    assert session["tokens_learned"] == second["tokens_learned"]
