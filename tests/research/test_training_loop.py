"""The outer loop on a toy objective with a state: it learns, carries states, resumes after kills, and runs in parallel.

This file is also the program of the tests' child processes: see `main`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from research.training import loop
from research.training.features import Chunk
from research.training.loop import Progress, Record, Schedule, Stream, Trainer, TrainingError, read_losses

ROOT = Path(__file__).resolve().parents[2]
WIDTH, VOCAB = 6, 11
SCHEDULE = Schedule(steps=12, lr=0.02, batch=2, span=2, validate_every=5)


@dataclass(frozen=True)
class Trace:
    """The state of the toy memory: a running mean, and the number of requests."""

    mean: Tensor
    requests: int = 0


class Toy:
    """An objective with logits from a hidden state and from the carried mean. Dropout draws random numbers."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        self.module = nn.ParameterDict(
            {
                "head": nn.Parameter(0.1 * torch.randn(WIDTH, VOCAB, generator=generator)),
                "carry": nn.Parameter(0.1 * torch.randn(WIDTH, VOCAB, generator=generator)),
            }
        )
        self.dropout = 0.0
        self.poison = False
        # Of each trained chunk: number of requests before the chunk, and whether the state has gradients.
        self.chunks: list[tuple[int, bool]] = []

    def start(self) -> Trace:
        return Trace(torch.zeros(WIDTH))

    def step(self, state: Trace, chunk: Chunk) -> tuple[Tensor, int, Trace]:
        if torch.is_grad_enabled():
            self.chunks.append((state.requests, state.mean.requires_grad))
        loss = torch.zeros(())
        parts = zip(chunk.states.split(chunk.lengths), chunk.targets.split(chunk.lengths), strict=True)
        for states, targets in parts:
            hidden = F.dropout(states, self.dropout, training=torch.is_grad_enabled())
            logits = hidden @ self.module["head"] + state.mean @ self.module["carry"]
            loss = loss + F.cross_entropy(logits, targets, reduction="sum")
            target_mean = (self.module["head"][:, targets].mean(1) + states.mean(0)) / 2
            state = Trace(0.5 * state.mean + 0.5 * target_mean, state.requests + 1)
        return loss * (math.nan if self.poison else 1.0), len(chunk.targets), state

    def detach(self, state: Trace) -> Trace:
        return dataclasses.replace(state, mean=state.mean.detach())

    def groups(self) -> list[dict[str, Any]]:
        return [
            {"params": [self.module["head"]], "factor": 1.0, "weight_decay": 0.01},
            {"params": [self.module["carry"]], "factor": 3.0, "weight_decay": 0.0},
        ]


def write_streams(folder: Path, kind: str, requests: list[int]) -> list[Stream]:
    """Write streams of requests of 5 to 9 tokens. Each stream prefers three tokens."""
    streams = []
    for number, count in enumerate(requests):
        rng = np.random.default_rng([len(kind), number])
        offsets = np.cumsum([0, *rng.integers(5, 10, count)])
        n, preferred = int(offsets[-1]), rng.integers(0, 5, 3)
        path = folder / f"{kind}-{number}"
        path.mkdir(parents=True)
        np.save(path / "states.npy", rng.normal(size=(n, WIDTH), loc=1).astype(np.float16))
        np.save(path / "targets.npy", preferred[rng.integers(0, 3, n)].astype(np.int32))
        np.save(path / "log_probs.npy", np.full(n, -math.log(VOCAB), np.float32))
        np.save(path / "entropy.npy", np.full(n, math.log(VOCAB), np.float32))
        np.save(path / "offsets.npy", offsets)
        streams.append(Stream(path.name, kind, path))
    return streams


def corpus(folder: Path) -> tuple[list[Stream], list[Stream]]:
    if folder.exists():
        train, valid = ([Stream(p.name, kind, p) for p in sorted(folder.glob(f"{kind}-*"))] for kind in ("a", "bb"))
        return train, valid
    return write_streams(folder, "a", [5, 1, 7, 3, 4]), write_streams(folder, "bb", [3, 4])


