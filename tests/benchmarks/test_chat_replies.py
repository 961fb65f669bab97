"""The count of replies that run away."""

import asyncio

import pytest

from benchmarks.chat_replies import MAX_TOKENS, MESSAGES, Reply, ask, loops, row
from service.client import AsyncClient
from tests.conftest import Server


@pytest.mark.parametrize(
    ("text", "loop"),
    [
        ("", False),
        ("I am glad to have you. " * 3, True),
        ("I am glad to have you. " * 2, False),
        ("Salt and pepper to taste. Oil and garlic to taste. Basil and oregano to taste.", False),
        ("It said that the fox is quick, and\nit SAID that the fox IS slow, or it said that the fox is here.", True),
    ],
)
def test_a_loop_is_six_words_that_come_three_times(text: str, loop: bool) -> None:
    assert loops(text) == loop


def test_a_reply_that_is_cut_and_loops_runs_away_once() -> None:
    replies = [Reply("one two three four five six " * 9, MAX_TOKENS, cut=True), Reply("Hello.", 2, cut=False)]
    assert row("greedy", replies) == "| temperature 0 | 1 | 1 | 1 | 257 |"


def test_every_message_is_answered(server: Server) -> None:
    async def replies() -> list[Reply]:
        async with AsyncClient(server.url) as client:
            return await ask(client, {"temperature": 0, "max_tokens": 4})

    answered = asyncio.run(replies())
    assert len(answered) == len(MESSAGES) == 30
    assert all(reply.tokens <= 4 for reply in answered)
