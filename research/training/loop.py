"""The outer loop: slow weights trained over streams whose state is carried from chunk to chunk, and from save to save.

Truncated backpropagation through time over several requests (Williams & Peng 1990), AdamW (Loshchilov & Hutter 2019,
arXiv 1711.05101) with warm-up and cosine decay (arXiv 1608.03983). A run goes on from its last save as if it had never
stopped: weights, optimiser, and the state and place of every stream in flight are saved.

Under `torch.distributed` each process trains `batch` streams and gradients are summed over all of them: W processes do
what one does with W times the batch.
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
WARMUP = 0.05  # of the steps
FLOOR = 0.05  # of the learning rate, at the end of the cosine
SKIPS_IN_A_ROW = 10
SAVE_SECONDS = 60.0
LOSSES, BEST, LATEST = "losses.jsonl", "best.safetensors", "latest"


class TrainingError(RuntimeError):
    """A run that cannot go on."""


class Objective(Protocol):
    """What is trained, and on what loss.

    A stream's state is made of tensors, numbers and None in lists, tuples and dicts, or is an instance of one class of
    such fields, the class that `start` returns: it is saved with the run.
    """

    @property
    def module(self) -> nn.Module:
        """Holds the parameters; its `state_dict` is the result."""

    def start(self) -> Any:
        """The state of a new session."""

    def step(self, state: Any, chunk: Chunk) -> tuple[Tensor, int, Any]:
        """The summed loss (nats, differentiable) of the chunk's targets or a random sample of them, how many that are,
        and the next state."""

    def detach(self, state: Any) -> Any:
        """The same state with no gradients behind it."""

    def groups(self) -> list[dict[str, Any]]:
        """AdamW's parameter groups: `params`, `factor` (of the learning rate) and `weight_decay`."""


@dataclass(frozen=True)
class Stream:
    """A stream's name, its kind, and the folder of its features."""

    name: str
    kind: str
    folder: Path


@dataclass(frozen=True)
class Schedule:
    """How a run goes. steps: of the optimiser. lr: its peak. batch: streams in flight, a process. span: requests that
    gradients pass. validate_every: steps. seed: of the order of the streams, of where sessions end, and of torch's
    random numbers. forget: the chance that a session ends after a chunk. One that goes on reads stream after stream, as
    people change their subject: so it learns when not to believe its past."""

    steps: int
    lr: float
    batch: int
    span: int
    validate_every: int
    seed: int = 0
    forget: float = 0.15

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, …"""
        warmup = max(1, round(WARMUP * self.steps))
        if step < warmup:
            return self.lr * (step + 1) / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        return self.lr * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass
class _Lane:
    """One of all processes' streams in flight: its `turn`-th stream, the next request of it, and the state there."""

    number: int
    state: Any
    turn: int = 0
    position: int = 0


@dataclass
class Progress:
    """How far a run is: steps done, those skipped (in all, and just now in a row), seconds, the best validation."""

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    best: Record = field(default_factory=dict)


