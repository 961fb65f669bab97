"""The unmodified `ollama` client works, and gets the texts that OpenAI's routes give."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import ollama
import pytest
from jsonschema import validate

from service.http.ollama_schemas import OllamaChatReply, OllamaGenerateReply
from service.http.routes.ollama import LINES
from service.types import SUGGESTED_SAMPLING
from tests.live import Client, Json, assert_success
from tests.service.in_process import InProcessServer

HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "My cat is Miso."}]
GREEDY: Json = {"temperature": 0, "num_predict": 8}
SLEEP: Json = {
    "type": "function",
    "function": {
        "name": "sleep",
        "description": "Sleep.",
        "parameters": {
            "type": "object",
            "properties": {"hours": {"enum": [1, 2]}},
            "required": ["hours"],
            "additionalProperties": False,
        },
    },
}
SCHEMA: Json = {
    "type": "object",
    "properties": {"age": {"enum": [7, 12]}},
    "required": ["age"],
    "additionalProperties": False,
}


@pytest.fixture
def peer(memory_server: InProcessServer) -> Iterator[ollama.Client]:
    with ollama.Client(memory_server.url) as peer:
        yield peer


def chat_text(client: Client, messages: list[Json] = HELLO, **fields: Any) -> str:
    """Return the text of OpenAI's chat."""
    text: str = client.chat(messages, **fields)["choices"][0]["message"]["content"]
    return text


def test_a_chat_is_that_of_openais_route(peer: ollama.Client, client: Client) -> None:
    reply = peer.chat(client.model, HELLO, options=GREEDY)
    whole = client.chat(HELLO)
    assert reply.message.role == "assistant" and reply.message.content == whole["choices"][0]["message"]["content"]
    assert reply.model == client.model and reply.done and reply.done_reason == whole["choices"][0]["finish_reason"]
    counts = (reply.prompt_eval_count, reply.eval_count)
    assert counts == (whole["usage"]["prompt_tokens"], whole["usage"]["completion_tokens"])
    assert reply.total_duration == (reply.prompt_eval_duration or 0) + (reply.eval_duration or 0) > 0


def test_a_call_and_its_result_go_round(roomy_server: InProcessServer) -> None:
    """Ollama cannot require a call: beside a schema, each reply is JSON or a call.

    The package leaves `additionalProperties` out of the tools that it sends.
    """
    model, ask = roomy_server.model, [HELLO[1]]
    body: Json = {"model": model, "messages": ask, "format": {"enum": [{"a": 1}, {"a": 2}]}, "tools": [SLEEP]}
    with Client(roomy_server.url, model) as client:
        for seed in range(16):
            body["options"] = {"temperature": 2, "seed": seed, "num_predict": 400}
            called = ollama.ChatResponse(**assert_success(client.http.post("/api/chat", json=body | {"stream": False})))
            if called.message.tool_calls and called.done_reason == "stop":
                break
        lines = client.http.post("/api/chat", json=body).text.splitlines()
    calls = called.message.tool_calls or []
    assert calls and {call.function.name for call in calls} == {"sleep"} and called.message.content == ""
    assert all(call.function.arguments["hours"] in (1, 2) for call in calls)
    parts = [ollama.ChatResponse(**json.loads(line)) for line in lines]
    assert [call for part in parts for call in part.message.tool_calls or ()] == calls
    results = [{"role": "tool", "tool_name": "sleep", "content": "Done."}] * len(calls)
    with ollama.Client(roomy_server.url) as peer:
        answered = peer.chat(model, [*ask, called.message, *results], options=GREEDY)
    with Client(roomy_server.url, model) as client:
        spelt = [
            {"id": f"c{number}", "type": "function", "function": {"name": "sleep", "arguments": json.dumps(dict(a))}}
            for number, a in enumerate(call.function.arguments for call in calls)
        ]
        chat: Any = [*ask, {"role": "assistant", "content": None, "tool_calls": spelt}]
        chat += [{"role": "tool", "tool_call_id": call["id"], "content": "Done."} for call in spelt]
        whole = client.chat(chat)
    assert answered.message.content == whole["choices"][0]["message"]["content"]
    assert answered.prompt_eval_count == whole["usage"]["prompt_tokens"], "the prompt is that of OpenAI's shape"


