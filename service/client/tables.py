"""Learning from tables: read a CSV or Parquet file row by row, find the type of each column, and count what was right.

The rules of a CSV file, whose fields are all texts:

- A field that is empty or one of `NA`, `N/A`, `NaN`, `null`, `None` and `?` (in any case) is missing.
- A column is numeric where every other field is a number, and boolean where every one is `true` or `false`. A number
  with a leading zero, such as a postal code, is no number. Any other column is categorical.
- Where some fields of a target are numbers and others are not, the caller says which task is meant. With "regression",
  the fields that are no numbers count as missing.
- A file is read twice: for the types, then to learn. Neither pass holds more than one batch of rows.
"""

import csv
import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal

from model.tabular.limits import MAX_COLUMNS
from service.client import operations
from service.client.errors import FileError
from service.client.operations import Operation
from service.http.policy_replies import LabelPrediction
from service.http.replies import Observed

Row = dict[str, float | str | bool | None]
Task = Literal["labels", "regression"]
BATCH = 64  # rows of a request, which become one version
MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?"})
NUMBER = re.compile(r"[+-]?(?=\.?[0-9])(0|[1-9][0-9]*)?(\.[0-9]*)?([eE][+-]?[0-9]{1,2})?")
MAX_FIELD_CHARS = 2**17  # of a CSV file
MAX_LABEL_VALUES = 20  # a numeric target of more different values is a number, not a label
SAMPLE_BYTES = 2**14  # in which the delimiter of a CSV file is looked for


@dataclass(frozen=True)
class MixedColumn:
    """A column of numbers and other values, which makes it categorical. row: of the first value that is no number."""

    numbers: int
    values: int
    row: int
    text: str

    def __str__(self) -> str:
        found = f"row {self.row:,} has {self.text[:40]!r}"
        return f"{self.numbers:,} of {self.values:,} values are numbers, but {found}"


@dataclass(frozen=True)
class Table:
    """A file whose columns have types.

    Attributes:
        types: the Python type of each column: float, bool or str.
        mixed: the categorical columns of which some values are numbers.
        num_rows: number of rows.
        target_values: the different values of the target, as texts; more than MAX_LABEL_VALUES are not counted.
        digest: SHA-256 of the file.
    """

    path: Path
    types: dict[str, type]
    mixed: dict[str, MixedColumn]
    num_rows: int
    target_values: frozenset[str]
    digest: str

    def rows(self) -> Iterator[Row]:
        """Yield the rows. Raises FileError."""
        for row in _raw_rows(self.path):
            yield {name: _typed(value, self.types[name]) for name, value in row.items()}

    def guess_task(self, target: str) -> Task:
        """Return "regression" for a numeric target of many values, else "labels".

        Raises FileError for a target of which some values are numbers.
        """
        if target in self.mixed:
            raise FileError(
                f"{target!r} of {self.path}: {self.mixed[target]}; say which task is meant: 'labels' takes each "
                "value as a label, 'regression' leaves out the rows without a number"
            )
        return "regression" if self.types[target] is float and len(self.target_values) > MAX_LABEL_VALUES else "labels"


def read_table(file: str | PathLike[str], target: str) -> Table:
    """Return a file's columns with their types, in one pass over its rows. Raises FileError."""
    path = Path(fspath(file))
    kinds: dict[str, Counter[type]] = {}
    others: dict[str, tuple[int, str]] = {}  # the first value of a column that is no number
    values, num_rows = set[str](), 0
    for row in _raw_rows(path):
        if not num_rows and target not in row:
            raise FileError(f"{path} has no column {target!r}; it has {', '.join(list(row)[:20])}")
        num_rows += 1
        for name, value in row.items():
            if value is not None:
                kind = _kind(value)
                kinds.setdefault(name, Counter())[kind] += 1
                if kind is not float:
                    others.setdefault(name, (num_rows, _text(value)))
        if row[target] is not None and len(values) <= MAX_LABEL_VALUES:
            values.add(_text(row[target]))
    if not num_rows:
        raise FileError(f"{path} has no rows")
    types = {name: next(iter(found)) if len(found) == 1 else str for name, found in kinds.items()}
    mixed = {
        name: MixedColumn(found[float], found.total(), *others[name])
        for name, found in kinds.items()
        if len(found) > 1 and found[float]
    }
    types = {name: types.get(name, float) for name in row}
    return Table(path, types, mixed, num_rows, frozenset(values), _digest(path))


