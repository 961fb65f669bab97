"""`imprint eval --recall`: the recall probes, and the files of their results."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from model.adaptive_lm import AdaptiveLM
from model.base.checkpoint import fingerprint
from model.text.tokenizer import Tokenizer
from research.corpus import base_folder, console, load_model, progress_bar
from research.evaluation.recall import report
from research.evaluation.recall.arms import Finder, RecallArm, Suggester
from research.evaluation.recall.chapter import Chapter, chapter
from research.evaluation.recall.filler import FILLER_WINDOW, fillers
from research.evaluation.recall.probes import CHAPTER, NAMES, PROBES, ProbeOptions, conversations
from research.evaluation.recall.registry import ARMS, new_arms
from research.evaluation.recall.scenes import SPLITS
from research.evaluation.recall.speaker import Speaker
from research.evaluation.recall.trial import RecallTrial, Record
from research.evaluation.report import markdown, print_tables
from research.machine import hardware
from research.plots import PlotsMissingError
from research.runs import ResultCache
from service.errors import CommandError
from service.model_loading import choose_decoder, load_encoder, load_reading_prefix
from service.settings import Settings


@dataclass(frozen=True)
class RecallOptions:
    """The options of `imprint eval --recall`.

    probes, arms: names
    distances: numbers of other tokens between the statements and the questions
    tokens: tokens of past text that an arm may put in the prompt
    out: folder of the results
    """

    probes: Sequence[str]
    arms: Sequence[str]
    distances: Sequence[int]
    tokens: int
    data: ProbeOptions
    out: Path


def evaluate_recall(settings: Settings, paths: Sequence[Path], options: RecallOptions) -> None:
    """Run the probes, and write recall.json, recall.md and recall.png. Raises CommandError.

    "all" stands for every probe whose data is given, and no arms for all arms that are not costly.
    """
    started = time.time()
    if list(options.probes) == ["all"]:
        options = replace(options, probes=[name for name in NAMES if name != "locomo" or options.data.locomo])
    _check(options)
    lm, tokenizer = load_model(settings)
    encoder = load_encoder(settings, lm.device, progress=console.print)
    decoder = choose_decoder(settings, lm.backbone)
    prefix = load_reading_prefix(settings, lm.backbone.config, device=lm.device, dtype=lm.backbone.embedding.dtype)
    speaker = Speaker(AdaptiveLM(lm.backbone, lm.memory, decoder=decoder), tokenizer, encoder, prefix)
    arms = new_arms(speaker, options.arms, options.tokens)
    other = fillers(paths, tokenizer, max(options.distances), options.data.seed)
    base = fingerprint(base_folder(settings))
    trial = RecallTrial(base, lm.device, ResultCache(options.out / "runs"), other, options.distances)
    groups, records = _answers(trial, arms, options)
    window = min(FILLER_WINDOW, speaker.max_context // 2)
    book = None
    if CHAPTER in options.probes:
        book = chapter(paths, tokenizer, window, options.data.seed, options.data.checked_split)
    extras = _extras(trial, arms, tokenizer, book, options)
    about = {
        "model": Path(settings.model).name,
        "base": base,
        "memory": lm.memory.fingerprint(),
        "split": options.data.split,
        "seed": options.data.seed,
        "recall_tokens": options.tokens,
        "other_text": "texts" if paths else "generated",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - started),
        "torch": torch.__version__,
        "machine": hardware(),
    }
    _write(about, arms, groups, extras, records, options.out)


def _check(options: RecallOptions) -> None:
    """Check names before the model is loaded. Raises CommandError."""
    for what, given, known in (
        ("recall", options.probes, NAMES),
        ("arms", options.arms, ARMS),
        ("recall-split", [options.data.split], SPLITS),
    ):
        if unknown := set(given) - set(known):
            raise CommandError(f"{what} must be among {', '.join(known)}, got {', '.join(sorted(unknown))}")


def _answers(
    trial: RecallTrial, arms: Sequence[RecallArm], options: RecallOptions
) -> tuple[list[dict[str, Any]], list[Record]]:
    """Return the figures and the answers of the probes that put questions."""
    found: list[Record] = []
    scenes = {name: PROBES[name](options.data) for name in options.probes if name in PROBES}
    with progress_bar() as bar:
        for probe, its_scenes in scenes.items():
            for arm in arms:
                task = bar.add_task(f"{probe}: {arm.name}", total=len(its_scenes))
                for scene in its_scenes:
                    found += trial.run(probe, scene, arm)
                    bar.advance(task)
    return report.grouped(found), found


def _extras(
    trial: RecallTrial,
    arms: Sequence[RecallArm],
    tokenizer: Tokenizer,
    book: Chapter | None,
    options: RecallOptions,
) -> dict[str, Any]:
    """Return what is no answer: evidence found in LoCoMo, and suggestions in a held-out chapter, by arm."""
    found: dict[str, Any] = {}
    with progress_bar() as bar:
        if "locomo" in options.probes:
            finders = [arm for arm in arms if isinstance(arm, Finder)]
            task = bar.add_task("locomo: evidence", total=len(finders))
            found["evidence"] = {}
            for arm in finders:
                talks = conversations(options.data)
                found["evidence"][arm.name] = trial.evidence(arm, talks)
                bar.advance(task)
        if book is not None:
            suggesters = [arm for arm in arms if isinstance(arm, Suggester)]
            task = bar.add_task("chapter", total=len(suggesters))
            found["chapter"], found["suggestions"] = book.name, {}
            for suggester in suggesters:
                found["suggestions"][suggester.name] = trial.suggestions(book, suggester, tokenizer)
                bar.advance(task)
    return found


def _write(
    about: dict[str, Any],
    arms: Sequence[RecallArm],
    groups: list[dict[str, Any]],
    extras: dict[str, Any],
    records: list[Record],
    out: Path,
) -> None:
    results = {"about": about, "arms": {arm.name: arm.title for arm in arms}, "figures": groups, **extras}
    answers = [asdict(record) for record in records]
    (out / "recall.json").write_text(json.dumps({**results, "answers": answers}, indent=1))
    tables = report.tables(groups)
    if extras.get("evidence"):
        tables.append(report.evidence_table(extras["evidence"]))
    if extras.get("suggestions"):
        tables.append(report.suggestion_table(extras["chapter"], extras["suggestions"]))
    titles = "".join(f"- `{arm.name}`: {arm.title}\n" for arm in arms)
    (out / "recall.md").write_text(
        f"{about['date']}; {about['machine']}; base {about['model']}; {about['recall_tokens']} tokens of past text at"
        f" most; split {about['split']}.\n\n{titles}{markdown(tables)}"
    )
    print_tables(tables)
    try:
        if groups:
            report.draw(groups, out / "recall.png")
    except PlotsMissingError as error:
        console.print(f"no plots: {error}")
    console.print(f"results: {out}")
