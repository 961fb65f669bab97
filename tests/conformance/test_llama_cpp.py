"""Cases of llama.cpp's documented server: its names of samplers, its routes, and the timings of its replies."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.conformance.conftest import HELLO, Ask
from tests.live import Client, assert_success, chunks

NO_END = {"1": -100, "2": -100}


def text(reply: Any) -> str:
    choice = reply["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def test_health_says_ok(api: Client) -> None:
    assert assert_success(api.http.get("/health")) == {"status": "ok"}


def test_a_model_has_its_sizes(api: Client) -> None:
    (model,) = assert_success(api.http.get("/v1/models"))["data"]
    assert model["meta"]["n_ctx"] == 512 and model["meta"]["n_vocab"] > 256 and model["meta"]["n_params"] > 1000


def test_n_predict_is_the_limit(api: Client) -> None:
    body = {"model": api.model, "prompt": "The", "logit_bias": NO_END}
    for limit, tokens in ((3, 3), (0, 0)):
        usage = assert_success(api.post("completions", body | {"n_predict": limit}))["usage"]
        assert usage["completion_tokens"] == tokens


@pytest.mark.parametrize("limit", ["n_predict", "max_tokens"])
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_minus_one_goes_on_to_the_end_of_the_context(api: Client, path: str, limit: str) -> None:
    prompt = {"messages": HELLO} if path.startswith("chat") else {"prompt": "The"}
    body = {"model": api.model, "logit_bias": NO_END, limit: -1, "temperature": 0} | prompt
    assert assert_success(api.post(path, body))["usage"]["total_tokens"] == 512


@pytest.mark.parametrize(
    "fields",
    [
        {"repeat_penalty": 1.0, "repeat_last_n": 64},
        {"repeat_penalty": 3.0, "repeat_last_n": 0},
        {"typical_p": 1.0, "top_k": 0, "min_p": 0.0},
        {"mirostat": 0, "dry_multiplier": 0.0, "xtc_probability": 0.0, "dynatemp_range": 0.0},
        {"n_probs": 0, "grammar": "", "lora": [], "image_data": []},
    ],
    ids=str,
)
def test_a_default_changes_nothing(complete: Ask, fields: dict[str, Any]) -> None:
    assert text(complete(**fields)) == text(complete())


def test_repeat_penalty_is_the_repetition_penalty_of_the_last_tokens(complete: Ask) -> None:
    fields = {"temperature": 0, "max_tokens": 30, "logit_bias": NO_END}
    whole = text(complete(repetition_penalty=1.7, repeat_last_n=64, **fields))
    assert text(complete(repeat_penalty=1.7, **fields)) == whole
    assert text(complete(repeat_penalty=1.7, repeat_last_n=1, **fields)) != text(complete(**fields)) or whole


def test_typical_p_repeats_with_a_seed(complete: Ask) -> None:
    assert text(complete(typical_p=0.4, max_tokens=12)) == text(complete(typical_p=0.4, max_tokens=12))


def test_a_temperature_above_2_is_allowed(complete: Ask) -> None:
    assert text(complete(temperature=5)) == text(complete(temperature=5))


def test_n_probs_is_the_number_of_alternatives(complete: Ask) -> None:
    top = complete(n_probs=3)["choices"][0]["logprobs"]["top_logprobs"]
    assert top and all(1 <= len(entries) <= 4 for entries in top)  # by their texts, which may be equal


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"mirostat": 2}, "mirostat"),
        ({"grammar": "root ::= missing"}, "grammar"),
        ({"json_schema": {"type": "nothing"}}, "json_schema"),
        ({"json_schema": {"type": "object"}, "grammar": 'root ::= "a"'}, "grammar"),
        ({"dry_multiplier": 0.8}, "dry_multiplier"),
        ({"xtc_probability": 0.5}, "xtc_probability"),
        ({"samplers": ["top_k"]}, "samplers"),
        ({"lora": [{"id": 0, "scale": 1}]}, "lora"),
        ({"repeat_penalty": 1.1, "repetition_penalty": 1.1}, "repeat_penalty"),
        ({"repeat_last_n": -2}, "repeat_last_n"),
        ({"n_predict": -2, "max_tokens": None}, "n_predict"),
        ({"n_predict": 2, "max_tokens": 2}, "n_predict"),
        ({"typical_p": 0}, "typical_p"),
        ({"stop": ["a"] * 33}, "stop"),
        ({"stop": "a" * 1025}, "stop"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_would_change_the_answer_and_cannot_be_honoured_is_refused(
    refused: Any, fields: dict[str, Any], param: str
) -> None:
    for path in ("completions", "chat/completions"):
        assert refused(path, fields)["param"] == param


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cache_prompt", True),
        ("id_slot", 1),
        ("n_keep", -1),
        ("mirostat_tau", 5.0),
        ("dry_base", 1.75),
        ("timings_per_token", True),
        ("reasoning_format", "none"),
        ("keep_alive", "5m"),
        ("provider", {"order": ["x"]}),
    ],
)
def test_a_hint_is_ignored_and_named(api: Client, field: str, value: Any) -> None:
    response = api.post("completions", api.completion(max_tokens=1) | {field: value})
    assert response.status_code == 200 and response.headers["x-imprint-ignored"] == field


@pytest.mark.parametrize(
    ("prompt", "choices"),
    [
        ([40, 41, "The fox", 42], 1),
        (["The fox", 42], 1),
        ([[40, "The fox", 41], [40, 41], "The fox"], 3),
        (["The fox", [40, 41]], 2),
    ],
    ids=str,
)
def test_texts_and_tokens_mix_in_a_prompt(api: Client, complete: Ask, prompt: Any, choices: int) -> None:
    reply = complete(prompt, temperature=0)
    assert len(reply["choices"]) == choices
    one = prompt if choices == 1 else prompt[0]
    ids: list[int] = []
    for part in one if isinstance(one, list) else [one]:
        ids += [part] if isinstance(part, int) else api.http.post("/tokenize", json={"content": part}).json()["tokens"]
    assert complete(ids, temperature=0)["choices"][0]["text"] == reply["choices"][0]["text"]


def test_timings_come_with_the_reply_and_with_the_last_chunk(api: Client, complete: Ask) -> None:
    reply = complete(logit_bias=NO_END)
    timings = reply["timings"]
    assert (timings["prompt_n"], timings["predicted_n"]) == (reply["usage"]["prompt_tokens"], 6)
    assert timings["prompt_ms"] > 0 and timings["predicted_ms"] > 0 and timings["predicted_per_second"] > 0
    body = {"model": api.model, "messages": HELLO, "max_tokens": 3, "stream": True}
    with api.http.stream("POST", "/v1/chat/completions", json=body) as response:
        events = list(chunks(response))
    assert ["timings" in event for event in events] == [False] * (len(events) - 1) + [True]


def one_text(api: Client, prompt: Any = "The quick brown", **fields: Any) -> Any:
    """Return the reply of llama.cpp's own route."""
    body = {"prompt": prompt, "n_predict": 6, "temperature": 0} | fields
    return assert_success(api.http.post("/completion", json=body))


