"""Tables: the types of columns, `imprint learn`, `imprint evaluate-log`, and the estimators of other libraries."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from river import metrics
from sklearn.base import clone
from sklearn.utils.estimator_checks import estimator_checks_generator
from typer.testing import CliRunner

from examples.maze import walk
from imprint import Client, FileError
from imprint.river import ImprintClassifier as RiverClassifier
from imprint.river import ImprintRegressor as RiverRegressor
from imprint.sklearn import ImprintClassifier, ImprintRegressor
from service.cli.main import app
from service.client.tables import TableProgress, plain_features, read_table
from tests.conftest import Server

WHERE = ["Ulm", "Bonn", "Jena"]
LABELS = ["stay", "go", "wait"]


@pytest.fixture(scope="module")
def url(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = Server(str(tiny_base), tmp_path_factory.mktemp("server") / "data").start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMPRINT_URL", server.url)
        yield server.url
    assert server.stop() == 0, server.log.read_text()


def imprint(*arguments: str, code: int = 0) -> str:
    """Return what a command prints."""
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert done.exit_code == code, (done.output, done.exception)
    return str(done.exception) if code else done.stdout


def write(folder: Path, text: str, name: str = "table.csv") -> Path:
    (folder / name).write_text(text)
    return folder / name


def people_csv(folder: Path, number: int = 90) -> Path:
    """A table in which the town decides the label and the number, and a column is noise."""
    rng = random.Random(0)
    rows = [(i % 3, rng.random()) for i in range(number)]
    lines = [f"{WHERE[town]},{noise:.3f},{20 + 20 * town + noise:.2f},{LABELS[town]}" for town, noise in rows]
    return write(folder, "town,noise,income,label\n" + "\n".join(lines) + "\n", "people.csv")


# The types of columns.


def test_the_types_of_a_csv_file(tmp_path: Path) -> None:
    text = (
        "\ufeffage;zip;member;town;empty;y\n41;01234;TRUE;Ulm;;a\n NA ;89073;false;;NULL;b\n"
        "-1.5e3;89075;true;3;?;b\n.5;0;n/a;none;;\n\n"
    )
    table = read_table(write(tmp_path, text), "y")
    assert table.types == {"age": float, "zip": str, "member": bool, "town": str, "empty": float, "y": str}
    assert table.num_rows == 4 and table.target_values == {"a", "b"} and table.guess_task("y") == "labels"
    rows = list(table.rows())
    assert rows[0] == {"age": 41.0, "zip": "01234", "member": True, "town": "Ulm", "empty": None, "y": "a"}
    assert [row["age"] for row in rows] == [41, None, -1500, 0.5]
    assert [row["member"] for row in rows] == [True, False, True, None] and rows[2]["town"] == "3"


def test_quotes_are_read_alike_in_all_of_a_csv_file(tmp_path: Path) -> None:
    """Neither text that says how quotes are doubled only after 16 KiB, nor apostrophes, nor blanks change them."""
    lines = [f'"Al, {i}","no doubled quotes",a' for i in range(900)]
    rows = list(read_table(write(tmp_path, "\n".join(["x,z,y", *lines, '"B", "He said ""hi, there""",b'])), "y").rows())
    assert rows[0] == {"x": "Al, 0", "z": "no doubled quotes", "y": "a"}
    assert rows[-1] == {"x": "B", "z": 'He said "hi, there"', "y": "b"}
    apostrophes = write(tmp_path, "x,z,y\n" + "'tis,'em,'a'\n" * 5)
    assert next(iter(read_table(apostrophes, "y").rows())) == {"x": "'tis", "z": "'em", "y": "'a'"}


def test_a_numeric_target_of_many_values_is_a_number(tmp_path: Path) -> None:
    few = read_table(write(tmp_path, "x,y\n" + "".join(f"1,{i % 20}\n" for i in range(60))), "y")
    many = read_table(write(tmp_path, "x,y\n" + "".join(f"1,{i}\n" for i in range(60)), "other.csv"), "y")
    assert (few.guess_task("y"), many.guess_task("y")) == ("labels", "regression")
    operation = next(TableProgress("s", few, "y").iter_operations())
    assert isinstance(operation.body, dict) and operation.body["examples"][3] == {"features": {"x": 1.0}, "label": "3"}


