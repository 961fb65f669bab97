"""The outer loop: the training of slow weights over streams whose state is carried from chunk to chunk.

The gradient is truncated backpropagation through time over several requests (Williams & Peng 1990). The optimiser is
AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with warm-up and cosine decay (arXiv 1608.03983). A save holds the
weights, the optimiser, and the state and position of every stream in flight, so a resumed run ends in the same bits.

Under `torch.distributed` each process trains `batch` streams, and gradients are summed over processes: W processes
equal one process with W times the batch.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from research.training.features import Chunk, StreamFeatures

Record = dict[str, Any]
BETAS = (0.9, 0.98)
CLIP = 1.0  # largest norm of the gradient of the mean loss
WARMUP = 0.05  # share of the steps
FLOOR = 0.05  # share of the peak learning rate at the end of the cosine
MAX_CONSECUTIVE_SKIPS = 10
SAVE_SECONDS = 60.0
LOSSES, BEST, LATEST = "losses.jsonl", "best.safetensors", "latest"


class TrainingError(RuntimeError):
    """An error that ends a run."""


class Objective(Protocol):
    """A trained module with its loss.

    The state of a stream is saved with the run. It consists of tensors, numbers and None in lists, tuples and dicts, or
    is an instance of the class that `start` returns, with such fields.
    """

    @property
    def module(self) -> nn.Module:
        """Return the module whose `state_dict` is the result."""

    def start(self) -> Any:
        """Return the state of a new session."""

    def step(self, state: Any, chunk: Chunk) -> tuple[Tensor, int, Any]:
        """Return the summed loss of the targets of a chunk, their number, and the next state.

        The loss is differentiable, in nats, and may be estimated from a random sample of the targets.
        """

    def detach(self, state: Any) -> Any:
        """Return the state without gradients."""

    def groups(self) -> list[dict[str, Any]]:
        """Return AdamW's parameter groups: `params`, `factor` of the learning rate, and `weight_decay`."""


@dataclass(frozen=True)
class Stream:
    """A stream: its name, its kind, and the folder of its features."""

    name: str
    kind: str
    folder: Path


