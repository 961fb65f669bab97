"""The probe of code completion: its places, what a suggestion is worth, and the command on a tiny base."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from research.corpus import RECORD_SEPARATOR
from research.evaluation import code
from research.evaluation.code import ARMS, Point, choose_points, evaluate_code, rated
from service.errors import CommandError
from service.settings import Settings
from tests.tiny import INFILL_SPECIAL, SPECIAL, build_tiny_base

FILE = "".join(f"def f{number}(a):\n    return a + {number}\n\n" for number in range(12))


def test_places_lie_in_the_second_half_and_leave_the_whole_text() -> None:
    found = choose_points(FILE, 6, random.Random(0))
    assert len(found) == 6 and {point.at_start for point in found} == {True, False}
    for point in found:
        assert point.before + point.rest + point.after == FILE and point.rest and "\n" not in point.rest
        line = point.before.split("\n")[-1]
        assert (line == "") == point.at_start and (point.at_start or line.strip())
        assert len(point.before) > len(FILE) / 2 - 40


@pytest.mark.parametrize(
    ("text", "exact", "saved"),
    [
        ("return a\nx", True, 8),
        ("return a  ", True, 8),
        ("return b", False, 7),
        ("", False, 0),
        ("return a + 1", False, 8),
    ],
)
def test_what_a_suggestion_is_worth(text: str, exact: bool, saved: int) -> None:
    value = rated("frozen", Point("", "", "return a", False), text, 1.0)
    assert (value.exact, value.saved, value.characters) == (exact, saved, 8)


def test_the_command_on_a_tiny_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = build_tiny_base(tmp_path / "tiny", special=[*SPECIAL, *INFILL_SPECIAL])
    for name, value in {"FILES": 2, "TESTED_FILES": 1, "POINTS": 2, "PROMPT_TOKENS": 128, "SNIPPET_TOKENS": 64}.items():
        monkeypatch.setattr(code, name, value)
    repository = tmp_path / "repository.txt"
    repository.write_text(RECORD_SEPARATOR.join([FILE] * 3))
    evaluate_code(Settings(model=str(base)), [repository], tmp_path / "out")
    suggestions = json.loads((tmp_path / "out" / "code.json").read_text())["repository"]
    assert [each["arm"] for each in suggestions] == [*ARMS, *ARMS]
    assert "Suggestions at 2 places" in (tmp_path / "out" / "code.md").read_text()
    repository.write_text(FILE)
    with pytest.raises(CommandError, match="more than 2 files"):
        evaluate_code(Settings(model=str(base)), [repository], tmp_path / "out")


def test_a_base_that_fills_no_gaps_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="no tokens for filling in the middle"):
        evaluate_code(Settings(model=str(tiny_base)), [], tmp_path)
