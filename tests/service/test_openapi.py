"""The OpenAPI page: every route has a description and examples, and a running server agrees with them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
from jsonschema import Draft202012Validator

from service.http import reference, replies
from service.http.schemas import SAFE_INTEGER
from service.tenants import OPERATOR, new_key
from tests.conftest import Server
from tests.live import Client, assert_success
from tests.tiny import TEXT

Json = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
JSON_TYPE = "application/json"
EXAMPLE_RESPONSE = "resp_5f2b9c04d1e75f2b9c04d1e75f2b9c04"
EXAMPLE_ITEM = "msg_5f2b9c04d1e75f2b9c04d1e75f2b9c04.i0_alice"
ENCODES = {"create_embedding", "ollama_embed", "ollama_embedding"}  # operations that need a sentence encoder


@pytest.fixture(scope="module")
def page(server: Server) -> Json:
    page: Json = httpx.get(f"{server.url}/openapi.json").json()
    return page


def operations(page: Json) -> Iterator[tuple[str, str, Json]]:
    for path, methods in page["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def check(page: Json, schema: Json, value: Any) -> None:
    """Check that `value` matches `schema`, whose references point into the page."""
    Draft202012Validator({**schema, "components": page["components"]}).validate(value)


def examples(page: Json, media: Json) -> list[Any]:
    """Return the examples of a body, its own or those of its schema; of a stream, those of its events or lines."""
    if "itemSchema" in media and "\n\n" not in media["example"]:
        return [json.loads(line) for line in media["example"].splitlines()]
    if "itemSchema" in media:
        events = [event.splitlines() for event in media["example"].split("\n\n") if event]
        return [dict(line.split(": ", 1) for line in event) for event in events]
    schema = media["schema"]
    for option in schema.get("anyOf", []):
        if "$ref" in option:
            schema = option
    if "$ref" in schema:
        schema = page["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return [media["example"]] if "example" in media else list(schema.get("examples", []))


def bodies(operation: Json) -> Iterator[Json]:
    """Yield the request body and all response bodies of an operation, each by media type."""
    if "requestBody" in operation:
        yield operation["requestBody"]["content"]
    for answer in operation["responses"].values():
        yield answer.get("content", {})


def test_every_route_is_described_but_the_pages_files(page: Json) -> None:
    hidden = [file.name for file in (ROOT / "service").rglob("*.py") if "include_in_schema" in file.read_text()]
    assert hidden == ["page.py"]
    names = [operation["operationId"] for _, _, operation in operations(page)]
    assert len(set(names)) == len(names) >= 16


def test_every_route_has_a_description_and_examples_that_match_its_schemas(page: Json) -> None:
    for method, path, operation in operations(page):
        route = f"{method.upper()} {path}"
        assert operation["summary"] and operation["description"].endswith("."), route
        for content in bodies(operation):
            for media_type, media in content.items():
                if media_type == "application/octet-stream":
                    continue
                media_examples = examples(page, media)
                assert media_examples, f"{route}: {media_type} has no example"
                for example in media_examples:
                    check(page, media.get("schema") or media["itemSchema"], example)
        for parameter in operation.get("parameters", []):
            assert parameter["description"], route


def test_the_page_of_routes_and_errors_is_what_its_generator_prints() -> None:
    page = (ROOT / "docs" / "http.md").read_text()
    assert page == reference.markdown(), "write it again: python -m service.http.reference > docs/http.md"


def test_every_row_of_the_pages_tables_is_complete() -> None:
    tables = [block.splitlines() for block in reference.markdown().split("\n\n") if block.startswith("|")]
    assert len(tables) == 2
    for header, _, *rows in tables:
        assert rows
        for row in rows:
            before, *cells, after = re.split(r"(?<!\\)\|", row)
            assert before == after == "" and len(cells) == header.count("|") - 1, row
            assert cells[0].strip() and cells[-1].strip(), row


def test_the_examples_of_streams_are_events_of_chunks(page: Json) -> None:
    for path, chunk in (("/v1/completions", "CompletionChunk"), ("/v1/chat/completions", "ChatChunk")):
        stream = page["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]
        *events, done = [event["data"] for event in examples(page, stream)]
        assert done == "[DONE]"
        for event in events:
            getattr(replies, chunk).model_validate_json(event, strict=True)
        assert json.loads(events[-1])["adaptation"]
        _, described = stream["itemSchema"]["properties"]["data"]["anyOf"]
        for event in events:
            check(page, described["contentSchema"], json.loads(event))


def test_every_answer_of_the_middleware_is_described(page: Json) -> None:
    for method, path, operation in operations(page):
        assert operation["responses"].keys() >= {"4XX", "5XX"}, (method, path)


def schemas(value: Any) -> Iterator[Json]:
    """Yield each JSON Schema within a part of the page."""
    if isinstance(value, list):
        for item in value:
            yield from schemas(item)
    elif isinstance(value, dict):
        if isinstance(value.get("type"), str) or "anyOf" in value or "enum" in value:
            yield value
        for name, item in value.items():
            if name not in ("example", "examples"):
                yield from schemas(item)


def test_every_limit_of_a_field_is_a_word_of_json_schema_and_exact(page: Json) -> None:
    """pydantic writes a limit that it cannot express as `ge`, and FastAPI writes limits as floats."""
    found = list(schemas({name: page[name] for name in ("paths", "components")}))
    assert len(found) > 200
    for schema in found:
        assert not schema.keys() & {"ge", "gt", "le", "lt", "max_length", "min_length"}, schema
        for limit in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            assert abs(schema.get(limit, 0)) <= SAFE_INTEGER, schema


def test_no_parameter_can_be_null_and_each_header_has_its_format(page: Json) -> None:
    for method, path, operation in operations(page):
        for parameter in operation.get("parameters", []):
            assert {"type": "null"} not in parameter["schema"].get("anyOf", []), (method, path, parameter["name"])
            if parameter["in"] == "header":
                assert "pattern" in parameter["schema"], (method, path, parameter["name"])


def test_a_server_answers_the_examples_as_described(page: Json, server: Server) -> None:
    with Client(server.url, server.model) as client:
        exported, response = create_example_session(client), create_response(client)
        item = create_item(client)
        # Operations that overwrite or erase the session come last.
        for method, path, operation in sorted(operations(page), key=lambda item: item[0] in ("put", "delete")):
            if "Policies" in operation["tags"]:
                continue  # their examples name a policy that is not shipped
            if operation["operationId"] in ENCODES:
                continue
            if "Infill" in operation["tags"]:
                continue  # this server's base fills no gaps
            content = operation.get("requestBody", {}).get("content", {None: {"schema": {}}})
            for media_type, media in content.items():
                for example in [None] if media_type is None else examples(page, media) or [exported]:
                    url = address(operation, path).replace(EXAMPLE_RESPONSE, response).replace(EXAMPLE_ITEM, item)
                    check_answer(page, operation, send(client, method, url, example))


def create_example_session(client: Client) -> bytes:
    """Create the session that the examples name, with several versions, and return its export."""
    client.http.put("/v1/sessions/alice", json={"keep_text": True})
    for start in range(3):
        client.observe("alice", TEXT[start : start + 40])
    return client.http.get("/v1/sessions/alice/export").content


def create_response(client: Client) -> str:
    """Create a response that is kept, and return its id."""
    return str(assert_success(client.post("responses", {"model": client.model, "input": "a"}))["id"])


def create_item(client: Client) -> str:
    """Add an item to the conversation that the examples name, and return its id."""
    added = client.post("conversations/alice/items", {"items": [{"role": "user", "content": "a"}]})
    return str(assert_success(added)["data"][0]["id"])


def address(operation: Json, path: str) -> str:
    """Return the path and query with the examples of the required parameters."""
    required = [parameter for parameter in operation.get("parameters", []) if parameter["required"]]
    values = {(parameter["in"], parameter["name"]): parameter["schema"]["examples"][0] for parameter in required}
    for (_, name), value in values.items():
        path = path.replace(f"{{{name}}}", str(value))
    query = urlencode({name: value for (location, name), value in values.items() if location == "query"})
    return path.replace("smollm2-135m-instruct", "tiny") + (f"?{query}" if query else "")


def send(client: Client, method: str, url: str, body: Any) -> httpx.Response:
    if isinstance(body, bytes):
        return client.http.request(method, url, content=body)
    if isinstance(body, dict) and "model" in body:
        body = body | {"model": client.model}
    return client.http.request(method, url, json=body)


def check_answer(page: Json, operation: Json, answer: httpx.Response) -> None:
    """Check that the answer is a success with the media type, schema and headers that the operation describes."""
    assert answer.is_success, answer.text
    response = operation["responses"][str(answer.status_code)]
    media_type = answer.headers["content-type"].partition(";")[0]
    assert media_type in response["content"], answer.headers["content-type"]
    if media_type == JSON_TYPE:
        check(page, response["content"][media_type]["schema"], answer.json())
    for header in response.get("headers", {}):
        assert header in answer.headers


def test_a_server_with_keys_describes_which_key_each_route_takes(
    make_server: Callable[..., Server], page: Json
) -> None:
    assert "securitySchemes" not in page["components"]  # the page of a server without keys
    keys = {scheme: new_key(tenant) for scheme, tenant in (("tenant", "acme"), ("operator", OPERATOR))}
    server = make_server(api_keys=",".join(line for _, line in keys.values())).start()
    page = httpx.get(f"{server.url}/openapi.json").json()
    assert page["components"]["securitySchemes"].keys() == {*keys, "x-api-key"}
    open_to_all = set()
    for method, path, operation in operations(page):
        schemes = {scheme for alternative in operation["security"] for scheme in alternative}
        if not schemes:
            open_to_all.add(path)
        for scheme, key in [("", ""), *((scheme, key) for scheme, (key, _) in keys.items())]:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            answer = httpx.request(method, server.url + path.replace("{id}", "nobody"), headers=headers)
            assert (answer.status_code == 401) == bool(schemes and scheme not in schemes), (method, path, scheme)
    assert open_to_all == {"/livez", "/readyz", "/health", "/ping", "/version"}