class TableProgress:
    """The progress of a session through a table. Each batch of rows is one version.

    Attributes:
        session: the session's id.
        task: what is learned, "labels" or "regression".
        rows: number of rows learned so far; `total` counts those of the table.
        skipped: number of rows without a target.
        version: the session's newest version; None before the first batch.
    """

    def __init__(
        self,
        session: str,
        table: Table,
        target: str,
        *,
        task: Task | None = None,
        ignore: Sequence[str] = (),
        batch: int = BATCH,
        key: str | None = None,
    ) -> None:
        if unknown := set(ignore) - table.types.keys():
            raise FileError(f"{table.path} has no column {min(unknown)!r} to ignore")
        self.session, self.total = session, table.num_rows
        self.task: Task = task or table.guess_task(target)
        if self.task == "regression" and table.types[target] is not float and target not in table.mixed:
            raise FileError(f"{target!r} of {table.path} is no column of numbers, which the task 'regression' needs")
        self._columns = [name for name in table.types if name != target and name not in ignore]
        if not 1 <= len(self._columns) <= MAX_COLUMNS:
            raise FileError(
                f"{table.path} has {len(self._columns)} columns to learn from; a session takes 1 to {MAX_COLUMNS}"
            )
        self.rows = self.skipped = 0
        self.version: int | None = None
        self._table, self._target, self._batch = table, target, batch
        described = f"{table.digest} {self.task} {target} {sorted(ignore)} {batch}"
        self._key = key or hashlib.sha256(described.encode()).hexdigest()
        self._examples: list[dict[str, Any]] = []
        self._right = self._right_constant = self._num_predicted = 0
        self._error = self._error_constant = 0.0
        self._labels: Counter[str] = Counter()
        self._sum = 0.0

    @property
    def notes(self) -> list[str]:
        """One line for each categorical column that is learned from: how its values are taken, and why."""
        table, target = self._table, self._target
        lines = [
            f"{name!r} is categorical" + (f": {table.mixed[name]}" if name in table.mixed else "")
            for name in self._columns
            if table.types[name] is str
        ]
        if self.task == "regression" and target in table.mixed:
            lines.append(f"rows without a number in {target!r} are left out: {table.mixed[target]}")
        return lines

    @property
    def score(self) -> tuple[str, float, float] | None:
        """The name of the measure, its value, and its value for the commonest label or the mean so far.

        Each row is predicted before it is learned. None before the first row.
        """
        if self.task == "labels" and self.rows:
            return "accuracy", self._right / self.rows, self._right_constant / self.rows
        if self._num_predicted:
            return "mean absolute error", self._error / self._num_predicted, self._error_constant / self._num_predicted
        return None

    def iter_operations(self) -> Iterator[Operation[Observed]]:
        """Yield one operation per batch. The caller passes each answer to `record_answer` before taking the next one.

        The same file learned once more in the same way has the same keys, so that the server learns no row twice.
        Raises FileError.
        """
        truth = "label" if self.task == "labels" else "target"
        rows, number = self._table.rows(), 0
        while batch := list(islice(rows, self._batch)):
            known = [(row, found) for row in batch if (found := self._truth(row[self._target])) is not None]
            self.skipped += len(batch) - len(known)
            self._examples = [
                {"features": {name: row[name] for name in self._columns if row[name] is not None}, truth: found}
                for row, found in known
            ]
            if known:
                key = f"{self._key}-{number}"
                yield operations.observe(
                    self.session, examples=self._examples, predict=True, model=self.task, idempotency_key=key
                )
            number += 1

    def record_answer(self, answer: Observed) -> None:
        """Add the answer to the operation that was yielded last."""
        for example, prediction in zip(self._examples, answer.predictions or (), strict=True):
            if isinstance(prediction, LabelPrediction):
                self._count_label(example["label"], prediction.label)
            else:
                self._count_number(example["target"], prediction.value)
        self.version = answer.version

    def _truth(self, value: float | str | bool | None) -> float | str | None:
        """Return a label as its text or a target as its number; None for a row without one."""
        if value is None:
            return None
        if self.task == "labels":
            return _text(value)
        return float(value) if _kind(value) is float else None

    def _count_label(self, label: str, predicted: str | int | None) -> None:
        self._right += predicted == label
        self._right_constant += bool(self._labels) and self._labels.most_common(1)[0][0] == label
        self._labels[label] += 1
        self.rows += 1

    def _count_number(self, target: float, predicted: float | None) -> None:
        if predicted is not None:
            self._num_predicted += 1
            self._error += abs(predicted - target)
            self._error_constant += abs(self._sum / self.rows - target)
        self._sum += target
        self.rows += 1

    def __str__(self) -> str:
        name, value, constant = self.score or ("", 0.0, 0.0)
        other = "the commonest label" if self.task == "labels" else "the mean"
        score = f" · {name} {value:.4g} ({other}: {constant:.4g})" if name else ""
        skipped = f" · {self.skipped:,} without a target" if self.skipped else ""
        version = "" if self.version is None else f" · version {self.version}"
        return f"learned {self.rows:,} rows{score}{skipped}{version}"