def test_its_own_route_has_the_text_of_openais(api: Client, complete: Ask) -> None:
    reply = one_text(api)
    expected = complete(temperature=0)
    assert reply["content"] == text(expected) and reply["tokens_evaluated"] == expected["usage"]["prompt_tokens"]
    assert (reply["stop_type"], reply["truncated"], reply["tokens_predicted"]) == ("limit", False, 6)
    ids = api.http.post("/tokenize", json={"content": "The quick brown"}).json()["tokens"]
    assert one_text(api, ids)["content"] == one_text(api, [*ids[:-1], ids[-1]])["content"] == reply["content"]
    assert one_text(api, n_predict=-1, logit_bias=NO_END)["stop_type"] == "limit"


def test_its_own_stream_and_chosen_fields(api: Client) -> None:
    whole = one_text(api)
    lines = api.http.post(
        "/completion", json={"prompt": "The quick brown", "n_predict": 6, "temperature": 0, "stream": True}
    )
    *parts, last = [json.loads(line.removeprefix("data: ")) for line in lines.text.split("\n\n") if line]
    assert "".join(part["content"] for part in parts) == whole["content"]
    assert last["stop"] is True and last["timings"]["predicted_n"] == 6
    fields = ["content", "timings/predicted_n"]
    assert one_text(api, response_fields=fields) == {"content": whole["content"], "timings/predicted_n": 6}


