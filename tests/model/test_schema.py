"""The schema of a session: the rules by which features become numbers, its limits, and its rows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from model.memory.name_layout import NameLayout
from model.tabular import config, limits
from model.tabular import schema as module
from model.tabular.limits import MAX_COLUMNS, MAX_VALUES
from model.tabular.schema import ARM_FEATURES, Features, Schema, SchemaError


def encode(schema: Schema, features: Features) -> list[float | None]:
    """Return a row as a list, None where a value is missing."""
    return [None if math.isnan(x) else x for x in schema.row(schema.encode(features, "features")).tolist()]


def test_the_rules_of_the_types() -> None:
    schema = Schema()
    assert encode(schema, {"age": 41, "city": "Ulm", "member": True, "note": None}) == [41, 1, 1]
    assert encode(schema, {"city": "Bonn", "member": False, "age": 1.5}) == [1.5, 0, 0, 1]
    assert encode(schema, {"age": None}) == [None, None, None, None]
    assert encode(schema, {"note": "late"}) == [None, None, None, None, 1]
    assert schema.columns() == ["age", "city=Ulm", "member", "city=Bonn", "note=late"]
    assert encode(Schema(), [3, None, "x"]) == encode(Schema(), {"0": 3, "1": None, "2": "x"}) == [3, 1]


def test_numbers_in_a_categorical_column_are_texts_and_strings_in_a_numeric_one_are_refused() -> None:
    schema = Schema()
    encode(schema, {"zip": "89073", "age": 3})
    assert encode(schema, {"zip": 89073.0}) == encode(schema, {"zip": 89073}) == encode(schema, {"zip": "89073"})
    assert encode(schema, {"zip": True}) == [0, None, 1] and schema.columns()[-1] == "zip=true"
    with pytest.raises(SchemaError, match=r"'features.age' is a numeric column, .* got the string '41'"):
        encode(schema, {"age": "41"})


def test_values_without_a_column_of_their_own_share_a_bucket() -> None:
    schema = Schema()
    for number in range(MAX_VALUES):
        encode(schema, {"city": f"city {number}"})
    assert schema.width == MAX_VALUES
    assert encode(schema, {"city": "another"}) == [0.0] * MAX_VALUES  # known to be none of them, so not missing
    assert encode(Schema(), {"text": "x" * 65}) == []
    assert schema.width == MAX_VALUES


def test_a_request_that_only_reads_adds_nothing() -> None:
    schema = Schema()
    encode(schema, {"age": 1, "city": "Ulm"})
    reading = Schema(schema.entries, may_grow=False)
    assert encode(reading, {"age": 2, "city": "Bonn", "new": 3, "": 4}) == [2, 0]
    assert reading.label("churn", "label") is None and reading.arm("a", "actions") is None
    assert reading.entries == schema.entries


def test_the_limits_name_field_limit_and_value(monkeypatch: pytest.MonkeyPatch) -> None:
    schema = Schema()
    encode(schema, [0.0] * MAX_COLUMNS)
    for value in (1, "value"):
        with pytest.raises(SchemaError, match=r"'features\.x' would be column 257 of the session, which may have 256"):
            encode(schema, {"x": value})
    for name in ("", "x" * 65, "ü" * 33):
        size = len(name.encode())
        with pytest.raises(SchemaError, match=f"a name of 1 to 64 bytes in UTF-8, got {size} bytes"):
            Schema().label(name, "label")
    monkeypatch.setitem(module.LIMITS, module.LABEL, ("labels", 2))
    assert [schema.label(name, "label") for name in ("b", "a", "b")] == [0, 1, 0]
    with pytest.raises(SchemaError, match=r"'label' 'c' would be one more than the 2 labels of a session"):
        schema.label("c", "label")
    with pytest.raises(SchemaError, match=r"must be in -1e\+15\.\.1e\+15, got 1e\+16"):
        encode(Schema(), {"x": 1e16})
    with pytest.raises(SchemaError, match="got 1000000"):
        encode(Schema(), {"x": 10**400})


def test_the_rows_give_the_schema_back_and_hold_only_what_is_new() -> None:
    schema = Schema()
    context = schema.encode({"city": "Ulm", "größe": 3}, "context")
    arm = schema.encode({"price": 2, "city": "x"}, "actions.0.features", ARM_FEATURES)
    assert (schema.label("churn", "label"), schema.arm("a", "actions.0.id")) == (0, 0)
    assert schema.row(context, arm).tolist() == [1, 3, 2, 1] and schema.groups == [0, 0, 1, 1]
    slots, heads, texts = schema.new_rows()
    assert slots.tolist() == list(range(8))
    stored = np.concatenate([heads.view(np.uint8).reshape(8, -1), texts], axis=1)
    assert NameLayout().are_valid_rows(stored, vocab_size=0)

    padded = [np.concatenate([part, np.zeros_like(part)]) for part in (heads, texts)]
    again = Schema.of_rows(*padded, may_grow=True)
    assert again.entries == schema.entries and not len(again.new_rows()[0])
    assert encode(again, {"größe": 1})[:2] == [None, 1]
    again.label("stay", "label")
    assert again.new_rows()[0].tolist() == [8]


@pytest.mark.parametrize(
    ("number", "value"), [(0, 6), (0, 0), (1, -1), (3, 65), (3, 2)], ids=["kind", "empty", "group", "long", "cut"]
)
def test_rows_that_no_schema_wrote_are_refused(number: int, value: int) -> None:
    schema = Schema()
    encode(schema, {"größe": 1})
    _, heads, texts = schema.new_rows()
    texts[0, 2:4] = np.frombuffer("ö".encode(), np.uint8)
    heads[0, 3] = 8
    good = np.concatenate([heads.view(np.uint8), texts], axis=1)
    assert NameLayout().are_valid_rows(good, vocab_size=0)
    heads[0, number] = value
    if (number, value) == (3, 2):
        heads[0, 3] = 3  # in the middle of a character
    assert not NameLayout().are_valid_rows(np.concatenate([heads.view(np.uint8), texts], axis=1), vocab_size=0)


def test_the_limits_are_those_of_the_learners() -> None:
    assert (limits.MAX_COLUMNS, limits.MAX_LABELS, limits.MAX_ARMS) == (
        config.MAX_COLUMNS,
        config.MAX_LABELS,
        config.MAX_ARMS,
    )
