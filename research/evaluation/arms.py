"""What is compared: an arm reads a stream and says how likely it found each token before it saw it.

Every arm gets the same tokens in the same requests, scores before it learns, and answers with a distribution that sums
to 1. What can be tuned is tuned by `research.evaluation.tuning` on streams set aside for that.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.adaptive_lm import AdaptiveLM
from model.base.backbone import Backbone
from model.memory import SiteRows
from research.evaluation.prequential import Clock, Progress, Stream, Trace, new_pool, score_request

Setting = Mapping[str, float]
PAST = "past."  # what the rows of a session's first half are called among an outcome's values


@dataclass(frozen=True)
class Outcome:
    """What an arm made of a stream of n targets.

    values: "log_probs" [n] (nats; NaN where the arm says nothing), or what `Arm.finish` makes them from. seconds: what
    the arm took, the base's trace not counted. state_bytes: what a session has to keep at the end. base_seconds: what
    the base alone took for the stream about then, if anybody measured it.
    """

    values: dict[str, Tensor]
    seconds: float
    state_bytes: int
    base_seconds: float = math.nan


@dataclass
class Subject:
    """One stream, what the base made of it, and the outcomes of the arms that have read it, by the arms' names.

    key: names the base, the tokens and the requests, so that outcomes can be kept.
    """

    stream: Stream
    trace: Trace
    key: str
    outcomes: dict[str, Outcome] = field(default_factory=dict)


class Arm(ABC):
    """One way to predict a stream.

    name: short, for options and files. title: for people. grid: the settings that tuning chooses from. part: "all", or
    "half" for arms that only speak of the second half. own_base: runs the base itself instead of reading its trace.
    costly: so slow that it is tuned on one stream a kind. equal_bytes: keeps as much as the memory does. needs: the
    arms whose outcomes it reads. fits: whether `fit` does something. kept: whether a run is worth keeping on disk.
    shared: the name that arms with one and the same `run` have in common.
    """

    name: str
    title: str
    grid: Sequence[Setting] = ({},)
    part: str = "all"
    own_base: bool = False
    costly: bool = False
    equal_bytes: bool = False
    requires: tuple[str, ...] = ()
    needs_fit: bool = False
    cached: bool = True

    @property
    def shared(self) -> str:
        return self.name

    def identity(self, subject: Subject) -> list[str]:
        """What a run depends on beside its subject and its setting."""
        return [str(subject.outcomes["memory"].state_bytes)] if self.equal_bytes else []

    @abstractmethod
    def run(self, subject: Subject, setting: Setting, progress: Progress) -> Outcome:
        """Reads one stream; progress is told of each request."""

    def fit(self, examples: Sequence[tuple[Subject, Outcome]], weights: Sequence[float]) -> dict[str, float]:
        """What `finish` needs beyond the setting, fitted to tuning streams of which each counts `weights`."""
        return {}

    def finish(self, subject: Subject, outcome: Outcome, fitted: Mapping[str, float]) -> Tensor:
        """log p [n] of the targets."""
        return outcome.values["log_probs"]

    def requests(self, subject: Subject) -> int:
        """How many requests `run` tells progress of."""
        stream = subject.stream
        return len(stream.requests) - (stream.half if self.part == "half" else 0)


class FrozenBase(Arm):
    """The frozen base, alone."""

    name, title = "static", "frozen base"
    cached = False

    def run(self, subject: Subject, setting: Setting, progress: Progress) -> Outcome:
        progress(self.requests(subject))
        return Outcome({"log_probs": subject.trace.log_probs}, 0.0, 0)


class Adapter(Arm):
    """The base with trained parameters before its head and no memory: states [n, d] → [n, d]."""

    name, title = "adapter", "plain adapter, no memory"

    def __init__(self, backbone: Backbone, adapter: Callable[[Tensor], Tensor], fingerprint: str) -> None:
        self.backbone, self.adapter, self.fingerprint = backbone, adapter, fingerprint

    def identity(self, subject: Subject) -> list[str]:
        return [self.fingerprint]

    @torch.inference_mode()
    def run(self, subject: Subject, setting: Setting, progress: Progress) -> Outcome:
        found, clock = [], Clock()
        for passage in subject.trace.passages():
            found.append(log_prob(self.backbone.logits(self.adapter(passage.states)), passage.targets))
            progress(1)
        return Outcome({"log_probs": torch.cat(found)}, clock.seconds, 0)


class _MemoryArm(Arm):
    """What the arms with a memory share. No session of theirs outlives a run."""

    def __init__(self, lm: AdaptiveLM, bos: int) -> None:
        self.lm, self.bos = lm, bos
        self.pool = new_pool(lm)
        self.fingerprint = lm.memory.fingerprint()

    def identity(self, subject: Subject) -> list[str]:
        return [self.fingerprint]

    def _read(
        self, session: int, subject: Subject, first: int, last: int | None = None, *, learn: bool
    ) -> Iterator[Tensor]:
        """log p of each request from `first` to before `last`."""
        for passage in list(subject.trace.passages())[first:last]:
            yield score_request(self.lm, self.pool, session, passage, self.bos, learn=learn)


class MemoryArm(_MemoryArm):
    """A session's memory: reads, then learns, request after request.

    Its outcome also has the session's state after the first half (`unpack_rows`) and how many rows it ends with.
    """

    name, title = "memory", "memory"

    def run(self, subject: Subject, setting: Setting, progress: Progress) -> Outcome:
        session, values, found, clock = self.pool.open(), {}, [], Clock()
        for number, log_probs in enumerate(self._read(session, subject, 0, learn=True), 1):
            found.append(log_probs)
            progress(1)
            if number == subject.stream.half:
                values = pack_rows(self.pool.dump(session))
        seconds, size = clock.seconds, state_bytes(self.pool.dump(session))
        values["rows"] = torch.tensor(sum(self.pool.rows(session).values()))
        self.pool.close(session)
        return Outcome({"log_probs": torch.cat(found), **values}, seconds, size)


class ClearedMemory(_MemoryArm):
    """The memory, forgotten after each request: what it is worth inside one."""

    name, title = "cleared", "memory cleared each request"

    def run(self, subject: Subject, setting: Setting, progress: Progress) -> Outcome:
        found: list[Tensor] = []
        size, clock = 0, Clock()
        for number in range(len(subject.stream.requests)):
            session = self.pool.open()
            found += self._read(session, subject, number, number + 1, learn=True)
            size = max(size, state_bytes(self.pool.dump(session)))
            self.pool.close(session)
            progress(1)
        return Outcome({"log_probs": torch.cat(found)}, clock.seconds, size)


class PastMemory(_MemoryArm):
    """The second half, read with the memory of some first half and learning nothing.

    of: whose first halves. Several are read one after the other, and the mean of their log-probabilities is told.
    """

    part = "half"
    requires = ("memory",)

    def __init__(self, lm: AdaptiveLM, bos: int, name: str, title: str, of: Callable[[Subject], list[Subject]]) -> None:
        super().__init__(lm, bos)
        self.name, self.title, self.of = name, title, of

    def identity(self, subject: Subject) -> list[str]:
        return [self.fingerprint, *(other.key for other in self.of(subject))]

    def requests(self, subject: Subject) -> int:
        return super().requests(subject) * len(self.of(subject))

    def run(self, subject: Subject, setting: Setting, progress: Progress) -> Outcome:
        log_probs_by_past, size, clock = [], 0, Clock()
        for other in self.of(subject):
            rows = unpack_rows(other.outcomes["memory"].values)
            session, found = self.pool.open(rows), []
            for log_probs in self._read(session, subject, subject.stream.half, learn=False):
                found.append(log_probs)
                progress(1)
            self.pool.close(session)
            log_probs_by_past.append(torch.cat(found))
            size = max(size, state_bytes(rows))
        mean_log_probs = (
            torch.stack(log_probs_by_past).mean(0)
            if log_probs_by_past
            else torch.full((self._num_scored(subject),), math.nan)
        )
        past = torch.full((subject.stream.past,), math.nan)
        return Outcome(
            {"log_probs": torch.cat([past, mean_log_probs])}, clock.seconds / max(1, len(log_probs_by_past)), size
        )

    def _num_scored(self, subject: Subject) -> int:
        return len(subject.trace.targets) - subject.stream.past


class RevisitedMemory(_MemoryArm):
    """A → B → A: the second half, read with the memory of the first half after it has learned other streams too."""

    name, title = "returned", "memory back from other kinds (A→B→A)"
    part = "half"
    requires = ("memory", "own-past")

    def __init__(
        self, lm: AdaptiveLM, bos: int, distractors: Callable[[Subject], list[Subject]], requests: int
    ) -> None:
        """between: the streams of B, of which the first `requests` requests each are learned, in turns."""
        super().__init__(lm, bos)
        self.distractors, self.per_stream = distractors, requests

    def identity(self, subject: Subject) -> list[str]:
        return [self.fingerprint, str(self.per_stream), *(other.key for other in self.distractors(subject))]

    def requests(self, subject: Subject) -> int:
        learned = sum(min(self.per_stream, len(other.stream.requests)) for other in self.distractors(subject))
        return super().requests(subject) + learned

    def run(self, subject: Subject, setting: Setting, progress: Progress) -> Outcome:
        session, found = self.pool.open(unpack_rows(subject.outcomes["memory"].values)), []
        for number in range(self.per_stream):
            for other in self.distractors(subject):
                for _ in self._read(session, other, number, number + 1, learn=True):
                    progress(1)
        size, clock = state_bytes(self.pool.dump(session)), Clock()
        for log_probs in self._read(session, subject, subject.stream.half, learn=False):
            found.append(log_probs)
            progress(1)
        self.pool.close(session)
        past = torch.full((subject.stream.past,), math.nan)
        return Outcome({"log_probs": torch.cat([past, *found])}, clock.seconds, size)


def other_subjects(subjects: Sequence[Subject], *, same_kind: bool, limit: int) -> Callable[[Subject], list[Subject]]:
    """For each subject, at most `limit` others of its kind, or of as many other kinds as possible: those that follow
    it in the list, round and round."""

    def choose(subject: Subject) -> list[Subject]:
        at = next(i for i, other in enumerate(subjects) if other is subject)
        others = [*subjects[at + 1 :], *subjects[:at]]
        if same_kind:
            return [other for other in others if other.stream.kind == subject.stream.kind][:limit]
        first_of_kind = {other.stream.kind: other for other in reversed(others)}
        first_of_kind.pop(subject.stream.kind, None)
        return sorted(first_of_kind.values(), key=others.index)[:limit]

    return choose


def pack_rows(rows: Mapping[str, SiteRows]) -> dict[str, Tensor]:
    """A session's rows as values of an outcome."""
    slots = {f"{PAST}{name}.slots": batch.slots for name, batch in rows.items()}
    return slots | {f"{PAST}{name}.data": batch.data for name, batch in rows.items()}


def unpack_rows(values: Mapping[str, Tensor]) -> dict[str, SiteRows]:
    """What `pack_rows` packed."""
    names = [key.removeprefix(PAST).removesuffix(".slots") for key in values if key.endswith(".slots")]
    return {name: SiteRows(values[f"{PAST}{name}.slots"], values[f"{PAST}{name}.data"]) for name in names}


def state_bytes(rows: Mapping[str, SiteRows]) -> int:
    """Bytes of a stored session: its packed rows and their slots' numbers."""
    return sum(batch.slots.nbytes + batch.data.nbytes for batch in rows.values())


def log_prob(logits: Tensor, targets: Tensor) -> Tensor:
    """log p [n] of targets [n] under logits [n, V]."""
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)
