"""The files of a training result: the checkpoint, and beside it the losses, the figure and the manifest."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.memory import Memory, save_memory
from research.corpus import console
from research.machine import code_version, hardware
from research.plots import PlotsMissingError, draw_training
from research.training.adapter import OutputAdapter, save_adapter
from research.training.loop import LOSSES, Progress, read_losses
from research.training.processes import world_size
from research.training.texts import PlannedStream


def write_result(
    out: Path,
    module: nn.Module,
    streams: Sequence[PlannedStream],
    progress: Progress,
    run: Path,
    *,
    facts: Mapping[str, Any],
    seconds: float,
) -> None:
    """Write the checkpoint of a finished run, and beside it, under the same name, the other files.

    module: memory or adapter
    run: folder of the run
    facts: further entries of the manifest
    seconds: duration of this call
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(module, OutputAdapter):
        save_adapter(module, out)
    elif isinstance(module, Memory):
        save_memory(module, out)
    shutil.copyfile(run / LOSSES, out.with_suffix(".jsonl"))
    files = [out, out.with_suffix(".jsonl"), out.with_suffix(".json")]
    try:
        draw_training(read_losses(run / LOSSES), out.with_suffix(".png"))
        files.append(out.with_suffix(".png"))
    except PlotsMissingError as error:
        console.print(f"no loss plot: {error}")
    manifest = _manifest(out, module, streams, progress, facts, seconds)
    out.with_suffix(".json").write_text(json.dumps(manifest, indent=1) + "\n")
    for kind, ratio in sorted(progress.best["kinds"].items()):
        console.print(f"{kind:<32} × {ratio:.4f}")
    console.print(f"best: perplexity × {progress.best['ratio']:.4f} at step {progress.best['step']:,}")
    console.print(f"written: {', '.join(map(str, files))}; the run: {run}")


def _manifest(
    out: Path,
    module: nn.Module,
    streams: Sequence[PlannedStream],
    progress: Progress,
    facts: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Return the facts that identify a result and its run."""
    return {
        "command": shlex.join(["imprint", *sys.argv[1:]]),
        "arm": "adapter" if isinstance(module, OutputAdapter) else "memory",
        "parameters": {name: list(tensor.shape) for name, tensor in module.state_dict().items()},
        "config": module.config.to_dict() if isinstance(module, Memory) else None,
        "best": progress.best,
        "skipped_steps": progress.skipped,
        "seconds": {"training": round(progress.seconds, 1), "this_call": round(seconds, 1)},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": code_version(),
        "torch": torch.__version__,
        "hardware": hardware(),
        "processes": world_size(),
        **facts,
        "sha256": hashlib.sha256(out.read_bytes()).hexdigest(),
        "streams": [stream.to_dict() for stream in streams],
    }
