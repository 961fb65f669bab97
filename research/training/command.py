"""`imprint train`: texts in, a trained memory out, or a plain adapter to compare it with.

The work folder keeps what can be used again: `tokens` and `features`, a stream each, and `runs`, a folder for each run
with other settings. The same command goes on with its own run. Several processes (torchrun) share the folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from model.base.backbone import Backbone
from model.base.checkpoint import CheckpointError, fingerprint, load_backbone
from model.base.config import ConfigError
from model.memory import Memory, save_memory
from model.memory.initial import default_config, fit_centres, random_memory
from model.text.tokenizer import Tokenizer
from research.corpus import base_folder, console, progress_bar
from research.machine import code_version, hardware
from research.plots import PlotsMissingError, draw_training
from research.training.adapter import AdapterObjective, OutputAdapter, rank_of, save_adapter
from research.training.features import BYTES_PER_STATE, FeaturesError, StreamFeatures, compute_features
from research.training.lexical import LexicalObjective
from research.training.loop import (
    LATEST,
    LOSSES,
    Objective,
    Progress,
    Record,
    Schedule,
    Stream,
    Trainer,
    TrainingError,
    read_losses,
)
from research.training.settle import settle
from research.training.texts import Budget, PlannedStream, draw_streams, find_kinds
from service.errors import CommandError
from service.settings import Settings

STATES = 65_536  # that a memory's first keys and its cells are fitted to
VALID_TOKENS = 8_192  # of a held-out stream, at most
VALIDATIONS = 4
MALLOC_TRIM_EVERY = 20  # steps
STREAMS = "streams.json"


@dataclass(frozen=True)
class Options:
    """The command's own; steps: None = one pass. rank: None = as many parameters as the memory has."""

    paths: list[str]
    out: Path
    work: Path
    budget: Budget
    steps: int | None
    batch: int
    span: int
    lr: float
    adapter: bool
    rank: int | None


def train_files(settings: Settings, options: Options) -> None:
    """Runs `imprint train`, in each of its processes. Raises CommandError."""
    began = time.monotonic()
    _configure_malloc()
    if dist.is_torchelastic_launched():
        device = _device(settings)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    console.quiet = _rank() != 0
    try:
        _train(settings, options, began)
    except KeyboardInterrupt:
        console.print(f"\nStopped. The same command goes on from what is in {options.work}.")
        raise SystemExit(130) from None
    except (CheckpointError, ConfigError, FeaturesError, TrainingError, OSError) as error:
        raise CommandError(str(error)) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _train(settings: Settings, options: Options, began: float) -> None:
    device, folder = _device(settings), base_folder(settings)
    # Features need no last bit, and some CPUs multiply bf16 six times as fast as fp32.
    fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    dtype = torch.bfloat16 if fast else torch.float32
    torch.set_num_threads(settings.threads or torch.get_num_threads())
    backbone, tokenizer = load_backbone(folder, device=device, dtype=dtype), Tokenizer.load(folder)
    base = fingerprint(folder)
    if (longest := options.budget.requests[1]) > backbone.config.max_context:
        raise CommandError(f"requests of {longest} tokens exceed the base's context of {backbone.config.max_context}")
    streams = _draw(options, tokenizer, f"{base} {dtype}")
    _compute(backbone, streams, tokenizer.start_token_id, options.work)
    train, valid = ([_stream(s, options.work) for s in streams if s.valid == held] for held in (False, True))
    objective = _objective(options, backbone, train)
    schedule = _schedule(options, streams)
    identity = _identity(options, schedule, streams, objective)
    run = options.work / "runs" / identity
    result = _loop(Trainer(objective, train, valid, schedule, run), schedule, run)
    _calibrate_gate(objective, backbone, train, options.budget.seed)
    if _rank() == 0:
        facts = {"base": base, "model": Path(settings.model).name, "run": identity, "schedule": asdict(schedule)}
        _write(options, objective, streams, result, run, facts, time.monotonic() - began)


# --- streams and features ------------------------------------------------------------------------------------------


def _draw(options: Options, tokenizer: Tokenizer, base: str) -> list[PlannedStream]:
    """The first process chooses the streams, the others read its list."""
    path = options.work / STREAMS
    if _rank() == 0:
        console.print("Choosing streams")
        options.work.mkdir(parents=True, exist_ok=True)
        streams = draw_streams(
            find_kinds(options.paths, options.budget), options.budget, tokenizer, base, options.work / "tokens"
        )
        scratch = path.with_suffix(".part")
        scratch.write_text(json.dumps([stream.to_dict() for stream in streams], indent=1))
        os.replace(scratch, path)
    _barrier()
    streams = [PlannedStream(**stream) for stream in json.loads(path.read_text())]
    kinds = sorted({stream.kind for stream in streams})
    console.print(f"{len(kinds)} kinds: {', '.join(kinds)}")
    for valid, what in ((False, f"to train on (asked for {options.budget.tokens:,} tokens)"), (True, "held out")):
        chosen = [stream for stream in streams if stream.valid == valid]
        console.print(f"{len(chosen)} streams, {sum(s.tokens for s in chosen):,} tokens {what}")
    return streams


