"""Code completion: `/infill` in llama.cpp's shape, `suffix`, and the requests that editors really send."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

from model.adaptive_lm import DecodeState
from model.base.config import tiny_config
from service.engine.text_sequence import TextStream
from service.http.infill_schemas import InfillReply
from service.turns.completion_job import AdaptPolicy, GenerationOptions, build_segment
from service.turns.infill import fill_in
from service.turns.prompts import TextPrompt, encode
from tests.live import Client, Json, assert_error, assert_success, wait_until
from tests.service.in_process import InProcessServer
from tests.tiny import INFILL_SPECIAL, SPECIAL, TEXT, build_tiny_base

CONTEXT = 4096
BEFORE, AFTER = TEXT[:80], TEXT[90:150]
ENDS = {str(token): -100 for token in range(len(SPECIAL) + len(INFILL_SPECIAL))}  # no text ends by itself


@pytest.fixture(scope="module")
def code_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessServer]:
    """Yield a server of a tiny base whose tokenizer has Qwen2.5-Coder's tokens for filling in the middle."""
    folder = tmp_path_factory.mktemp("code") / "qwen2.5-coder-tiny"
    base = build_tiny_base(folder, tiny_config(max_context=CONTEXT), special=[*SPECIAL, *INFILL_SPECIAL])
    server = InProcessServer(base, max_batch=1)
    yield server
    server.stop()


@pytest.fixture
def coder(code_server: InProcessServer) -> Iterator[Client]:
    with Client(code_server.url, code_server.model) as client:
        yield client


def infill(client: Client, **fields: Any) -> Json:
    body = {"input_prefix": BEFORE, "input_suffix": AFTER, "n_predict": 8, "logit_bias": ENDS} | fields
    return assert_success(client.http.post("/infill", json=body))


def test_a_gap_is_filled_as_by_the_prompt_that_clients_write_themselves(coder: Client) -> None:
    reply = infill(coder)
    InfillReply.model_validate(reply, strict=True)
    raw = f"<|fim_prefix|>{BEFORE}<|fim_suffix|>{AFTER}<|fim_middle|>"
    written = coder.complete(raw, logit_bias=ENDS)
    suffixed = coder.complete(BEFORE, suffix=AFTER, logit_bias=ENDS)
    assert reply["content"] == written["choices"][0]["text"] == suffixed["choices"][0]["text"] != ""
    assert reply["tokens_evaluated"] == written["usage"]["prompt_tokens"] == suffixed["usage"]["prompt_tokens"]
    assert (reply["stop_type"], reply["tokens_predicted"], reply["truncated"]) == ("limit", 8, False)
    split = infill(coder, input_prefix=BEFORE[:50], prompt=BEFORE[50:])
    assert split["content"] == reply["content"], "`prompt` is the end of the text before the gap"


def test_other_texts_change_the_prompt(coder: Client) -> None:
    extra = [{"text": TEXT[150:190], "filename": "other.txt", "time": 12}]
    raw = f"<|repo_name|>repository\n<|file_sep|>other.txt\n{TEXT[150:190]}<|file_sep|>file\n"
    raw += f"<|fim_prefix|>{BEFORE}<|fim_suffix|>{AFTER}<|fim_middle|>"
    written = coder.complete(raw, logit_bias=ENDS)
    reply = infill(coder, input_extra=extra)
    assert reply["content"] == written["choices"][0]["text"]
    assert reply["tokens_evaluated"] == written["usage"]["prompt_tokens"]


def test_a_stream_has_the_text_of_the_reply_and_no_done(coder: Client) -> None:
    whole = infill(coder)
    body = {"input_prefix": BEFORE, "input_suffix": AFTER, "n_predict": 8, "logit_bias": ENDS, "stream": True}
    text = coder.http.post("/infill", json=body).text
    *parts, last = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line]
    assert "".join(part["content"] for part in parts) == whole["content"]
    assert all(part["stop"] is False for part in parts) and last["stop"] is True and last["content"] == ""
    assert last["tokens_predicted"] == whole["tokens_predicted"]