@dataclass(frozen=True)
class Schedule:
    """The schedule of a run.

    steps: number of optimiser steps
    lr: peak learning rate
    batch: streams in flight in each process
    span: requests of a chunk, which gradients pass through
    validate_every: steps between validations
    seed: seed of the order of streams, of the ends of sessions, and of torch's random numbers
    forget: probability that a session ends after a chunk. A session that continues reads stream after stream, as people
        change their subject, so the memory learns when its past does not help.
    """

    steps: int
    lr: float
    batch: int
    span: int
    validate_every: int
    seed: int = 0
    forget: float = 0.15

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, from 0 on."""
        warmup = max(1, round(WARMUP * self.steps))
        if step < warmup:
            return self.lr * (step + 1) / warmup
        share = (step - warmup) / max(1, self.steps - warmup)
        return self.lr * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * share)))


@dataclass
class _Lane:
    """One stream in flight of all processes.

    number: number of the lane among the lanes of all processes
    state: state of the session before the next request
    turn: number of streams that the lane has finished
    position: next request of the current stream
    """

    number: int
    state: Any
    turn: int = 0
    position: int = 0


@dataclass
class Progress:
    """The progress of a run: finished steps, skipped steps (in total and consecutive), seconds, and best validation."""

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    best: Record = field(default_factory=dict)


class Trainer:
    """Trains an objective in one folder. `run` starts the run or resumes it."""

    def __init__(
        self,
        objective: Objective,
        train: Sequence[Stream],
        valid: Sequence[Stream],
        schedule: Schedule,
        folder: Path,
        *,
        save_seconds: float = SAVE_SECONDS,
    ) -> None:
        """Raise ValueError without streams to train on or without streams to validate on."""
        if not train or not valid:
            raise ValueError(f"streams to train on and to validate on are needed, got {len(train)} and {len(valid)}")
        self.progress = Progress()
        self._objective, self._train, self._valid, self._schedule = objective, train, valid, schedule
        self._folder, self._save_seconds = folder, save_seconds
        self._rank, self._world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        groups = objective.groups()
        self._parameters: list[Tensor] = [p for group in groups for p in group["params"]]
        self._device = self._parameters[0].device
        self._optimizer = torch.optim.AdamW(groups, lr=schedule.lr, betas=BETAS)
        first = self._rank * schedule.batch
        self._lanes = [_Lane(n, objective.start()) for n in range(first, first + schedule.batch)]
        self._open: dict[int, StreamFeatures] = {}
        self._saved = time.monotonic()

    def run(
        self,
        *,
        on_record: Callable[[Record], None] = lambda _: None,
        progress: Callable[[str, int, int], None] = lambda *_: None,
    ) -> Progress:
        """Train to the end, and leave the best weights in the module and in `best.safetensors`.

        on_record: called with every step and validation, as written to losses.jsonl
        progress: called with the phase, the number of finished items, and the total
        Raises TrainingError.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._resume()
        started = time.monotonic() - self.progress.seconds
        if not self.progress.best:
            self._validate(on_record, progress)
        while self.progress.step < self._schedule.steps:
            record, due = self._step()
            self.progress.seconds = time.monotonic() - started
            self._log_record(record | {"seconds": round(self.progress.seconds, 3)}, on_record)
            progress("training", self.progress.step, self._schedule.steps)
            if self.progress.step % self._schedule.validate_every == 0 or self.progress.step == self._schedule.steps:
                self._validate(on_record, progress)
            elif due:
                self._save()
        self._barrier()
        self._objective.module.load_state_dict(load_file(self._folder / BEST))
        return self.progress

    # --- a step ----------------------------------------------------------------------------------------------------

    def _step(self) -> tuple[Record, bool]:
        """Run one step of the optimiser, and return its record and whether a save is due."""
        self._optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(5, dtype=torch.float64, device=self._device)
        for lane in self._lanes:
            sums += torch.tensor([*self._advance(lane), 0.0], dtype=torch.float64, device=self._device)
        sums[4] = float(self._rank == 0 and time.monotonic() - self._saved > self._save_seconds)
        adapted, frozen, targets, skipped, due = self._sum(sums).tolist()
        rate = self._schedule.rate(self.progress.step)
        norm = self._update(targets, rate)
        self.progress.step += 1
        self._count_skips(bool(skipped) or norm is None)
        record: Record = {"step": self.progress.step, "tokens": int(targets), "lr": rate, "norm": norm}
        if targets:
            record |= {"loss": adapted / targets, "frozen": frozen / targets}
        return record | {"skipped": self.progress.skipped}, bool(due)

    def _advance(self, lane: _Lane) -> tuple[float, float, int, int]:
        """Add the gradient of the next chunk of a lane.

        Returns the summed loss, the summed loss of the base, the number of targets, and 1 if the chunk was skipped.
        """
        if lane.number not in self._open:
            self._open[lane.number] = StreamFeatures(self._stream(lane).folder)
        features = self._open[lane.number]
        chunk = features.chunk(lane.position, self._schedule.span, self._device)
        self._seed(self.progress.step, lane.number)
        loss, targets, state = self._objective.step(lane.state, chunk)
        finite = bool(loss.isfinite())
        if finite and loss.requires_grad:
            loss.backward()
        lane.position += len(chunk.lengths)
        lane.state = self._objective.detach(state)
        ends = random.Random(f"{self._schedule.seed}/{lane.number}/{lane.turn}/{lane.position}").random()
        if not finite or ends < self._schedule.forget:
            lane.state = self._objective.start()
        if not finite or lane.position >= features.requests:
            lane.turn, lane.position = lane.turn + 1, 0
            del self._open[lane.number]
        return (loss.item(), targets * _frozen(chunk), targets, 0) if finite else (0.0, 0.0, 0, 1)

    def _stream(self, lane: _Lane) -> Stream:
        """Return the current stream of a lane. Each pass takes every stream once, in a new random order."""
        number = lane.number + lane.turn * self._world * self._schedule.batch
        turn, index = divmod(number, len(self._train))
        order = list(range(len(self._train)))
        random.Random(f"{self._schedule.seed}/{turn}").shuffle(order)
        return self._train[order[index]]

    def _seed(self, *purpose: object) -> None:
        """Seed torch from the purpose of the random numbers alone, so that a resumed run draws the same numbers."""
        torch.manual_seed(random.Random(f"{self._schedule.seed}/{purpose}").getrandbits(63))

    def _update(self, targets: float, rate: float) -> float | None:
        """Step along the clipped gradient of the mean loss, and return its norm; None without a finite gradient."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        gradient = self._sum(torch.cat([g.flatten() for g in gradients])) / max(targets, 1.0)
        norm = float(gradient.norm())
        if not targets or not math.isfinite(norm):
            return None
        gradient *= min(1.0, CLIP / max(norm, 1e-12))
        for p, part in zip(self._parameters, gradient.split([p.numel() for p in self._parameters]), strict=True):
            p.grad = part.view_as(p)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        self._optimizer.step()
        return norm

    def _count_skips(self, skipped: bool) -> None:
        self.progress.skipped += skipped
        self.progress.skipped_in_a_row = self.progress.skipped_in_a_row + 1 if skipped else 0
        if self.progress.skipped_in_a_row >= MAX_CONSECUTIVE_SKIPS:
            raise TrainingError(
                f"loss or gradient was not finite in {MAX_CONSECUTIVE_SKIPS} steps in a row,"
                f" up to step {self.progress.step} of {self._schedule.steps}:"
                f" try a learning rate below {self._schedule.lr:g}"
            )

    # --- validation ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _validate(self, on_record: Callable[[Record], None], progress: Callable[[str, int, int], None]) -> None:
        """Record perplexity ÷ the frozen base's by kind, keep the weights with the best geometric mean, and save.

        Each request is a chunk, and the seed depends on the stream alone, so an objective that samples targets samples
        many, and the same ones in every validation.
        """
        kinds = sorted({stream.kind for stream in self._valid})
        sums = torch.zeros(len(kinds), 2, dtype=torch.float64, device=self._device)
        share = self._valid[self._rank :: self._world]
        for number, stream in enumerate(share):
            progress("validating", number, len(share))
            self._seed(stream.name)
            gain, targets = self._gain(stream)
            sums[kinds.index(stream.kind)] += torch.tensor([gain, targets], dtype=torch.float64, device=self._device)
        progress("validating", len(share), len(share))
        gains = [gain / targets for gain, targets in self._sum(sums).tolist()]
        record: Record = {"step": self.progress.step, "ratio": _ratio(sum(gains) / len(gains))}
        record["kinds"] = {kind: _ratio(gain) for kind, gain in zip(kinds, gains, strict=True)}
        if not self.progress.best or record["ratio"] < self.progress.best["ratio"]:
            self.progress.best = record
            if self._rank == 0:
                _replace(self._folder / BEST, lambda path: save_file(_tensors(self._objective.module), path))
        self._log_record({"valid": record}, on_record)
        self._save()

    def _gain(self, stream: Stream) -> tuple[float, int]:
        """Return frozen − adapted loss (nats) summed over a stream, and the number of targets."""
        features, state, gain, targets = StreamFeatures(stream.folder), self._objective.start(), 0.0, 0
        for number in range(features.requests):
            chunk = features.chunk(number, 1, self._device)
            loss, count, state = self._objective.step(state, chunk)
            gain += (_frozen(chunk) - loss.item() / count) * len(chunk.targets)
            targets += len(chunk.targets)
        return gain, targets

    # --- saving ----------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write the part of this process. The save is valid as soon as `latest` names its step."""
        data = {
            "progress": vars(self.progress),
            "module": self._objective.module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "lanes": [vars(lane) for lane in self._lanes],
        }
        part = self._part_path(self.progress.step)
        _replace(part, lambda path: torch.save(data, path))
        self._barrier()
        if self._rank == 0:
            _replace(self._folder / LATEST, lambda path: path.write_text(str(self.progress.step)))
        self._barrier()
        for old in self._folder.glob(f"step-*.{self._rank}.pt"):
            if old != part:
                old.unlink()
        self._saved = time.monotonic()

    def _resume(self) -> None:
        """Load the last save, or broadcast the initial weights to all processes."""
        latest = self._folder / LATEST
        if latest.exists():
            part = self._part_path(int(latest.read_text()))
            with torch.serialization.safe_globals([type(self._objective.start())]):
                data = torch.load(part, map_location=self._device, weights_only=True)
            self._objective.module.load_state_dict(data["module"])
            self._optimizer.load_state_dict(data["optimizer"])
            self._lanes = [_Lane(**lane) for lane in data["lanes"]]
            self.progress = Progress(**data["progress"])
        elif self._world > 1:
            for parameter in self._parameters:
                dist.broadcast(parameter.data, 0)
        if self._rank == 0:
            self._drop_records_after(self.progress.step if latest.exists() else -1)
        self._barrier()

    def _part_path(self, step: int) -> Path:
        return self._folder / f"step-{step:08}.{self._rank}.pt"

    def _log_record(self, record: Record, on_record: Callable[[Record], None]) -> None:
        if self._rank == 0:
            with (self._folder / LOSSES).open("a") as file:
                file.write(json.dumps(record) + "\n")
            on_record(record)

    def _drop_records_after(self, step: int) -> None:
        """Drop the records of steps after the last save, which run again."""
        path = self._folder / LOSSES
        kept = [record for record in read_losses(path) if record.get("valid", record)["step"] <= step]
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        _replace(path, lambda scratch: scratch.write_text(lines))

    # --- processes --------------------------------------------------------------------------------------------------

    def _sum(self, values: Tensor) -> Tensor:
        if self._world > 1:
            dist.all_reduce(values)
        return values

    def _barrier(self) -> None:
        if self._world > 1:
            dist.barrier()


def read_losses(path: Path) -> list[Record]:
    """Return the records of a losses.jsonl without a truncated last line."""
    records: list[Record] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _frozen(chunk: Chunk) -> float:
    """Return the loss of the base, in nats per token."""
    return -chunk.log_probs.double().mean().item()


def _ratio(gain: float) -> float:
    """Return the ratio of perplexities for a gain in nats per token, bounded so that JSON can hold a diverged run."""
    return math.exp(min(-gain, 99.0))


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically."""
    scratch = path.with_name(f".{path.name}.part")
    write(scratch)
    os.replace(scratch, path)
