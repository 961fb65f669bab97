"""`python -m research.streams.train TASK`: trains the mixer of a task on the prior; writes checkpoint and manifest."""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from model.tabular.checkpoint import save_tabular
from model.tabular.config import default_config
from model.tabular.loading import new_learner
from research.corpus import console, progress_bar
from research.machine import code_version, hardware
from research.streams.training import fit, record_labels, record_numbers


def main() -> None:
    """Record the readers over the prior, fit the mixer, write both files."""
    parser = argparse.ArgumentParser(prog="python -m research.streams.train", description=__doc__)
    parser.add_argument("task", choices=["labels", "regression"])
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint; its manifest lies beside it")
    parser.add_argument("--tasks", type=int, default=420, help="streams of the prior")
    parser.add_argument("--steps", type=int, default=2500, help="steps of the optimiser")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.process_time()
    with progress_bar() as bar:
        reading = bar.add_task("reading", total=arguments.tasks)
        record = record_labels if arguments.task == "labels" else record_numbers
        records = record(arguments.tasks, arguments.seed, lambda done: bar.update(reading, completed=done))
        fitting = bar.add_task("fitting", total=arguments.steps)
        mixer, losses = fit(records, arguments.steps, 0, lambda done: bar.update(fitting, completed=done))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    save_tabular(new_learner(default_config(arguments.task, arguments.task), mixer), arguments.out)
    manifest = {
        "command": shlex.join(["python", "-m", "research.streams.train", *sys.argv[1:]]),
        "tasks": arguments.tasks,
        "steps": arguments.steps,
        "seed": arguments.seed,
        "records": len(records.readouts),
        "parameters": sum(parameter.numel() for parameter in mixer.parameters()),
        "loss": sum(losses[-100:]) / len(losses[-100:]),
        "seconds": round(time.process_time() - begun, 1),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": code_version(),
        "torch": torch.__version__,
        "hardware": hardware(),
        "sha256": hashlib.sha256(arguments.out.read_bytes()).hexdigest(),
    }
    arguments.out.with_suffix(".json").write_text(json.dumps(manifest, indent=1) + "\n")
    console.print(f"written: {arguments.out}; {manifest['seconds']} s of one core")


if __name__ == "__main__":
    main()