def test_what_ends_a_text(coder: Client) -> None:
    text = infill(coder, n_predict=40)["content"]
    word = text[12:15]
    stopped = infill(coder, n_predict=40, stop=["\0", word])
    assert (stopped["content"], stopped["stop_type"], stopped["stopping_word"]) == (
        text[: text.index(word)],
        "word",
        word,
    )
    likely = {str(token): 100 for token in range(len(SPECIAL), len(SPECIAL) + len(INFILL_SPECIAL))}
    ended = infill(coder, logit_bias=likely)
    assert (ended["content"], ended["stop_type"]) == ("", "eos"), "the next file and the next gap end a text"


def test_an_infill_only_predicts_unless_it_says_otherwise(coder: Client) -> None:
    coder.observe("quiet", TEXT)
    for fields in ({"session": "quiet"}, {"session": "quiet", "learn": "all"}, {"model": f"{coder.model}@quiet"}):
        reply = infill(coder, **fields)
        assert reply["adaptation"]["version_to"] == 1 and reply["adaptation"]["tokens_learned"] == 0
    header = coder.http.post("/infill", json={"input_prefix": BEFORE}, headers={"X-Imprint-Session": "quiet"})
    assert assert_success(header)["adaptation"]["version_to"] == 1
    assert coder.complete(BEFORE, suffix=AFTER, session="quiet")["adaptation"]["tokens_learned"] == 0
    taught = infill(coder, session="quiet", adapt="both")["adaptation"]
    around = coder.http.post("/tokenize", json={"content": BEFORE}).json()["count"]
    around += coder.http.post("/tokenize", json={"content": AFTER}).json()["count"]
    assert (taught["tokens_learned"], taught["version_to"]) == (around, 2), "the text, not the tokens around it"


async def test_the_memory_looks_for_what_stands_before_the_gap(code_server: InProcessServer) -> None:
    """The last tokens of the prompt are the suffix's: no n-gram that was learned would end with them."""
    model = code_server.sessions.loaded_model
    last = tuple(model.tokenizer.encode(BEFORE)[-8:])
    raw = TextPrompt(f"<|fim_prefix|>{BEFORE}<|fim_suffix|>{AFTER}<|fim_middle|>")
    filled, _, _ = await fill_in(BEFORE, AFTER, [], model, 8)
    for prompt in (filled, raw):
        encoded = encode(prompt, model.tokenizer, (), reply=True)
        segment = build_segment(GenerationOptions(8), prompt, encoded, AdaptPolicy("predict", False, False), CONTEXT)
        assert segment.generate is not None and segment.generate.follows == last
        request = model.recall.request(encoded.token_ids, encoded.question, chat=False)
        assert request is not None and request.query is not None
        assert model.tokenizer.decode(encoded.token_ids[slice(*request.query)]) in BEFORE, (
            "episodes are found by it too"
        )
    state = DecodeState(torch.zeros(4), torch.arange(8), torch.zeros(2))
    assert state.following(last).last_tokens.tolist() == list(last)
    assert state.following(last[-3:]).last_tokens.tolist() == [-1] * 5 + list(last[-3:])


def test_a_text_that_is_too_long_is_cut_and_the_cut_is_told(coder: Client) -> None:
    body: Json = {"input_prefix": TEXT * 200, "input_suffix": TEXT * 100, "n_predict": 4, "logit_bias": ENDS}
    response = coder.http.post("/infill", json=body)
    reply = assert_success(response)
    cut = reply["tokens_cut"]
    assert reply["truncated"] and cut["prefix"] > 0 < cut["suffix"] and cut["extra"] == 0
    assert reply["tokens_evaluated"] == CONTEXT - 4 and reply["tokens_predicted"] == 4
    told = f"prefix={cut['prefix']}, suffix={cut['suffix']}, extra=0"
    assert response.headers["X-Imprint-Cut"] == told
    completion = coder.post("completions", coder.completion(TEXT * 200, suffix=TEXT * 100, max_tokens=4))
    assert assert_success(completion)["choices"][0]["finish_reason"] and completion.headers["X-Imprint-Cut"] == told
    assert "X-Imprint-Cut" not in coder.http.post("/infill", json={"input_prefix": "a"}).headers