class Trainer:
    """One run in one folder. `run` starts it or goes on with it."""

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
        """Raises ValueError without streams of either sort."""
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
        """Trains to the end; the best weights are then in the module, and in `best.safetensors`.

        tell: is told every step and validation, as they stand in losses.jsonl (a line each). progress: is told what is
        being done, how much of it is done, and of how much. Raises TrainingError.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._resume()
        began = time.monotonic() - self.progress.seconds
        if not self.progress.best:
            self._validate(on_record, progress)
        while self.progress.step < self._schedule.steps:
            record, due = self._step()
            self.progress.seconds = time.monotonic() - began
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
        """One step of the optimiser; its record, and whether it is time to save."""
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
        """Adds the gradient of a lane's next chunk; returns its loss, the base's, targets, and 1 if it was skipped."""
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
        """Every pass over the streams takes each of them once, in an order of its own."""
        number = lane.number + lane.turn * self._world * self._schedule.batch
        turn, index = divmod(number, len(self._train))
        order = list(range(len(self._train)))
        random.Random(f"{self._schedule.seed}/{turn}").shuffle(order)
        return self._train[order[index]]

    def _seed(self, *what: object) -> None:
        """An objective's random numbers depend on what they are for, not on what was computed before or elsewhere."""
        torch.manual_seed(random.Random(f"{self._schedule.seed}/{what}").getrandbits(63))

    def _update(self, targets: float, rate: float) -> float | None:
        """Steps down the gradient of the mean loss, clipped; returns its norm, or None where there is none."""
        missing = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        gradient = self._sum(torch.cat([g.flatten() for g in missing])) / max(targets, 1.0)
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
        if self.progress.skipped_in_a_row >= SKIPS_IN_A_ROW:
            raise TrainingError(
                f"loss or gradient was not finite in {SKIPS_IN_A_ROW} steps in a row, up to step {self.progress.step}"
                f" of {self._schedule.steps}: try a learning rate below {self._schedule.lr:g}"
            )

    # --- validation ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _validate(self, on_record: Callable[[Record], None], progress: Callable[[str, int, int], None]) -> None:
        """Perplexity over the frozen base's, by kind; the weights with the best geometric mean are kept. Saves.

        Request by request and with the same random numbers each time, so that an objective that samples its targets has
        many of them, and the same in all validations.
        """
        kinds = sorted({stream.kind for stream in self._valid})
        sums = torch.zeros(len(kinds), 2, dtype=torch.float64, device=self._device)
        mine = self._valid[self._rank :: self._world]
        for number, stream in enumerate(mine):
            progress("validating", number, len(mine))
            self._seed(stream.name)
            gain, targets = self._gain(stream)
            sums[kinds.index(stream.kind)] += torch.tensor([gain, targets], dtype=torch.float64, device=self._device)
        progress("validating", len(mine), len(mine))
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
        """Frozen minus adapted loss (nats) over a whole stream, and its targets."""
        features, state, gain, targets = StreamFeatures(stream.folder), self._objective.start(), 0.0, 0
        for number in range(features.requests):
            chunk = features.chunk(number, 1, self._device)
            loss, count, state = self._objective.step(state, chunk)
            gain += (_frozen(chunk) - loss.item() / count) * len(chunk.targets)
            targets += len(chunk.targets)
        return gain, targets

    # --- saving ----------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Each process writes its part; the save counts once `latest` names it."""
        data = {
            "progress": vars(self.progress),
            "module": self._objective.module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "lanes": [vars(lane) for lane in self._lanes],
        }
        mine = self._part_path(self.progress.step)
        _replace(mine, lambda path: torch.save(data, path))
        self._barrier()
        if self._rank == 0:
            _replace(self._folder / LATEST, lambda path: path.write_text(str(self.progress.step)))
        self._barrier()
        for old in self._folder.glob(f"step-*.{self._rank}.pt"):
            if old != mine:
                old.unlink()
        self._saved = time.monotonic()

    def _resume(self) -> None:
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
        """Steps that were done after the last save are done again."""
        path = self._folder / LOSSES
        kept = [record for record in read_losses(path) if record.get("valid", record)["step"] <= step]
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        _replace(path, lambda scratch: scratch.write_text(lines))

    # --- together --------------------------------------------------------------------------------------------------

    def _sum(self, values: Tensor) -> Tensor:
        if self._world > 1:
            dist.all_reduce(values)
        return values

    def _barrier(self) -> None:
        if self._world > 1:
            dist.barrier()


def read_losses(path: Path) -> list[Record]:
    """The records of a losses.jsonl; a last line that was cut short is left out."""
    records: list[Record] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _frozen(chunk: Chunk) -> float:
    """The base's loss, nats a token."""
    return -chunk.log_probs.double().mean().item()


def _ratio(gain: float) -> float:
    """Of perplexities, for a gain in nats a token; bounded, so that a run gone wrong can still be written down."""
    return math.exp(min(-gain, 99.0))


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """`path` becomes what `write` writes, whole or not at all."""
    scratch = path.with_name(f".{path.name}.part")
    write(scratch)
    os.replace(scratch, path)
