"""`imprint train --policy NAME`: trains a policy on its scenario; writes the checkpoint, a manifest and a loss plot."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from model.policies.network import new_policy, save_policy
from research.corpus import console, progress_bar
from research.machine import code_version, hardware
from research.plots import PlotsMissingError, draw_losses
from research.scenarios.registry import RECIPES
from research.scenarios.scenario import Recipe
from research.training.policy_loop import PolicyTrainer
from service.errors import CommandError


def find_recipe(name: str) -> Recipe:
    """Return the recipe of a name. Raises CommandError."""
    if name not in RECIPES:
        raise CommandError(f"--policy must be one of {', '.join(RECIPES)}, got {name!r}")
    return RECIPES[name]


def train_policy(name: str, out: Path, work: Path, *, rounds: int | None, seed: int) -> None:
    """Train the policy `name` and write it to `out`; a stopped run resumes from the folder `work`.

    rounds: instead of the recipe's. Training uses one thread, because the matrices are small. Raises CommandError.
    """
    recipe = find_recipe(name)
    recipe = recipe.with_train_config(seed=seed, rounds=rounds or recipe.train_config.rounds)
    torch.set_num_threads(1)
    policy = new_policy(recipe.config(name), seed=seed)
    facts = {"policy": policy.config.to_dict(), "lessons": asdict(recipe.train_config)}
    facts |= {"scenario": {**recipe.options, **recipe.training}}
    run = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    trainer = PolicyTrainer(
        policy, lambda batch, rng: recipe.make(batch, rng, training=True), recipe.train_config, work / "runs" / run
    )
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    console.print(f"{name}: {parameters:,} parameters; round {len(trainer.losses):,} of {recipe.train_config.rounds:,}")
    try:
        with progress_bar() as bar:
            task = bar.add_task("training", total=recipe.train_config.rounds, completed=len(trainer.losses))
            trainer.run(lambda done, loss: bar.update(task, completed=done, description=f"training, loss {loss:.4f}"))
    except KeyboardInterrupt:
        console.print(f"\nStopped. The same command goes on from what is in {work}.")
        raise SystemExit(130) from None
    out.parent.mkdir(parents=True, exist_ok=True)
    save_policy(policy, out)
    _write_manifest(out, facts | {"parameters": parameters}, trainer)
    try:
        draw_losses(trainer.losses, out.with_suffix(".png"))
    except PlotsMissingError as error:
        console.print(f"no loss plot: {error}")
    console.print(f"written: {out}; {trainer.seconds:.0f} s of one core")


def _write_manifest(out: Path, facts: dict[str, Any], trainer: PolicyTrainer) -> None:
    """Write what is needed to reproduce a checkpoint beside the checkpoint `out`."""
    manifest = {
        "command": shlex.join(["imprint", *sys.argv[1:]]),
        **facts,
        "loss": trainer.losses[-1],
        "seconds": round(trainer.seconds, 1),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": code_version(),
        "torch": torch.__version__,
        "hardware": hardware(),
        "sha256": hashlib.sha256(out.read_bytes()).hexdigest(),
    }
    out.with_suffix(".json").write_text(json.dumps(manifest, indent=1) + "\n")
