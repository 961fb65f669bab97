"""The fields that say what form a text must have: OpenAI's, vLLM's and llama.cpp's, each as one grammar."""

import json
from collections.abc import Mapping
from typing import Any

from model.text.grammar import GrammarSource
from service.errors import BadRequest
from service.http.faults import shorten

MAX_GRAMMAR_CHARS = 65_536
MAX_CHOICES = 1024  # texts from which one is chosen
# vLLM's names in `structured_outputs`, and in the older fields with the prefix `guided_`.
KINDS: dict[str, Any] = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "rules"}
FIELDS = (
    *("response_format", "structured_outputs", "json_schema", "grammar"),
    *(f"guided_{name}" for name in KINDS),
)


def grammar_of(fields: Mapping[str, Any]) -> tuple[GrammarSource, str] | None:
    """Return the grammar that the fields of a request ask for, and the field that has it; None if none does.

    Raises:
        BadRequest: a field is not valid, or several fields ask for a grammar.
    """
    found = {name: grammar for name, value in fields.items() if (grammar := _grammar(name, value)) is not None}
    if len(found) > 1:
        first, second, *_ = found
        raise BadRequest(f"Give {first!r} or {second!r}, not two of them.", param=second)
    return next(((grammar, name) for name, grammar in found.items()), None)


def _grammar(name: str, value: Any) -> GrammarSource | None:
    match name, value:
        case "response_format", dict():
            return _response_format(value)
        case "structured_outputs", dict(options):
            kinds = [kind for kind in KINDS if options.get(kind) is not None]
            if len(kinds) == 1 and not {*options} - {*KINDS, "disable_any_whitespace", "whitespace_pattern"}:
                return _source(f"{name}.{kinds[0]}", KINDS[kinds[0]], options[kinds[0]])
            if options.get("json_object") is True and not kinds:
                return GrammarSource("json_schema", '{"type":"object"}')
        case "json_schema", dict():
            return _source(name, "json_schema", value)
        case "grammar", str():
            return _source(name, "rules", value)
        case _ if name.startswith("guided_"):
            return _source(name, KINDS[name.removeprefix("guided_")], value)
    raise BadRequest(f"'{name}' has no form that this server supports, got {shorten(value)}.", param=name)


def _response_format(value: Mapping[str, Any]) -> GrammarSource | None:
    """Return the grammar of a `response_format`: OpenAI's forms, and llama.cpp's with the schema right inside.

    Raises BadRequest for another form.
    """
    param = "response_format"
    match value:
        case {"type": "text"}:
            return None
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return _source(param, "json_schema", schema)
        case {"type": "json_object" | "json_schema", "schema": dict(schema)}:
            return _source(param, "json_schema", schema)
        case {"type": "json_object"} if value.get("schema") is None:
            return GrammarSource("json_schema", '{"type":"object"}')
        case {"type": "json_object"}:
            raise BadRequest(
                f"'response_format.schema' must be an object, got {shorten(value['schema'])}.", param=param
            )
        case {"type": "json_schema"}:
            needed = "'response_format.json_schema' must be an object with a JSON Schema in 'schema'"
            raise BadRequest(f"{needed}, got {shorten(value.get('json_schema'))}.", param=param)
    got = shorten(value["type"]) if "type" in value else "none"
    message = f'\'response_format.type\' must be "text", "json_object" or "json_schema", got {got}.'
    raise BadRequest(message, param=param)


def _source(param: str, kind: Any, value: Any) -> GrammarSource:
    """Return a grammar. Raises BadRequest if the value is of another type than the kind needs, or too large."""
    texts = isinstance(value, list) and 0 < len(value) <= 1024 and all(isinstance(each, str) and each for each in value)
    if not (
        isinstance(value, dict | str)
        if kind == "json_schema"
        else texts
        if kind == "choice"
        else isinstance(value, str)
    ):
        raise BadRequest(f"'{param}' has no form that this server supports, got {shorten(value)}.", param=param)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) > MAX_GRAMMAR_CHARS:
        message = f"'{param}' may have {MAX_GRAMMAR_CHARS} characters, got {len(text)}."
        raise BadRequest(message, param=param)
    return GrammarSource(kind, text)
