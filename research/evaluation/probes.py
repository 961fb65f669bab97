"""The probes of `imprint eval`: facts recalled, keystrokes saved, cost, poison and long sessions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from research.corpus import mixed_requests, progress_bar
from research.evaluation import metrics
from research.evaluation.arms import unpack_rows
from research.evaluation.cost import learning_cost
from research.evaluation.facts import FactRecall, invent_facts
from research.evaluation.keystrokes import greedy_predictions, saved_share
from research.evaluation.long import LongRun, ratio_between, read_long
from research.evaluation.poison import harm
from research.evaluation.prequential import Passage, Stream, new_pool
from research.evaluation.trial import Trial
from research.runs import content_hash

NAMES = ("facts", "keystrokes", "cost", "poison")
FACTS = 48
DISTANCES = (0, 1_000, 10_000, 100_000)
TIMES = {"once": 1, "three times": 3}
TYPED_REQUESTS = 4  # of a stream's second half
TIMED_REQUESTS = 5
POISON_TOKENS = 4_096
REQUESTS_AFTER_POISON = 4  # requests of normal text after the poison
REQUESTS_PER_TRACE = 32  # requests of a long run that are read with the base, and cached, together
NUM_BINS = 50
SPAN = 100_000  # tokens of a part of a long run for which a ratio is given

Advance = Callable[[int], None]


def facts(trial: Trial) -> dict[str, Any]:
    """Measure the recall of invented facts after other text: the requests of all streams, interleaved."""

    def make(advance: Advance) -> dict[str, Any]:
        recall = FactRecall(trial.lm, trial.encode, trial.bos, invent_facts(FACTS))
        streams = [list(subject.trace.passages()) for subject in trial.subjects]
        fillers = [passage for row in zip_longest(*streams) for passage in row if passage is not None]
        found: dict[str, Any] = {"facts": FACTS, "frozen": recall.shares()}
        for name, times in TIMES.items():
            found[name] = recall.run(fillers, DISTANCES, times=times, progress=advance)
        return found

    available = sum(len(subject.trace.targets) for subject in trial.subjects)
    farthest = max(distance for distance in DISTANCES if distance <= available)
    return trial.cached("facts", make, total=len(TIMES) * farthest, uses=("evaluation/facts.py",))


def keystrokes(trial: Trial) -> dict[str, Any]:
    """Measure the keys saved at the start of each second half, with the memory of the first half and without."""

    def make(advance: Advance) -> dict[str, Any]:
        shares: dict[str, list[float]] = {"memory": [], "frozen": []}
        pool = new_pool(trial.lm)
        for subject in trial.subjects:
            half = subject.stream.half
            session = pool.open(unpack_rows(subject.outcomes["memory"].values))
            ids: list[int] = []
            predictions: dict[str, list[int]] = {"memory": [], "frozen": []}
            for passage in list(subject.trace.passages())[half : half + TYPED_REQUESTS]:
                request = passage.targets.tolist()
                ids += request
                predictions["memory"] += greedy_predictions(trial.lm, pool, session, request, trial.bos)
                predictions["frozen"] += trial.lm.backbone.logits(passage.states).argmax(-1).tolist()
                advance(1)
            pool.close(session)
            for name, predicted in predictions.items():
                shares[name].append(saved_share(ids, predicted, trial.tokenizer.token_bytes))
        kinds = [subject.stream.kind for subject in trial.subjects]
        names = [subject.stream.name for subject in trial.subjects]
        means = {name: metrics.over_kinds(values, kinds) for name, values in shares.items()}
        return {
            **{name: None if mean is None else asdict(mean) for name, mean in means.items()},
            "streams": {name: dict(zip(names, values, strict=True)) for name, values in shares.items()},
        }

    return trial.cached(
        "keystrokes",
        make,
        total=sum(min(TYPED_REQUESTS, len(s.stream.requests) - s.stream.half) for s in trial.subjects),
        uses=("evaluation/keystrokes.py",),
    )


def cost(trial: Trial) -> dict[str, Any]:
    """Measure the time of learning and decoding relative to the frozen base. The result is not cached."""
    requests = [subject.stream.requests[0] for subject in trial.subjects][:TIMED_REQUESTS]
    with progress_bar() as bar:
        task = bar.add_task("cost", total=len(requests))
        return dict(learning_cost(trial.lm, requests, trial.bos, progress=lambda n: bar.advance(task, n)))


def poison(trial: Trial) -> dict[str, Any]:
    """Measure the perplexity ratio of the first stream of each kind after three sorts of nonsense."""
    first = {subject.stream.kind: subject for subject in reversed(trial.subjects)}
    streams = {kind: list(subject.trace.passages())[:REQUESTS_AFTER_POISON] for kind, subject in sorted(first.items())}

    def make(advance: Advance) -> dict[str, Any]:
        window = trial.options.window
        found = harm(trial.lm, streams, trial.bos, tokens=POISON_TOKENS, window=window, progress=advance)
        ratios = {name: {kind: math.exp(loss) for kind, loss in kinds.items()} for name, kinds in found.items()}
        return {
            name: {
                "mean": math.exp(sum(found[name].values()) / len(kinds)),
                "worst": max(kinds.values()),
                "kinds": kinds,
            }
            for name, kinds in ratios.items()
        }

    total = 3 * sum(map(len, streams.values()))
    return trial.cached("poison", make, total=total, uses=("evaluation/poison.py",))


def long(trial: Trial, paths: Sequence[Path], tokens: int) -> dict[str, Any]:
    """Measure one session over `tokens` tokens of all kinds, interleaved request by request.

    The outputs of the base are cached: about 1.2 kB a token with the default base.
    """
    order = mixed_requests(paths, trial.tokenizer, trial.options.window, tokens)
    parts = [
        Stream(f"long/{start}", "long", order[start : start + REQUESTS_PER_TRACE])
        for start in range(0, len(order), REQUESTS_PER_TRACE)
    ]

    def make(advance: Advance) -> dict[str, Any]:
        def passages() -> Iterator[Passage]:
            for part in parts:
                yield from trial.subject(part, lambda _: None, compact=True).trace.passages()

        return asdict(read_long(trial.lm, passages(), trial.bos, advance))

    name = "long " + content_hash([part.requests for part in parts])
    run = LongRun(**trial.cached(name, make, total=len(order), uses=("evaluation/long.py",)))
    return {
        **asdict(run),
        "ratio": ratio_between(run, 0, run.tokens),
        "ratio_second_span": ratio_between(run, SPAN, 2 * SPAN),
        "ratio_last_span": ratio_between(run, run.tokens - SPAN, run.tokens),
        "bins": _bins(run),
    }


def _bins(run: LongRun) -> dict[str, list[float]]:
    """Return at most NUM_BINS ratios of consecutive requests, each at the position of the last request."""
    parts = np.array_split(np.arange(len(run.position)), min(NUM_BINS, len(run.position)))
    gains = np.array(run.frozen) - np.array(run.adapted)
    return {
        "position": [float(run.position[part[-1]]) for part in parts],
        "ratio": [float(np.exp(-gains[part].mean())) for part in parts],
    }
