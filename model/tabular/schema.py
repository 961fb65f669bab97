"""The schema of a session: which columns, labels and arms its requests have named, in the order in which they came.

The schema turns the features of a request into numbers, by these rules:

- A number is a numeric column, `true` and `false` are 1 and 0. A string makes its column categorical: each value has a
  column of its own, which is 1 where the row has the value and else 0. `null`, and a column that is left out, are
  missing (NaN), for all columns of the values.
- A column has the type of its first value. A number in a categorical column is the text of the number; a string in a
  numeric column is an error.
- A list is a row whose columns are named "0", "1", …
- A column has at most MAX_VALUES values of its own. Further values, and texts of more than MAX_NAME_BYTES bytes, share
  one bucket: the row has a value, and it is none of the column's. So do new values where all columns are taken.
- What comes for the first time makes a column, a label or an arm, if the request may learn. A request that only reads
  leaves out columns that the session does not have.

The entries of the schema are the rows of a site of kind "names": row i is the entry that came as number i, and no entry
ever changes. So a version, a fork or an export of the session has the schema of its time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.memory import SiteConfig
from model.memory.name_layout import HEAD_SIZE
from model.tabular.limits import MAX_ABS, MAX_ARMS, MAX_COLUMNS, MAX_LABELS, MAX_NAME_BYTES, MAX_VALUES

Value = float | int | str | bool | None
Features = Mapping[str, Value] | Sequence[Value]
FloatArray = NDArray[np.float32]

NAME = "names"
SLOTS = 4 * MAX_COLUMNS + MAX_LABELS + MAX_ARMS  # two groups of columns, each with as many categorical ones at most
BUCKET = "?" * (MAX_NAME_BYTES + 1)  # a text that is in no column's values
ROW, ARM_FEATURES = 0, 1  # groups of columns: of examples and contexts, and of the features of arms
NUMERIC, CATEGORICAL, VALUE, LABEL, ARM = range(1, 6)  # kinds of entries
LIMITS = {LABEL: ("labels", MAX_LABELS), ARM: ("actions", MAX_ARMS)}


class SchemaError(ValueError):
    """Features or a name that the schema cannot take; `field` names the part of the request."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"'{field}' {message}")
        self.field = field


class Entry(NamedTuple):
    """One name. parent: of a value, the number of the entry of its column."""

    kind: int
    group: int
    parent: int
    text: str


def names_site() -> SiteConfig:
    """Return the memory site of a session's schema."""
    return SiteConfig(NAME, "names", slots=SLOTS, k=SLOTS, width=MAX_NAME_BYTES)


