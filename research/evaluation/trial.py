"""One evaluation: the streams and the arms that run on them, with finished results cached in the output folder."""

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
from research.evaluation.past_rows import LastTokensMemory, NewestEpisodes
from research.evaluation.prequential import Stream, Trace, read_passage, read_trace
from research.evaluation.tuning import Tuned, tune, tuning_subjects
from research.runs import ResultCache, code_hash, content_hash
from research.training.adapter import load_adapter
from service.errors import CommandError

CHEAP = (
    "static", "memory", "cleared", "own-past", "same-kind", "other-kind", "returned", "cache-raw-fixed", "cache-raw",
    "cache-fixed", "cache", "cache-raw-bytes", "cache-bytes", "memory+cache", "ngrams", "dense", "dynamic-head",
)  # fmt: skip
COSTLY = ("episodes", "memory+last-tokens", "last-tokens", "full-history", "dynamic-lora", "dynamic-all")
ALWAYS = ("static", "memory")
OTHER_KINDS = 3  # memories of other kinds that a stream is read with
BASE_TIMING_INTERVAL_S = 60.0
DISTRACTOR_REQUESTS = 4  # requests of each other kind that are learned between the two halves of a stream
READING_CODE = ("evaluation/prequential.py", "evaluation/arms.py")

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Options:
    """The options of `imprint eval`.

    requests, window: requests of a stream at most, and tokens of a request
    streams: streams of each kind
    arms, tuning, probes: names of arms, of kinds to tune on, and of probes
    long: tokens of the long session; 0 = none
    adapter: file of an adapter to compare with
    out: folder of the results
    """

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
    """Runs the arms of one evaluation and describes the results.

    tuning: kinds that settings are chosen on
    tuned, stream_scores: chosen settings and scores, by arm, after the arm has run
    """

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
        self._base_s_per_token = 0.0
        self._base_timed_at = -math.inf
        with progress_bar() as bar:
            task = bar.add_task("reading with the base", total=sum(len(stream.requests) for stream in streams))
            self.subjects = [self.subject(stream, lambda n: bar.advance(task, n)) for stream in streams]
        self.arms = [arm for arm in self._all_arms() if arm.name in self.names]

    def run(self) -> None:
        """Tune and run the arms. An arm comes after the arms that it requires."""
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
        """Return the description of each arm, by name."""
        describer = Describer(self.subjects, self.stream_scores, self.tuning)
        return {arm.name: {**describer.arm(arm), "tuned": self.tuned[arm.name].to_dict()} for arm in self.arms}

    def subject(self, stream: Stream, advance: Advance, *, compact: bool = False) -> Subject:
        """Return a stream with its trace, from the cache if possible.

        compact: cache the states in half precision, which halves the disk space
        """
        code = code_hash(self.lm.device, *READING_CODE)
        name = content_hash("trace", code, self.base, self.bos, compact, stream.requests)
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
        """Return what `make` measures of the memory on these streams, from the cache if possible.

        total: number of steps that `make` reports
        uses: files of `research` that compute the result
        """
        sources = code_hash(self.lm.device, *READING_CODE, *uses)
        cache_key = content_hash(name, sources, self.base, self.lm.memory.fingerprint(), [s.key for s in self.subjects])
        with progress_bar() as bar:
            task = bar.add_task(name.split()[0], total=total)
            if (cached := self.runs.load(cache_key)) is None:
                cached = {"none": torch.zeros(0)}, make(lambda n: bar.advance(task, n))
                self.runs.save(cache_key, *cached)
            bar.update(task, completed=total)
        return dict(cached[1])

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text without BOS."""
        return self.tokenizer.encode_inside(text)

    def _width(self, token: int) -> int:
        return len(self.tokenizer.token_bytes(token))

    def _outcome(self, arm: Arm, subject: Subject, setting: Setting, advance: Advance) -> Outcome:
        if not arm.cached:
            return replace(arm.run(subject, setting, advance), base_seconds=self._base_seconds(subject))
        module = type(arm).__module__.removeprefix("research.").replace(".", "/") + ".py"
        sources = code_hash(self.lm.device, *READING_CODE, module)
        name = content_hash(arm.shared, sources, subject.key, dict(setting), arm.identity(subject))
        if (cached := self.runs.load(name)) is not None:
            advance(arm.requests(subject))
            return Outcome(cached[0], **cached[1])
        outcome = replace(arm.run(subject, setting, advance), base_seconds=self._base_seconds(subject))
        note = {n: getattr(outcome, n) for n in ("seconds", "state_bytes", "base_seconds")}
        self.runs.save(name, outcome.values, note)
        return outcome

    def _base_seconds(self, subject: Subject) -> float:
        """Return the current duration of a stream in the frozen base, from one request timed at most once a minute."""
        if time.monotonic() - self._base_timed_at > BASE_TIMING_INTERVAL_S:
            request = subject.stream.requests[0]
            if not self._base_s_per_token:
                read_passage(self.lm.backbone, request, self.bos)  # warm-up
            self._base_timed_at = time.monotonic()
            read_passage(self.lm.backbone, request, self.bos)
            self._base_s_per_token = (time.monotonic() - self._base_timed_at) / len(request)
        return self._base_s_per_token * len(subject.trace.targets)

    def _all_arms(self) -> list[Arm]:
        lm, bos, backbone = self.lm, self.bos, self.lm.backbone
        whitening = Whitening.of([s.trace.states for s in self.subjects if s.stream.kind in self.tuning])
        same = other_subjects(self.subjects, same_kind=True, limit=1)
        other = other_subjects(self.subjects, same_kind=False, limit=OTHER_KINDS)
        all_others = other_subjects(self.subjects, same_kind=False, limit=len(self.subjects))

        def trainable() -> Backbone:
            return load_backbone(self.folder, trainable=True)

        arms: list[Arm] = [
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
            NewestEpisodes(lm, bos, self.tokenizer),
            LastTokensMemory(lm, bos),
            LastTokens(backbone, bos),
            FullHistory(backbone, bos),
            DynamicLoRA(trainable, bos),
            DynamicAll(trainable, bos),
        ]
        return arms if self.options.adapter is None else [*arms, self._adapter(self.options.adapter)]

    def _adapter(self, path: Path) -> Adapter:
        try:
            adapter = load_adapter(path, self.lm.backbone.config.hidden_size)
        except ValueError as error:
            raise CommandError(f"adapter: {error}") from error
        return Adapter(self.lm.backbone, adapter, content_hash(path.read_bytes().hex()))


def arm_names(options: Options) -> set[str]:
    """Return the names of the chosen arms and of the arms that these require. Raises CommandError."""
    adapter = () if options.adapter is None else ("adapter",)
    known = {*CHEAP, *COSTLY, *adapter}
    chosen = set(options.arms) or {*CHEAP, *adapter}
    if unknown := chosen - known - {"all"}:
        raise CommandError(f"arms must be among {', '.join(sorted(known))} or all, got {', '.join(sorted(unknown))}")
    if "all" in chosen:
        return known
    chosen |= {*ALWAYS}
    if "returned" in chosen:
        chosen.add("own-past")
    if "memory+cache" in chosen:
        chosen.add("cache")
    return chosen


def _tuning_kinds(streams: Sequence[Stream], chosen: Sequence[str]) -> set[str]:
    kinds = {stream.kind for stream in streams}
    if unknown := set(chosen) - kinds:
        raise CommandError(f"tune must be among the kinds {', '.join(sorted(kinds))}, got {', '.join(sorted(unknown))}")
    return set(chosen) or kinds