def trainer_in(
    folder: Path, schedule: Schedule = SCHEDULE, toy: Toy | None = None, save_seconds: float = 60
) -> Trainer:
    train, valid = corpus(folder / "features")
    return Trainer(toy or Toy(), train, valid, schedule, folder / "run", save_seconds=save_seconds)


def weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of the last save."""
    step = int((folder / "run" / "latest").read_text())
    with torch.serialization.safe_globals([Trace, (Trace, "__main__.Trace")]):
        saved = torch.load(folder / "run" / f"step-{step:08}.0.pt", weights_only=True)
    module: dict[str, Tensor] = saved["module"]
    return module


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def losses(folder: Path) -> list[Record]:
    """Return the records without their seconds."""
    return [{k: v for k, v in r.items() if k != "seconds"} for r in read_losses(folder / "run" / "losses.jsonl")]


def main() -> None:
    """Train in a folder with pauses: a program that tests kill or run in several processes."""
    folder, batch, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    torch.set_num_threads(1)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    toy = Toy()
    toy.dropout = float(sys.argv[4])
    trainer = trainer_in(folder, dataclasses.replace(SCHEDULE, batch=batch), toy, save_seconds=2.5 * pause)
    trainer.run(progress=lambda *_: time.sleep(pause))
    if dist.is_initialized():
        dist.destroy_process_group()


def program(*arguments: object, processes: int = 1) -> subprocess.Popen[bytes]:
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *launch, __file__, *map(str, arguments)], env=environment)


def test_a_run_learns_and_keeps_the_best_validated_weights(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, dataclasses.replace(SCHEDULE, steps=60, validate_every=20))
    reported: list[Record] = []
    progress: list[tuple[str, int, int]] = []
    result = trainer.run(on_record=reported.append, progress=lambda *p: progress.append(p))
    validations = [record["valid"] for record in reported if "valid" in record]
    assert [v["step"] for v in validations] == [0, 20, 40, 60]
    assert result.best == min(validations, key=lambda v: v["ratio"])
    assert result.best["ratio"] < 0.9 < validations[0]["ratio"]
    assert set(result.best["kinds"]) == {"bb"}
    steps = [record for record in reported if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 61))
    assert all(record["frozen"] == pytest.approx(math.log(VOCAB), rel=1e-5) for record in steps)
    assert read_losses(tmp_path / "run" / "losses.jsonl") == reported
    assert progress[-1] == ("validating", 2, 2)
    assert ("training", 60, 60) in progress


def test_the_best_weights_end_up_in_the_module(tmp_path: Path) -> None:
    toy = Toy()
    trainer_in(tmp_path, dataclasses.replace(SCHEDULE, lr=30.0), toy).run()  # so large a rate only does harm
    assert losses(tmp_path)[0]["valid"]["ratio"] < losses(tmp_path)[-1]["valid"]["ratio"]
    assert equal(dict(toy.module.state_dict()), Toy().module.state_dict())
    assert equal(load_file(tmp_path / "run" / "best.safetensors"), Toy().module.state_dict())


@pytest.mark.parametrize(("forget", "sessions"), [(0.0, ["0 2 4 5 6 8 10 12 13 15 17 19"]), (1.0, ["0"] * 12)])
def test_a_session_continues_over_streams_until_it_is_forgotten_and_gradients_stop_between_chunks(
    tmp_path: Path, forget: float, sessions: list[str]
) -> None:
    toy = Toy()
    schedule = dataclasses.replace(SCHEDULE, steps=12, batch=1, forget=forget)
    trainer_in(tmp_path, schedule, toy).run()  # 20 requests in five streams of 5, 1, 7, 3 and 4, two at a time
    assert not any(reaches_back for _, reaches_back in toy.chunks)
    text = " ".join(str(carried) for carried, _ in toy.chunks)
    assert text.replace(" 0", "|0").split("|") == sessions


def test_a_pass_takes_every_stream_once(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    lanes = [loop._Lane(number, None, turn) for turn in range(5) for number in range(2)]
    names = [trainer._stream(lane).name for lane in lanes]
    assert sorted(names[:5]) == sorted(names[5:]) == [f"a-{n}" for n in range(5)]
    assert names[:5] != names[5:]


def test_the_rate_rises_then_falls() -> None:
    schedule = Schedule(steps=100, lr=1.0, batch=1, span=1, validate_every=1)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0], abs=1e-2)
    assert sorted(rates[5:], reverse=True) == rates[5:]
    assert rates[-1] == pytest.approx(loop.FLOOR, abs=1e-2)


def test_a_loss_that_is_not_finite_is_skipped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy()
    step = toy.step

    def poisoned(state: Trace, chunk: Chunk) -> tuple[Tensor, int, Trace]:
        toy.poison = torch.is_grad_enabled() and len(toy.chunks) % 5 == 4
        return step(state, chunk)

    monkeypatch.setattr(toy, "step", poisoned)
    result = trainer_in(tmp_path, toy=toy).run()
    assert 0 < result.skipped < SCHEDULE.steps
    assert all(parameter.isfinite().all() for parameter in toy.module.parameters())
    assert losses(tmp_path)[-1]["valid"]["ratio"] < losses(tmp_path)[0]["valid"]["ratio"]


def test_a_run_that_only_skips_ends_with_a_clear_error(tmp_path: Path) -> None:
    toy = Toy()
    toy.poison = True
    with pytest.raises(TrainingError, match=r"not finite in 10 steps in a row, up to step 10 of 12: .* below 0.02"):
        trainer_in(tmp_path, toy=toy).run()
    assert equal(dict(toy.module.state_dict()), Toy().module.state_dict())


def test_a_second_call_changes_nothing(tmp_path: Path) -> None:
    trainer_in(tmp_path).run()
    weights_before, losses_before = weights(tmp_path), losses(tmp_path)
    result: Progress = trainer_in(tmp_path).run()
    assert result.step == SCHEDULE.steps
    assert equal(weights(tmp_path), weights_before)
    assert losses(tmp_path) == losses_before


def test_a_killed_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    """Kill a run repeatedly at arbitrary points: random numbers, optimiser and streams in flight resume."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        corpus(folder / "features")
    assert program(whole, 2, 0, 0.3).wait() == 0
    reached = 0
    for _ in range(3):
        process = program(killed, 2, 0.1, 0.3)
        while _latest(killed) <= reached:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        reached = _latest(killed)
    assert reached < SCHEDULE.steps
    assert program(killed, 2, 0, 0.3).wait() == 0
    assert equal(weights(killed), weights(whole))
    assert losses(killed) == losses(whole)
    assert (killed / "run" / "best.safetensors").read_bytes() == (whole / "run" / "best.safetensors").read_bytes()


def _latest(folder: Path) -> int:
    path = folder / "run" / "latest"
    return int(path.read_text()) if path.exists() else 0


def test_two_processes_equal_one_with_twice_the_batch(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        corpus(folder / "features")
    assert program(one, 2, 0, 0.3).wait() == 0
    assert program(two, 1, 0, 0.3, processes=2).wait() == 0
    assert equal(weights(one), weights(two))
    for record, parallel_record in zip(losses(one), losses(two), strict=True):
        assert rounded(record) == rounded(parallel_record)


def rounded(record: Record) -> Record:
    """Return a record with numbers of nine decimals."""
    found: Record = json.loads(json.dumps(record), parse_float=lambda number: round(float(number), 9))
    return found


def test_streams_of_both_sorts_are_needed(tmp_path: Path) -> None:
    train, valid = corpus(tmp_path / "features")
    with pytest.raises(ValueError, match="streams to train on and to validate on are needed, got 0 and 2"):
        Trainer(Toy(), [], valid, SCHEDULE, tmp_path / "run")
    with pytest.raises(ValueError, match="got 5 and 0"):
        Trainer(Toy(), train, [], SCHEDULE, tmp_path / "run")


if __name__ == "__main__":
    main()
