"""The data that every recall probe consists of: scenes with requests to learn and questions about them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Message = dict[str, str]  # "role" and "content", as in a chat request
Split = Literal["train", "dev", "review"]
SPLITS: tuple[Split, ...] = ("train", "dev", "review")


@dataclass(frozen=True)
class Question:
    """A question about a scene, and how an answer to it is scored.

    text: the question, or the beginning of a sentence that the answer continues if `is_cue`
    answer: the value that a right answer contains
    evidence: the taught text that holds the answer
    label: what sort of question it is; figures are given by label
    others: values of the same sort that belong to other people in the scene
    outdated: the value that a correction replaced
    wording: identifies the template of `text`
    """

    text: str
    answer: str
    evidence: str
    label: str
    others: tuple[str, ...] = ()
    outdated: str = ""
    wording: str = ""
    is_cue: bool = False


@dataclass(frozen=True)
class Scene:
    """Everything that one session learns, and the questions about it.

    requests: chats, each learned as one request, in order
    max_tokens: tokens of an answer, at most
    """

    name: str
    requests: tuple[tuple[Message, ...], ...]
    questions: tuple[Question, ...] = field(default=())
    max_tokens: int = 32


def user(content: str) -> Message:
    """Return a message of the user."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """Return a message of the assistant."""
    return {"role": "assistant", "content": content}