def _compute(backbone: Backbone, streams: Sequence[PlannedStream], bos: int, work: Path) -> None:
    """This process's share of the features that are not there yet."""
    mine = [s for s in streams[_rank() :: _world()] if not _features(work, s).exists()]
    total = sum(stream.tokens for stream in mine)
    if mine:
        size = total * backbone.config.hidden_size * BYTES_PER_STATE * _world()
        if size > (free := shutil.disk_usage(work).free):
            raise CommandError(f"{work}: {size / 1e9:.1f} GB are needed for features, {free / 1e9:.1f} GB are free")
        duration = _duration(total * _seconds_per_token(backbone, mine[0], work, bos))
        console.print(f"Reading {total:,} tokens with the base: about {duration}, {size / 1e9:.2f} GB")
        with progress_bar() as bar:
            task = bar.add_task("reading with the base", total=total)
            for stream in mine:
                ids, lengths = _tokens(work, stream)
                compute_features(
                    backbone, ids, lengths, bos, _features(work, stream), progress=lambda n: bar.advance(task, n)
                )
    _barrier()


def _seconds_per_token(backbone: Backbone, stream: PlannedStream, work: Path, bos: int) -> float:
    """Of the first two requests of a stream; those that warm up are not counted."""
    ids, lengths = _tokens(work, stream)
    scratch = work / "features" / f"estimate-{_rank()}"
    for _ in range(2):
        shutil.rmtree(scratch, ignore_errors=True)
        began = time.monotonic()
        compute_features(backbone, ids, lengths[:2], bos, scratch)
    shutil.rmtree(scratch)
    return (time.monotonic() - began) / sum(lengths[:2])


def _tokens(work: Path, stream: PlannedStream) -> tuple[list[int], list[int]]:
    with np.load(work / "tokens" / f"{stream.id}.npz") as file:
        return file["ids"].tolist(), file["lengths"].tolist()


def _features(work: Path, stream: PlannedStream) -> Path:
    return work / "features" / stream.id


def _stream(stream: PlannedStream, work: Path) -> Stream:
    return Stream(stream.name, stream.kind, _features(work, stream))


# --- the run -------------------------------------------------------------------------------------------------------


def _objective(options: Options, backbone: Backbone, train: Sequence[Stream]) -> Objective:
    device, hidden_size, seed = backbone.embedding.device, backbone.config.hidden_size, options.budget.seed
    head = backbone.head_matrix
    if not options.adapter:
        try:
            memory = random_memory(default_config(hidden_size), seed=seed, states=_sample_states(train))
        except ValueError as error:  # too few states
            raise CommandError(str(error)) from error
        return LexicalObjective(memory.to(device), head)
    rank = options.rank or rank_of(
        sum(p.numel() for p in Memory(default_config(hidden_size)).parameters()), hidden_size
    )
    return AdapterObjective(OutputAdapter(hidden_size, rank, seed=seed).to(device), head)


def _calibrate_gate(objective: Objective, backbone: Backbone, train: Sequence[Stream], seed: int) -> None:
    """Places a memory's cells where training has moved its keys, and fits its gate to what is then served."""
    memory = objective.module
    if not isinstance(memory, Memory) or memory.lexical is None:
        return
    fit_centres(memory.lexical, _sample_states(train), torch.Generator().manual_seed(seed))
    dtype = backbone.embedding.dtype
    with progress_bar() as bar:
        task = bar.add_task("settling the gate", total=2 * len(train))
        gain = settle(
            memory,
            [StreamFeatures(stream.folder) for stream in train],
            lambda states: backbone.logits(states.to(dtype)),
            seed=seed,
            progress=lambda n: bar.advance(task, n),
        )
    console.print(f"as served, on the streams trained on: perplexity × {np.exp(gain):.4f}")


