"""Nothing that grows with a body runs on the event loop, and a body is refused as early as its size tells.

The gaps that a loop has on an idle machine are in the table of `python -m tests.loop_gap`; a busy machine allows only
bounds of seconds here, which the work of these bodies on the loop would exceed.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.text.tokenizer import PIECE_CHARS, Tokenizer
from service.concurrency import LARGE, STEP, dump_json, dump_json_pieces, run_off_loop
from service.errors import BadRequest
from service.http import json_route
from service.http.json_route import count_values, parse_json
from service.http.schemas import MAX_MESSAGES, MAX_PARTS
from service.turns.prompts import MAX_DIGESTS, MAX_LOGPROBS, ChatPrompt, TextPrompt, encode, segments
from tests.conftest import Server
from tests.live import Client, assert_error, assert_success
from tests.loop_gap import MB, bodies, deep_manifest, measured_gap, reset_peak, resident_mb

MAX_GAP_S = 3.0
MAX_GROWTH = 20  # bytes of memory for each byte of a text
REFUSED = (
    "chat of one 5 MB message",
    "chat of one largest message",
    "chat of 20,000 empty messages",
    "chat of 200,000 empty messages",
    "chat of one message in many parts",
    "text prompt",
    "128 text prompts",
    "list of token ids",
    "128 lists of token ids",
    "nested lists",
    "list of numbers",
    "escaped quotes",
    "no JSON",
)
JsonText = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('ab,[{"\\', max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('k,"\\', max_size=3), inner, max_size=4),
    max_leaves=30,
)


@pytest.mark.parametrize("name", REFUSED)
def test_the_server_answers_others_while_a_large_body_is_refused(server: Server, name: str) -> None:
    path, body = bodies("tiny", megabytes=15)[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    with httpx.Client(base_url=server.url, timeout=300) as client, measured_gap(server.url) as gap:
        response = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"]
    assert gap.seconds < MAX_GAP_S


def test_the_server_answers_others_while_a_long_text_is_learned_and_told(server: Server) -> None:
    with Client(server.url) as client, measured_gap(server.url) as gap:
        text = "The fox learns the way home. " * 2000
        client.observe("large-text", text)
        scored = client.score("large-text", text)
    assert len(scored["tokens"]) == len(scored["logprobs"]) == len(scored["frozen_logprobs"]) > 4096
    assert "".join(scored["tokens"]) == text
    assert scored["loss"] == pytest.approx(-sum(scored["logprobs"]) / len(scored["logprobs"]))
    assert gap.seconds < MAX_GAP_S


def test_a_large_answer_equals_the_small_ones(server: Server) -> None:
    with Client(server.url) as client:
        prompts: list[list[int]] = [[7, 8, 9] * 30, [9, 8, 7] * 30] * 4
        fields = {"max_tokens": 0, "echo": True, "logprobs": 3}
        response = client.post("completions", client.completion(prompts, **fields))
        whole = assert_success(response)
        assert response.headers["content-type"] == "application/json"
        single = client.complete(prompts[1], **fields)
    assert whole.keys() == single.keys()
    for index, choice in enumerate(whole["choices"]):
        assert choice["index"] == index
        assert choice.keys() == single["choices"][0].keys()
    tokens = single["choices"][0]["logprobs"]["tokens"]
    assert whole["choices"][1]["logprobs"]["tokens"] == tokens


def test_a_chat_has_as_many_messages_as_a_session_knows_again(server: Server) -> None:
    assert MAX_MESSAGES == MAX_DIGESTS
    with Client(server.url) as client:
        message = {"role": "user", "content": ""}
        for path in ("chat/completions", "sessions/many/observe"):
            body: dict[str, Any] = {"messages": [message] * (MAX_MESSAGES + 1)}
            body |= {"model": "tiny"} if path.startswith("chat") else {}
            error = client.post(path, body).json()["error"]
            assert error["param"] == "messages"
            assert str(MAX_MESSAGES) in error["message"] and str(MAX_MESSAGES + 1) in error["message"]
        parts = [{"type": "text", "text": "a"}] * (MAX_PARTS + 1)
        error = client.post("sessions/many/observe", {"messages": [message | {"content": parts}]}).json()["error"]
        assert error["param"] == "messages.0.content"


def test_a_deep_manifest_is_no_export(server: Server) -> None:
    response = httpx.put(f"{server.url}/v1/sessions/deep/import", content=deep_manifest(), timeout=60)
    assert_error(response, 400, "invalid_export")


def test_the_large_body_of_a_good_request_is_taken(server: Server) -> None:
    with Client(server.url) as client:
        body = client.completion("Hello") | {"logit_bias": {str(i): 0.5 for i in range(200)}}
        padded = json.dumps(body).encode() + b" " * LARGE
        large = client.http.post("/v1/completions", content=padded, headers={"Content-Type": "application/json"})
        assert assert_success(large)["choices"] == assert_success(client.post("completions", body))["choices"]
        bad = json.dumps(body | {"temperature": 900}).encode() + b" " * LARGE
        response = client.http.post("/v1/completions", content=bad, headers={"Content-Type": "application/json"})
        small = client.post("completions", body | {"temperature": 900})
        assert response.status_code == small.status_code == 400
        assert response.json() == small.json()


def test_an_answer_holds_the_log_probabilities_of_so_many_tokens(server: Server) -> None:
    with Client(server.url) as client:
        echo = client.completion([[7] * 400] * 128, max_tokens=0, echo=True, logprobs=5, n=8)
        error = assert_error(client.post("completions", echo), 400, "too_many_logprobs")
        assert error["param"] == "logprobs"
        assert str(MAX_LOGPROBS) in error["message"] and str(400 * 128 * 8) in error["message"]
        text = {"text": "The quick fox. " * MAX_LOGPROBS}
        assert_error(client.post("sessions/long-score/score", text), 400, "too_many_logprobs")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("text", ["a", "<|im_end|>", "天", "The quick brown fox. "])
@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_text_takes_at_most_twenty_times_its_bytes(text: str, kind: str, tiny_base: Path) -> None:
    def prompt_of(content: str) -> TextPrompt | ChatPrompt:
        return TextPrompt(content) if kind == "text" else ChatPrompt([{"role": "user", "content": content}])

    tokenizer, size = Tokenizer.load(tiny_base), 3 * MB  # many pieces, so that the memory of one piece counts little
    prompt = prompt_of(text * (size // len(text.encode())))
    encode(prompt_of(text * 2 * PIECE_CHARS), tokenizer, [], reply=False)  # what the library keeps for itself
    reset_peak(os.getpid())
    before = resident_mb(os.getpid(), "VmRSS")
    parts = segments(encode(prompt, tokenizer, [], reply=False), 512, 1, learn=True, score=True)
    assert sum(len(part.token_ids) - 1 for part in parts) >= tokenizer.fewest_tokens(size)
    assert resident_mb(os.getpid(), "VmHWM") - before < MAX_GROWTH * size / MB


def test_large_work_runs_on_another_thread_and_small_work_at_once() -> None:
    async def threads() -> list[int]:
        return [await run_off_loop(size, threading.get_ident) for size in (0, LARGE - 1, LARGE)]

    first, second, third = asyncio.run(threads())
    assert first == second == threading.get_ident() != third


@given(JsonText)
def test_the_count_is_no_less_than_the_values(value: Any) -> None:
    text = json.dumps(value).encode()
    assert count_values(text) >= _values(value) - 1


def _values(value: Any) -> int:
    match value:
        case dict():
            return 1 + sum(map(_values, value.values()))
        case list():
            return 1 + sum(map(_values, value))
        case _:
            return 1


@settings(max_examples=300, deadline=None)
@given(JsonText, st.integers(1, 9))
def test_the_exact_count_leaves_out_what_strings_hold(value: Any, chunk_bytes: int) -> None:
    text = json.dumps(value).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_route, "CHUNK_BYTES", chunk_bytes)
        patch.setattr(json_route, "MAX_VALUES", 0)
        counted = count_values(text)
        patch.setattr(json_route, "MAX_VALUES", counted)
        assert (count_values(text) > counted) == (_marks(text.decode()) > counted)


def _marks(text: str) -> int:
    """The commas and brackets outside of strings, counted character by character."""
    counted, in_string, escaped = 0, False, False
    for character in text:
        if in_string:
            in_string = escaped or character != '"'
            escaped = not escaped and character == "\\"
        elif character == '"':
            in_string = True
        else:
            counted += character in ",[{"
    return counted


@pytest.mark.parametrize("make", [lambda n: b"[" + b"1," * n + b"1]", lambda n: b'{"a":' + b"[]," * n])
def test_too_many_values_are_refused_before_they_are_parsed(make: Callable[[int], bytes]) -> None:
    with pytest.raises(BadRequest, match="262144 JSON values"):
        parse_json(make(json_route.MAX_VALUES + 1))
    assert parse_json(b'"' + b"[,{" * json_route.MAX_VALUES + b'"') == "[,{" * json_route.MAX_VALUES


@given(JsonText)
def test_json_in_steps_is_json(value: Any) -> None:
    values = [value] * (STEP + 2)
    for one in (value, values, {"a": values, "b": {"c": [values]}}):
        assert json.loads(dump_json(one)) == json.loads(json.dumps(one))
        assert json.loads(b"".join(reversed(dump_json_pieces(one)))) == json.loads(json.dumps(one))
    assert json.loads(dump_json({"a": iter(values), "b": iter([])})) == {"a": values, "b": []}