def test_a_column_of_numbers_and_others_says_what_it_became(tmp_path: Path) -> None:
    rows = [f"{i},{i / 2},Ulm" for i in range(30)]
    table = read_table(write(tmp_path, "\n".join(["x,y,town", *rows[:7], "about 7,unknown,Jena", *rows[7:]])), "y")
    assert TableProgress("s", table, "y", task="labels").notes == [
        "'x' is categorical: 30 of 31 values are numbers, but row 8 has 'about 7'",
        "'town' is categorical",
    ]
    with pytest.raises(FileError, match=r"'y' of .*30 of 31 .* row 8 has 'unknown'; say which task is meant: 'labels'"):
        TableProgress("s", table, "y")
    numbers = TableProgress("s", table, "y", task="regression")
    assert numbers.notes[-1].startswith("rows without a number in 'y' are left out: 30 of 31")
    operation = next(numbers.iter_operations())
    assert isinstance(operation.body, dict) and numbers.skipped == 1
    assert [each["target"] for each in operation.body["examples"]] == [i / 2 for i in range(30)]
    labels = next(TableProgress("s", table, "y", task="labels").iter_operations())
    assert isinstance(labels.body, dict) and labels.body["examples"][7]["label"] == "unknown"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x,y\n1,2,3\n", "line 2: 3 fields, the head has 2"),
        ("x,x\n1,2\n", "must be distinct names of columns, got x, x"),
        ("x,y\n", "has no rows"),
        ("", "must be distinct names|has no rows"),
        ("x,z\n1,2\n", "has no column 'y'; it has x, z"),
        ("x,y\n\xff,2\n", "is not UTF-8 text"),
        ('x,y\n"unclosed,a\n2,b\n', "line 3: unexpected end of data"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "bad.csv"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(FileError, match=words):
        read_table(file, "y")


def test_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(FileError, match="needs pyarrow to be read: pip install pyarrow"):
        read_table(write(tmp_path, "PAR1", "table.parquet"), "y")


def test_parquet_keeps_its_types(tmp_path: Path) -> None:
    """Needs pyarrow, which is no dependency of the project."""
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    columns: dict[str, list[Any]] = {
        "x": [1, None, 3] * 100,
        "b": [True, None, False] * 100,
        "s": ["a", "07", None] * 100,
        "day": [date(2026, 12, 1), None, date(2026, 12, 2)] * 100,
        "price": [Decimal("1.50"), None, Decimal("2")] * 100,
        "all_missing": [None] * 300,
        "y": [2.5, float("nan"), None] * 100,
    }
    file = tmp_path / "table.parquet"
    parquet.write_table(pyarrow.table(columns), file, row_group_size=70)
    table = read_table(file, "y")
    types = {"x": float, "b": bool, "s": str, "day": str, "price": float, "all_missing": float, "y": float}
    assert (table.types, table.num_rows, table.mixed) == (types, 300, {})
    rows = list(table.rows())
    first = {"x": 1.0, "b": True, "s": "a", "day": "2026-12-01", "price": 1.5, "all_missing": None, "y": 2.5}
    assert rows[0] == first
    assert rows[1] == dict.fromkeys(first) | {"s": "07"} and rows[299]["price"] == 2.0
    with pytest.raises(FileError, match="is no Parquet file"):
        read_table(write(tmp_path, "no table" * 20, "bad.parquet"), "y")


def test_features_of_other_libraries_become_json() -> None:
    given = {"a": np.float32(1.5), 2: np.int64(3), "b": np.bool_(True), "c": float("nan"), "d": "x", "e": None}
    assert plain_features(given) == {"a": 1.5, "2": 3.0, "b": True, "c": None, "d": "x", "e": None}


# Commands.


def test_learn_predicts_each_row_before_it_learns_it_and_learns_no_row_twice(url: str, tmp_path: Path) -> None:
    file = people_csv(tmp_path)
    printed = imprint("learn", str(file), "--target", "label", "--session", "people", "--ignore", "income")
    assert printed.startswith("learned 90 rows · accuracy 0.9") and "the commonest label: 0.3" in printed
    assert imprint("learn", str(file), "-t", "label", "-s", "people", "--ignore", "income") == printed
    with Client(url) as client:
        session = client.get("people")
        assert (session.version, session.tokens_learned) == (2, 90)
        assert client.predict("people", {"town": "Bonn"}).label == "go"


def test_learn_goes_on_where_it_was_stopped(url: str, tmp_path: Path) -> None:
    table = read_table(people_csv(tmp_path), "income")
    with Client(url) as client:

        def stop(progress: TableProgress) -> None:
            if progress.rows == 40:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            client.learn_table("halves", table.path, "income", batch=20, ignore=["label"], progress=stop)
        assert client.get("halves").tokens_learned == 40
        done = client.learn_table("halves", table.path, "income", batch=20, ignore=["label"])
        assert (done.task, done.rows, client.get("halves").tokens_learned) == ("regression", 90, 90)
        assert done.score is not None and done.score[1] < 0.5 * done.score[2]


def test_learn_says_what_is_wrong(url: str, tmp_path: Path) -> None:
    file = str(people_csv(tmp_path))
    assert "has no column 'no'" in imprint("learn", file, "-t", "no", "-s", "x", code=1)
    assert "has no column 'no' to ignore" in imprint("learn", file, "-t", "label", "-s", "x", "--ignore", "no", code=1)
    assert "is no column of numbers" in imprint("learn", file, "-t", "label", "-s", "x", "--task", "regression", code=1)
    mixed = write(tmp_path, "x,y\n" + "".join(f"{i},{i}\n" for i in range(30)) + "1,about 7\n", "mixed.csv")
    failed = imprint("learn", str(mixed), "-t", "y", "-s", "mixed", code=1)
    assert "row 31 has 'about 7'; say which task is meant" in failed
    done = CliRunner().invoke(app, ["learn", str(mixed), "-t", "y", "-s", "mixed", "--task", "regression"])
    assert done.stdout.startswith("learned 30 rows") and "1 without a target" in done.stdout
    assert "rows without a number in 'y' are left out: 30 of 31" in done.stderr
    assert "No such file" in imprint("learn", "/no/such.csv", "-t", "label", "-s", "x", code=1)
    labels = write(tmp_path, "x,y\n" + "".join(f"{i},l{i}\n" for i in range(120)), "labels.csv")
    failed = imprint("learn", str(labels), "-t", "y", "-s", "many", code=1)
    assert "would be one more than the 100 labels of a session" in failed and "before that: learned 64 rows" in failed


def log_file(folder: Path, number: int = 120) -> Path:
    """A log of a policy that takes "a" in 3 of 4 cases; right is "a" in the morning and "b" in the evening."""
    rng = random.Random(1)
    lines = []
    for _ in range(number):
        morning, action = rng.random() < 0.5, "a" if rng.random() < 0.75 else "b"
        reward = float((action == "a") == morning)
        context = {"hour": 8 if morning else 20}
        line = {"context": context, "action": action, "reward": reward, "propensity": 0.75 if action == "a" else 0.25}
        lines.append(json.dumps(line))
    return write(folder, "\n".join(lines), "log.jsonl")


def test_a_log_is_evaluated_before_a_policy_goes_live(url: str, tmp_path: Path) -> None:
    file = str(log_file(tmp_path))
    found = json.loads(imprint("evaluate-log", file, "--json"))
    assert found["policies"].keys() == {"uniform", "always:a", "always:b"}
    assert found["policies"]["uniform"]["ips"]["low"] < 0.5 < found["policies"]["uniform"]["ips"]["high"]
    table = imprint("evaluate-log", file, "--policy", "always:b", "--session", "shadow")
    assert "shadow" in table and "always:b" in table and "120 decisions" in table
    found = json.loads(imprint("evaluate-log", file, "--session", "shadow-2", "--json"))
    assert found["policies"]["session shadow-2"]["dr"]["mean"] > found["policies"]["uniform"]["dr"]["high"]
    with Client(url) as client:
        assert client.get("shadow").tokens_learned == 120
        assert client.act("shadow", actions=["a", "b"], context={"hour": 20}, temperature=0).action == "b"
    assert "exists: it may have learned" in imprint("evaluate-log", file, "--session", "shadow", code=1)
    assert "a policy must be uniform" in imprint("evaluate-log", file, "--policy", "best", code=1)


# Estimators of other libraries.


def test_a_model_of_river(url: str) -> None:
    model, accuracy = RiverClassifier(), metrics.Accuracy()
    for i in range(40):
        x: dict[Any, Any] = {"town": WHERE[i % 3], "n": i % 7}
        y = i % 3 == 1
        accuracy.update(y, model.predict_one(x))
        model.learn_one(x, y)
    assert accuracy.get() > 0.8
    assert set(model.predict_proba_one({"town": "Bonn"})) == {True, False}
    assert model.clone().predict_proba_one({"town": "Bonn"}) == {}
    number = RiverRegressor(session="river-numbers")
    assert number.predict_one({"x": 1}) == 0
    for i in range(40):
        number.learn_one({"x": i % 10}, 3 * (i % 10))
    assert 3 < number.predict_one({"x": 3}) < 15 and number.session_id == "river-numbers"


def test_an_estimator_of_scikit_learn(url: str) -> None:
    rng = np.random.default_rng(0)
    y = np.arange(150) % 3
    X = rng.normal(size=(150, 4)) + 4 * y[:, None]
    model = ImprintClassifier().fit(X, y)
    assert model.score(X, y) > 0.9
    probs = model.predict_proba(X[:5])
    assert probs.shape == (5, 3) and np.allclose(probs.sum(1), 1)
    model.partial_fit(X[:3] + 100, np.array([7, 7, 7]))
    assert model.classes_.tolist() == [0, 1, 2, 7] and model.predict(X[:1] + 100) == [7]
    mixed = np.array([["Ulm", 1.0], ["Bonn", None]] * 10, dtype=object)
    assert ImprintClassifier().fit(mixed, ["a", "b"] * 10).predict(mixed[:2]).tolist() == ["a", "b"]
    numbers = ImprintRegressor().fit(X, X[:, 0])
    assert numbers.score(X, X[:, 0]) > 0.8


def test_the_example_walks_through_a_maze_that_no_session_knew(url: str) -> None:
    """Sessions find a goal that they do not see many times oftener than in the 8 of 200 steps that chance brings."""
    with Client(url) as client:
        walks = [walk(client, f"walker-{seed}", "maze", seed) for seed in range(2)]
    assert all(len(rewards) == len(lost) == 200 and sum(rewards) > 30 for rewards, lost in walks)


@pytest.mark.parametrize("estimator", [ImprintClassifier(), ImprintRegressor()], ids=["classifier", "regressor"])
def test_the_checks_of_scikit_learn_for_interfaces(url: str, estimator: Any) -> None:
    """Those of interfaces and faulty data; `python -m tests.service.test_tables` runs all, which takes minutes."""
    chosen = ("clone", "parameters", "n_features", "unfitted", "1d", "tags", "nans", "get_params", "set_params", "repr")
    ran = 0
    for one, check in estimator_checks_generator(estimator):
        if any(word in check.func.__name__ for word in chosen):
            check(clone(one))
            ran += 1
    assert ran >= 12


def main() -> None:
    for estimator in (ImprintClassifier(), ImprintRegressor()):
        for one, check in estimator_checks_generator(estimator):
            name = check.func.__name__
            try:
                check(clone(one))
                print("passed", name)
            except Exception as error:
                print("FAILED", name, type(error).__name__, str(error)[:200])


if __name__ == "__main__":
    main()
