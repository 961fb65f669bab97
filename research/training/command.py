"""`imprint train`: the training of a memory, or of a plain adapter for comparison, on texts.

The work folder keeps what other runs can use again (see `prepare`). The same command resumes its own run. Several
processes (torchrun) share the folder.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from model.base.backbone import Backbone
from model.base.checkpoint import CheckpointError, fingerprint, load_backbone
from model.base.config import ConfigError
from model.memory import Memory
from model.memory.initial import default_config, fit_centres, random_memory
from model.text.tokenizer import Tokenizer
from research.corpus import base_folder, console, progress_bar
from research.training.adapter import AdapterObjective, OutputAdapter, rank_of
from research.training.features import FeaturesError, StreamFeatures
from research.training.gate_calibration import calibrate_gate
from research.training.lexical import LexicalObjective
from research.training.loop import (
    LATEST,
    Objective,
    Progress,
    Record,
    Schedule,
    Stream,
    Trainer,
    TrainingError,
)
from research.training.prepare import choose_streams, compute_missing_features, format_duration, training_streams
from research.training.processes import configure_malloc, feature_dtype, rank, training_device, trim_malloc, world_size
from research.training.result import write_result
from research.training.texts import Budget, PlannedStream
from service.errors import CommandError
from service.settings import Settings

STATES = 65_536  # hidden states that the first keys and the cells of a memory are fitted to
VALID_TOKENS = 8_192  # of a held-out stream, at most
VALIDATIONS = 4
MALLOC_TRIM_EVERY = 20  # steps


@dataclass(frozen=True)
class Options:
    """The options of `imprint train`.

    paths: text files, folders of texts and `hf:` data sets
    out, work: checkpoint to write, and work folder
    budget: streams to draw
    steps: optimiser steps; None = one pass over the streams
    batch, span, lr: as in `Schedule`
    adapter: whether a plain adapter is trained instead of a memory
    rank: rank of the adapter; None = as many parameters as the memory
    """

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
    """Run `imprint train` in this process. Raises CommandError."""
    started = time.monotonic()
    configure_malloc()
    if dist.is_torchelastic_launched():
        device = training_device(settings)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    console.quiet = rank() != 0
    try:
        _train(settings, options, started)
    except KeyboardInterrupt:
        console.print(f"\nStopped. The same command goes on from what is in {options.work}.")
        raise SystemExit(130) from None
    except (CheckpointError, ConfigError, FeaturesError, TrainingError, OSError) as error:
        raise CommandError(str(error)) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _train(settings: Settings, options: Options, started: float) -> None:
    """Prepare the streams, train, calibrate the gate and write the result."""
    device, folder = training_device(settings), base_folder(settings)
    dtype = feature_dtype(device)
    torch.set_num_threads(settings.threads or torch.get_num_threads())
    backbone, tokenizer = load_backbone(folder, device=device, dtype=dtype), Tokenizer.load(folder)
    base, _ = fingerprint(folder), backbone.head_matrix  # which some bases lack: told before hours of work
    if (longest := options.budget.requests[1]) > backbone.config.max_context:
        raise CommandError(f"requests of {longest} tokens exceed the base's context of {backbone.config.max_context}")
    streams = choose_streams(options.paths, options.budget, tokenizer, f"{base} {dtype}", options.work)
    compute_missing_features(backbone, streams, tokenizer.start_token_id, options.work)
    train, valid = training_streams(streams, options.work)
    objective = _objective(options, backbone, train)
    schedule = _schedule(options, streams)
    identity = _identity(options, schedule, streams, objective)
    run = options.work / "runs" / identity
    result = _loop(Trainer(objective, train, valid, schedule, run), schedule, run)
    _fit_served_gate(objective, backbone, train, options.budget.seed)
    if rank() == 0:
        facts = {"base": base, "model": Path(settings.model).name, "run": identity, "schedule": asdict(schedule)}
        facts |= {"budget": asdict(options.budget)}
        seconds = time.monotonic() - started
        write_result(options.out, objective.module, streams, result, run, facts=facts, seconds=seconds)


def _objective(options: Options, backbone: Backbone, train: Sequence[Stream]) -> Objective:
    """Return the new memory or adapter with its loss."""
    device, hidden_size, seed = backbone.embedding.device, backbone.config.hidden_size, options.budget.seed
    head = backbone.head_matrix
    if not options.adapter:
        try:
            memory = random_memory(default_config(hidden_size), seed=seed, states=_sample_states(train))
        except ValueError as error:  # too few states
            raise CommandError(str(error)) from error
        return LexicalObjective(memory.to(device), head)
    memory_size = sum(parameter.numel() for parameter in Memory(default_config(hidden_size)).parameters())
    adapter_rank = options.rank or rank_of(memory_size, hidden_size)
    return AdapterObjective(OutputAdapter(hidden_size, adapter_rank, seed=seed).to(device), head)


def _fit_served_gate(objective: Objective, backbone: Backbone, train: Sequence[Stream], seed: int) -> None:
    """Fit the cells of a memory to the trained keys, and the gate to sessions as they are served."""
    memory = objective.module
    if not isinstance(memory, Memory) or memory.lexical is None:
        return
    fit_centres(memory.lexical, _sample_states(train), torch.Generator().manual_seed(seed))
    with progress_bar() as bar:
        task = bar.add_task("calibrating the gate", total=2 * len(train))
        gain = calibrate_gate(
            memory,
            [StreamFeatures(stream.folder) for stream in train],
            backbone.head_matrix,
            seed=seed,
            progress=lambda n: bar.advance(task, n),
        )
    console.print(f"as served, on the streams trained on: perplexity × {np.exp(gain):.4f}")


def _sample_states(train: Sequence[Stream]) -> Tensor:
    """Return hidden states [n, d] from the beginnings of all streams."""
    per_stream = -(-STATES // len(train))
    return torch.cat([StreamFeatures(stream.folder).chunk(0, 8).states[:per_stream] for stream in train])


def _schedule(options: Options, streams: Sequence[PlannedStream]) -> Schedule:
    """Return the schedule of the run, and print its length."""
    train = [stream for stream in streams if not stream.valid]
    one_pass = sum(-(-stream.requests // options.span) for stream in train) / (options.batch * world_size())
    steps = options.steps or max(1, round(one_pass))
    console.print(
        f"{steps:,} steps of {options.batch * world_size()} streams × {options.span} requests: "
        f"{steps / one_pass:.1f} passes"
    )
    return Schedule(steps, options.lr, options.batch, options.span, -(-steps // VALIDATIONS), options.budget.seed)


def _identity(options: Options, schedule: Schedule, streams: Sequence[PlannedStream], objective: Objective) -> str:
    """Return the name of the run: a hash of everything that determines the result."""
    digest = hashlib.sha256()
    facts = [asdict(schedule), world_size(), options.adapter, [[stream.id, stream.valid] for stream in streams]]
    digest.update(json.dumps(facts).encode())
    for name, tensor in objective.module.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _loop(trainer: Trainer, schedule: Schedule, run: Path) -> Progress:
    """Run the trainer with progress bars, and print the validations and the remaining time."""
    last_step = int((run / LATEST).read_text()) if (run / LATEST).exists() else 0
    console.print(f"Going on from step {last_step:,} of {schedule.steps:,}" if last_step else "Starting at step 0")
    step_times: list[float] = []
    with progress_bar() as bar:
        tasks = {"training": bar.add_task("training", total=schedule.steps, completed=last_step)}

        def on_record(record: Record) -> None:
            if "valid" in record:
                validation = record["valid"]
                ratio = validation["ratio"]
                console.print(f"step {validation['step']:,}: perplexity on held-out streams × {ratio:.4f}")
            else:
                step_times.append(time.monotonic())
                bar.update(tasks["training"], description=f"training × {_recent(record):.4f}")
                if record["step"] % MALLOC_TRIM_EVERY == 0:
                    trim_malloc()
                if len(step_times) == 4:
                    left = (step_times[3] - step_times[0]) / 3 * (schedule.steps - record["step"])
                    console.print(f"about {format_duration(left)} left, validations not counted")

        def progress(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total)
            bar.update(tasks[phase], completed=done, total=total)

        return trainer.run(on_record=on_record, progress=progress)


def _recent(record: Record) -> float:
    """Return perplexity ÷ the frozen base's in this step."""
    return float(np.exp(record.get("loss", 0.0) - record.get("frozen", 0.0)))
