"""On the default base, a session's memory helps that session and not another one, with the numbers of docs/tour.md."""

from __future__ import annotations

import io
import re
import runpy
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import pytest

from imprint import Client, Completion, CompletionOptions
from service.types import SUGGESTED_SAMPLING
from tests.conftest import Server

pytestmark = [pytest.mark.e2e, pytest.mark.real]

ROOT = Path(__file__).parents[2]
TOUR = (ROOT / "docs" / "tour.md").read_text()
REL_TOLERANCE = 0.02  # processors round differently


@dataclass
class ExampleRun:
    """A server of the default base after `examples/two_users.py`, in which ada and bo each learned half of a text."""

    client: Client
    table: str


@pytest.fixture(scope="module")
def example_run(real_server: Server) -> Iterator[ExampleRun]:
    with Client(real_server.url) as client, redirect_stdout(io.StringIO()) as table:
        script = runpy.run_path(str(ROOT / "examples" / "two_users.py"))
        script["main"](real_server.url)
        sys.stdout.flush()
        yield ExampleRun(client, table.getvalue())


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


def complete_greedily(
    client: Client, reader: str | None, prompt: str, **options: Unpack[CompletionOptions]
) -> Completion:
    """Complete with the memory of `reader` without learning; None = the frozen base."""
    options["adapt"] = "predict" if reader else None
    options["session"] = reader
    options["temperature"] = 0
    return client.complete(prompt, **options)


def test_a_memory_beats_the_base_and_the_other_sessions_memory_on_its_own_text(example_run: ExampleRun) -> None:
    keeper, loom = (numbers(line) for line in example_run.table.splitlines()[2:])
    (_, ada, own, bo, other), (_, ada_too, others, bo_too, owns) = keeper, loom
    assert own < 1 < other * 1.05 and ada < bo
    assert owns < 1 < others * 1.05 and bo_too < ada_too


def test_the_table_of_the_tour_is_what_the_example_prints(example_run: ExampleRun) -> None:
    shown = TOUR[TOUR.index("| perplexity of") :].split("\n\n")[0]
    assert re.sub(r"\d+\.\d+", "", shown) == re.sub(r"\d+\.\d+", "", example_run.table.rstrip())
    assert numbers(shown) == pytest.approx(numbers(example_run.table), rel=REL_TOLERANCE)


def test_the_sessions_of_the_tour_learned_what_it_says(example_run: ExampleRun) -> None:
    documented = re.findall(r"--session (\w+)\nlearned (\d+) tokens · (\d+) rows · loss ([\d.]+) · version 1", TOUR)
    assert [name for name, *_ in documented] == ["ada", "bo"]
    for name, tokens, rows, loss in documented:
        session, (entry,) = example_run.client.get(name), example_run.client.log(name)
        assert session.tokens_learned == int(tokens)
        assert session.rows == pytest.approx(int(rows), rel=REL_TOLERANCE)
        assert entry.loss == pytest.approx(float(loss), rel=REL_TOLERANCE)


def test_what_the_tour_teaches_is_completed_as_it_shows(example_run: ExampleRun) -> None:
    paragraph = " ".join(line.removeprefix("> ") for line in TOUR.splitlines() if line.startswith("> "))
    learned = example_run.client.observe("visitor", paragraph)
    assert f"{learned.tokens_learned} tokens" in TOUR
    table = TOUR[TOUR.index("| prompt |") :].split("\n\n")[0]
    for row in table.splitlines()[2:]:
        prompt, adapted, frozen = (cell.strip() for cell in row.strip("|").split("|"))
        for shown, session in ((adapted, "visitor"), (frozen, None)):
            penalty = SUGGESTED_SAMPLING.frequency_penalty  # as the page has it
            output = complete_greedily(
                example_run.client, session, prompt, max_tokens=12, frequency_penalty=penalty
            ).text
            assert " ".join(output.split()).startswith(shown)


def test_an_empty_session_is_the_base_bit_for_bit(example_run: ExampleRun) -> None:
    scored = example_run.client.score("nobody", (ROOT / "examples" / "keeper-2.txt").read_text()[:1000])
    assert scored.logprobs == scored.frozen_logprobs
    assert scored.loss == scored.frozen_loss


def test_what_was_taught_is_completed(example_run: ExampleRun) -> None:
    """The base cannot know the name; the session that read the story does."""
    prompt = "The Keeper of Orvane Light was called"

    def name_logprob(session: str | None) -> float:
        text = prompt + " Marrow Tessaly"
        reply = complete_greedily(example_run.client, session, text, max_tokens=0, echo=True, logprobs=0)
        logprobs = reply.choices[0].logprobs
        assert logprobs is not None
        start = next(i for i, offset in enumerate(logprobs.text_offset) if offset >= len(prompt))
        return sum(logprob or 0.0 for logprob in logprobs.token_logprobs[start:])

    assert name_logprob("ada") > name_logprob(None) + 2
