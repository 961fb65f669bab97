"""Count the replies that run away, by sampling options: `python -m benchmarks.chat_replies` prints a table.

Needs a running server. Each set of options answers the same 30 everyday messages. A reply *runs away* if it reaches
the limit of tokens before the model ends its turn, or if it *loops*: the reply says the same six words in a row three
times.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass

from service.client import AsyncClient, ChatOptions
from service.errors import NotFound

MAX_TOKENS = 512  # of a reply, as in `imprint chat`
CONCURRENCY = 6
NGRAM, LOOPS_AT = 6, 3
MESSAGES = (
    "Hello! How are you?",
    "What is the capital of France?",
    "Explain photosynthesis to a child.",
    "Give me a recipe for tomato soup.",
    "Write a short poem about the sea.",
    "What should I wear when it rains?",
    "How do I boil an egg?",
    "Tell me a joke.",
    "What are three tips for sleeping better?",
    "My cat is called Miso and she sleeps on the radiator.",
    "Write an email to my boss: I am ill and stay at home today.",
    "What is the difference between a virus and a bacterium?",
    "Suggest a name for a small bakery.",
    "How can I learn to play the guitar?",
    "Translate 'good morning' into Spanish.",
    "What is 17 plus 25?",
    "Why is the sky blue?",
    "Plan a weekend in Rome.",
    "Summarise the story of Romeo and Juliet.",
    "I feel a bit lonely today.",
    "What does a plumber do?",
    "How do I remove a coffee stain from a shirt?",
    "List five animals that live in the desert.",
    "What is a good present for my grandmother?",
    "Write a Python function that adds two numbers.",
    "How does a bicycle stay upright?",
    "What is the best way to save money?",
    "Tell me a bedtime story about a fox.",
    "What time is it?",
    "Thank you, goodbye!",
)
ARMS: dict[str, ChatOptions] = {
    "openai": {"temperature": 1.0, "top_p": 1.0, "frequency_penalty": 0.0},
    "greedy": {"temperature": 0},
    "0.3": {"temperature": 0.3, "top_p": 0.9},
    "0.3-f0.2": {"temperature": 0.3, "top_p": 0.9, "frequency_penalty": 0.2},
    "0.3-f0.4": {"temperature": 0.3, "top_p": 0.9, "frequency_penalty": 0.4},
    "0.3-f0.6": {"temperature": 0.3, "top_p": 0.9, "frequency_penalty": 0.6},
    "0.4-f0.5": {"temperature": 0.4, "top_p": 0.9, "frequency_penalty": 0.5},
    "0.6-f0.4": {"temperature": 0.6, "top_p": 0.9, "frequency_penalty": 0.4},
}


@dataclass(frozen=True)
class Reply:
    """A reply, its length in tokens, and whether the limit of tokens ended it."""

    text: str
    tokens: int
    cut: bool

    @property
    def loops(self) -> bool:
        """Return whether the reply says the same words again and again."""
        return loops(self.text)


def loops(text: str) -> bool:
    """Return whether the same NGRAM words follow each other at LOOPS_AT places or more of the text."""
    words = text.lower().split()
    ngrams = Counter(tuple(words[at : at + NGRAM]) for at in range(len(words) - NGRAM + 1))
    return max(ngrams.values(), default=0) >= LOOPS_AT


async def ask(client: AsyncClient, options: ChatOptions) -> list[Reply]:
    """Return the replies to all messages, each of which begins a chat of its own."""
    limit = asyncio.Semaphore(CONCURRENCY if options.get("session") is None else 1)  # a session learns in order

    async def one(number: int, message: str) -> Reply:
        async with limit:
            sampled: ChatOptions = {"max_tokens": MAX_TOKENS, "seed": number, **options}
            reply = await client.chat([{"role": "user", "content": message}], **sampled)
        choice = reply.choices[0]
        return Reply(choice.message.content or "", reply.usage.completion_tokens, choice.finish_reason == "length")

    return await asyncio.gather(*(one(number, message) for number, message in enumerate(MESSAGES)))


def row(name: str, replies: list[Reply]) -> str:
    """Return the row of one set of options in the table."""
    cut, looping = sum(reply.cut for reply in replies), sum(reply.loops for reply in replies)
    away = sum(reply.cut or reply.loops for reply in replies)
    tokens = statistics.median(reply.tokens for reply in replies)
    options = ", ".join(f"{option.replace('_', ' ')} {value}" for option, value in ARMS[name].items())
    return f"| {options or 'the defaults of the API'} | {cut} | {looping} | {away} | {tokens:.0f} |"


async def measure(url: str | None, names: list[str], session: str | None, read: bool) -> None:
    """Print the table; with `read`, the replies themselves below it."""
    print(f"| sampling | no end in {MAX_TOKENS} tokens | loop | run away, of {len(MESSAGES)} | median tokens |")
    print("| --- | --- | --- | --- | --- |")
    texts = []
    async with AsyncClient(url) as client:
        for name in names:
            if session is not None:
                with suppress(NotFound):
                    await client.delete(session)
            replies = await ask(client, ARMS[name] | {"session": session})
            print(row(name, replies), flush=True)
            texts += [f"\n## {name}"]
            for message, reply in zip(MESSAGES, replies, strict=True):
                texts += [f"\n› {message}  [{reply.tokens}{' cut' * reply.cut}{' loops' * reply.loops}]\n{reply.text}"]
    if read:
        print("\n".join(texts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="Address of the server; default: IMPRINT_URL, else http://127.0.0.1:8000.")
    parser.add_argument("--only", action="append", choices=ARMS, help="One set of options; may be given several times.")
    parser.add_argument("--session", help="A session that learns the messages; it is erased before each set.")
    parser.add_argument("--read", action="store_true", help="Print the replies too.")
    args = parser.parse_args()
    asyncio.run(measure(args.url, args.only or list(ARMS), args.session, args.read))


if __name__ == "__main__":
    main()