def _sample_states(train: Sequence[Stream]) -> Tensor:
    """States [n, d] from the beginnings of all streams."""
    share = -(-STATES // len(train))
    return torch.cat([StreamFeatures(stream.folder).chunk(0, 8).states[:share] for stream in train])


def _schedule(options: Options, streams: Sequence[PlannedStream]) -> Schedule:
    train = [stream for stream in streams if not stream.valid]
    one_pass = sum(-(-stream.requests // options.span) for stream in train) / (options.batch * _world())
    steps = options.steps or max(1, round(one_pass))
    console.print(
        f"{steps:,} steps of {options.batch * _world()} streams × {options.span} requests: "
        f"{steps / one_pass:.1f} passes"
    )
    return Schedule(steps, options.lr, options.batch, options.span, -(-steps // VALIDATIONS), options.budget.seed)


def _identity(options: Options, schedule: Schedule, streams: Sequence[PlannedStream], objective: Objective) -> str:
    """Names the run: equal if, and only if, it would come to the same end."""
    digest = hashlib.sha256()
    facts = [asdict(schedule), _world(), options.adapter, [[stream.id, stream.valid] for stream in streams]]
    digest.update(json.dumps(facts).encode())
    for name, tensor in objective.module.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _loop(trainer: Trainer, schedule: Schedule, run: Path) -> Progress:
    """Runs the trainer under bars; prints what validations say."""
    before = int((run / LATEST).read_text()) if (run / LATEST).exists() else 0
    console.print(f"Going on from step {before:,} of {schedule.steps:,}" if before else "Starting at step 0")
    began: list[float] = []
    with progress_bar() as bar:
        tasks = {"training": bar.add_task("training", total=schedule.steps, completed=before)}

        def on_record(record: Record) -> None:
            if "valid" in record:
                found = record["valid"]
                console.print(f"step {found['step']:,}: perplexity on held-out streams × {found['ratio']:.4f}")
            else:
                began.append(time.monotonic())
                bar.update(tasks["training"], description=f"training × {_recent(record):.4f}")
                if record["step"] % MALLOC_TRIM_EVERY == 0:
                    _trim_malloc()
                if len(began) == 4:
                    left = (began[3] - began[0]) / 3 * (schedule.steps - record["step"])
                    console.print(f"about {_duration(left)} left, validations not counted")

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        return trainer.run(on_record=on_record, progress=progress)


def _recent(record: Record) -> float:
    """Perplexity over the frozen base's in this step."""
    return float(np.exp(record.get("loss", 0.0) - record.get("frozen", 0.0)))


# --- what comes out ------------------------------------------------------------------------------------------------


def _write(
    options: Options,
    objective: Objective,
    streams: Sequence[PlannedStream],
    result: Progress,
    run: Path,
    facts: dict[str, Any],
    seconds: float,
) -> None:
    """The checkpoint; beside it, under its name, losses, plot and manifest."""
    out, module = options.out, objective.module
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
    manifest = {
        "command": shlex.join(["imprint", *sys.argv[1:]]),
        "arm": "adapter" if options.adapter else "memory",
        "parameters": {name: list(tensor.shape) for name, tensor in module.state_dict().items()},
        "config": module.config.to_dict() if isinstance(module, Memory) else None,
        "best": result.best,
        "skipped_steps": result.skipped,
        "seconds": {"training": round(result.seconds, 1), "this_call": round(seconds, 1)},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": code_version(),
        "torch": torch.__version__,
        "hardware": hardware(),
        "processes": _world(),
        **facts,
        "budget": asdict(options.budget),
        "sha256": hashlib.sha256(out.read_bytes()).hexdigest(),
        "streams": [stream.to_dict() for stream in streams],
    }
    out.with_suffix(".json").write_text(json.dumps(manifest, indent=1) + "\n")
    for kind, ratio in sorted(result.best["kinds"].items()):
        console.print(f"{kind:<32} × {ratio:.4f}")
    console.print(f"best: perplexity × {result.best['ratio']:.4f} at step {result.best['step']:,}")
    console.print(f"written: {', '.join(map(str, files))}; the run: {run}")


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


# --- processes -----------------------------------------------------------------------------------------------------


def _configure_malloc() -> None:
    """Has glibc keep what is freed: each step needs hundreds of megabytes again, and taking them from the system page
    by page took two thirds of a step's time."""
    if platform.libc_ver()[0] == "glibc":
        libc, trim_threshold, mmap_max = ctypes.CDLL(None), -1, -4  # M_… of malloc.h
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_max, 0)


def _trim_malloc() -> None:
    """What was kept grows holes that nothing fits into: to 12 GB within 200 steps, of which a step needs 3 or 4."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _device(settings: Settings) -> torch.device:
    if settings.device == "cpu" or not torch.cuda.is_available():
        if settings.device == "cuda":
            raise CommandError("IMPRINT_DEVICE is cuda, but this machine has no CUDA device that torch can use")
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
