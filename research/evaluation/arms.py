"""Arms: the methods that are compared. An arm scores every token of a stream before the arm learns the token.

All arms get the same tokens in the same requests and return probabilities that sum to 1. The settings of an arm are
tuned by `research.evaluation.tuning` on streams set aside for tuning. The arms without the memory are in `caches`,
`contexts` and `gradients`.
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
PAST = "past."  # prefix of the rows of a session's first half among the values of an outcome


@dataclass(frozen=True)
class Outcome:
    """The result of an arm on a stream of n targets.

    values: "log_probs" [n] (nats; NaN where the arm gives no prediction), or the tensors from which `Arm.finish`
        computes them
    seconds: duration of the arm, without the trace of the base
    state_bytes: size of the state that a session keeps at the end
    base_seconds: duration of the base alone on the stream at about the same time; NaN if not measured
    """

    values: dict[str, Tensor]
    seconds: float
    state_bytes: int
    base_seconds: float = math.nan


@dataclass
class Subject:
    """One stream with the trace of the base and the outcomes of the arms that have run, by name of the arm.

    key: hash of the base, the tokens and the requests, for the result cache
    """

    stream: Stream
    trace: Trace
    key: str
    outcomes: dict[str, Outcome] = field(default_factory=dict)


class Arm(ABC):
    """A method that predicts a stream.

    name: short name for options and files
    title: name for tables and figures
    grid: settings that tuning chooses from
    part: "all", or "half" for arms that predict only the second half
    own_base: whether the arm runs the base itself instead of reading the trace
    costly: whether the arm is so slow that it is tuned on one stream of each kind
    equal_bytes: whether the arm keeps as many bytes as the memory
    requires: names of the arms whose outcomes the arm reads
    needs_fit: whether `fit` has parameters to fit
    cached: whether a run is kept on disk
    shared: common name of the arms that have the same `run`
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
        """Return what a run depends on besides the subject and the setting."""
        return [str(subject.outcomes["memory"].state_bytes)] if self.equal_bytes else []

    @abstractmethod
    def run(self, subject: Subject, setting: Setting, progress: Progress) -> Outcome:
        """Run the arm on one stream, and report each request to `progress`."""

    def fit(self, examples: Sequence[tuple[Subject, Outcome]], weights: Sequence[float]) -> dict[str, float]:
        """Return the parameters of `finish`, fitted to tuning streams with the given weights."""
        return {}

    def finish(self, subject: Subject, outcome: Outcome, fitted: Mapping[str, float]) -> Tensor:
        """Return log p [n] of the targets, in nats."""
        return outcome.values["log_probs"]

    def requests(self, subject: Subject) -> int:
        """Return the number of requests that `run` reports to `progress`."""
        stream = subject.stream
        return len(stream.requests) - (stream.half if self.part == "half" else 0)


class FrozenBase(Arm):
    """The frozen base alone."""

    name, title = "static", "frozen base"
    cached = False

    def run(self, subject: Subject, setting: Setting, progress: Progress) -> Outcome:
        progress(self.requests(subject))
        return Outcome({"log_probs": subject.trace.log_probs}, 0.0, 0)


class Adapter(Arm):
    """The base without a memory, but with a trained adapter (states [n, d] → [n, d]) before the head."""

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


class SessionArm(Arm):
    """An arm with the memory of a session. Every session is closed at the end of a run."""

    def __init__(self, lm: AdaptiveLM, bos: int) -> None:
        self.lm, self.bos = lm, bos
        self.pool = new_pool(lm)
        self.fingerprint = lm.memory.fingerprint()

    def identity(self, subject: Subject) -> list[str]:
        return [self.fingerprint]

    def _read(
        self, session: int, subject: Subject, first: int, last: int | None = None, *, learn: bool
    ) -> Iterator[Tensor]:
        """Yield log p of each request in [first, last)."""
        for passage in list(subject.trace.passages())[first:last]:
            yield score_request(self.lm, self.pool, session, passage, self.bos, learn=learn)


class MemoryArm(SessionArm):
    """The memory of a session, which scores and then learns request after request.

    The outcome also holds the state of the session after the first half (see `unpack_rows`) and the final number of
    rows.
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
        values["rows"] = torch.tensor(sum(self.pool.num_rows(session).values()))
        self.pool.close(session)
        return Outcome({"log_probs": torch.cat(found), **values}, seconds, size)


class ClearedMemory(SessionArm):
    """The memory with a new session for each request: the worth of the memory inside a request."""

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


class PastMemory(SessionArm):
    """The memory of other first halves, read on the second half without learning.

    of: returns the subjects whose first halves are read, one after the other; the outcome is the mean of their
        log-probabilities
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


class RevisitedMemory(SessionArm):
    """The memory of the first half, read on the second half after the memory has learned other streams (A → B → A)."""

    name, title = "returned", "memory back from other kinds (A→B→A)"
    part = "half"
    requires = ("memory", "own-past")

    def __init__(
        self, lm: AdaptiveLM, bos: int, distractors: Callable[[Subject], list[Subject]], requests: int
    ) -> None:
        """Take the streams of B, `distractors`. The first `requests` requests of each are learned, interleaved."""
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
    """Return a function that chooses at most `limit` other subjects of the same kind, or of different other kinds.

    The function takes the subjects that follow in the list, and wraps around at the end.
    """

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
    """Return the rows of a session as values of an outcome."""
    slots = {f"{PAST}{name}.slots": batch.slots for name, batch in rows.items()}
    return slots | {f"{PAST}{name}.data": batch.data for name, batch in rows.items()}


def unpack_rows(values: Mapping[str, Tensor]) -> dict[str, SiteRows]:
    """Return the rows that `pack_rows` packed."""
    names = [key.removeprefix(PAST).removesuffix(".slots") for key in values if key.endswith(".slots")]
    return {name: SiteRows(values[f"{PAST}{name}.slots"], values[f"{PAST}{name}.data"]) for name in names}


def state_bytes(rows: Mapping[str, SiteRows]) -> int:
    """Return the size of a stored session: the packed rows and their slot numbers."""
    return sum(batch.slots.nbytes + batch.data.nbytes for batch in rows.values())


def log_prob(logits: Tensor, targets: Tensor) -> Tensor:
    """Return log p [n] of targets [n] under logits [n, V]."""
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)