class Schema:
    """The schema of one session: `entries`, and how many of them came with the rows that the schema was read from.

    may_grow: whether unknown columns, labels and arms become entries.
    """

    def __init__(self, entries: Sequence[Entry] = (), *, may_grow: bool = True) -> None:
        self.entries: list[Entry] = []
        self.may_grow = may_grow
        self.labels: dict[str, int] = {}
        self.arms: dict[str, int] = {}
        self.groups: list[int] = []  # of each encoded column
        self._fields: tuple[dict[str, int], dict[str, int]] = ({}, {})  # name -> entry, by group
        self._numeric: dict[int, int] = {}  # a numeric column's entry -> its encoded column
        self._values: dict[int, dict[str, int]] = {}  # a categorical column's entry -> value -> encoded column
        for entry in entries:
            self._add(entry)
        self.num_stored = len(self.entries)

    @classmethod
    def of_rows(cls, heads: NDArray[np.int32], texts: NDArray[np.uint8], *, may_grow: bool) -> Schema:
        """Read a site's rows: heads [n, HEAD_SIZE] and texts [n, MAX_NAME_BYTES], in the order of the slots.

        Raises ValueError for rows that no schema has written.
        """
        number = int(np.count_nonzero(heads[:, 0]))
        return cls(_entries(heads[:number].tobytes(), texts[:number].tobytes()), may_grow=may_grow)

    def new_rows(self) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.uint8]]:
        """Return the slots [n], heads [n, HEAD_SIZE] and texts [n, MAX_NAME_BYTES] of what was added."""
        added = self.entries[self.num_stored :]
        heads = np.zeros((len(added), HEAD_SIZE), np.int32)
        texts = np.zeros((len(added), MAX_NAME_BYTES), np.uint8)
        for row, entry in enumerate(added):
            data = entry.text.encode()
            heads[row] = entry.kind, entry.group, entry.parent, len(data)
            texts[row, : len(data)] = np.frombuffer(data, np.uint8)
        return np.arange(self.num_stored, len(self.entries)), heads, texts

    @property
    def width(self) -> int:
        """The number of encoded columns so far, of both groups."""
        return len(self.groups)

    def columns(self) -> list[str]:
        """Return the names of the encoded columns, in order: `age`, `city=Ulm`."""
        found = []
        for entry in self.entries:
            if entry.kind == NUMERIC:
                found.append(entry.text)
            elif entry.kind == VALUE:
                found.append(f"{self.entries[entry.parent].text}={entry.text}")
        return found

    def encode(self, features: Features, field: str, group: int = ROW) -> dict[int, float]:
        """Return the numbers of features, by encoded column; what is not there is missing.

        Raises SchemaError on the part of `field` that the schema cannot take.
        """
        items = features.items() if isinstance(features, Mapping) else enumerate_texts(features)
        numbers: dict[int, float] = {}
        for name, value in items:
            if value is not None:
                numbers |= self._encode_value(name, value, f"{field}.{name[:80]}", group)
        return numbers

    def row(self, *numbers: Mapping[int, float]) -> FloatArray:
        """Return the numbers of one row, one for each encoded column that there is by now; NaN is missing."""
        row = np.full(self.width, math.nan, np.float32)
        for some in numbers:
            row[list(some)] = list(some.values())
        return row

    def decode(self, row: FloatArray, group: int = ROW) -> dict[str, Value]:
        """Return features that `encode` turns into the numbers of a row [C]; a text of the bucket becomes BUCKET."""
        features: dict[str, Value] = {}
        for name, number in self._fields[group].items():
            if number in self._numeric:
                value: Value = float(row[self._numeric[number]])
                is_there = value == value
            else:
                present = {text: row[c] for text, c in self._values[number].items() if not math.isnan(row[c])}
                value, is_there = next((text for text, x in present.items() if x), BUCKET), bool(present)
            if is_there:
                features[name] = value
        return features

    def label(self, name: str, field: str) -> int | None:
        """Return the number of a label; None for one that is new and does not become an entry."""
        return self._name(LABEL, self.labels, name, field)

    def arm(self, name: str, field: str) -> int | None:
        """Return the number of an arm; None for one that is new and does not become an entry."""
        return self._name(ARM, self.arms, name, field)

    def _encode_value(self, name: str, value: float | int | str | bool, field: str, group: int) -> dict[int, float]:
        """Return the numbers that a value sets, by encoded column."""
        number = self._fields[group].get(name)
        if number is None:
            if not self.may_grow:
                return {}
            number = self._new_column(CATEGORICAL if isinstance(value, str) else NUMERIC, name, field, group)
        if self.entries[number].kind == NUMERIC:
            if isinstance(value, str):
                got = f"got the string {value[:80]!r}"
                raise SchemaError(field, f"is a numeric column, which takes numbers, true, false and null, {got}.")
            return {self._numeric[number]: _checked(value, field)}
        text = value if isinstance(value, str) else _text_of(value)
        values = self._values[number]
        has_room = len(values) < MAX_VALUES and self.width < MAX_COLUMNS
        if text not in values and self.may_grow and has_room and len(text.encode()) <= MAX_NAME_BYTES:
            self._add(Entry(VALUE, group, number, text))
        return {column: float(text == other) for other, column in values.items()}

    def _new_column(self, kind: int, name: str, field: str, group: int) -> int:
        _check_name(name, field)
        full = "would be column {} of the session, which may have {}; each value of a text column counts as one."
        if self.width >= MAX_COLUMNS or len(self._fields[group]) >= MAX_COLUMNS:
            raise SchemaError(field, full.format(MAX_COLUMNS + 1, MAX_COLUMNS))
        return self._add(Entry(kind, group, 0, name))

    def _name(self, kind: int, names: dict[str, int], name: str, field: str) -> int | None:
        if name in names or not self.may_grow:
            return names.get(name)
        _check_name(name, field)
        plural, limit = LIMITS[kind]
        if len(names) >= limit:
            raise SchemaError(field, f"{name[:80]!r} would be one more than the {limit} {plural} of a session.")
        self._add(Entry(kind, ROW, 0, name))
        return names[name]

    def _add(self, entry: Entry) -> int:
        """Append an entry and return its number."""
        number, group = len(self.entries), entry.group
        self.entries.append(entry)
        if entry.kind == LABEL:
            self.labels[entry.text] = len(self.labels)
        elif entry.kind == ARM:
            self.arms[entry.text] = len(self.arms)
        elif entry.kind == CATEGORICAL:
            self._fields[group][entry.text] = number
            self._values[number] = {}
        else:
            if entry.kind == NUMERIC:
                self._fields[group][entry.text] = number
                self._numeric[number] = self.width
            else:
                self._values[entry.parent][entry.text] = self.width
            self.groups.append(group)
        return number


def enumerate_texts(values: Sequence[Value]) -> Iterator[tuple[str, Value]]:
    """Yield the values of a list with the names of their columns."""
    return zip(map(str, range(len(values))), values, strict=True)


@lru_cache(maxsize=256)
def _entries(heads: bytes, texts: bytes) -> tuple[Entry, ...]:
    """Return the entries of a site's rows; sessions send many requests between two new names."""
    entries: list[Entry] = []
    for row, (kind, group, parent, length) in enumerate(np.frombuffer(heads, np.int32).reshape(-1, HEAD_SIZE).tolist()):
        start = row * MAX_NAME_BYTES
        if group not in (ROW, ARM_FEATURES) or (kind == VALUE and not _is_categorical(entries, parent)):
            raise ValueError(f"row {row} of the schema is not valid")
        entries.append(Entry(kind, group, parent, texts[start : start + length].decode()))
    return tuple(entries)


def _is_categorical(entries: Sequence[Entry], number: int) -> bool:
    return number < len(entries) and entries[number].kind == CATEGORICAL


def _check_name(name: str, field: str) -> None:
    size = len(name.encode())
    if not 1 <= size <= MAX_NAME_BYTES:
        raise SchemaError(field, f"must be a name of 1 to {MAX_NAME_BYTES} bytes in UTF-8, got {size} bytes.")


def _checked(value: float | int | bool, field: str) -> float:
    if not abs(value) <= MAX_ABS:
        raise SchemaError(field, f"must be in {-MAX_ABS:g}..{MAX_ABS:g}, got {str(value)[:40]}.")
    return float(value)


def _text_of(value: float | int | bool) -> str:
    """Return the text of a number or a boolean in a categorical column: 3 and 3.0 are equal, as in JSON."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(int(value)) if float(value).is_integer() and abs(value) < 2**53 else repr(float(value))
