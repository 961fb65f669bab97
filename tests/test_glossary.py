"""The glossary: every place that it names exists, and no public name uses a word that it forbids."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("imprint", "model", "service", "research", "benchmarks")


@cache
def tables() -> dict[str, list[list[str]]]:
    """Return the rows of each table of the glossary, by the title of the table's first column."""
    found: dict[str, list[list[str]]] = {}
    title = ""
    for line in (ROOT / "docs" / "glossary.md").read_text().splitlines():
        if not line.startswith("|"):
            title = ""
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not title:
            title = cells[0]
            found[title] = []
        elif not set(cells[0]) <= {"-"}:
            found[title].append(cells)
    return found


def in_code(cell: str) -> list[str]:
    """Return what stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def defines(file: Path, name: str) -> bool:
    """Return whether a module defines a class, a function or a name at its top level."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
            return True
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return True
    return False


def public_names(file: Path) -> Iterator[str]:
    """Yield the public names of a module: its own, and those of its classes, fields, functions and parameters."""
    yield from file.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ClassDef):
            yield node.name
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    yield field.target.id
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
            if not node.name.startswith("_") or node.name == "__init__":
                arguments = node.args
                for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
                    yield argument.arg


def forbidden_name(file: Path) -> Iterator[str]:
    """Yield the public names of a module that the glossary forbids."""
    patterns = [pattern for cells in tables()["forbidden"] for pattern in in_code(cells[0])]
    staying = [in_code(name)[0] for name, where, _ in tables()["name"] if file == ROOT / in_code(where)[0]]
    for name in public_names(file):
        if name not in staying and any(fnmatchcase(name, pattern) for pattern in patterns):
            yield name


@pytest.mark.parametrize("package", PACKAGES)
def test_no_public_name_is_forbidden(package: str) -> None:
    found = {str(file): names for file in (ROOT / package).rglob("*.py") if (names := [*forbidden_name(file)])}
    assert not found


def test_the_terms_are_in_order_and_unique() -> None:
    terms = [cells[0].lower() for cells in tables()["term"]]
    assert terms == sorted(set(terms))


def test_the_place_of_each_term_exists() -> None:
    for term, _, where in tables()["term"]:
        (place,) = in_code(where)
        path, _, name = place.partition(":")
        assert (ROOT / path).exists(), f"{term}: {path}"
        assert not name or defines(ROOT / path, name), f"{term}: {place}"


def test_a_name_that_stays_is_still_there() -> None:
    for name, where, _ in tables()["name"]:
        assert in_code(name)[0] in public_names(ROOT / in_code(where)[0]), where