def test_a_stream_has_the_text_and_the_counts_of_the_whole_reply(peer: ollama.Client, client: Client) -> None:
    whole = peer.chat(client.model, HELLO, options=GREEDY)
    *parts, last = peer.chat(client.model, HELLO, options=GREEDY, stream=True)
    assert "".join(part.message.content or "" for part in parts) == whole.message.content and not last.message.content
    assert [part.done for part in parts] == [False] * len(parts) and last.done
    assert (last.done_reason, last.prompt_eval_count, last.eval_count) == (
        whole.done_reason,
        whole.prompt_eval_count,
        whole.eval_count,
    )
    *texts, end = peer.generate(client.model, "My cat is", options=GREEDY, stream=True)
    assert "".join(part.response or "" for part in texts) == chat_text(client, [HELLO[1] | {"content": "My cat is"}])
    assert end.done and end.response == ""


@pytest.mark.parametrize("path", ["chat", "generate"])
def test_streams_are_json_lines_and_the_default(client: Client, path: str) -> None:
    body: Json = {"model": client.model, "options": GREEDY, "session": f"lines-{path}"}
    body |= {"messages": HELLO} if path == "chat" else {"prompt": "My cat is Miso."}
    streamed, whole = (client.http.post(f"/api/{path}", json=body | more) for more in ({}, {"stream": False}))
    assert streamed.headers["content-type"].startswith(LINES) and streamed.text.endswith("\n")
    model = OllamaChatReply if path == "chat" else OllamaGenerateReply
    for line in [*streamed.text.splitlines(), whole.text]:
        model.model_validate_json(line, strict=True)
    lines = [json.loads(line) for line in streamed.text.splitlines()]
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert lines[-1]["adaptation"]["version_to"] == 1 and not any("adaptation" in line for line in lines[:-1])


def test_a_raw_prompt_goes_on(peer: ollama.Client, client: Client) -> None:
    text = client.complete("Once upon a time")["choices"][0]["text"]
    assert peer.generate(client.model, "Once upon a time", raw=True, options=GREEDY).response == text
    suggested = client.complete("Once", seed=3, **vars(SUGGESTED_SAMPLING))["choices"][0]["text"]
    options: Json = {"num_predict": 8, "seed": 3}
    assert peer.generate(client.model, "Once", raw=True, options=options).response == suggested
    end = peer.generate(client.model, "Once", raw=True, options={"temperature": 0})
    assert (end.prompt_eval_count or 0) + (end.eval_count or 0) <= 512  # as many as fit, and not OpenAI's 16
    assert end.done_reason == "stop" or (end.eval_count or 0) > 400


def test_a_system_text_is_a_message(peer: ollama.Client, client: Client) -> None:
    reply = peer.generate(client.model, "My cat is Miso.", system="Be brief.", options=GREEDY)
    assert reply.response == chat_text(client)


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"temperature": 1.5, "top_k": 3}, {"temperature": 1.5, "top_k": 3}),
        ({"temperature": 1.5, "top_p": 0.3}, {"temperature": 1.5, "top_p": 0.3}),
        ({"temperature": 1.5, "min_p": 0.2}, {"temperature": 1.5, "min_p": 0.2}),
        ({"temperature": 1.5, "typical_p": 0.5}, {"temperature": 1.5, "typical_p": 0.5}),
        ({"temperature": 0, "repeat_penalty": 5.0}, {"temperature": 0, "repeat_penalty": 5.0}),
        (
            {"temperature": 0, "repeat_penalty": 5.0, "repeat_last_n": -1},
            {"temperature": 0, "repetition_penalty": 5.0},
        ),
        ({"temperature": 0, "presence_penalty": 2}, {"temperature": 0, "presence_penalty": 2}),
        ({"temperature": 0, "frequency_penalty": 2.0}, {"temperature": 0, "frequency_penalty": 2.0}),
        ({"temperature": 0, "stop": ["e"]}, {"temperature": 0, "stop": ["e"]}),
        ({"num_ctx": 4096, "num_thread": 2, "mirostat": 0}, {"temperature": None}),
    ],
    ids=lambda value: str(value),
)
def test_options_are_samplers(peer: ollama.Client, client: Client, options: Json, fields: Json) -> None:
    reply = peer.chat(client.model, HELLO, options={"num_predict": 12, "seed": 5} | options)
    assert reply.message.content == chat_text(client, max_completion_tokens=12, seed=5, **fields)


