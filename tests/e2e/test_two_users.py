"""On the real base: what a session has learned helps that session, and not its neighbour."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import Server

pytestmark = [pytest.mark.e2e, pytest.mark.real]

EXAMPLES = Path(__file__).parents[2] / "examples"
READERS = {"ada": "keeper", "bo": "loom"}


@pytest.fixture(scope="module")
def client(real_server: Server) -> Iterator[httpx.Client]:
    """A client of a server of the default base, where each reader has observed the first part of a book."""
    with httpx.Client(base_url=real_server.url, timeout=120) as client:
        for reader, book in READERS.items():
            text = (EXAMPLES / f"{book}-1.txt").read_text()
            reply = client.post(f"/v1/sessions/{reader}/observe", json={"text": text})
            assert reply.status_code == 200, reply.text
            assert reply.json()["version"] == 1
        yield client


def score(client: httpx.Client, reader: str, text: str) -> Any:
    reply = client.post(f"/v1/sessions/{reader}/score", json={"text": text})
    assert reply.status_code == 200, reply.text
    return reply.json()


@pytest.mark.parametrize(("reader", "neighbour"), [("ada", "bo"), ("bo", "ada")])
def test_a_memory_beats_the_base_and_the_neighbours_memory_on_its_own_book(
    client: httpx.Client, reader: str, neighbour: str
) -> None:
    unseen = (EXAMPLES / f"{READERS[reader]}-2.txt").read_text()
    own, other = score(client, reader, unseen), score(client, neighbour, unseen)
    assert own["frozen_loss"] == other["frozen_loss"]
    assert own["loss"] < own["frozen_loss"]
    assert own["loss"] < other["loss"]


def test_an_empty_session_is_the_base_bit_for_bit(client: httpx.Client) -> None:
    scored = score(client, "nobody", (EXAMPLES / "keeper-2.txt").read_text())
    assert scored["logprobs"] == scored["frozen_logprobs"]
    assert scored["loss"] == scored["frozen_loss"]


def test_what_was_taught_is_completed(client: httpx.Client) -> None:
    """The base cannot know the name; the session that read the story does."""
    prompt = "The Keeper of Orvane Light was called"

    def name_logprob(**fields: Any) -> float:
        body = {"model": "smollm2-135m-instruct", "prompt": prompt + " Marrow Tessaly", "max_tokens": 0, "echo": True}
        reply = client.post("/v1/completions", json=body | {"logprobs": 0} | fields)
        assert reply.status_code == 200, reply.text
        logprobs = reply.json()["choices"][0]["logprobs"]
        start = next(i for i, offset in enumerate(logprobs["text_offset"]) if offset >= len(prompt))
        return float(sum(logprobs["token_logprobs"][start:]))

    assert name_logprob(session="ada", adapt="predict") > name_logprob() + 2
