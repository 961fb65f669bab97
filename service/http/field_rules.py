"""JSON Schema of the rules of a body that involve several fields; the validators in `service/http/schemas.py` and
`service/http/generation_schemas.py` enforce the same rules, and `tests/fuzz_http.py` compares the two.

A field that is null counts as absent. What JSON Schema cannot state (two fields are equal, a field needs a header) is
left to descriptions.
"""

from typing import Any

Json = dict[str, Any]

NULL: Json = {"type": "null"}
STRING: Json = {"type": "string"}
ARRAY: Json = {"type": "array"}
INTEGER: Json = {"type": "integer"}
NUMBER: Json = {"type": "number"}
TRUE: Json = {"const": True}


def _fields(*absent: str, **given: Json) -> Json:
    """Return the schema of an object with all fields of `given` and without the fields of `absent`."""
    return {"required": list(given), "properties": given | dict.fromkeys(absent, NULL)}


def _instead_of(other: str, *names: str) -> Json:
    """Return the schema of an object that has not both `other` and one of `names`."""
    return {"anyOf": [{"properties": {other: NULL}}, {"properties": dict.fromkeys(names, NULL)}]}


_NO_CALLS: Json = {"anyOf": [NULL, {"maxItems": 0}]}
MESSAGE: Json = {
    "anyOf": [
        _fields(role={"const": "assistant"}, tool_calls={"type": "array", "minItems": 1}),
        {"required": ["content"], "properties": {"content": {"not": NULL}, "tool_calls": _NO_CALLS}},
    ]
}
NOT_STREAMED: Json = {"properties": {"stream": {"enum": [None, False]}, "stream_options": NULL}}
STREAM: Json = {"anyOf": [NOT_STREAMED, _fields("prompt_logprobs", stream=TRUE)]}
N_PROBS: Json = {"anyOf": [{"properties": {"n_probs": {"enum": [None, 0]}}}, {"properties": {"logprobs": NULL}}]}
WITH_LOGPROBS: Json = {"anyOf": [{"properties": {"top_logprobs": {"enum": [None, 0]}}}, _fields(logprobs=TRUE)]}
# Schemathesis generates no object under more than three such rules, so that not all of them are stated.
RESPONSE: Json = {
    "allOf": [
        _instead_of("conversation", "previous_response_id", "session"),
        {
            "anyOf": [
                {"properties": {"store": {"enum": [None, True]}}},
                {"properties": {"adapt": {"enum": [None, "predict"]}}},
            ]
        },
    ]
}
FORM: Json = {
    "anyOf": [{"properties": {"type": {"enum": ["text", "json_object"]}}}, _fields(schema={"type": "object"})]
}
COMPLETION: Json = {"allOf": [STREAM, _instead_of("n_predict", "max_tokens"), N_PROBS]}
CHAT: Json = {"allOf": [STREAM, _instead_of("n_predict", "max_tokens", "max_completion_tokens"), WITH_LOGPROBS]}
TOKENIZE: Json = {
    "oneOf": [
        _fields("content", "messages", prompt=STRING),
        _fields("prompt", "messages", content=STRING),
        _fields("prompt", "content", messages=ARRAY),
    ]
}
FEATURES: Json = {"type": ["object", "array"]}
GIVEN: Json = {"not": NULL}
EXAMPLE: Json = {"oneOf": [_fields("target", label=GIVEN), _fields("label", target=GIVEN)]}
OBSERVE: Json = {
    "oneOf": [
        _fields("messages", "features", "label", "target", "examples", "model", "predict", text=STRING),
        _fields("text", "features", "label", "target", "examples", "model", "predict", messages=ARRAY),
        _fields("text", "messages", "target", "examples", "source", features=FEATURES, label=GIVEN),
        _fields("text", "messages", "label", "examples", "source", features=FEATURES, target=GIVEN),
        _fields("text", "messages", "features", "label", "target", "source", examples=ARRAY),
    ]
}
PREDICT: Json = {"oneOf": [_fields("examples", features=FEATURES), _fields("features", examples=ARRAY)]}
UNLEARN: Json = {"oneOf": [_fields("versions", version=INTEGER), _fields("version", versions=ARRAY)]}
CHOICE: Json = {"anyOf": [{"properties": {"propensity": NULL}}, _fields(forced=STRING)]}
ACT: Json = {
    "allOf": [
        {"anyOf": [{"properties": {"action_id": NULL, "regret": NULL}}, _fields(reward=NUMBER)]},
        CHOICE,
        {
            "oneOf": [
                _fields("observation", "examples", actions=ARRAY),
                _fields("actions", "examples", "context", "allowed", "forced", observation=ARRAY),
                _fields(
                    *("actions", "observation", "context", "allowed", "forced", "temperature", "seed"), examples=ARRAY
                ),
            ]
        },
    ]
}
FEEDBACK: Json = {
    "oneOf": [
        _fields("completion_id", "text", "examples", action_id=STRING, reward=NUMBER),
        _fields("action_id", "reward", "regret", "examples", completion_id=STRING, text=STRING),
        _fields("action_id", "reward", "regret", "completion_id", "text", examples=ARRAY),
    ]
}
