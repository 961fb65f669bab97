"""The preparation of a training run: the choice of streams, their features, and where both are in the work folder.

The work folder has `tokens` and `features`, with one file or folder for each stream, and `runs`, with one folder for
each run. The first process chooses the streams; every process computes a share of the missing features.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from model.base.backbone import Backbone
from model.text.tokenizer import Tokenizer
from research.corpus import console, progress_bar
from research.training.features import BYTES_PER_STATE, compute_features
from research.training.loop import Stream
from research.training.processes import barrier, rank, world_size
from research.training.texts import Budget, PlannedStream, draw_streams, find_kinds
from service.errors import CommandError

STREAMS_FILE = "streams.json"


def choose_streams(
    paths: Sequence[str], budget: Budget, tokenizer: Tokenizer, base: str, work: Path
) -> list[PlannedStream]:
    """Choose the streams in the first process, and read its list in the others. Raises CommandError.

    base: identifies the base and the precision that compute the features
    """
    path = work / STREAMS_FILE
    if rank() == 0:
        console.print("Choosing streams")
        work.mkdir(parents=True, exist_ok=True)
        streams = draw_streams(find_kinds(paths, budget), budget, tokenizer, base, work / "tokens")
        scratch = path.with_suffix(".part")
        scratch.write_text(json.dumps([stream.to_dict() for stream in streams], indent=1))
        os.replace(scratch, path)
    barrier()
    streams = [PlannedStream(**stream) for stream in json.loads(path.read_text())]
    kinds = sorted({stream.kind for stream in streams})
    console.print(f"{len(kinds)} kinds: {', '.join(kinds)}")
    for valid, purpose in ((False, f"to train on (asked for {budget.tokens:,} tokens)"), (True, "held out")):
        chosen = [stream for stream in streams if stream.valid == valid]
        console.print(f"{len(chosen)} streams, {sum(s.tokens for s in chosen):,} tokens {purpose}")
    return streams


def compute_missing_features(backbone: Backbone, streams: Sequence[PlannedStream], bos: int, work: Path) -> None:
    """Compute this process's share of the missing features. Raises CommandError if the disk is too small."""
    share = [stream for stream in streams[rank() :: world_size()] if not features_folder(work, stream).exists()]
    total = sum(stream.tokens for stream in share)
    if share:
        size = total * backbone.config.hidden_size * BYTES_PER_STATE * world_size()
        if size > (free := shutil.disk_usage(work).free):
            raise CommandError(f"{work}: {size / 1e9:.1f} GB are needed for features, {free / 1e9:.1f} GB are free")
        duration = format_duration(total * _seconds_per_token(backbone, share[0], work, bos))
        console.print(f"Reading {total:,} tokens with the base: about {duration}, {size / 1e9:.2f} GB")
        with progress_bar() as bar:
            task = bar.add_task("reading with the base", total=total)
            for stream in share:
                ids, lengths = _read_tokens(work, stream)
                folder = features_folder(work, stream)
                compute_features(backbone, ids, lengths, bos, folder, progress=lambda n: bar.advance(task, n))
    barrier()


def features_folder(work: Path, stream: PlannedStream) -> Path:
    """Return the folder of the features of a stream."""
    return work / "features" / stream.id


def training_streams(streams: Sequence[PlannedStream], work: Path) -> tuple[list[Stream], list[Stream]]:
    """Return the streams to train on and the held-out streams, with the folders of their features."""
    train, valid = (
        [Stream(s.name, s.kind, features_folder(work, s)) for s in streams if s.valid == held_out]
        for held_out in (False, True)
    )
    return train, valid


def format_duration(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours, for messages."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


def _seconds_per_token(backbone: Backbone, stream: PlannedStream, work: Path, bos: int) -> float:
    """Measure the first two requests of a stream, after a warm-up."""
    ids, lengths = _read_tokens(work, stream)
    scratch = work / "features" / f"estimate-{rank()}"
    for _ in range(2):
        shutil.rmtree(scratch, ignore_errors=True)
        started = time.monotonic()
        compute_features(backbone, ids, lengths[:2], bos, scratch)
    shutil.rmtree(scratch)
    return (time.monotonic() - started) / sum(lengths[:2])


def _read_tokens(work: Path, stream: PlannedStream) -> tuple[list[int], list[int]]:
    """Return the token ids of a stream and the lengths of its requests."""
    with np.load(work / "tokens" / f"{stream.id}.npz") as file:
        return file["ids"].tolist(), file["lengths"].tolist()
