"""Cases of OpenAI's reference of completions, chat completions and models."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.conformance.conftest import HELLO, Ask
from tests.conftest import Server
from tests.live import Client, assert_error, assert_success, chunks

BOTH = ["completions", "chat/completions"]


def body(path: str, model: str, **fields: Any) -> dict[str, Any]:
    prompt = {"messages": HELLO} if path.startswith("chat") else {"prompt": "The quick"}
    return {"model": model, "max_tokens": 4, "seed": 1} | prompt | fields


def choice_text(choice: dict[str, Any]) -> str:
    """Return the text of a choice, or what a chunk adds to it."""
    return str(choice["text"] if "text" in choice else (choice.get("message") or choice["delta"]).get("content") or "")


@pytest.mark.parametrize(
    ("fields", "param", "instead"),
    [
        ({"functions": [{"name": "mood", "parameters": {"type": "object"}}]}, "functions", "tools"),
        ({"function_call": {"name": "mood"}}, "function_call", "tool_choice"),
        (
            {"messages": [*HELLO, {"role": "assistant", "function_call": {"name": "mood", "arguments": "{}"}}]},
            "messages.1.function_call",
            "tool_calls",
        ),
    ],
)
def test_what_tools_have_replaced_is_refused_with_the_new_name(
    api: Client, fields: dict[str, Any], param: str, instead: str
) -> None:
    error = assert_error(api.post("chat/completions", body("chat/completions", api.model) | fields), 400, None)
    assert error["param"] == param and f"use '{instead}'" in error["message"]


def test_a_reply_has_openais_fields(chat: Ask, complete: Ask) -> None:
    reply, text = chat(), complete()
    assert (reply["object"], text["object"]) == ("chat.completion", "text_completion")
    assert reply["id"].startswith("chatcmpl-") and text["id"].startswith("cmpl-")
    (choice,) = reply["choices"]
    assert choice["message"]["role"] == "assistant" and choice["message"]["refusal"] is None
    assert choice["finish_reason"] in ("stop", "length")
    usage = reply["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


def test_a_chat_without_a_temperature_is_sampled_as_the_model_suggests(api: Client, chat: Ask, complete: Ask) -> None:
    def text(reply: dict[str, Any]) -> str:
        (choice,) = reply["choices"]
        return str(choice["text"] if "text" in choice else choice["message"]["content"])

    suggested = api.http.get("/v1/models").json()["data"][0]["sampling"]
    openai_default = {"temperature": 1, "top_p": 1, "frequency_penalty": 0}
    assert text(chat(max_tokens=40)) == text(chat(max_tokens=40, **suggested))
    assert text(chat(max_tokens=40)) != text(chat(max_tokens=40, **openai_default))
    assert text(chat(max_tokens=40, temperature=1)) == text(chat(max_tokens=40, **openai_default))
    assert text(complete(max_tokens=40)) == text(complete(max_tokens=40, **openai_default))


@pytest.mark.parametrize("path", BOTH)
def test_more_tokens_than_fit_are_as_many_as_fit(api: Client, path: str) -> None:
    response = api.post(path, body(path, api.model, max_tokens=10**6, temperature=0))
    usage = response.json()["usage"]
    assert response.status_code == 200 and usage["total_tokens"] <= 512


def test_a_reply_that_fills_the_context_ends_by_length(complete: Ask) -> None:
    reply = complete(max_tokens=10**6, logit_bias={"1": -100, "2": -100}, temperature=0)
    assert reply["usage"]["total_tokens"] == 512
    assert reply["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("path", BOTH)
def test_a_prompt_over_the_context_is_refused(api: Client, path: str) -> None:
    long = {"prompt": [5] * 600} if path == "completions" else {"messages": [{"role": "user", "content": "a b " * 900}]}
    response = api.post(path, body(path, api.model) | long)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_a_prompt_that_leaves_no_room_is_refused_unless_nothing_is_asked(complete: Ask, refused: Any) -> None:
    assert complete([5] * 512, max_tokens=0, echo=True)["usage"]["completion_tokens"] == 0
    assert refused("completions", {"prompt": [5] * 512, "max_tokens": 1})["code"] == "context_length_exceeded"


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_a_chat_has_at_most_the_tokens_asked_for(chat: Ask, limit: str) -> None:
    reply = chat(**{"max_tokens": None, limit: 3}, logit_bias={"1": -100, "2": -100})
    assert reply["usage"]["completion_tokens"] == 3
    assert reply["choices"][0]["finish_reason"] == "length"


def test_up_to_16_choices_in_order(chat: Ask, complete: Ask) -> None:
    assert [choice["index"] for choice in chat(n=16, max_tokens=2)["choices"]] == list(range(16))
    assert len({choice["text"] for choice in complete(n=4)["choices"]}) > 1


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("completions", {"n": 17}, "n"),
        ("chat/completions", {"seed": 2**63}, "seed"),
        ("chat/completions", {"seed": -(2**63) - 1}, "seed"),
        ("completions", {"best_of": 17}, "best_of"),
        ("completions", {"best_of": 1, "n": 2}, "best_of"),
        ("completions", {"best_of": 2, "stream": True}, "best_of"),
        ("completions", {"logprobs": 21}, "logprobs"),
        ("completions", {"temperature": -0.1}, "temperature"),
        ("completions", {"top_p": 1.1}, "top_p"),
        ("completions", {"presence_penalty": 2.1}, "presence_penalty"),
        ("completions", {"frequency_penalty": -2.1}, "frequency_penalty"),
        ("completions", {"logit_bias": {"5": 101}}, "logit_bias.5"),
        ("completions", {"suffix": "the end"}, "suffix"),
        ("completions", {"stream_options": {"include_usage": True}}, "stream_options"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"messages": HELLO}, "messages"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"prompt": "hi"}, "prompt"),
        ("chat/completions", {"top_logprobs": 2}, "top_logprobs"),
        ("chat/completions", {"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ("chat/completions", {"max_tokens": 0}, "max_tokens"),
        ("chat/completions", {"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ("chat/completions", {"modalities": ["audio"]}, "modalities"),
        ("chat/completions", {"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
        ("chat/completions", {"web_search_options": {}}, "web_search_options"),
        ("chat/completions", {"messages": [{"role": "robot", "content": "hi"}]}, "messages.0.role"),
    ],
    ids=str,
)
def test_what_is_out_of_bounds_is_refused_by_its_name(
    refused: Any, path: str, fields: dict[str, Any], param: str
) -> None:
    assert refused(path, fields)["param"] == param


def test_top_p_0_takes_the_likeliest_token(complete: Ask) -> None:
    assert complete(top_p=0)["choices"] == complete(temperature=0)["choices"]


def test_stop_strings_end_the_text_and_are_not_in_it(complete: Ask) -> None:
    whole = complete(temperature=0, max_tokens=12)["choices"][0]["text"]
    stop = next(char for char in whole[3:] if char.isascii() and not char.isspace())
    for stops in (stop, ["never", "not once", "no", "nor this", stop]):
        choice = complete(temperature=0, max_tokens=12, stop=stops)["choices"][0]
        assert choice["text"] == whole[: whole.index(stop)] and choice["finish_reason"] == "stop"


@pytest.mark.parametrize("count", [0, 1, 20])
def test_logprobs_of_a_completion_have_up_to_20_alternatives(complete: Ask, count: int) -> None:
    reply = complete(logprobs=count)
    logprobs = reply["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == reply["usage"]["completion_tokens"]
    assert all(1 <= len(top) <= count + 1 for top in logprobs["top_logprobs"])  # by their texts, which may be equal


def test_logprobs_of_a_chat(chat: Ask) -> None:
    content = chat(logprobs=True, top_logprobs=20)["choices"][0]["logprobs"]["content"]
    assert all(len(token["top_logprobs"]) == 20 and token["logprob"] <= 0 for token in content)
    assert chat()["choices"][0]["logprobs"] is None


def test_best_of_returns_the_likeliest_of_its_candidates(complete: Ask) -> None:
    candidates = complete(n=5, logprobs=0)["choices"]

    def mean(choice: Any) -> float:
        values = choice["logprobs"]["token_logprobs"]
        return sum(values) / len(values) if values else 0.0

    ranked = [choice["text"] for choice in sorted(candidates, key=mean, reverse=True)]
    best = complete(best_of=5, n=2)
    assert [choice["text"] for choice in best["choices"]] == ranked[:2]
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    assert best["choices"][0]["logprobs"] is None
    total = sum(len(choice["logprobs"]["tokens"]) for choice in candidates)
    assert best["usage"]["completion_tokens"] == total
    echoed = complete(best_of=5, n=1, echo=True, logprobs=0)
    assert echoed["choices"][0]["text"] == "The quick brown" + ranked[0]


@pytest.mark.parametrize(
    ("prompt", "choices"),
    [("The", 1), (["The", "A"], 2), ([5, 6], 1), ([[5, 6], [7]], 2), (["The", [5, 6]], 2)],
    ids=str,
)
def test_a_prompt_is_a_text_tokens_or_a_list_of_these(complete: Ask, prompt: Any, choices: int) -> None:
    reply = complete(prompt)
    assert len(reply["choices"]) == choices
    parts = [complete(one) for one in (prompt if choices > 1 else [prompt])]
    assert reply["usage"]["prompt_tokens"] == sum(part["usage"]["prompt_tokens"] for part in parts)
    assert [choice["text"] for choice in reply["choices"]] == [part["choices"][0]["text"] for part in parts]


@pytest.mark.parametrize("path", BOTH)
@pytest.mark.parametrize("with_usage", [True, False])
def test_a_stream_ends_with_its_usage_and_done(api: Client, path: str, with_usage: bool) -> None:
    fields = body(path, api.model, stream=True) | ({"stream_options": {"include_usage": True}} if with_usage else {})
    with api.http.stream("POST", f"/v1/{path}", json=fields) as response:
        events = list(chunks(response))
    assert len({event["id"] for event in events}) == 1
    last = events[-1]
    if with_usage:
        assert last["choices"] == [] and last["usage"]["completion_tokens"] >= 0
        assert all(event["usage"] is None for event in events[:-1])
    else:
        assert last["choices"][0]["finish_reason"] and all(event.get("usage") is None for event in events)


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_stream_has_the_text_of_the_reply(api: Client, path: str) -> None:
    fields = body(path, api.model, n=2, seed=4, max_tokens=6)
    whole = [choice_text(choice) for choice in assert_success(api.post(path, fields))["choices"]]
    texts, reasons = ["", ""], list[str]()
    with api.http.stream("POST", f"/v1/{path}", json=fields | {"stream": True}) as response:
        for event in chunks(response):
            (choice,) = event["choices"]
            texts[choice["index"]] += choice_text(choice)
            reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    assert texts == whole and len(reasons) == 2


def test_another_seed_gives_another_text(complete: Ask) -> None:
    assert len({complete(seed=seed)["choices"][0]["text"] for seed in range(4)}) == 4


def test_logprobs_come_with_the_chunks_of_a_stream(api: Client) -> None:
    fields = body(
        "chat/completions", api.model, temperature=0, max_tokens=5, logprobs=True, top_logprobs=10, stream=True
    )
    text, tokens = "", list[dict[str, Any]]()
    with api.http.stream("POST", "/v1/chat/completions", json=fields) as response:
        for event in chunks(response):
            text += choice_text(event["choices"][0])
            tokens += (event["choices"][0]["logprobs"] or {"content": []})["content"]
    assert b"".join(bytes(token["bytes"]) for token in tokens).decode(errors="replace") == text
    assert all(len(token["top_logprobs"]) == 10 for token in tokens)


def test_an_echo_has_the_log_probabilities_of_the_prompt(complete: Ask) -> None:
    for prompt in ("The quick brown", [40, 41, 42, 43]):
        (choice,) = complete(prompt, echo=True, logprobs=1)["choices"]
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(logprobs["text_offset"]) > 4
        assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
        assert all(1 <= len(top) <= 2 for top in logprobs["top_logprobs"][1:])
        assert not isinstance(prompt, str) or choice["text"].startswith(prompt)


def test_a_bias_is_of_a_token_of_the_vocabulary(complete: Ask, chat: Ask, refused: Any) -> None:
    first = complete(temperature=0, max_tokens=1, logit_bias={"70": 100})["choices"][0]["text"]
    assert first == complete([70], max_tokens=0, echo=True)["choices"][0]["text"]
    assert chat(logit_bias={"70": -100})["choices"]
    for bias, named in (({"1000000": 1}, "1000000"), ({"no_id": 50}, "no_id"), ({"1": "much"}, "1")):
        error = refused("chat/completions", {"logit_bias": bias})
        assert error["param"] == f"logit_bias.{named}" and named in error["message"]


def test_an_error_names_all_keys_that_are_no_token_ids(refused: Any) -> None:
    error = refused("chat/completions", {"logit_bias": {"one": 1, "2": 1, "-3": 1, "four": 1}})
    assert error["param"] == "logit_bias" and all(key in error["message"] for key in ('"one"', '"-3"', '"four"'))


def test_parts_of_text_are_the_text(chat: Ask) -> None:
    parts = [{"type": "text", "text": HELLO[0]["content"]}]
    assert chat([{"role": "user", "content": parts}], temperature=0)["choices"] == chat(temperature=0)["choices"]


def test_a_seed_and_temperature_0_repeat_the_reply(chat: Ask) -> None:
    assert chat(seed=3)["choices"] == chat(seed=3)["choices"]
    assert chat(temperature=0, seed=None)["choices"] == chat(temperature=0, seed=5)["choices"]


@pytest.mark.parametrize("user", ["teaches-nothing", "an e-mail <a@example.org> / or anything else", "é" * 400])
def test_user_is_any_text_and_teaches_nothing(api: Client, user: str) -> None:
    response = api.post("chat/completions", body("chat/completions", api.model, user=user))
    assert response.status_code == 200 and response.json()["adaptation"] is None
    assert response.headers["x-imprint-ignored"] == "user"
    assert api.version("teaches-nothing") == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("store", True),
        ("metadata", {"app": "x"}),
        ("service_tier", "flex"),
        ("reasoning_effort", "high"),
        ("verbosity", "low"),
        ("prompt_cache_key", "k"),
        ("prompt_cache_retention", "24h"),
        ("safety_identifier", "s"),
        ("parallel_tool_calls", True),
        ("prediction", {"type": "content", "content": "x"}),
    ],
)
def test_a_hint_is_ignored_and_named(api: Client, field: str, value: Any) -> None:
    for more in ({}, {"stream": True}):
        fields = body("chat/completions", api.model) | {field: value} | more
        response = api.post("chat/completions", fields)
        assert response.status_code == 200, response.text
        assert response.headers["x-imprint-ignored"] == field


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none"},
        {"tool_choice": "auto"},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"n": 1, "store": False, "metadata": {}},
        {"stop": None, "logit_bias": None, "stream_options": None, "tools": None, "audio": None, "seed": None},
    ],
    ids=str,
)
def test_a_value_that_changes_nothing_passes_without_a_word(api: Client, fields: dict[str, Any]) -> None:
    response = api.post("chat/completions", body("chat/completions", api.model) | fields)
    assert response.status_code == 200 and "x-imprint-ignored" not in response.headers


@pytest.mark.parametrize("path", ["", "/v1"])
def test_a_base_url_works_with_v1_and_without(server: Server, path: str) -> None:
    with openai.OpenAI(base_url=server.url + path, api_key="none", max_retries=0) as client:
        model = client.models.list().data[0].id
        assert client.models.retrieve(model).id == model
        assert client.completions.create(model=model, prompt="The", max_tokens=1).choices
        reply = client.chat.completions.create(model=model, messages=HELLO, max_tokens=2, stream=True)  # type: ignore[arg-type]
        assert list(reply)


def test_errors_are_the_packages_own(sdk: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.chat.completions.create(model="gpt-4o", messages=HELLO)  # type: ignore[arg-type]
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        sdk.completions.create(model=server.model, prompt="a", extra_body={"sesion": "ada"})
    assert bad.value.param == "sesion" and "'session'" in bad.value.message


def test_messages_that_others_wrote_come_back(chat: Ask) -> None:
    reply: dict[str, Any] = {"role": "assistant", "content": "Hm.", "refusal": None, "annotations": [], "audio": None}
    reply |= {"reasoning_content": "so", "tool_calls": None, "function_call": None}
    assert chat([*HELLO, reply, *HELLO])["choices"]
