"""The wording in which texts of the past stand before a question: four were tried, and every arm uses the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from research.evaluation.recall.scenes import Message, assistant, user

Wording = Callable[[Sequence[str], str], list[Message]]


def system_notes(texts: Sequence[str], question: str) -> list[Message]:
    """Return a chat with the texts as notes in the system message."""
    notes = "\n".join(f"- {text}" for text in texts)
    content = f"You are a helpful assistant. Notes from earlier conversations with this user:\n{notes}"
    return [{"role": "system", "content": content}, user(question)]


def user_notes(texts: Sequence[str], question: str) -> list[Message]:
    """Return a chat with the texts as notes in the user's message, before the question."""
    notes = "\n".join(f"- {text}" for text in texts)
    return [user(f"Notes from our earlier conversations:\n{notes}\n\nAnswer from the notes: {question}")]


def earlier_turns(texts: Sequence[str], question: str) -> list[Message]:
    """Return a chat in which each text is an earlier message of the user."""
    turns = [message for text in texts for message in (user(text), assistant("Thank you, noted."))]
    return [*turns, user(question)]


def plain_before(texts: Sequence[str], question: str) -> list[Message]:
    """Return a chat with the texts before the question in the user's message, with nothing that explains them."""
    return [user("\n".join([*texts, question]))]


WORDINGS: dict[str, Wording] = {
    "system notes": system_notes,
    "user notes": user_notes,
    "earlier turns": earlier_turns,
    "plain before": plain_before,
}
BEST = "user notes"


def with_texts(texts: Sequence[str], question: str, wording: str = BEST) -> list[Message]:
    """Return the messages of a chat that asks a question after texts of the past, oldest first.

    Without texts the chat is the question alone.
    """
    return WORDINGS[wording](texts, question) if texts else [user(question)]


def before_cue(texts: Sequence[str], cue: str) -> str:
    """Return the text to continue: texts of the past, oldest first, then the beginning of a sentence."""
    return "\n".join([*texts, cue])
