"""`imprint eval`: all arms and probes on the same tokens, and the files of the results."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from research.corpus import base_folder, console, load_model, read_streams
from research.evaluation import probes
from research.evaluation.arms import Subject
from research.evaluation.report import print_report, write_markdown
from research.evaluation.trial import Options, Trial, arm_names
from research.machine import hardware
from research.plots import PlotsMissingError, draw
from service.errors import CommandError
from service.settings import Settings


def evaluate_files(settings: Settings, paths: Sequence[Path], options: Options) -> None:
    """Run the arms and the probes, and write results.json, arrays.npz, table.md and figures. Raises CommandError."""
    started = time.time()
    _check(options)
    lm, tokenizer = load_model(settings)
    if options.window >= (context := lm.backbone.config.max_context):
        raise CommandError(f"window must be at most {context - 1} (the base's context, less BOS), got {options.window}")
    at_least = max(2, options.requests // 2)
    streams = read_streams(paths, tokenizer, options.requests, options.window, options.streams, at_least=at_least)
    trial = Trial(lm, tokenizer, base_folder(settings), streams, options)
    trial.run()
    results: dict[str, Any] = {
        "streams": [_describe_stream(subject) for subject in trial.subjects],
        "arms": trial.describe(),
        "probes": {name: getattr(probes, name)(trial) for name in options.probes},
    }
    if options.long:
        results["probes"]["long"] = probes.long(trial, paths, options.long)
    if "cost" in results["probes"]:  # the arm computes the head twice, a server does not
        results["arms"]["memory"]["cost"] = results["probes"]["cost"]["observe_over_score_frozen"]
    results["about"] = _about(settings, trial, started)
    results = _nan_to_none(results)
    (options.out / "results.json").write_text(json.dumps(results, indent=1))
    np.savez_compressed(options.out / "arrays.npz", allow_pickle=False, **_arrays(trial))
    write_markdown(results, options.out / "table.md")
    print_report(results)
    _draw(results, options.out)
    console.print(f"results: {options.out}")


def _check(options: Options) -> None:
    """Check the names of arms and probes before the model is loaded. Raises CommandError."""
    arm_names(options)
    if unknown := set(options.probes) - set(probes.NAMES):
        known = ", ".join(probes.NAMES)
        raise CommandError(f"probes must be among {known} or none, got {', '.join(sorted(unknown))}")


def _draw(results: dict[str, Any], out: Path) -> None:
    try:
        for path in draw(results, out):
            console.print(f"plot: {path}")
    except PlotsMissingError as error:
        console.print(f"no plots: {error}")


def _arrays(trial: Trial) -> dict[str, np.ndarray[Any, Any]]:
    """Return log p of every target under every arm, as `arm/stream`."""
    return {
        f"{arm}/{stream}": scores.log_probs.numpy()
        for arm, stream_scores in trial.stream_scores.items()
        for stream, scores in stream_scores.items()
    }


def _about(settings: Settings, trial: Trial, started: float) -> dict[str, Any]:
    streams = [subject.stream for subject in trial.subjects]
    return {
        "model": Path(settings.model).name,
        "base": trial.base,
        "memory": trial.lm.memory.fingerprint(),
        "requests": trial.options.requests,
        "window": trial.options.window,
        "tokens": sum(len(request) for stream in streams for request in stream.requests),
        "kinds": sorted({stream.kind for stream in streams}),
        "tuned_on": sorted(trial.tuning),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - started),
        "torch": torch.__version__,
        "machine": hardware(),
    }


def _describe_stream(subject: Subject) -> dict[str, Any]:
    """Return the description of a stream. `rows` and `state_bytes` are those of the memory at the end."""
    trace, memory = subject.trace, subject.outcomes["memory"]
    return {
        "name": subject.stream.name,
        "kind": subject.stream.kind,
        "tokens": len(trace.targets),
        "bytes": int(trace.widths.sum()),
        "frozen_loss": -float(trace.log_probs.double().mean()),
        "rows": int(memory.values["rows"]),
        "state_bytes": memory.state_bytes,
    }


def _nan_to_none(value: Any) -> Any:
    """Replace NaN, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {str(name): _nan_to_none(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_nan_to_none(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
