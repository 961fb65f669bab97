"""A short slice of `python -m tests.fuzz_http`: the server and its description agree."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import Server
from tests.fuzz_http import PHASES, fuzz, fuzzed_server, summary

pytestmark = pytest.mark.e2e

NUM_OPERATIONS = 24


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, dict[str, str]]]:
    with fuzzed_server(tmp_path_factory.mktemp("fuzzed")) as running:
        yield running


@pytest.mark.parametrize(("tenant", "phases"), [("acme", PHASES[1:2]), ("bo", PHASES[2:])])
def test_every_answer_is_one_that_the_description_knows(
    fuzzed: tuple[Server, dict[str, str]], tenant: str, phases: tuple[str, ...]
) -> None:
    server, keys = fuzzed
    report = fuzz(server.url, keys, tenant, seed=1, examples=3, phases=phases)
    assert not report.faults, summary({tenant: report})
    assert len({operation for operation, _ in report.statuses}) == NUM_OPERATIONS
    assert report.cases > 100
