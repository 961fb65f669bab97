"""Cases of vLLM's documented server: its extra parameters, and its routes besides OpenAI's."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conformance.conftest import HELLO, Ask
from tests.live import Client, assert_success, chunks

EOS = "2"


def text(reply: Any) -> str:
    choice = reply["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


@pytest.mark.parametrize("path", ["/health", "/ping"])
def test_health_is_a_200(api: Client, path: str) -> None:
    assert api.http.get(path).status_code == 200


def test_version(api: Client) -> None:
    assert assert_success(api.http.get("/version")).keys() == {"version"}


def test_a_model_says_how_long_its_requests_may_be(api: Client) -> None:
    (model,) = assert_success(api.http.get("/v1/models"))["data"]
    assert (model["id"], model["root"], model["max_model_len"]) == (api.model, api.model, 512)


@pytest.mark.parametrize("fields", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-9}, {"temperature": 0, "top_k": 5}])
def test_a_sampler_that_leaves_one_token_is_greedy(complete: Ask, fields: dict[str, Any]) -> None:
    assert text(complete(**fields)) == text(complete(temperature=0))


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": -1},
        {"top_k": 0},
        {"min_p": 0.0},
        {"repetition_penalty": 1.0},
        {"min_tokens": 0},
        {"ignore_eos": False},
        {"stop_token_ids": []},
        {"use_beam_search": False, "length_penalty": 1.0, "early_stopping": False},
        {"skip_special_tokens": True, "include_stop_str_in_output": False},
        {"bad_words": [], "allowed_token_ids": None, "logits_processors": None},
        {"guided_json": None, "structured_outputs": None, "return_token_ids": False},
    ],
    ids=str,
)
def test_a_default_changes_nothing(complete: Ask, fields: dict[str, Any]) -> None:
    assert text(complete(**fields)) == text(complete())


@pytest.mark.parametrize(
    "fields", [{"top_k": 3}, {"min_p": 0.2}, {"repetition_penalty": 1.8}, {"top_k": 40, "top_p": 0.5}]
)
def test_sampling_with_a_seed_repeats(chat: Ask, fields: dict[str, Any]) -> None:
    assert text(chat(**fields)) == text(chat(**fields))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": -1}, "repetition_penalty"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids.0"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids.0"),
        ({"prompt_logprobs": -2}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"bad_words": ["fox"]}, "bad_words"),
        ({"allowed_token_ids": [5]}, "allowed_token_ids"),
        ({"truncate_prompt_tokens": 4}, "truncate_prompt_tokens"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
    ],
    ids=str,
)
def test_what_is_out_of_bounds_or_would_change_the_answer_is_refused(
    refused: Any, fields: dict[str, Any], param: str
) -> None:
    for path in ("completions", "chat/completions"):
        assert refused(path, fields)["param"] == param


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_each_chunk_has_the_numbers_of_tokens_so_far(api: Client, path: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body: dict[str, Any] = {"max_tokens": 5, "logit_bias": {EOS: -100}, "stream": True, "stream_options": options}
    body |= {"messages": HELLO} if path.startswith("chat") else {"prompt": "The quick"}
    with api.http.stream("POST", f"/v1/{path}", json=body) as response:
        usages = [event["usage"] for event in chunks(response)]
    assert all(usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] for usage in usages)
    generated = [usage["completion_tokens"] for usage in usages]
    assert generated == sorted(generated) and generated[-2:] == [5, 5]


@pytest.mark.parametrize("path", ["completions", "chat/completions", "embeddings", "responses"])
def test_a_request_need_not_name_the_model(api: Client, path: str) -> None:
    prompts: dict[str, Any] = {"chat/completions": {"messages": HELLO}, "completions": {"prompt": "The"}}
    response = api.post(path, prompts.get(path, {"input": "The"}))
    if path == "embeddings":
        assert response.json()["error"]["code"] == "no_encoder", "this server has no encoder"
    else:
        assert assert_success(response)["model"] == api.model


def test_a_high_penalty_repeats_no_token_of_prompt_and_text(complete: Ask) -> None:
    prompt = [40, 41, 42, 43]
    free = complete(prompt, temperature=0, logprobs=0, max_tokens=40, logit_bias={"1": -100, EOS: -100})
    held = complete(
        prompt, temperature=0, logprobs=0, max_tokens=40, logit_bias={"1": -100, EOS: -100}, repetition_penalty=10
    )
    distinct = [len(set(reply["choices"][0]["logprobs"]["tokens"])) for reply in (free, held)]
    assert distinct[0] < distinct[1]


def test_the_text_does_not_end_before_min_tokens(complete: Ask) -> None:
    ends = {"logit_bias": {EOS: 100}, "temperature": 0}
    assert complete(**ends)["usage"]["completion_tokens"] == 0
    reply = complete(**ends, min_tokens=4)
    assert reply["usage"]["completion_tokens"] == 4 and reply["choices"][0]["finish_reason"] == "stop"


def test_no_stop_string_ends_the_text_before_min_tokens(complete: Ask) -> None:
    free = text(complete(temperature=0))
    stopped = complete(temperature=0, stop=[free[0]], min_tokens=3)
    assert stopped["usage"]["completion_tokens"] >= 3 and text(stopped).startswith(free[0])


def test_ignore_eos_goes_on_to_the_limit(complete: Ask) -> None:
    reply = complete(logit_bias={EOS: 100}, ignore_eos=True)
    assert reply["usage"]["completion_tokens"] == 6 and reply["choices"][0]["finish_reason"] == "length"


def test_a_stop_token_ends_the_text_and_is_not_in_it(api: Client, complete: Ask) -> None:
    whole = complete(temperature=0, logprobs=0)["choices"][0]
    ids = assert_success(api.http.post("/tokenize", json={"prompt": whole["logprobs"]["tokens"][0]}))["tokens"]
    if len(ids) == 1:
        stopped = complete(temperature=0, stop_token_ids=ids)["choices"][0]
        assert (stopped["text"], stopped["finish_reason"]) == ("", "stop")
    forced = complete(temperature=0, logit_bias={"65": 100}, stop_token_ids=[65])["choices"][0]
    assert (forced["text"], forced["finish_reason"]) == ("", "stop")


@pytest.mark.parametrize("count", [0, 3])
def test_prompt_logprobs(api: Client, complete: Ask, chat: Ask, count: int) -> None:
    reply, talk = complete([7, 8, 9], prompt_logprobs=count), chat(prompt_logprobs=count)
    for tokens, total in (
        (reply["choices"][0]["prompt_logprobs"], 3),
        (talk["prompt_logprobs"], talk["usage"]["prompt_tokens"]),
    ):
        first, *others = tokens
        assert first is None and len(others) == total - 1
        for entries in others:
            assert count <= len(entries) <= count + 1
            assert all(entry["logprob"] <= 0 for entry in entries.values())
    second = reply["choices"][0]["prompt_logprobs"][1]["8"]
    assert second["frozen_logprob"] == second["logprob"]
    echoed = complete([7, 8, 9], echo=True, logprobs=1, max_tokens=0)["choices"][0]["logprobs"]
    assert second["logprob"] == echoed["token_logprobs"][1]


def test_prompt_logprobs_of_several_prompts_stand_with_their_choices(complete: Ask) -> None:
    choices = complete([[7, 8, 9], [7, 8]], prompt_logprobs=0, n=2)["choices"]
    assert [len(choice["prompt_logprobs"]) for choice in choices] == [3, 3, 2, 2]


def test_prompt_logprobs_tell_what_the_memory_changes(api: Client, complete: Ask) -> None:
    learned = "The cat of the house is called Miso and sleeps on the radiator."
    api.observe("prompt-logprobs", learned)
    reply = complete(learned, prompt_logprobs=0, session="prompt-logprobs", adapt="predict")
    tokens = [next(iter(entries.values())) for entries in reply["choices"][0]["prompt_logprobs"][1:]]
    gain = sum(token["logprob"] - token["frozen_logprob"] for token in tokens)
    assert gain > 1.0


def test_a_replay_has_the_log_probabilities_and_the_timings_of_the_first_answer(api: Client) -> None:
    body = {"model": api.model, "prompt": ["The fox", "A dog"], "max_tokens": 3, "session": "replayed", "best_of": 2}
    body |= {"prompt_logprobs": 2, "logprobs": 1, "seed": 1}
    first, again = (api.post("completions", body, **{"Idempotency-Key": "prompt-logprobs"}) for _ in range(2))
    assert again.headers["idempotent-replayed"] == "true"
    assert assert_success(first) == assert_success(again)


def test_a_final_message_is_continued(api: Client, chat: Ask) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "Well, the fox"}]
    fields = {"add_generation_prompt": False, "continue_final_message": True}
    prompt = assert_success(api.http.post("/apply-template", json={"messages": begun} | fields))["prompt"]
    assert prompt.endswith("Well, the fox")
    body = {"model": api.model, "prompt": prompt, "max_tokens": 6, "temperature": 0}
    continued = assert_success(api.post("completions", body))
    reply = chat(begun, temperature=0, **fields)
    assert text(reply) == text(continued)
    assert reply["usage"]["prompt_tokens"] == continued["usage"]["prompt_tokens"]


def test_a_continued_message_is_learned_neither_now_nor_when_it_comes_back(api: Client) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "Well, the fox"}]
    fields = {"add_generation_prompt": False, "continue_final_message": True}
    body = {"model": api.model, "max_tokens": 6, "temperature": 0, "session": "continued"}
    first = assert_success(api.post("chat/completions", body | {"messages": begun} | fields))
    alone = assert_success(api.post("chat/completions", body | {"messages": HELLO, "session": "continued-not"}))
    assert first["adaptation"]["tokens_learned"] == alone["adaptation"]["tokens_learned"] > 0
    whole = [*HELLO, {"role": "assistant", "content": "Well, the fox" + text(first)}]
    again = assert_success(api.post("chat/completions", body | {"messages": whole}))
    assert again["adaptation"]["tokens_learned"] == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"continue_final_message": True, "add_generation_prompt": True},
        {"continue_final_message": True, "add_generation_prompt": False},  # the last message is the user's
    ],
    ids=str,
)
def test_what_cannot_be_continued_is_refused(refused: Any, fields: dict[str, Any]) -> None:
    assert refused("chat/completions", fields)["param"] == "continue_final_message"


def test_a_prompt_without_the_assistants_turn(chat: Ask) -> None:
    assert chat(add_generation_prompt=False)["usage"]["prompt_tokens"] < chat()["usage"]["prompt_tokens"]


def test_tokenize_and_detokenize_are_inverse(api: Client) -> None:
    words = "The fox, naïve 猫 <|im_end|>"
    done = assert_success(api.http.post("/tokenize", json={"model": api.model, "prompt": words}))
    assert done["count"] == len(done["tokens"]) and done["max_model_len"] == 512 and done["token_strs"] is None
    assert assert_success(api.http.post("/detokenize", json={"tokens": done["tokens"]}))["prompt"] == words
    with_texts = assert_success(api.http.post("/tokenize", json={"prompt": words, "return_token_strs": True}))
    assert len(with_texts["token_strs"]) == done["count"]


def test_tokenize_counts_a_chat_as_completions_do(api: Client, chat: Ask) -> None:
    done = assert_success(api.http.post("/tokenize", json={"model": api.model, "messages": HELLO}))
    assert done["count"] == chat()["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "gpt-4o"}, 404, "model"),
        ("/detokenize", {"tokens": "a"}, 400, "tokens"),
        ("/detokenize", {"tokens": [10**6]}, 400, "tokens.0"),
        ("/apply-template", {"messages": []}, 400, "messages"),
    ],
    ids=str,
)
def test_faults_of_the_tokenizers_routes(api: Client, path: str, body: Any, status: int, param: str) -> None:
    response = api.http.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


@pytest.mark.parametrize("field", ["priority", "request_id", "cache_salt", "mm_processor_kwargs", "some_new_field"])
def test_a_field_that_changes_no_answer_is_ignored_and_named(api: Client, field: str) -> None:
    response = api.post("completions", api.completion(max_tokens=1) | {field: "x"})
    assert response.status_code == 200 and response.headers["x-imprint-ignored"] == field
