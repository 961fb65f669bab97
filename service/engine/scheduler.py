"""The scheduler: continuous batching with chunked prefill. It counts; no tensor and no thread appears here.

Each step runs at most one block of one job (prefill or learning) and one token of every decoding sequence, so that a
long prompt delays the running streams by one block at a time. Blocks go round robin; admission is first come, first
served.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, Protocol, TypeVar


class Schedulable(Protocol):
    """The properties of a job on which the scheduler decides."""

    @property
    def num_sequences(self) -> int:
        """Number of sequences that the job may decode at once."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the key-value cache that the job may need."""

    @property
    def wants_block(self) -> bool:
        """True if the job's next step is a block rather than decoding."""


JobT = TypeVar("JobT", bound=Schedulable)


class Scheduler(Generic[JobT]):
    """The queue of waiting jobs and the round of running jobs.

    `max_sequences` and `max_tokens` bound what runs at once; a job larger than a bound runs alone.
    """

    def __init__(self, *, max_sequences: int, max_tokens: int) -> None:
        self.max_sequences = max_sequences
        self.max_tokens = max_tokens
        self.waiting: deque[JobT] = deque()
        self.running: deque[JobT] = deque()

    @property
    def tokens_reserved(self) -> int:
        """Number of tokens of the key-value cache that the running jobs may need."""
        return sum(job.num_tokens for job in self.running)

    def add(self, job: JobT) -> None:
        """Queue a job."""
        self.waiting.append(job)

    def remove(self, job: JobT) -> None:
        """Remove a job, whether the job waits or runs."""
        for queue in (self.waiting, self.running):
            if job in queue:
                queue.remove(job)

    def admit(self) -> list[JobT]:
        """Move jobs from waiting to running, in order, while they fit; return the moved jobs."""
        admitted = []
        while self.waiting and self._fits(self.waiting[0]):
            job = self.waiting.popleft()
            self.running.append(job)
            admitted.append(job)
        return admitted

    def next_block(self) -> JobT | None:
        """Return the job whose block is next, and move the job to the end of the round."""
        for job in self.running:
            if job.wants_block:
                self.running.remove(job)
                self.running.append(job)
                return job
        return None

    def _fits(self, job: JobT) -> bool:
        if not self.running:
            return True
        num_sequences = sum(other.num_sequences for other in self.running) + job.num_sequences
        return num_sequences <= self.max_sequences and self.tokens_reserved + job.num_tokens <= self.max_tokens