def test_nothing_is_computed_where_no_text_is_wanted(coder: Client) -> None:
    """Editors fill llama.cpp's cache of prompts so."""
    before = coder.metric("tokens_prefilled_total")
    extra = [{"text": TEXT, "filename": "a"}]
    for body in (
        {"input_extra": extra, "n_predict": 1},
        {"input_prefix": BEFORE, "input_extra": extra, "n_predict": 0},
    ):
        reply = assert_success(coder.http.post("/infill", json=body))
        assert (reply["content"], reply["tokens_evaluated"]) == ("", 0)
    assert assert_success(coder.http.post("/infill", json={"n_predict": 0, "response_fields": [""]})) == {}
    assert coder.metric("tokens_prefilled_total") == before


def test_a_text_that_is_to_be_learned_is_learned_also_where_no_text_is_wanted(coder: Client) -> None:
    body: Json = {"input_prefix": BEFORE, "n_predict": 0}
    headers = {"X-Imprint-Session": "no-text", "X-Imprint-Adapt": "both"}
    assert assert_success(coder.http.post("/infill", json=body, headers=headers))["adaptation"]["tokens_learned"] > 0
    assert infill(coder, session="no-text", adapt="both", n_predict=0)["adaptation"]["version_to"] == 2


def test_a_base_without_the_tokens_says_why_it_cannot(client: Client) -> None:
    for response in (
        client.http.post("/infill", json={"input_prefix": "a", "input_suffix": "b"}),
        client.post("completions", client.completion("a", suffix="b")),
    ):
        error = assert_error(response, 400, "infill_not_supported")
        assert error["param"] == "suffix" and "<|fim_prefix|>" in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input_prefix": 3}, "input_prefix"),
        ({"input_extra": [{"filename": "a"}]}, "input_extra.0.text"),
        ({"input_extra": [{"text": "a"}] * 300}, "input_extra"),
        ({"response_fields": ["a"] * 100}, "response_fields"),
        ({"n_predict": -2}, "n_predict"),
        ({"n_indent": -1}, "n_indent"),
        ({"n": 2}, "n"),
        ({"echo": True}, "echo"),
        ({"logprobs": 2}, "logprobs"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"sesion": "repo"}, "sesion"),
        ({"mirostat": 2}, "mirostat"),
        ({"adapt": "both"}, "adapt"),
        ({"model": "other"}, "model"),
    ],
)
def test_bad_requests_name_the_field(coder: Client, fields: Json, param: str) -> None:
    response = coder.http.post("/infill", json={"input_prefix": "a"} | fields)
    assert response.status_code in (400, 404) and response.json()["error"]["param"] == param, response.text


def test_a_suffix_needs_one_text(coder: Client) -> None:
    for fields, param in (({"prompt": ["a", "b"]}, "suffix"), ({"prompt": "a", "echo": True}, "echo")):
        response = coder.post("completions", coder.completion(**fields, suffix="b"))
        assert assert_error(response, 400, None)["param"] == param


# --- the text goes with the one who types -----------------------------------------------------------------------------


def endless(**fields: Any) -> Json:
    return {"input_prefix": BEFORE, "input_suffix": AFTER, "n_predict": 2000, "logit_bias": ENDS} | fields


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_ends_when_the_editor_sends_the_next_one(coder: Client, stream: bool) -> None:
    """The one place of the server is free at once, although 2,000 tokens were asked for."""
    before = coder.metric("tokens_predicted_total")
    if stream:
        with httpx.stream("POST", f"{coder.url}/infill", json=endless(stream=True), timeout=120) as response:
            chunks = response.iter_raw()
            next(chunks)
            assert coder.metric("requests_in_flight") == 1, "by which replicas are added"
    else:
        with httpx.Client(timeout=httpx.Timeout(120, read=0.2)) as editor, pytest.raises(httpx.ReadTimeout):
            editor.post(f"{coder.url}/infill", json=endless(session="typed"))
    assert infill(coder)["tokens_predicted"] == 8
    wait_until(coder.idle)
    assert coder.version("typed") == 0 and coder.metric("tokens_predicted_total") == before + 8


