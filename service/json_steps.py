"""JSON text made step by step, so that other threads get the interpreter's lock between the steps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

STEP = 64  # elements of a list that are written in one step


def dump_json(value: Any) -> str:
    """Return `value` as compact JSON; NaN and infinity become `NaN` and `Infinity`, as `json.loads` reads them."""
    return "".join(_parts(value))


def _parts(value: Any) -> Iterator[str]:
    """Yield the text of a value in parts. An object is taken apart; so is a short list, which may hold long lists."""
    match value:
        case Mapping():
            separator = "{"
            for key, item in value.items():
                yield f"{separator}{_dump(str(key))}:"
                yield from _parts(item)
                separator = ","
            yield "}" if value else "{}"
        case list() | tuple() if len(value) > STEP:
            yield "["
            for start in range(0, len(value), STEP):
                yield ("," if start else "") + _dump(value[start : start + STEP])[1:-1]
            yield "]"
        case list() | tuple() if any(isinstance(item, Sequence | Mapping) for item in value):
            separator = "["
            for item in value:
                yield separator
                yield from _parts(item)
                separator = ","
            yield "]"
        case _:
            yield _dump(value)


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
