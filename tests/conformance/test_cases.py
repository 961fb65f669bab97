"""The list of the peers' cases: the page of it, and that each case names a test that exists."""

from __future__ import annotations

import re
from pathlib import Path

from tests.conformance.cases import CASES, is_test, page

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_of_the_peers_cases_is_what_its_generator_prints() -> None:
    assert (ROOT / "docs" / "conformance.md").read_text() == page()


def test_every_case_names_a_test_that_exists_or_says_why_it_does_not_hold() -> None:
    defined = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)", file.read_text(), re.M)
    }
    answers = [answer for cases in CASES.values() for answer in cases.values()]
    assert len(answers) == 112
    assert {answer for answer in answers if is_test(answer)} <= defined
    assert all(answer.endswith(".") for answer in answers if not is_test(answer))