def _raw_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file, a missing value as None. Raises FileError."""
    try:
        yield from _parquet_rows(path) if path.suffix.lower() in (".parquet", ".pq") else _csv_rows(path)
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        sample = lines.read(SAMPLE_BYTES)
        lines.seek(0)
        try:  # what the sniffer finds out about quotes holds for the sample only
            delimiter = csv.Sniffer().sniff(sample, ",;\t|").delimiter
        except csv.Error:
            delimiter = ","
        csv.field_size_limit(MAX_FIELD_CHARS)
        reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
        try:
            names = [name.strip() for name in next(reader, [])]
            _check_names(names, path)
            for fields in reader:
                if len(fields) > len(names):
                    raise FileError(f"{path}, line {reader.line_num}: {len(fields)} fields, the head has {len(names)}")
                if fields:
                    yield dict.fromkeys(names) | {
                        name: None if field.strip().lower() in MISSING else field.strip()
                        for name, field in zip(names, fields, strict=False)
                    }
        except csv.Error as error:
            raise FileError(f"{path}, line {reader.line_num}: {error}") from None


def _check_names(names: Sequence[str], path: Path) -> None:
    if len(set(names)) < len(names) or not all(names):
        raise FileError(f"the first line of {path} must be distinct names of columns, got {', '.join(names)[:200]}")


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        parquet = import_module("pyarrow.parquet")
    except ModuleNotFoundError:
        raise FileError(f"{path} needs pyarrow to be read: pip install pyarrow") from None
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=BATCH):
            yield from batch.to_pylist()
    except import_module("pyarrow").ArrowInvalid as error:
        raise FileError(f"{path} is no Parquet file: {str(error)[:200]}") from None


def _kind(value: Any) -> type:
    """Return the type of a value that is not missing: of a CSV field, the type that the text has."""
    if isinstance(value, bool) or (isinstance(value, str) and value.lower() in ("true", "false")):
        return bool
    if isinstance(value, str):
        return float if NUMBER.fullmatch(value) else str
    try:
        float(value)
    except (TypeError, ValueError):
        return str
    return float


def _typed(value: Any, kind: type) -> float | str | bool | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if kind is bool:
        return value if isinstance(value, bool) else value.lower() == "true"
    return float(value) if kind is float else _text(value)


def _text(value: Any) -> str:
    """Return the text of a value; a number without a fraction has none in its text."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain_features(features: Mapping[Any, Any]) -> dict[str, float | str | bool | None]:
    """Return features of another library as JSON: numbers of any kind as floats, NaN as null, other values as texts."""
    return {str(name): _plain(value) for name, value in features.items()}


def _plain(value: Any) -> float | str | bool | None:
    if isinstance(value, str | bool) or value is None:
        return value
    if type(value).__name__ == "bool_":  # NumPy's
        return bool(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return number if math.isfinite(number) else None
