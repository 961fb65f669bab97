"""The arms of the recall probes: the interface, and the arms that put texts of the past before the question."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from research.evaluation.recall.prompt import BEST, before_cue, with_texts
from research.evaluation.recall.scenes import Message, user
from research.evaluation.recall.search import Index
from research.evaluation.recall.spans import cut_text
from research.evaluation.recall.speaker import Speaker

RECALL_TOKENS = 256
BLOCK = 64  # tokens typed, after which the texts of the prompt are chosen anew
SUMMARISED_TOKENS = 512  # of new text, after which a running summary is written again


@dataclass(frozen=True)
class Answer:
    """An answer, and the texts that were put before the model for it; None for an arm that puts none."""

    text: str
    spans: tuple[str, ...] | None = None


class RecallArm(Protocol):
    """A method that learns from requests and answers questions in new requests without history."""

    name: str
    title: str

    @property
    def identity(self) -> object:
        """Return what the results depend on beside the code, the base and the scene."""
        ...

    def forget(self) -> None:
        """Start a new, empty session."""
        ...

    def teach(self, messages: Sequence[Message]) -> None:
        """Learn one chat request."""
        ...

    def teach_text(self, text: str) -> None:
        """Learn a document as one request."""
        ...

    def ask(self, question: str, max_tokens: int) -> Answer:
        """Return the greedy reply to a question in a new request."""
        ...

    def complete(self, cue: str, max_tokens: int) -> Answer:
        """Return the greedy continuation of the beginning of a sentence, in a new request."""
        ...


@runtime_checkable
class BatchArm(Protocol):
    """An arm that answers several questions faster together, each in a request of its own."""

    def ask_all(self, questions: Sequence[str], max_tokens: int) -> list[Answer]:
        """Return what `ask` returns for each question."""
        ...

    def complete_all(self, cues: Sequence[str], max_tokens: int) -> list[Answer]:
        """Return what `complete` returns for each cue."""
        ...


@runtime_checkable
class Finder(Protocol):
    """An arm that can name the texts it would read."""

    name: str

    def forget(self) -> None: ...

    def teach(self, messages: Sequence[Message]) -> None: ...

    def find(self, query: str, limit: int) -> list[str]:
        """Return at most `limit` learned texts, best first."""
        ...


@runtime_checkable
class Suggester(Protocol):
    """An arm that can complete what a person types."""

    def guess(self, token_ids: Sequence[int]) -> list[int]:
        """Return the likeliest token at each position of a request, which is not learned.

        What is put before a token depends on the tokens before it only.
        """
        ...


class OneByOne:
    """The questions of a `BatchArm`, one by one."""

    def ask(self: BatchArm, question: str, max_tokens: int) -> Answer:
        """Return the greedy reply to a question in a new request."""
        return self.ask_all([question], max_tokens)[0]

    def complete(self: BatchArm, cue: str, max_tokens: int) -> Answer:
        """Return the greedy continuation of the beginning of a sentence, in a new request."""
        return self.complete_all([cue], max_tokens)[0]


class FrozenArm(OneByOne):
    """The frozen base, which remembers nothing."""

    name, title = "frozen", "frozen base"
    identity: object = None

    def __init__(self, speaker: Speaker) -> None:
        self._speaker = speaker

    def forget(self) -> None:
        pass

    def teach(self, messages: Sequence[Message]) -> None:
        pass

    def teach_text(self, text: str) -> None:
        pass

    def ask_all(self, questions: Sequence[str], max_tokens: int) -> list[Answer]:
        chats = [with_texts((), question) for question in questions]
        return [Answer(text) for text in self._speaker.answers(chats, max_tokens)]

    def complete_all(self, cues: Sequence[str], max_tokens: int) -> list[Answer]:
        return [Answer(text) for text in self._speaker.sentences(cues, max_tokens)]

    def guess(self, token_ids: Sequence[int]) -> list[int]:
        return self._speaker.likeliest(self._speaker.text_ids(""), token_ids)


class PromptArm(OneByOne, ABC):
    """The base with texts of the past in the prompt, in one wording."""

    name: str
    title: str
    identity: object = None
    wording = BEST

    def __init__(self, speaker: Speaker) -> None:
        self._speaker = speaker
        self.forget()

    @abstractmethod
    def forget(self) -> None: ...

    @abstractmethod
    def teach_text(self, text: str) -> None: ...

    @abstractmethod
    def chosen(self, query: str) -> tuple[str, ...]:
        """Return the texts that are put before a question or a cue, oldest first."""

    def teach(self, messages: Sequence[Message]) -> None:
        for message in messages:
            self.teach_text(message["content"])

    def ask_all(self, questions: Sequence[str], max_tokens: int) -> list[Answer]:
        chosen = [self.chosen(question) for question in questions]
        chats = [with_texts(texts, question, self.wording) for texts, question in zip(chosen, questions, strict=True)]
        return [Answer(*both) for both in zip(self._speaker.answers(chats, max_tokens), chosen, strict=True)]

    def complete_all(self, cues: Sequence[str], max_tokens: int) -> list[Answer]:
        chosen = [self.chosen(cue) for cue in cues]
        prompts = [before_cue(texts, cue) for texts, cue in zip(chosen, cues, strict=True)]
        return [Answer(*both) for both in zip(self._speaker.sentences(prompts, max_tokens), chosen, strict=True)]


class OracleArm(PromptArm):
    """The base with the one text in the prompt that holds the answer: the bound of finding.

    evidence: the text of each question or cue; set for each scene
    """

    name, title = "oracle", "the fact itself in the prompt"

    def __init__(self, speaker: Speaker, wording: str = BEST) -> None:
        super().__init__(speaker)
        self.wording = self.identity = wording
        if wording != BEST:
            self.name = f"oracle-{wording.replace(' ', '-')}"
            self.title = f"the fact itself in the prompt, {wording}"

    def forget(self) -> None:
        self.evidence: Mapping[str, str] = {}

    def teach_text(self, text: str) -> None:
        pass

    def chosen(self, query: str) -> tuple[str, ...]:
        return (self.evidence[query],)


class RetrievalArm(PromptArm):
    """The base with the best texts in the prompt that an index finds.

    limit: texts at most. tokens: tokens of the texts together, at most.
    """

    def __init__(
        self,
        speaker: Speaker,
        name: str,
        title: str,
        new_index: Callable[[], Index],
        *,
        limit: int = 10_000,
        tokens: int = RECALL_TOKENS,
    ) -> None:
        self.name, self.title, self.identity = name, title, (limit, tokens)
        self._new_index, self._limit, self._tokens = new_index, limit, tokens
        super().__init__(speaker)

    def forget(self) -> None:
        self._texts: list[str] = []
        self._sizes: list[int] = []
        self._index = self._new_index()

    def teach_text(self, text: str) -> None:
        for span in cut_text(text, self._speaker.count):
            self._texts.append(span)
            self._sizes.append(self._speaker.count(span))
            self._index.add(span)

    def find(self, query: str, limit: int) -> list[str]:
        """Return at most `limit` texts, best first."""
        return [self._texts[number] for number in self._index.rank(query, limit)]

    def chosen(self, query: str) -> tuple[str, ...]:
        """Return the best texts within the budget, in the order in which they were learned, each once."""
        left, numbers, taken = self._tokens, list[int](), set[str]()
        for number in self._index.rank(query, self._tokens):
            text = self._texts[number]
            if text not in taken and self._sizes[number] <= left and len(numbers) < self._limit:
                numbers.append(number)
                taken.add(text)
                left -= self._sizes[number]
        return tuple(self._texts[number] for number in sorted(numbers))

    def guess(self, token_ids: Sequence[int]) -> list[int]:
        """Return the likeliest tokens; before each block, texts are found by the block before it."""
        found = list[int]()
        for start in range(0, len(token_ids), BLOCK):
            query = self._speaker.tokenizer.decode(token_ids[max(0, start - BLOCK) : start])
            texts = self.chosen(query) if start else ()
            before = self._speaker.text_ids("".join(f"{text}\n" for text in texts))
            found += self._speaker.likeliest(before, token_ids[: start + BLOCK])[start:]
        return found


class SummaryArm(PromptArm):
    """The base with a summary of the past in the prompt, which the base itself writes and keeps up to date.

    tokens: tokens of the summary, at most
    """

    name, title = "summary", "a running summary by the base, in the prompt"

    def __init__(self, speaker: Speaker, tokens: int = RECALL_TOKENS) -> None:
        self._tokens = self.identity = tokens
        super().__init__(speaker)

    def forget(self) -> None:
        self._summary = ""
        self._unread: list[str] = []
        self._unread_tokens = 0

    def teach_text(self, text: str) -> None:
        for span in cut_text(text, self._speaker.count):
            self._unread.append(span)
            self._unread_tokens += self._speaker.count(span)
            if self._unread_tokens >= SUMMARISED_TOKENS:
                self._update()

    def chosen(self, query: str) -> tuple[str, ...]:
        if self._unread:
            self._update()
        return (self._summary,) if self._summary else ()

    def _update(self) -> None:
        """Replace the summary by one of the summary and the unread texts."""
        lines = "\n".join(filter(None, [self._summary, *self._unread]))
        task = f"{lines}\n\nList the most important facts above in short sentences, with all names and numbers."
        (self._summary,) = self._speaker.answers([[user(task)]], self._tokens)
        self._unread, self._unread_tokens = [], 0
