"""The words for what is wrong with a body: pydantic's faults as errors, and a client's values in short."""

import json
from collections.abc import Sequence
from typing import Any

from service.errors import BadRequest
from service.http.schemas import NAME_RULE, SESSION_ID

MAX_SHOWN_CHARS = 80  # characters of a client's value that an error message repeats


def explain(faults: Sequence[Any]) -> BadRequest:
    """Return an error that describes the first of pydantic's `faults`: the field, the limit and the value."""
    fault = faults[0]
    where, *path = (str(part) for part in fault["loc"] if not _is_union_tag(part))
    param = ".".join(path)[: 2 * MAX_SHOWN_CHARS] or None
    name = f"'{param}'" if param else f"The {where}"
    match fault["type"]:
        case "missing":
            message = f"{name} is required."
        case "extra_forbidden":
            message = f"Unknown field {name}."
        case "model_attributes_type" | "model_type" | "dict_type":
            message = f"{name} should be a JSON object, got {shorten(fault['input'])}."
        case "too_short" if "min_length" in fault.get("ctx", {}):
            context = fault["ctx"]
            message = f"{name} should have at least {context['min_length']} item, got {context['actual_length']}."
        case "string_pattern_mismatch" if fault["ctx"]["pattern"] == SESSION_ID:
            message = f"{name} {NAME_RULE}, got {shorten(fault['input'])} of {len(fault['input'])} characters."
        case _:
            reason = fault["msg"][:1].lower() + fault["msg"][1:]
            message = f"{name}: {reason}, got {shorten(fault['input'])}."
    return BadRequest(message, param=param)


def _is_union_tag(part: str | int) -> bool:
    return isinstance(part, str) and (part.startswith("<") or part == "[key]")


def shorten(value: Any) -> str:
    """Return a short text in JSON's terms for a value that a client sent."""
    match value:
        case str():
            shown = json.dumps(value[:MAX_SHOWN_CHARS], ensure_ascii=False)
            return shown + ("…" if len(value) > MAX_SHOWN_CHARS else "")
        case list():
            return f"a list of {len(value)}"
        case dict():
            return "an object"
        case int() if value.bit_length() > 64:
            return f"an integer of {value.bit_length()} bits"
        case None | bool() | int() | float():
            return json.dumps(value)
        case _:
            return f"a {type(value).__name__}"