def parts_of(api: Client, **fields: Any) -> list[Any]:
    """Return the events of a stream of llama.cpp's own route."""
    body = {"prompt": "The quick brown", "n_predict": 6, "temperature": 0, "stream": True} | fields
    lines = api.http.post("/completion", json=body).text.split("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines if line]


def test_its_own_reply_has_the_ids_of_the_tokens(api: Client) -> None:
    reply = one_text(api, return_tokens=True, logit_bias=NO_END)
    assert len(reply["tokens"]) == reply["timings"]["predicted_n"] == 6 and one_text(api)["tokens"] == []
    assert api.http.post("/detokenize", json={"tokens": reply["tokens"]}).json()["content"] == reply["content"]
    *parts, last = parts_of(api, logit_bias=NO_END)
    assert [token for part in parts for token in part["tokens"]] == reply["tokens"] and last["tokens"] == []


def test_its_own_reply_has_the_prompt_and_the_settings(api: Client) -> None:
    fields = ["content", "generation_settings/n_predict", "prompt"]
    whole = one_text(api, response_fields=[], seed=3)
    assert whole["generation_settings"] | {"n_predict": 6, "seed": 3, "temperature": 0} == whole["generation_settings"]
    chosen = one_text(api, response_fields=fields)
    assert chosen == {"content": whole["content"], fields[1]: 6, "prompt": "The quick brown"}
    ids = api.http.post("/tokenize", json={"content": "The quick brown"}).json()["tokens"]
    assert one_text(api, ids)["prompt"] == "The quick brown"
    last = parts_of(api, seed=3)[-1]
    assert last["generation_settings"] == whole["generation_settings"] | {"stream": True}


def test_its_own_reply_has_the_alternatives_by_their_ids(api: Client) -> None:
    fields = {"n_probs": 10, "n_predict": 5, "logit_bias": NO_END}
    tokens = one_text(api, **fields, return_tokens=True)
    written = tokens["completion_probabilities"]
    assert [one["id"] for one in written] == tokens["tokens"] and len(written) == 5
    for one in written:
        top = one["top_logprobs"]
        assert len(top) == 10 and one["logprob"] == max(each["logprob"] for each in top) <= 0
        assert one["id"] in [each["id"] for each in top] and bytes(one["bytes"]).decode(errors="ignore") in one["token"]
    *parts, last = parts_of(api, **fields)
    assert [one for part in parts for one in part["completion_probabilities"]] == written
    assert one_text(api)["completion_probabilities"] is None and not last["completion_probabilities"]


def test_its_own_reply_has_the_probabilities_after_all_samplers(api: Client) -> None:
    fields = {"n_probs": 10, "n_predict": 5, "logit_bias": NO_END, "post_sampling_probs": True}
    for one in one_text(api, **fields)["completion_probabilities"]:
        assert one["prob"] == 1.0 and one["top_probs"][0] == {
            name: one[name] for name in ("id", "token", "bytes", "prob")
        }
        assert len(one["top_probs"]) == 10 and all(each["prob"] < 1e-30 for each in one["top_probs"][1:])
    for one in one_text(api, **fields, temperature=1, top_k=3, seed=1)["completion_probabilities"]:
        probs = [each["prob"] for each in one["top_probs"]]
        assert abs(sum(probs[:3]) - 1) < 1e-5 and 0 < one["prob"] < 1 and one["prob"] in probs[:3]


def test_its_own_route_biases_texts_and_tokens(api: Client) -> None:
    ids = api.http.post("/tokenize", json={"content": " x"}).json()["tokens"]
    free = one_text(api, return_tokens=True, logit_bias=NO_END)
    for bias in ([[" x", 100]], {" x": 100}, [[token, 100] for token in ids], {str(token): 100 for token in ids}):
        assert set(one_text(api, return_tokens=True, logit_bias=bias)["tokens"]) <= set(ids)
    first = free["tokens"][0]
    for value in (False, -100):
        assert first not in one_text(api, return_tokens=True, logit_bias=[[first, value], ["1", 0]])["tokens"]
    wrong: tuple[tuple[Any, str], ...] = (
        (5, "logit_bias"),
        ([[" x"]], "logit_bias.0"),
        ([[" x", 101]], "logit_bias.0.1"),
        ({" x": True}, "logit_bias. x"),
        ([[10**6, 1]], "logit_bias.1000000"),
        ([["ab " * 80, 1]] * 1024 + [["", 1]], "logit_bias"),
    )
    for bias, param in wrong:
        response = api.http.post("/completion", json={"prompt": "The", "logit_bias": bias})
        assert response.status_code == 400 and response.json()["error"]["param"].startswith(param), response.text


def test_its_own_route_teaches_the_session_that_it_names(api: Client) -> None:
    assert one_text(api)["adaptation"] is None
    assert one_text(api, session="llama")["adaptation"]["tokens_learned"] > 0 and api.version("llama") == 1
    several = api.http.post("/completion", json={"prompt": ["The", "A"]})
    assert several.status_code == 400 and several.json()["error"]["param"].startswith("prompt")
    assert api.http.post("/completion", json={"prompt": "The", "n": 2}).json()["error"]["param"] == "n"


def test_tokenize_with_pieces_and_back(api: Client) -> None:
    words = "naïve 猫"
    plain = assert_success(api.http.post("/tokenize", json={"content": words}))["tokens"]
    pieces = assert_success(api.http.post("/tokenize", json={"content": words, "with_pieces": True}))["tokens"]
    assert [entry["id"] for entry in pieces] == plain
    parts = [entry["piece"] for entry in pieces]
    assert b"".join(part.encode() if isinstance(part, str) else bytes(part) for part in parts).decode() == words
    assert assert_success(api.http.post("/detokenize", json={"tokens": plain}))["content"] == words
    assert assert_success(api.http.post("/detokenize", json={"tokens": []}))["content"] == ""


def test_a_template_is_applied_and_nothing_is_generated(api: Client) -> None:
    prompt = assert_success(api.http.post("/apply-template", json={"messages": HELLO}))["prompt"]
    assert prompt == "<|im_start|>user\nThe quick brown fox<|im_end|>\n<|im_start|>assistant\n"