# --- lines ------------------------------------------------------------------------------------------------------------


class Pieces:
    """A decoder whose tokens are indices of texts."""

    def __init__(self, *pieces: str) -> None:
        self._pieces = pieces

    def step(self, token_id: int) -> str:
        return self._pieces[token_id]

    def flush(self) -> str:
        return ""


@pytest.mark.parametrize(
    ("pieces", "min_indent", "expected"),
    [
        (("a\n", "    b\n", "  c\n", "    d"), 4, "a\n    b"),
        (("a\n", "    b\n", "\n", "\n    c", "\nd"), 4, "a\n    b\n\n\n    c"),
        (("a\n  ", "  b", "\n\t", "x"), 2, "a\n    b"),
        (("a\n b", "\nc"), 1, "a\n b"),
        (("a\nb", "\nc"), 0, "a\nb\nc"),
        (("a", "\n\n}"), 4, "a"),
    ],
)
def test_a_text_ends_before_a_line_with_less_indentation(
    pieces: tuple[str, ...], min_indent: int, expected: str
) -> None:
    stream = TextStream(Pieces(*pieces), (), min_indent=min_indent)  # type: ignore[arg-type]
    shown = list[str]()
    for token in range(len(pieces)):
        released, ended = stream.num_released_chars, stream.push(token)
        shown.append(stream.text[released : stream.num_released_chars])
        if ended:
            break
    else:
        stream.finish()
        shown = [stream.text]
    assert stream.text == "".join(shown) == expected, "what was shown is never taken back"


def test_the_first_tokens_that_may_end_nothing_are_not_taken_back_by_a_later_line() -> None:
    stream = TextStream(Pieces("a\n", "bc", "\n    d", "\ne"), (), min_tokens=2, min_indent=4)  # type: ignore[arg-type]
    assert [stream.push(token) for token in range(4)] == [False, False, False, True]
    assert stream.text == "a\nbc\n    d"


def test_a_text_of_more_than_one_line_takes_its_time_only(coder: Client) -> None:
    newline = coder.http.post("/tokenize", json={"content": "\n"}).json()["tokens"][0]
    lines = ENDS | {str(newline): 100}
    late = infill(coder, n_predict=500, t_max_predict_ms=1, logit_bias=lines)
    assert 0 < late["tokens_predicted"] < 500 and late["has_new_line"] and late["stop_type"] == "limit"
    assert (
        infill(coder, n_predict=30, t_max_predict_ms=1, logit_bias=ENDS | {str(newline): -100})["tokens_predicted"]
        == 30
    )


# --- the requests of editors ------------------------------------------------------------------------------------------

LLAMA_VIM_FIELDS = [
    *("content", "timings/prompt_n", "timings/prompt_ms", "timings/prompt_per_token_ms", "timings/prompt_per_second"),
    *("timings/predicted_n", "timings/predicted_ms", "timings/predicted_per_token_ms", "timings/predicted_per_second"),
    *("truncated", "tokens_cached"),
]


def test_llama_vim(coder: Client) -> None:
    """autoload/llama.vim: `llama#fim`, and the request that warms its ring of chunks."""
    body: Json = {
        "input_prefix": "def area(r):\n",
        "input_suffix": "\n\nprint(area(2))\n",
        "input_extra": [{"text": "PI = 3\n", "time": 12.5, "filename": "constants.py"}],
        "prompt": "    return ",
        "n_predict": 16,
        "stop": [],
        "n_indent": 4,
        "top_k": 40,
        "top_p": 0.90,
        "stream": False,
        "samplers": ["top_k", "top_p", "infill"],
        "cache_prompt": True,
        "t_max_prompt_ms": 500,
        "t_max_predict_ms": 250,
        "response_fields": LLAMA_VIM_FIELDS,
    }
    response = coder.http.post("/infill", json=body, headers={"X-Imprint-Session": "vim"})
    reply = assert_success(response)
    assert set(reply) <= set(LLAMA_VIM_FIELDS) and {"content", "timings/prompt_n", "tokens_cached"} <= set(reply)
    assert "samplers" in response.headers["X-Imprint-Ignored"]
    chosen = assert_success(coder.http.post("/infill", json=body | {"model": f"{coder.model}@vim"}))
    assert chosen["content"] == reply["content"]
    ring: Json = body | {"id_slot": 0, "input_prefix": "", "input_suffix": "", "prompt": "", "n_predict": 0}
    ring |= {"temperature": 0.0, "samplers": [], "t_max_prompt_ms": 1, "t_max_predict_ms": 1, "response_fields": [""]}
    assert assert_success(coder.http.post("/infill", json=ring)) == {}
    assert coder.version("vim") == 0