@pytest.mark.parametrize("more", [{}, {"stream": True}], ids=str)
def test_a_format_is_followed(peer: ollama.Client, client: Client, more: Json) -> None:
    options = {"temperature": 0, "num_predict": 40}
    for form in ("json", SCHEMA):
        reply: Any = peer.chat(client.model, HELLO, format=form, options=options, **more)
        text = "".join(part.message.content or "" for part in reply) if more else reply.message.content
        if form == SCHEMA:
            validate(json.loads(text), SCHEMA)
        else:
            assert text.lstrip().startswith("{")


def test_a_session_is_named_by_model_header_or_field_and_learns_each_message_once(
    peer: ollama.Client, client: Client, memory_server: InProcessServer
) -> None:
    first: Any = peer.chat(f"{client.model}:latest@ollama", HELLO, options=GREEDY)
    assert client.version("ollama") == 1
    learned = client.session("ollama")["tokens_learned"]
    history = [*HELLO, first.message.model_dump(exclude_none=True)]
    history.append({"role": "user", "content": "ok"})
    peer.chat(f"{client.model}@ollama", history, options=GREEDY)
    grown = client.session("ollama")["tokens_learned"] - learned
    assert 0 < grown < learned  # the new message only
    assert client.chat(history, session="ollama")["adaptation"]["tokens_learned"] == 0  # known in OpenAI's shape too
    with ollama.Client(memory_server.url, headers={"X-Imprint-Session": "by-header"}) as named:
        named.generate(client.model, "My cat is Miso.", options=GREEDY)
    assert client.version("by-header") == 1
    body: Json = {"model": client.model, "prompt": "Miso", "options": GREEDY, "stream": False}
    reply = assert_success(client.http.post("/api/generate", json=body | {"session": "by-header", "adapt": "predict"}))
    assert reply["adaptation"]["version_to"] == 1
    assert assert_success(client.http.post("/api/generate", json=body))["adaptation"] is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_repeated_key_learns_once(client: Client, stream: bool) -> None:
    session = f"ollama-key-{stream}"
    body = {"model": client.model, "messages": HELLO, "options": GREEDY, "session": session, "stream": stream}
    texts = set()
    for _ in range(2):
        answer = client.http.post("/api/chat", json=body, headers={"Idempotency-Key": session})
        texts.add("".join(json.loads(line)["message"]["content"] for line in answer.text.splitlines()))
    assert answer.headers["Idempotent-Replayed"] == "true" and len(texts) == 1
    assert client.version(session) == 1


def test_nothing_to_answer_is_a_loaded_model(peer: ollama.Client, client: Client) -> None:
    chat, text = peer.chat(client.model), peer.generate(client.model)
    assert chat.done and chat.done_reason == text.done_reason == "load" and chat.message.content == ""


def test_the_model_is_listed_and_shown(peer: ollama.Client, client: Client) -> None:
    (model,) = peer.list().models
    assert model.model == client.model and model.digest and model.modified_at and model.size
    shown = peer.show(f"{client.model}:latest")
    assert shown.capabilities == ["completion", "tools"] and shown.modelinfo is not None
    architecture = shown.modelinfo["general.architecture"]
    assert shown.modelinfo[f"{architecture}.context_length"] == 512
    assert shown.modelinfo["general.parameter_count"] > 0 and "temperature 0.4" in (shown.parameters or "")
    assert assert_success(client.http.get("/api/version")) == {"version": "0.6.4"}


