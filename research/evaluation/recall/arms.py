"""The arms of the recall probes: the interface, and the arms that put texts of the past before the question."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from research.evaluation.recall.prompt import BEST, before_cue, with_texts
from research.evaluation.recall.scenes import Message
from research.evaluation.recall.search import Index
from research.evaluation.recall.spans import cut_text
from research.evaluation.recall.speaker import Speaker

RECALL_TOKENS = 256
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


class FrozenArm:
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

    def ask(self, question: str, max_tokens: int) -> Answer:
        return Answer(self._speaker.answer(with_texts((), question), max_tokens))

    def complete(self, cue: str, max_tokens: int) -> Answer:
        return Answer(self._speaker.complete(cue, max_tokens))


class OracleArm(FrozenArm):
    """The base with the one text in the prompt that holds the answer: the bound of finding.

    evidence: the text of each question or cue; set for each scene
    """

    name, title = "oracle", "the fact itself in the prompt"

    def __init__(self, speaker: Speaker, wording: str = BEST) -> None:
        super().__init__(speaker)
        self.wording = wording
        if wording != BEST:
            self.name = f"oracle-{wording.replace(' ', '-')}"
            self.title = f"the fact itself in the prompt, {wording}"
        self.evidence: Mapping[str, str] = {}
        self.identity = wording

    def ask(self, question: str, max_tokens: int) -> Answer:
        texts = (self.evidence[question],)
        return Answer(self._speaker.answer(with_texts(texts, question, self.wording), max_tokens), texts)

    def complete(self, cue: str, max_tokens: int) -> Answer:
        texts = (self.evidence[cue],)
        return Answer(self._speaker.complete(before_cue(texts, cue), max_tokens), texts)


class RetrievalArm:
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
        self._speaker, self._new_index, self._limit, self._tokens = speaker, new_index, limit, tokens
        self.forget()

    def forget(self) -> None:
        self._texts: list[str] = []
        self._sizes: list[int] = []
        self._index = self._new_index()

    def teach(self, messages: Sequence[Message]) -> None:
        for message in messages:
            self._add(message["content"])

    def teach_text(self, text: str) -> None:
        self._add(text)

    def find(self, query: str, limit: int) -> list[str]:
        """Return at most `limit` texts, best first."""
        return [self._texts[number] for number in self._index.rank(query, limit)]

    def ask(self, question: str, max_tokens: int) -> Answer:
        texts = self._chosen(question)
        return Answer(self._speaker.answer(with_texts(texts, question), max_tokens), texts)

    def complete(self, cue: str, max_tokens: int) -> Answer:
        texts = self._chosen(cue)
        return Answer(self._speaker.complete(before_cue(texts, cue), max_tokens), texts)

    def _add(self, text: str) -> None:
        for span in cut_text(text, self._speaker.count):
            self._texts.append(span)
            self._sizes.append(self._speaker.count(span))
            self._index.add(span)

    def _chosen(self, query: str) -> tuple[str, ...]:
        """Return the best texts within the budget, in the order in which they were learned, each once."""
        left, numbers, taken = self._tokens, list[int](), set[str]()
        for number in self._index.rank(query, self._tokens):
            text = self._texts[number]
            if text not in taken and self._sizes[number] <= left and len(numbers) < self._limit:
                numbers.append(number)
                taken.add(text)
                left -= self._sizes[number]
        return tuple(self._texts[number] for number in sorted(numbers))


class SummaryArm(FrozenArm):
    """The base with a summary of the past in the prompt, which the base itself writes and keeps up to date.

    tokens: tokens of the summary, at most
    """

    name, title = "summary", "a running summary by the base, in the prompt"

    def __init__(self, speaker: Speaker, tokens: int = RECALL_TOKENS) -> None:
        super().__init__(speaker)
        self._tokens, self.identity = tokens, tokens
        self.forget()

    def forget(self) -> None:
        self._summary = ""
        self._unread: list[str] = []
        self._unread_tokens = 0

    def teach(self, messages: Sequence[Message]) -> None:
        for message in messages:
            self.teach_text(message["content"])

    def teach_text(self, text: str) -> None:
        for span in cut_text(text, self._speaker.count):
            self._unread.append(span)
            self._unread_tokens += self._speaker.count(span)
            if self._unread_tokens >= SUMMARISED_TOKENS:
                self._update()

    def ask(self, question: str, max_tokens: int) -> Answer:
        texts = self._texts()
        return Answer(self._speaker.answer(with_texts(texts, question), max_tokens), texts)

    def complete(self, cue: str, max_tokens: int) -> Answer:
        texts = self._texts()
        return Answer(self._speaker.complete(before_cue(texts, cue), max_tokens), texts)

    def _texts(self) -> tuple[str, ...]:
        if self._unread:
            self._update()
        return (self._summary,) if self._summary else ()

    def _update(self) -> None:
        """Replace the summary by one of the summary and the unread texts."""
        lines = "\n".join(filter(None, [self._summary, *self._unread]))
        task = f"{lines}\n\nList the most important facts above in short sentences, with all names and numbers."
        self._summary = self._speaker.answer([{"role": "user", "content": task}], self._tokens)
        self._unread, self._unread_tokens = [], 0