def test_llama_vscode(coder: Client) -> None:
    """src/llama-server.ts: `getFIMCompletion`, and the request that prepares the next one."""
    body: Json = {
        "input_prefix": "def area(r):\n",
        "input_suffix": "\n\nprint(area(2))\n",
        "input_extra": [{"text": "PI = 3\n", "time": 1700000000000, "filename": "constants.py"}],
        "prompt": "    return ",
        "n_predict": 16,
        "top_k": 40,
        "top_p": 0.99,
        "stream": False,
        "n_indent": 4,
        "samplers": ["top_k", "top_p", "infill"],
        "cache_prompt": True,
        "t_max_prompt_ms": 500,
        "t_max_predict_ms": 500,
    }
    reply = assert_success(coder.http.post("/v1/sessions/vscode/infill", json=body))
    assert (
        reply["adaptation"]["version_to"] == 0
        and reply["content"] == infill(coder, **body | {"logit_bias": {}})["content"]
    )
    assert isinstance(reply["content"], str) and reply["timings"]["prompt_n"] == reply["tokens_evaluated"] > 0
    warm: Json = body | {
        "input_prefix": "",
        "input_suffix": "",
        "prompt": "",
        "n_predict": 1,
        "samplers": ["temperature"],
    }
    assert assert_success(coder.http.post("/v1/sessions/vscode/infill", json=warm))["content"] == ""
    assert coder.version("vscode") == 0


def test_continue(coder: Client) -> None:
    """core/llm/llms/OpenAI.ts with `useLegacyCompletionsEndpoint`: it writes the template of Qwen-Coder itself."""
    stops = ["<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>"]
    body: Json = {
        "model": f"{coder.model}:predict@continue",
        "prompt": "<|fim_prefix|># Path: a.py\ndef area(r):\n    return <|fim_suffix|>\n\nprint(area(2))<|fim_middle|>",
        "max_tokens": 16,
        "temperature": 0.01,
        "stream": True,
        "stop": [*stops, "<|file_sep|>", "<|im_start|>", "<|im_end|>", "/src/", "#- coding: utf-8", "```"],
    }
    with httpx.stream("POST", f"{coder.url}/v1/completions", json=body, timeout=120) as response:
        assert response.status_code == 200, response.read()
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events[-1] == "[DONE]" and all("choices" in json.loads(event) for event in events[:-1])
    assert coder.version("continue") == 0


def test_minuet(coder: Client) -> None:
    """lua/minuet/backends/common.lua: `complete_openai_fim_base` with `openai_fim_compatible`."""
    body: Json = {
        "model": f"{coder.model}@minuet",
        "stream": True,
        "prompt": "def area(r):\n    return ",
        "suffix": "\n\nprint(area(2))\n",
        "max_tokens": 16,
        "top_p": 0.9,
    }
    with httpx.stream("POST", f"{coder.url}/v1/completions", json=body, timeout=120) as response:
        assert response.status_code == 200, response.read()
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
    whole = assert_success(coder.http.post("/v1/completions", json=body | {"stream": False}))
    assert events[-1] == "[DONE]" and whole["choices"][0]["text"] == text
    assert coder.version("minuet") == 0


def test_ollama_clients_fill_gaps_too(coder: Client) -> None:
    body: Json = {"model": coder.model, "prompt": BEFORE, "suffix": AFTER, "stream": False}
    reply = assert_success(coder.http.post("/api/generate", json=body | {"options": {"num_predict": 8}}))
    without = coder.complete(BEFORE, suffix=AFTER)
    assert reply["response"] == without["choices"][0]["text"]
