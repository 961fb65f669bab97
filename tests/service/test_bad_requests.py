"""Invalid requests: each is answered with a 4xx in OpenAI's shape that names the field, and the server goes on."""

import json
import re
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

Json = dict[str, Any]

JSON = {"Content-Type": "application/json"}
USER = [{"role": "user", "content": "hi"}]


def tool(**function: Any) -> Json:
    return {"type": "function", "function": {"name": "f"} | function}


TOOL = tool()

# field(s) added to a good completion request, the param of the error
COMPLETION: list[tuple[Json, str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": 1}, "prompt"),
    ({"prompt": True}, "prompt"),
    ({"prompt": {}}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt.0"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"prompt": [None]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": ["a", True]}, "prompt.1"),
    ({"prompt": [1, "a", None]}, "prompt.2"),
    ({"prompt": [1, "a", 2**31 - 1]}, "prompt.2"),
    ({"prompt": [[1, "a"], "b", [1, {}]]}, "prompt.2.1"),
    ({"prompt": [1, 2.5]}, "prompt.1"),
    ({"prompt": [1, True]}, "prompt.1"),
    ({"prompt": [-1]}, "prompt.0"),
    ({"prompt": [2**31 - 1]}, "prompt.0"),
    ({"prompt": [2**80]}, "prompt.0"),
    ({"prompt": [[1], [1, 2**31 - 1]]}, "prompt.1.1"),
    ({"model": 7}, "model"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": "16"}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": -2}, "max_tokens"),
    ({"max_tokens": 2**31}, "max_tokens"),
    ({"max_tokens": 10**3000}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 100.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": [1]}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"n": "2"}, "n"),
    ({"best_of": 17}, "best_of"),
    ({"best_of": 2, "n": 3}, "best_of"),
    ({"seed": 2**63}, "seed"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop.1"),
    ({"stop": ["a"] * 33}, "stop"),
    ({"stop": ["a" * 1025]}, "stop.0"),
    ({"stop": 5}, "stop"),
    ({"stop": [5]}, "stop.0"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias.a"),
    ({"logit_bias": {"-1": 1}}, "logit_bias.-1"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"logit_bias": {"1": "x"}}, "logit_bias.1"),
    ({"logit_bias": {"2147483647": 1}}, "logit_bias.2147483647"),
    ({"logit_bias": {str(i): 1 for i in range(5000)}}, "logit_bias"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"echo": 1}, "echo"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ({"stream": True, "stream_options": []}, "stream_options"),
    ({"suffix": "the end"}, "suffix"),
    ({"user": 5}, "user"),
    ({"session": ""}, "session"),
    ({"session": "-a"}, "session"),
    ({"session": "a/b"}, "session"),
    ({"session": "a\x00b"}, "session"),
    ({"session": "a\n"}, "session"),
    ({"session": "a" * 129}, "session"),
    ({"session": "é"}, "session"),
    ({"session": 1}, "session"),
    ({"adapt": "predict"}, "adapt"),
    ({"learn": "all"}, "learn"),
    ({"session": "bad", "adapt": "always"}, "adapt"),
    ({"session": "bad", "learn": "nothing"}, "learn"),
    ({"session": "bad", "learn": "completion", "n": 2}, "learn"),
    ({"session": "bad", "learn": "all", "prompt": ["a", "b"]}, "learn"),
    ({"session": "bad", "adapt": "observe", "n": 2}, "adapt"),
    ({"session": "bad", "learn": "all", "best_of": 2}, "learn"),
    ({"session": "bad", "adapt": "observe", "best_of": 2}, "adapt"),
    ({"messages": USER}, "messages"),
    ({"max_completion_tokens": 5}, "max_completion_tokens"),
    ({"sesion": "bad"}, "sesion"),
    ({"session_id": "bad"}, "session_id"),
    ({"adpat": "predict"}, "adpat"),
    ({f"unknown_{i}": 1 for i in range(100)}, ""),
    ({"prompt": "long " * 100_000}, "prompt"),
    ({"prompt": [1] * 100_000}, "prompt"),
]

# what a newcomer meets first, and words of the answer
WORDS: list[tuple[Json, str]] = [
    ({"messages": []}, "'messages' should have at least 1 item, got 0."),
    ({"max_tokens": 0}, "'max_tokens': should be at least 1, or -1 for as many as fit, got 0."),
    ({"session": "a" * 129}, "may have 128 characters: letters from a to z, digits and . _ ~ : @ + = -"),
    ({"session": "a" * 129}, "of 129 characters."),
    ({"response_format": "json"}, "'response_format' should be a JSON object, got \"json\"."),
    ({"response_format": {}}, '\'response_format.type\' must be "text", "json_object" or "json_schema", got none.'),
    ({"response_format": {"type": "xml"}}, 'or "json_schema", got "xml".'),
    ({"response_format": {"type": "json_schema"}}, "must be an object with a JSON Schema in 'schema', got null."),
]

CHAT: list[tuple[Json, str]] = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": {"role": "user", "content": "hi"}}, "messages"),
    ({"messages": ["hi"]}, "messages.0"),
    ({"messages": [{"content": "hi"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "robot", "content": "hi"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": ["hi"]}]}, "messages.0.content.0"),
    (
        {
            "messages": [
                *USER,
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "see"},
                        {"type": "image_url", "image_url": {"url": "http://a/b.png"}},
                    ],
                },
            ]
        },
        "messages.1.content.1.type",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages.0.content.0.text"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages.0.tool_calls.0.id"),
    ({"messages": [{"role": "assistant", "content": None}]}, "messages.0.content"),
    ({"messages": [{"role": "tool", "content": "7", "tool_call_id": "c1"}]}, "messages.0.tool_call_id"),
    ({"messages": [{"role": "user", "content": "long " * 100_000}]}, "messages"),
    ({"prompt": "hi"}, "prompt"),
    ({"echo": True}, "echo"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": 2**31}, "max_completion_tokens"),
    ({"max_completion_tokens": 5, "max_tokens": 6}, "max_tokens"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools.0.type"),
    ({"tools": [TOOL, TOOL]}, "tools"),
    ({"tools": [tool(name=f"f{i}") for i in range(129)]}, "tools"),
    ({"tools": [tool(name=f"f{i}", description="x" * 30_000) for i in range(5)]}, "tools"),
    ({"tools": [tool(name="a b")]}, "tools.0.function.name"),
    ({"tools": [tool(parameters={"type": "array"})]}, "tools.0.function.parameters"),
    ({"tools": [tool(parameters={"description": "x" * 70_000})]}, "tools.0.function.parameters"),
    ({"tools": [tool(parameters={"not": {}}, strict=True)]}, "tools"),
    ({"tools": [TOOL], "guided_regex": "a"}, "guided_regex"),
    ({"tools": [TOOL], "min_tokens": 1}, "min_tokens"),
    ({"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "b"}}}}, "response_format"),
    ({"response_format": "json"}, "response_format"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
    ({"web_search_options": {}}, "web_search_options"),
]

# method, path, body, status, param
SESSIONS: list[tuple[str, str, Json | None, int, str | None]] = [
    ("PUT", "/v1/sessions/-a", None, 400, "id"),
    ("PUT", "/v1/sessions/%00", None, 400, "id"),
    ("PUT", "/v1/sessions/%0A", None, 400, "id"),
    ("PUT", "/v1/sessions/a%0A", None, 400, "id"),
    ("PUT", "/v1/sessions/%FF", None, 400, "id"),
    ("PUT", "/v1/sessions/%2e%2e", None, 400, "id"),
    ("PUT", "/v1/sessions/a%20b", None, 400, "id"),
    ("PUT", "/v1/sessions/" + "a" * 129, None, 400, "id"),
    ("GET", "/v1/sessions/%F0%9F%90%B1", None, 400, "id"),
    ("PUT", "/v1/sessions/a%2Fb", None, 404, None),
    ("GET", "/v1/sessions/nobody-made-it", None, 404, "id"),
    ("DELETE", "/v1/sessions/nobody-made-it", None, 404, "id"),
    ("PUT", "/v1/sessions/bad", {"adapt": "never"}, 400, "adapt"),
    ("PUT", "/v1/sessions/bad", {"learn": True}, 400, "learn"),
    ("PUT", "/v1/sessions/bad", {"color": "red"}, 400, "color"),
    ("GET", "/v1/sessions?limit=0", None, 400, "limit"),
    ("GET", "/v1/sessions?limit=1001", None, 400, "limit"),
    ("GET", "/v1/sessions?limit=many", None, 400, "limit"),
    ("GET", "/v1/sessions?limit=1&limt=1", None, 400, "limt"),
    ("GET", "/v1/sessions?after=a%20b", None, 400, "after"),
    ("POST", "/v1/sessions/bad/observe", None, 400, None),
    ("POST", "/v1/sessions/bad/observe", {}, 400, "text"),
    ("POST", "/v1/sessions/bad/observe", {"text": "a", "messages": USER}, 400, "text"),
    ("POST", "/v1/sessions/bad/observe", {"text": 1}, 400, "text"),
    ("POST", "/v1/sessions/bad/observe", {"messages": []}, 400, "messages"),
    ("POST", "/v1/sessions/-bad/observe", {"text": "a"}, 400, "id"),
    ("POST", "/v1/sessions/bad/score", {}, 400, "text"),
    ("POST", "/v1/sessions/bad/score", {"text": "a", "learn": 1}, 400, "learn"),
    ("POST", "/v1/sessions/bad/score", {"text": ["a"]}, 400, "text"),
    ("GET", "/v1/models/another", None, 404, "model"),
    ("GET", "/v1/nothing", None, 404, None),
    ("GET", "/v1/sessions/", None, 404, None),
    ("GET", "/v1/completions", None, 405, None),
    ("POST", "/v1/models", {}, 405, None),
    ("PATCH", "/v1/sessions/bad", {}, 405, None),
    ("DELETE", "/v1/sessions", None, 405, None),
    ("POST", "/metrics", None, 405, None),
]

# bytes of a body, status, Content-Type
BODIES: list[tuple[bytes, int, str]] = [
    (b"", 400, "application/json"),
    (b"   ", 400, "application/json"),
    (b"null", 400, "application/json"),
    (b"[]", 400, "application/json"),
    (b'"prompt"', 400, "application/json"),
    (b"{", 400, "application/json"),
    (b'{"prompt": "a",}', 400, "application/json"),
    (b"{'prompt': 'a'}", 400, "application/json"),
    (b'{"prompt": "a"} {"prompt": "b"}', 400, "application/json"),
    (b"prompt=a", 400, "application/json"),
    (b"\x00", 400, "application/json"),
    (b'{"prompt": "a\x00"}', 400, "application/json"),
    (b'{"prompt": "\xff\xfe"}', 400, "application/json"),
    (b'{"prompt": "\xed\xa0\x80"}', 400, "application/json"),
    ('{"prompt": "a"}'.encode("utf-16"), 400, "application/json"),
    (b'{"prompt": "\\ud800"}', 400, "application/json"),
    (b'{"prompt": "\\udc00\\ud800"}', 400, "application/json"),
    (b'{"temperature": NaN}', 400, "application/json"),
    (b'{"temperature": Infinity}', 400, "application/json"),
    (b'{"temperature": -Infinity}', 400, "application/json"),
    (b'{"temperature": 1e999}', 400, "application/json"),
    (b'{"max_tokens": 1' + b"0" * 100_000 + b"}", 400, "application/json"),
    (b"[" * 100_000, 400, "application/json"),
    (b"[" * 100_000 + b"]" * 100_000, 400, "application/json"),
    (b'{"prompt":' * 50_000 + b"1" + b"}" * 50_000, 400, "application/json"),
    (b'{"' + b"k" * 1_000_000 + b'": 1}', 400, "application/json"),
    (b"{" + b",".join(b'"%d":0' % i for i in range(100_000)) + b"}", 400, "application/json"),
    (b'{"prompt": [' + b'"a",' * 100_000 + b"1]}", 400, "application/json"),
    (b'{"prompt": [1' + b",true" * 100_000 + b"]}", 400, "application/json"),
    (b'{"stop": [' + b"1," * 100_000 + b"1]}", 400, "application/json"),
    (b"prompt=a", 415, "application/x-www-form-urlencoded"),
    (b'{"prompt": "a"}', 415, "text/plain"),
    (b'{"prompt": "a"}', 415, "application/json; charset=latin-1"),
    (b'{"prompt": "a"}', 415, "multipart/form-data"),
    (b'{"prompt": "a"}', 415, "nonsense"),
    (b'{"prompt": "a"}', 415, ""),
]

# header, status, param
HEADERS: list[tuple[tuple[str, bytes], int, str]] = [
    (("X-Imprint-Session", b"a b"), 400, "X-Imprint-Session"),
    (("X-Imprint-Session", b""), 400, "X-Imprint-Session"),
    (("X-Imprint-Session", b"\xff"), 400, "X-Imprint-Session"),
    (("X-Imprint-Session", b"a" * 129), 400, "X-Imprint-Session"),
    (("X-Imprint-Adapt", b"sometimes"), 400, "X-Imprint-Adapt"),
    (("X-Imprint-Adapt", b"observe"), 400, "X-Imprint-Adapt"),
    (("If-Match", b'"v3"'), 400, "If-Match"),
    (("Idempotency-Key", b""), 400, "Idempotency-Key"),
    (("Idempotency-Key", b"k" * 256), 400, "Idempotency-Key"),
    (("Idempotency-Key", b"caf\xe9"), 400, "Idempotency-Key"),
]

# bytes on the wire, the statuses that may answer them; None = the connection may simply be closed
WIRE: list[tuple[bytes, set[int | None]]] = [
    (b"\x00\x01\x02\x03\r\n\r\n", {400}),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", {400, None}),
    (b"GET\r\n\r\n", {400}),
    (b"GET /livez HTTP/9.9\r\n\r\n", {400}),
    (b"GET /livez HTTP/1.1\r\nBad Header: a\r\n\r\n", {400}),
    (b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n", {400}),
    (b"GET http://[ HTTP/1.1\r\nHost: localhost\r\n\r\n", {400, 404}),
    (b"CONNECT a:80 HTTP/1.1\r\nHost: localhost\r\n\r\n", {400, 404, 405}),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400, 404, None}),
    (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n", {400}),
    (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: ten\r\n\r\n", {400}),
    (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999999\r\n\r\n", {400}),
    (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999999\r\n\r\n", {413}),
    (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        {400, None},
    ),
    (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 100\r\n\r\n{}",
        {None},
    ),
    (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 1\r\n\r\n{}",
        {400},
    ),
]


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def check(response: httpx.Response, status: int, param: str | None) -> str:
    """Check that the response is an error in OpenAI's shape, and return its message."""
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"]
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["message"] and len(error["message"]) < 1000
    if param is not None and status == 400:
        assert param in error["message"]
    return str(error["message"])


def ids(table: list[Any]) -> list[str]:
    return [re.sub(r"\s+", " ", repr(row))[:60].encode("ascii", "replace").decode() for row in table]


@pytest.mark.parametrize(("fields", "param"), COMPLETION, ids=ids(COMPLETION))
def test_completion_fields(client: httpx.Client, server: Any, fields: Json, param: str) -> None:
    body = {"model": server.model, "prompt": "hi", "max_tokens": 1} | fields
    check(client.post("/v1/completions", json=body), 400, param or None)


@pytest.mark.parametrize(("fields", "param"), CHAT, ids=ids(CHAT))
def test_chat_fields(client: httpx.Client, server: Any, fields: Json, param: str) -> None:
    body = {"model": server.model, "messages": USER} | fields
    check(client.post("/v1/chat/completions", json=body), 400, param)


@pytest.mark.parametrize(("fields", "words"), WORDS, ids=ids(WORDS))
def test_what_is_wrong_is_said_in_words(client: httpx.Client, server: Any, fields: Json, words: str) -> None:
    body = {"model": server.model, "messages": USER} | fields
    (param,) = fields
    assert words in check(client.post("/v1/chat/completions", json=body), 400, param)


@pytest.mark.parametrize(("method", "path", "body", "status", "param"), SESSIONS, ids=ids(SESSIONS))
def test_routes(
    client: httpx.Client, method: str, path: str, body: Json | None, status: int, param: str | None
) -> None:
    response = client.request(method, path, json=body) if body is not None else client.request(method, path)
    check(response, status, param)
    assert ("Allow" in response.headers) == (status == 405)


def test_allow_names_every_method_of_the_path(client: httpx.Client) -> None:
    assert client.patch("/v1/sessions/bad").headers["Allow"] == "GET, PUT, DELETE"


@pytest.mark.parametrize(("body", "status", "content_type"), BODIES, ids=ids(BODIES))
def test_bodies(client: httpx.Client, body: bytes, status: int, content_type: str) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    response = client.post("/v1/completions", content=body, headers=headers)
    error = response.json()["error"]
    check(response, status, error["param"])
    if status == 415:
        assert error["param"] == "Content-Type"


@pytest.mark.parametrize(("header", "status", "param"), HEADERS, ids=ids(HEADERS))
def test_headers(client: httpx.Client, server: Any, header: tuple[str, bytes], status: int, param: str) -> None:
    body = {"model": server.model, "prompt": "hi", "max_tokens": 1}
    check(client.post("/v1/completions", json=body, headers=[(header[0].encode(), header[1])]), status, param)


def test_the_name_of_a_model_cannot_name_what_is_no_session(client: httpx.Client, server: Any) -> None:
    for name in ("@", "@-a", "@a b", ":predict@", "@a\n"):
        response = client.post("/v1/completions", json={"model": server.model + name, "prompt": "a"})
        check(response, 400, "model")


def test_unknown_model(client: httpx.Client) -> None:
    for path, body in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": USER})):
        response = client.post(f"/v1/{path}", json={"model": "gpt-4o", **body})
        assert "gpt-4o" in check(response, 404, "model")
        assert response.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("route", ["observe", "score"])
def test_a_stale_if_match_is_a_412(client: httpx.Client, route: str) -> None:
    client.put("/v1/sessions/bad-etag")
    for stale in ('"v999"', "v0", "garbage", '"'):
        response = client.post(f"/v1/sessions/bad-etag/{route}", json={"text": "a"}, headers={"If-Match": stale})
        check(response, 412, "If-Match")


def test_a_malformed_if_match_is_a_412_though_the_request_was_answered_before(client: httpx.Client) -> None:
    key = {"Idempotency-Key": "answered"}
    observe = "/v1/sessions/bad-etag-again/observe"
    assert client.post(observe, json={"text": "a"}, headers=key).is_success
    assert client.post(observe, json={"text": "a"}, headers=key | {"If-Match": '"v0"'}).is_success
    for malformed in ("null", "v0", '"v0', '"v0" "v1"', "", '"v0", *'):
        check(client.post(observe, json={"text": "a"}, headers=key | {"If-Match": malformed}), 412, "If-Match")


def test_the_error_names_field_limit_and_value(client: httpx.Client, server: Any) -> None:
    body = {"model": server.model, "prompt": "hi", "temperature": 102.25}
    message = check(client.post("/v1/completions", json=body), 400, "temperature")
    assert "102.25" in message and re.search(r"\b100\b", message)


@pytest.mark.parametrize("prompt", ["a " * 50_000, [7] * 50_000], ids=["text", "tokens"])
def test_a_prompt_over_the_context_states_limit_and_count(
    client: httpx.Client, server: Any, prompt: str | list[int]
) -> None:
    response = client.post("/v1/completions", json={"model": server.model, "prompt": prompt})
    message = check(response, 400, "prompt")
    assert response.json()["error"]["code"] == "context_length_exceeded"
    numbers = [int(number) for number in re.findall(r"\d+", message)]
    assert any(number >= 50_000 for number in numbers) or "at least" in message
    assert any(0 < number < 50_000 for number in numbers)


def test_a_body_over_the_limit_is_a_413_declared_or_chunked(client: httpx.Client) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 2**20

    for content in (b" " * (40 * 2**20), chunks()):
        check(client.post("/v1/completions", content=content, headers=JSON), 413, None)


@pytest.mark.parametrize(("data", "allowed"), WIRE, ids=ids(WIRE))
def test_garbage_on_the_wire(server: Any, data: bytes, allowed: set[int | None]) -> None:
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as wire:
        wire.sendall(data)
        wire.shutdown(socket.SHUT_WR)
        answer = b""
        try:
            while part := wire.recv(65536):
                answer += part
        except ConnectionResetError:
            pass
    status = int(answer.split(b" ", 2)[1]) if answer else None
    assert status in allowed


def test_the_server_still_answers_and_has_counted_no_500(client: httpx.Client, server: Any) -> None:
    body = {"model": server.model, "prompt": "hi", "max_tokens": 1}
    good = client.post("/v1/completions", content=json.dumps(body), headers=JSON)
    assert good.status_code == 200, good.text
    exposition = client.get("/metrics").text
    codes = set(re.findall(r'imprint_requests_total\{code="(\d+)"', exposition))
    assert {"200", "400", "404", "405", "413", "415"} <= codes
    assert "500" not in codes
