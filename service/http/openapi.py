"""The descriptions in /openapi.json that FastAPI does not derive from the routes: headers, errors, streams, keys.

The examples are data in `service/http/openapi_examples.py`.
"""

import json
from collections.abc import Container
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.http.openapi_examples import EXAMPLES
from service.http.replies import ChatChunk, CompletionChunk, ErrorReply
from service.http.sse import NamedEventStream
from service.tenants import OPERATOR

Json = dict[str, Any]
Responses = dict[int | str, Json]

ERROR_RESPONSES: Responses = {
    "4XX": {"model": ErrorReply, "description": "The request can't be honoured; `param` names the field."},
    "5XX": {
        "model": ErrorReply,
        "description": "The server can't answer now; `Retry-After` says when to try again.",
    },
}


def error_responses(body: type[BaseModel]) -> Responses:
    """Return the description of the errors of routes whose errors have another interface's body."""
    return {
        "4XX": {"model": body, "description": "The request can't be honoured."},
        "5XX": {"model": body, "description": "The server can't answer now."},
    }


ETAG_HEADER: Json = {"ETag": {"schema": {"type": "string"}, "description": 'The session\'s version, such as `"v3"`.'}}
ETAG_RESPONSES: Responses = {200: {"headers": ETAG_HEADER}}
FILE_TYPE = "application/octet-stream"
FILE_CONTENT: Json = {"content": {FILE_TYPE: {"schema": {"type": "string", "format": "binary"}}}}


SCHEMAS = "#/components/schemas/"


def streamed_responses(chunk: str) -> Responses:
    """Return the description of an answer that may be a stream of chunks of the schema `chunk`."""
    events = [json.dumps(example, separators=(",", ":")) for example in EXAMPLES[chunk]]
    payload = {"anyOf": [{"$ref": SCHEMAS + name} for name in (chunk, ErrorReply.__name__)]}
    data = {"anyOf": [{"const": "[DONE]"}, {"contentMediaType": "application/json", "contentSchema": payload}]}
    return {
        200: {
            "description": "The completion, or a stream of its chunks. The chunks with a `finish_reason` carry "
            "`adaptation`.",
            "content": {
                "text/event-stream": {
                    # The schema of each event. Open API 3.1 has no word for it; FastAPI and Open API 3.2 have this one.
                    "itemSchema": {
                        "type": "object",
                        "properties": {"data": {"type": "string"} | data},
                        "required": ["data"],
                    },
                    "example": "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]),
                }
            },
        }
    }


def named_events(name: str, description: str, *others: str) -> Responses:
    """Return the description of an answer that may be a stream of named events.

    name: of the examples of the events. others: the kinds of event that the examples lack.
    """
    kinds = [*dict.fromkeys(event["type"] for event in EXAMPLES[name]), *others]
    data = {"type": "object", "properties": {"type": {"enum": kinds}}, "required": ["type"]}
    fields: Json = {
        "event": {"enum": kinds},
        "data": {"type": "string", "contentMediaType": "application/json", "contentSchema": data},
    }
    example = "".join(NamedEventStream.frame(json.dumps(event, separators=(",", ":"))) for event in EXAMPLES[name])
    content: Json = {
        "text/event-stream": {
            "itemSchema": {"type": "object", "properties": fields, "required": ["event", "data"]},
            "example": example,
        }
    }
    return {200: {"description": description, "content": content}}


def describe_api(app: FastAPI, *, keys_required: bool, public_paths: Container[str]) -> None:
    """Add the examples to /openapi.json and, where the server has keys, the key that each route takes."""
    generate = app.openapi

    def openapi() -> Json:
        spec = generate()
        _add_chunks(spec)
        _remove_null_parameters(spec)
        _add_examples(spec)
        if keys_required:
            _add_keys(spec, public_paths)
        return spec

    app.openapi = openapi  # type: ignore[method-assign]


def _add_chunks(spec: Json) -> None:
    """Add the schemas of the events of streams, which are no reply of a route."""
    _, definitions = models_json_schema(
        [(CompletionChunk, "serialization"), (ChatChunk, "serialization")], ref_template=SCHEMAS + "{model}"
    )
    spec["components"]["schemas"] = definitions["$defs"] | spec["components"]["schemas"]


def _remove_null_parameters(spec: Json) -> None:
    """Let no parameter be null: what is not sent is absent, and "null" in a header or a query is a text."""
    for methods in spec["paths"].values():
        for operation in methods.values():
            for parameter in operation.get("parameters", ()):
                schema = parameter["schema"]
                if {"type": "null"} in schema.get("anyOf", ()):
                    (given,) = (option for option in schema.pop("anyOf") if option != {"type": "null"})
                    parameter["schema"] = given | schema


def _add_examples(spec: Json) -> None:
    # FastAPI itself would drop the nulls of the examples.
    for name, schema in spec["components"]["schemas"].items():
        if name in EXAMPLES:
            schema["examples"] = EXAMPLES[name]


def _add_keys(spec: Json, public_paths: Container[str]) -> None:
    spec["components"]["securitySchemes"] = {
        name: {"type": "http", "scheme": "bearer", "description": f"A key of `imprint keys new {tenant}`."}
        for name, tenant in (("tenant", "TENANT"), ("operator", OPERATOR))
    }
    header = {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same key, for other clients."}
    spec["components"]["securitySchemes"]["x-api-key"] = header
    for path, methods in spec["paths"].items():
        schemes = ["operator"] if path == "/metrics" else ["tenant", "x-api-key"]
        for operation in methods.values():
            operation["security"] = [] if path in public_paths else [{scheme: []} for scheme in schemes]