CHAT: Json = {"messages": HELLO}


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("chat", CHAT | {"model": "llama3"}, 404, "llama3"),
        ("chat", {"model": "llama3"}, 404, "llama3"),
        ("show", {"model": "llama3"}, 404, "llama3"),
        ("chat", CHAT | {"model": None}, 400, "model"),
        ("chat", CHAT | {"options": {"temperature": "hot"}}, 400, "'options.temperature'"),
        ("chat", CHAT | {"options": {"stop": [""]}}, 400, "'options.stop.0'"),
        ("chat", CHAT | {"options": {"num_predict": -3}}, 400, "'options.num_predict'"),
        ("chat", CHAT | {"options": {"mirostat": 2}}, 400, "'mirostat'"),
        ("chat", CHAT | {"options": {"session": "ada"}}, 400, "'options.session'"),
        ("chat", CHAT | {"options": {"max_tokens": 5}}, 400, "'options.max_tokens'"),
        ("chat", CHAT | {"temperature": 0.5}, 400, "'temperature'"),
        ("chat", CHAT | {"sesion": "ada"}, 400, "did you mean 'session'"),
        ("chat", CHAT | {"adapt": "predict"}, 400, "needs a session"),
        ("chat", CHAT | {"session": "a b"}, 400, "'session'"),
        ("chat", CHAT | {"tools": [{"type": "function"}]}, 400, "'tools.0.function'"),
        ("chat", CHAT | {"messages": [{"role": "tool", "content": "a"}]}, 400, "'messages.0' must be the result"),
        ("chat", CHAT | {"format": "yaml"}, 400, "'format"),
        ("chat", CHAT | {"format": {"type": "nothing"}}, 400, "'json_schema' is no grammar"),
        ("chat", {"messages": [{"role": "robot", "content": "a"}]}, 400, "'messages.0.role'"),
        ("chat", {"messages": [{"role": "user", "content": "a", "images": ["aGk="]}]}, 400, "'messages.0.images'"),
        ("chat", {"messages": [HELLO[1] | {"content": "cat " * 2000}]}, 400, "512 tokens"),
        ("chat", {"messages": [HELLO[1]] * 1025}, 400, "'messages'"),
        ("generate", {"prompt": "a", "suffix": "b"}, 400, "'suffix'"),
        ("generate", {"prompt": "a", "context": [1]}, 400, "'context'"),
        ("generate", {"prompt": 7}, 400, "'prompt'"),
        ("generate", {"prompt": "a", "raw": True, "options": {"top_p": 2}}, 400, "'options.top_p'"),
    ],
    ids=lambda value: str(value)[-40:],
)
def test_errors_have_ollamas_shape(client: Client, path: str, body: Json, status: int, words: str) -> None:
    answer = client.http.post(f"/api/{path}", json={"model": client.model} | body)
    assert answer.status_code == status, answer.text
    (message,) = answer.json().values()
    assert words in message and list(answer.json()) == ["error"]


def test_the_clients_error_has_message_and_status(peer: ollama.Client, memory_server: InProcessServer) -> None:
    with pytest.raises(ollama.ResponseError, match="does not exist") as found:
        peer.chat("llama3", HELLO)
    assert found.value.status_code == 404 and found.value.error.startswith("The model 'llama3'")
    assert httpx.get(f"{memory_server.url}/api/nothing").json() == {"error": "There is no route GET /api/nothing."}


def test_ignored_fields_are_named(client: Client) -> None:
    body: Json = {"model": client.model, "messages": HELLO, "options": GREEDY | {"num_ctx": 64}}
    answer = client.http.post("/api/chat", json=body | {"keep_alive": "5m", "think": True})
    named = set(answer.headers["x-imprint-ignored"].split(", "))
    assert named == {"num_ctx", "keep_alive", "think"}


def test_the_loaded_model_is_listed(peer: ollama.Client, client: Client) -> None:
    (running,) = peer.ps().models
    (listed,) = peer.list().models
    assert running.model == listed.model == client.model
    assert running.size == listed.size and running.digest == listed.digest and running.context_length


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "text/plain", ""])
def test_a_program_need_not_declare_its_json_but_a_page_must(client: Client, content_type: str) -> None:
    """`curl -d` declares a form, and Ollama's own examples are of this kind."""
    body = json.dumps({"model": client.model, "prompt": "Hello.", "stream": False, "options": GREEDY})
    headers = {"Content-Type": content_type} if content_type else {}
    assert assert_success(client.http.post("/api/generate", content=body, headers=headers))["done"]
    for of_a_page in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        assert client.http.post("/api/generate", content=body, headers=headers | of_a_page).status_code == 415
