"""The streams of one evaluation and the arms that run on them; what is finished is kept in the output folder."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from model.adaptive_lm import AdaptiveLM
from model.base.backbone import Backbone
from model.base.checkpoint import fingerprint, load_backbone
from model.text.tokenizer import Tokenizer
from research.corpus import progress_bar
from research.evaluation.arms import (
    Adapter,
    Arm,
    ClearedMemory,
    FrozenBase,
    MemoryArm,
    Outcome,
    PastMemory,
    RevisitedMemory,
    Setting,
    Subject,
    other_subjects,
)
from research.evaluation.caches import Combined, NeuralCache, NGrams, Whitening
from research.evaluation.contexts import FullHistory, LastTokens
from research.evaluation.describe import Describer, StreamScores
from research.evaluation.gradients import DenseDelta, DynamicAll, DynamicHead, DynamicLoRA
from research.evaluation.prequential import Stream, Trace, read_passage, read_trace
from research.evaluation.tuning import Tuned, tune, tuning_subjects
from research.runs import ResultCache, code_hash, key
from research.training.adapter import load_adapter
from service.errors import CommandError

CHEAP = (
    "static", "memory", "cleared", "own-past", "same-kind", "other-kind", "returned", "cache-raw-fixed", "cache-raw",
    "cache-fixed", "cache", "cache-raw-bytes", "cache-bytes", "memory+cache", "ngrams", "dense", "dynamic-head",
)  # fmt: skip
COSTLY = ("last-tokens", "full-history", "dynamic-lora", "dynamic-all")
ALWAYS = ("static", "memory")
OTHER_KINDS = 3  # pasts of other kinds that are read against a stream
BASE_TIMING_INTERVAL_S = 60.0
DISTRACTOR_REQUESTS = 4  # requests of each other kind that are learned before a stream is returned to
READING_CODE = ("evaluation/prequential.py", "evaluation/arms.py")

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Options:
    """What `imprint eval` is asked for. arms, tuning, probes: names. long: tokens of the long session, 0 = none."""

    requests: int
    window: int
    streams: int
    arms: Sequence[str]
    tuning: Sequence[str]
    probes: Sequence[str]
    long: int
    adapter: Path | None
    out: Path


class Trial:
    """tuning: the kinds that settings are chosen on. tuned and readings: by arm, once it has run."""

    def __init__(
        self, lm: AdaptiveLM, tokenizer: Tokenizer, folder: Path, streams: Sequence[Stream], options: Options
    ) -> None:
        self.lm, self.tokenizer, self.folder, self.options = lm, tokenizer, folder, options
        self.names = arm_names(options)
        self.tuning = _tuning_kinds(streams, options.tuning)
        self.base = fingerprint(folder)
        self.bos = tokenizer.start_token_id
        self.runs = ResultCache(options.out / "runs")
        self.tuned: dict[str, Tuned] = {}
        self.stream_scores: dict[str, dict[str, StreamScores]] = {}
        self._base_s_per_token, self._base_timed_at = (
            0.0,
            -math.inf,
        )  # seconds of a token in the base, and when that was measured
        with progress_bar() as bar:
            task = bar.add_task("reading with the base", total=sum(len(stream.requests) for stream in streams))
            self.subjects = [self.subject(stream, lambda n: bar.advance(task, n)) for stream in streams]
        self.arms = [arm for arm in self._every_arm() if arm.name in self.names]

    def run(self) -> None:
        """Tunes and runs the arms; those that others read come first."""
        tuning = [subject for subject in self.subjects if subject.stream.kind in self.tuning]
        with progress_bar() as bar:
            for arm in self.arms:
                trials = sum(map(arm.requests, tuning_subjects(arm, tuning))) * len(arm.grid)
                total = trials + sum(map(arm.requests, self.subjects))
                task = bar.add_task(arm.title, total=total)

                def run(subject: Subject, setting: Setting, arm: Arm = arm, task: Any = task) -> Outcome:
                    return self._outcome(arm, subject, setting, lambda n: bar.advance(task, n))

                tuned = tune(arm, tuning, run)
                stream_scores = {}
                for subject in self.subjects:
                    outcome = run(subject, tuned.setting)
                    log_probs = arm.finish(subject, outcome, tuned.fitted)
                    subject.outcomes[arm.name] = outcome
                    stream_scores[subject.stream.name] = StreamScores(
                        log_probs, outcome.seconds, outcome.state_bytes, outcome.base_seconds
                    )
                bar.update(task, completed=total)
                self.tuned[arm.name], self.stream_scores[arm.name] = tuned, stream_scores

    def describe(self) -> dict[str, Any]:
        """What is told of each arm, by name."""
        describer = Describer(self.subjects, self.stream_scores, self.tuning)
        return {arm.name: {**describer.arm(arm), "tuned": self.tuned[arm.name].to_dict()} for arm in self.arms}

    def subject(self, stream: Stream, advance: Advance, *, compact: bool = False) -> Subject:
        """A stream with its trace, from disk if it is there. compact: states in half precision, half the disk."""
        name = key("trace", code_hash(self.lm.device, *READING_CODE), self.base, self.bos, compact, stream.requests)
        note: dict[str, Any]
        if (cached := self.runs.load(name)) is not None:
            tensors, note = cached
            advance(len(stream.requests))
        else:
            trace = read_trace(self.lm.backbone, stream, self.bos, self._width, advance)
            states = trace.states.half() if compact else trace.states
            tensors = {n: getattr(trace, n) for n in ("targets", "log_probs", "entropy", "widths")} | {"states": states}
            note = {"lengths": trace.lengths}
            self.runs.save(name, tensors, note)
        found: dict[str, Any] = {**tensors, "states": tensors["states"].float(), **note}
        return Subject(stream, Trace(**found), name)

    def cached(
        self, name: str, make: Callable[[Advance], Mapping[str, Any]], *, total: int, uses: Sequence[str]
    ) -> dict[str, Any]:
        """What `make` measures of the memory on these streams, made once. uses: files of `research` that compute it."""
        sources = code_hash(self.lm.device, *READING_CODE, *uses)
        cache_key = key(name, sources, self.base, self.lm.memory.fingerprint(), [s.key for s in self.subjects])
        with progress_bar() as bar:
            task = bar.add_task(name.split()[0], total=total)
            if (cached := self.runs.load(cache_key)) is None:
                cached = {"none": torch.zeros(0)}, make(lambda n: bar.advance(task, n))
                self.runs.save(cache_key, *cached)
            bar.update(task, completed=total)
        return dict(cached[1])

    def encode(self, text: str) -> list[int]:
        """Token ids without BOS."""
        ids = self.tokenizer.encode(text)
        return ids[1:] if self.tokenizer.add_bos else ids

    def _width(self, token: int) -> int:
        return len(self.tokenizer.token_bytes(token))

    def _outcome(self, arm: Arm, subject: Subject, setting: Setting, advance: Advance) -> Outcome:
        if not arm.cached:
            return replace(arm.run(subject, setting, advance), base_seconds=self._base_seconds(subject))
        module = type(arm).__module__.removeprefix("research.").replace(".", "/") + ".py"
        sources = code_hash(self.lm.device, *READING_CODE, module)
        name = key(arm.shared, sources, subject.key, dict(setting), arm.identity(subject))
        if (cached := self.runs.load(name)) is not None:
            advance(arm.requests(subject))
            return Outcome(cached[0], **cached[1])
        outcome = replace(arm.run(subject, setting, advance), base_seconds=self._base_seconds(subject))
        note = {n: getattr(outcome, n) for n in ("seconds", "state_bytes", "base_seconds")}
        self.runs.save(name, outcome.values, note)
        return outcome

    def _base_seconds(self, subject: Subject) -> float:
        """What the frozen base takes for a stream nowadays: one request is timed, at most once a minute."""
        if time.monotonic() - self._base_timed_at > BASE_TIMING_INTERVAL_S:
            request = subject.stream.requests[0]
            if not self._base_s_per_token:
                read_passage(self.lm.backbone, request, self.bos)  # the first one is slower
            self._base_timed_at = time.monotonic()
            read_passage(self.lm.backbone, request, self.bos)
            self._base_s_per_token = (time.monotonic() - self._base_timed_at) / len(request)
        return self._base_s_per_token * len(subject.trace.targets)

    def _every_arm(self) -> list[Arm]:
        lm, bos, backbone = self.lm, self.bos, self.lm.backbone
        whitening = Whitening.of([s.trace.states for s in self.subjects if s.stream.kind in self.tuning])
        same = other_subjects(self.subjects, same_kind=True, limit=1)
        other = other_subjects(self.subjects, same_kind=False, limit=OTHER_KINDS)
        all_others = other_subjects(self.subjects, same_kind=False, limit=len(self.subjects))

        def trainable() -> Backbone:
            return load_backbone(self.folder, trainable=True)

        every: list[Arm] = [
            FrozenBase(),
            MemoryArm(lm, bos),
            ClearedMemory(lm, bos),
            PastMemory(lm, bos, "own-past", "memory, frozen after the first half", lambda subject: [subject]),
            PastMemory(lm, bos, "same-kind", "another session's memory, same kind", same),
            PastMemory(lm, bos, "other-kind", "another session's memory, other kinds (harm)", other),
            RevisitedMemory(lm, bos, all_others, DISTRACTOR_REQUESTS),
            NeuralCache(whitening=None, limited=False, gated=False),
            NeuralCache(whitening=None, limited=False, gated=True),
            NeuralCache(whitening=whitening, limited=False, gated=False),
            NeuralCache(whitening=whitening, limited=False, gated=True),
            NeuralCache(whitening=None, limited=True, gated=True),
            NeuralCache(whitening=whitening, limited=True, gated=True),
            Combined(),
            NGrams(),
            DenseDelta(backbone, whitening),
            DynamicHead(backbone, whitening),
            LastTokens(backbone, bos),
            FullHistory(backbone, bos),
            DynamicLoRA(trainable, bos),
            DynamicAll(trainable, bos),
        ]
        return every if self.options.adapter is None else [*every, self._adapter(self.options.adapter)]

    def _adapter(self, path: Path) -> Adapter:
        try:
            adapter = load_adapter(path, self.lm.backbone.config.hidden_size)
        except ValueError as error:
            raise CommandError(f"adapter: {error}") from error
        return Adapter(self.lm.backbone, adapter, key(path.read_bytes().hex()))


def arm_names(options: Options) -> set[str]:
    """The arms asked for, and those that these need. Raises CommandError."""
    given = () if options.adapter is None else ("adapter",)
    every = {*CHEAP, *COSTLY, *given}
    asked = set(options.arms) or {*CHEAP, *given}
    if unknown := asked - every - {"all"}:
        raise CommandError(f"arms must be among {', '.join(sorted(every))} or all, got {', '.join(sorted(unknown))}")
    if "all" in asked:
        return every
    asked |= {*ALWAYS}
    if "returned" in asked:
        asked.add("own-past")
    if "memory+cache" in asked:
        asked.add("cache")
    return asked


def _tuning_kinds(streams: Sequence[Stream], asked: Sequence[str]) -> set[str]:
    kinds = {stream.kind for stream in streams}
    if unknown := set(asked) - kinds:
        raise CommandError(f"tune must be among the kinds {', '.join(sorted(kinds))}, got {', '.join(sorted(unknown))}")
    return set(asked) or kinds
