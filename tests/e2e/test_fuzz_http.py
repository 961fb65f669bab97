"""A short slice of `python -m tests.fuzz_http`: the server and its description agree."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fuzz_http import PHASES, Target, fuzz, fuzzed_server, summary

pytestmark = pytest.mark.e2e

NUM_OPERATIONS = 56


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with fuzzed_server(tmp_path_factory.mktemp("fuzzed")) as running:
        yield running


@pytest.mark.parametrize(("tenant", "phases"), [("acme", PHASES[1:2]), ("bo", PHASES[2:])])
def test_every_answer_is_one_that_the_description_knows(fuzzed: Target, tenant: str, phases: tuple[str, ...]) -> None:
    report = fuzz(fuzzed, tenant, seed=1, examples=2, phases=phases)
    assert not report.faults, summary({tenant: report})
    assert len({operation for operation, _ in report.statuses}) == NUM_OPERATIONS
    assert report.cases > 50
