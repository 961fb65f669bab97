"""Who runs next: continuous batching with chunked prefill. Counts only, no tensors, no threads.

Each step runs at most one block of one run (prefill or learning) and one token of every decoding sequence, so a long
prompt delays running streams by one block at a time. Blocks take turns round robin; admission is first come, first
served.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, Protocol, TypeVar


class Schedulable(Protocol):
    """What the scheduler needs to know of a run."""

    @property
    def num_sequences(self) -> int:
        """Sequences it may decode at once."""

    @property
    def num_tokens(self) -> int:
        """Key-value cache tokens it may need."""

    @property
    def wants_block(self) -> bool:
        """Whether its next step is a block rather than decoding."""


R = TypeVar("R", bound=Schedulable)


class Scheduler(Generic[R]):
    """max_sequences and max_tokens bound what runs at once; a run larger than a bound runs alone."""

    def __init__(self, *, max_sequences: int, max_tokens: int) -> None:
        self.max_sequences = max_sequences
        self.max_tokens = max_tokens
        self.waiting: deque[R] = deque()
        self.running: deque[R] = deque()

    @property
    def tokens_reserved(self) -> int:
        return sum(run.num_tokens for run in self.running)

    def add(self, run: R) -> None:
        self.waiting.append(run)

    def remove(self, run: R) -> None:
        """Forgets a run, wherever it is."""
        for queue in (self.waiting, self.running):
            if run in queue:
                queue.remove(run)

    def admit(self) -> list[R]:
        """Moves runs from waiting to running, in order, while they fit; returns them."""
        admitted = []
        while self.waiting and self._fits(self.waiting[0]):
            run = self.waiting.popleft()
            self.running.append(run)
            admitted.append(run)
        return admitted

    def next_block(self) -> R | None:
        """The run whose block is next; it goes to the end of the round."""
        for run in self.running:
            if run.wants_block:
                self.running.remove(run)
                self.running.append(run)
                return run
        return None

    def _fits(self, run: R) -> bool:
        if not self.running:
            return True
        sequences = sum(other.num_sequences for other in self.running) + run.num_sequences
        return sequences <= self.max_sequences and self.tokens_reserved + run.num_tokens <= self.max_tokens
