"""`imprint bench`: starts the arms, runs the scenarios, and writes the results."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import masking, peers, profiling, report, scenarios
from benchmarks.peers import PeerSelection
from benchmarks.states import states
from benchmarks.stream_timing import Arm, PeerError
from benchmarks.testbed import QUICK, Sizes, Testbed
from benchmarks.texts import PromptSource
from model.adaptive_lm import AdaptiveLM
from model.text.tokenizer import Tokenizer
from research.corpus import base_folder, console, load_model
from research.machine import processor
from service.base_cache import BaseError, resolve_gguf
from service.errors import CommandError
from service.model_loading import choose_decoder
from service.settings import PREFIX, Settings

Scenario = Callable[[Testbed], Awaitable[dict[str, Any]]]
GPU_BATCH = 256
BUSY_THRESHOLD = 0.15  # share of the machine in use by others, from which on a warning is printed
PROFILE = "profile"
MASKED = {"masked-1": 1, "masked-16": 16}  # sequences of a step whose draws a grammar masks
IN_PROCESS = (*MASKED, PROFILE)  # measured without a server, by this process, which has the model on the CPU
PATH_SETTINGS = ("MODEL", "MEMORY", "_DIR", "_FILE")  # endings of settings that may name files of this machine


@dataclass(frozen=True)
class Options:
    """The options of `imprint bench`.

    out: folder of the results
    sizes: sizes of the scenarios
    minutes: time of all scenarios together, without the starts of servers
    threads: threads of every arm; 0 = one for each core
    names: names of scenarios; empty = all
    page: Markdown file that shows the last results between its marks
    """

    out: Path
    sizes: Sizes
    minutes: float
    threads: int = 0
    names: Sequence[str] = ()
    peer_selection: PeerSelection = field(default_factory=PeerSelection)
    page: Path | None = None


def sizes_for(settings: Settings, *, quick: bool) -> Sizes:
    """Return the sizes of the scenarios, with the large batch on a GPU."""
    sizes = QUICK if quick else Sizes()
    return replace(sizes, batches=(*sizes.batches, GPU_BATCH)) if device_of(settings) == "cuda" else sizes


def plan(sizes: Sizes) -> dict[str, tuple[Scenario, float]]:
    """Return the scenarios in order, each with its weight in the time."""
    chosen: dict[str, tuple[Scenario, float]] = {
        "single": (scenarios.single, 2.0),
        "prefill": (scenarios.prefill, 2.0),
    }
    chosen |= {f"streams-{count}": (scenarios.streams(count), 2.5 + count / 25) for count in sizes.streams}
    chosen |= {f"batch-{count}": (scenarios.batch(count), 1.5) for count in sizes.batches}
    return chosen | {
        "sessions": (scenarios.sessions, 2.0),
        "history": (scenarios.history, 1.0),
        "states": (states, 0.5),
        "rate": (scenarios.rate, 2.5),
        "interruption": (scenarios.interruption, 3.0),
        "acts": (scenarios.acts, 0.5),
    }


def run(settings: Settings, options: Options) -> dict[str, Any]:
    """Run the chosen scenarios, and write results.json, table.md and figures. Raises CommandError."""
    names = _check(options)
    options.out.mkdir(parents=True, exist_ok=True)
    threads = options.threads or os.cpu_count() or 1
    started, busy = time.time(), psutil.cpu_percent(interval=1.0) / 100
    if busy > BUSY_THRESHOLD:
        console.print(f"the machine is busy with other work ({busy:.0%}): ratios are wide, and single numbers too low")
    lm, tokenizer = load_model(settings)
    texts = PromptSource(tokenizer)
    results: dict[str, Any] = {"about": {}, "missing": {}, "scenarios": {}, "profile": {}}
    with _sigterm_as_interrupt():
        try:
            asyncio.run(_measure(settings, options, lm, texts, tokenizer.eos_token_ids, names, threads, results))
            if device_of(settings) == "cpu":
                _measure_in_process(settings, options, lm, tokenizer, texts, names, threads, results)
        except PeerError as error:
            raise CommandError(str(error)) from error
    results["about"] = _about(settings, options, lm, threads, started, busy)
    results = json.loads(json.dumps(report.finalize_results(results)))
    (options.out / "results.json").write_text(json.dumps(results, indent=1))
    report.write(results, options.out, options.page)
    return results


def _check(options: Options) -> list[str]:
    """Return the names of the chosen scenarios. Raises CommandError for options that cannot work."""
    known = [*plan(options.sizes), *IN_PROCESS]
    names = list(options.names) or known
    if unknown := set(names) - set(known):
        raise CommandError(f"scenarios must be among {', '.join(known)}, got {', '.join(sorted(unknown))}")
    if unknown := set(options.peer_selection.names) - set(peers.NAMES):
        raise CommandError(f"peers must be among {', '.join(peers.NAMES)} or none, got {', '.join(sorted(unknown))}")
    if options.page is not None:
        report.check_page(options.page)
    return names


async def _measure(
    settings: Settings,
    options: Options,
    lm: AdaptiveLM,
    texts: PromptSource,
    eos: Iterable[int],
    names: Sequence[str],
    threads: int,
    results: dict[str, Any],
) -> None:
    """Start the arms and run the scenarios one after the other; fill `results`."""
    all_scenarios = plan(options.sizes)
    chosen = [name for name in names if name not in IN_PROCESS]
    total = sum(all_scenarios[name][1] for name in chosen)
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="imprint-bench-")))
        bar = stack.enter_context(_progress())
        task = bar.add_task("starting", total=max(total, 1e-9))
        if chosen:
            testbed = await _testbed(settings, options, lm, texts, eos, threads, stack, folder, results["missing"])
        done = 0.0
        for name in chosen:
            scenario, weight = all_scenarios[name]

            def advance(share: float, done: float = done, weight: float = weight) -> None:
                bar.update(task, completed=done + share * weight)

            bar.update(task, description=name)
            testbed.budget_s, testbed.progress = 60 * options.minutes * weight / total, advance
            started = time.monotonic()
            missing_before = dict(results["missing"])
            results["scenarios"][name] = await scenario(testbed)
            for peer in results["missing"].keys() - missing_before.keys():
                console.print(f"{peer} is not measured from here on: {results['missing'][peer]}")
            console.print(f"{name}: {time.monotonic() - started:.0f} s")
            done += weight
            bar.update(task, completed=done)


def _measure_in_process(
    settings: Settings,
    options: Options,
    lm: AdaptiveLM,
    tokenizer: Tokenizer,
    texts: PromptSource,
    names: Sequence[str],
    threads: int,
    results: dict[str, Any],
) -> None:
    """Measure what needs no server, by the steps that the server takes; fill `results`."""
    served = AdaptiveLM(lm.backbone, lm.memory, decoder=choose_decoder(settings, lm.backbone))
    rounds, steps = options.sizes.rounds[0], 4 if options.sizes.rounds[0] < 3 else 16
    for name in (name for name in MASKED if name in names):
        found = masking.masked(served, tokenizer, texts, MASKED[name], threads, 2 * rounds, 2 * steps)
        results["scenarios"][name] = found
    if PROFILE in names:
        results["profile"] = profiling.profiles(served, texts, options.sizes.batches, threads, steps)


async def _testbed(
    settings: Settings,
    options: Options,
    lm: AdaptiveLM,
    texts: PromptSource,
    eos: Iterable[int],
    threads: int,
    stack: AsyncExitStack,
    folder: Path,
    missing: dict[str, str],
) -> Testbed:
    """Start this server and the chosen peers."""
    sizes = options.sizes
    largest = max([16, *sizes.streams, *sizes.batches])
    # Limits for the largest load and no more, so that the device cannot hold all of the 2,000 sessions.
    limits = {"MAX_BATCH": largest, "MAX_QUEUE": largest + 16, "HOT_SESSIONS": largest}
    served = {name.upper(): getattr(settings, name) for name in ("model", "memory", "cache_dir", "device", "context")}
    endpoint, available = await asyncio.gather(
        peers.start_imprint(stack, options.out, folder, threads, **served, **limits),
        _start_peers(settings, options, threads, stack, missing),
    )
    endpoint.fields["logit_bias"] = {str(token): -100 for token in eos}
    config = lm.backbone.config
    context = min(settings.context or config.max_context, config.max_context)
    return Testbed(endpoint, available, missing, texts, sizes, lm.memory.config, config.vocab_size, context)


async def _start_peers(
    settings: Settings, options: Options, threads: int, stack: AsyncExitStack, missing: dict[str, str]
) -> dict[str, Arm]:
    """Start the chosen peers, and return their arms by name. Fill `missing` with the reasons of the others."""
    sizes, selection = options.sizes, options.peer_selection
    base = base_folder(settings)
    available: dict[str, Arm] = {}

    async def add(name: str, start: Callable[[], Awaitable[Arm]]) -> None:
        try:
            if name not in selection.names:
                raise PeerError("it was not asked for")
            available[name] = await start()
        except PeerError as error:
            missing[name] = str(error)
            console.print(f"{name} is not measured: {error}")

    async def llama() -> Arm:
        gguf = selection.gguf or await asyncio.to_thread(_gguf, settings)
        large_server = (max(sizes.streams), max(sizes.lengths) + sizes.stream_tokens + 32)
        return await peers.start_llama(stack, options.out, replace(selection, gguf=gguf), threads, large_server)

    await asyncio.gather(
        add("transformers", lambda: peers.start_transformers(stack, options.out, base, threads)),
        add("llama.cpp", llama),
        add("vllm", lambda: peers.find_vllm(stack, selection.vllm_url)),
    )
    return available


def _gguf(settings: Settings) -> Path | None:
    """Return the GGUF file that the base was converted from. Raises PeerError."""
    try:
        return resolve_gguf(settings.model, settings.cache_dir, progress=console.print)
    except BaseError as error:
        raise PeerError(str(error)) from error


def _about(
    settings: Settings, options: Options, lm: AdaptiveLM, threads: int, started: float, busy: float
) -> dict[str, Any]:
    """Return the facts about the run and its machine."""
    device = device_of(settings)
    environment = {
        name: value for name, value in peers.measured_environment(threads).items() if name.startswith(PREFIX)
    }
    tensors = {id(tensor): tensor.numel() * tensor.element_size() for tensor in lm.backbone.parameters()}
    versions = {"imprint": version("imprint"), "torch": torch.__version__}
    weights = sum(tensors.values()) // (2 if device == "cuda" else 1)  # a GPU serves bf16; this process has loaded fp32
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - started),
        "machine": machine(),
        "device": device,
        "threads": threads,
        "busy": busy,
        "sizes": asdict(options.sizes),
        "model": Path(settings.model).name,
        "memory": lm.memory.fingerprint(),
        "versions": versions | peers.versions(options.peer_selection, options.out),
        "settings": {name: value for name, value in environment.items() if not name.endswith(PATH_SETTINGS)},
        "weight_bytes": weights,
        "read_bytes_per_s": profiling.read_bandwidth(device, threads),
    }


def machine() -> str:
    """Return the processor, its cores, the memory and the GPU, if there is one."""
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    cpu = f"{processor()}, {os.cpu_count()} cores ({torch.backends.cpu.get_cpu_capability()}), {memory}"
    return f"{cpu}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else cpu


def device_of(settings: Settings) -> str:
    """Return the device of the server: "cuda" or "cpu"."""
    if settings.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return settings.device


def _progress() -> Progress:
    """Return the progress bar over all scenarios."""
    columns = (TextColumn("{task.description:<14}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True)


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Handle SIGTERM as Ctrl-C, so that no server is left behind."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
