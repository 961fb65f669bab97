"""Bases by name: their sizes and licences, the memory that each has here, and what each would cost on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from model.base.checkpoint import CheckpointError, fingerprint
from service.base_cache import BaseError, cached_base
from service.model_loading import memory_kind, shipped_name
from service.settings import Settings

PRODUCT_SIZE = 512  # rows and columns of the matrices that are multiplied
VECTOR_SIZE = 4096  # rows and columns of the matrix that is multiplied with a vector: 64 MiB, more than most caches
CALLS = 20  # the fastest counts, which other processes disturb least
FIXED_BYTES = 1.2e9  # interpreter, libraries, caches and rows of the default settings, about


@dataclass(frozen=True)
class KnownBase:
    """A base of which the licence and the number of parameters are known; `real` if its real weights were served."""

    name: str
    parameters: int
    licence: str
    real: bool = False


KNOWN_BASES = (
    KnownBase("smollm2-135m-instruct", 134_515_008, "Apache-2.0", real=True),
    KnownBase("Qwen/Qwen2.5-Coder-0.5B-Instruct", 494_032_768, "Apache-2.0", real=True),
    KnownBase("Qwen/Qwen3-0.6B", 596_049_920, "Apache-2.0"),
    KnownBase("google/gemma-3-1b-it", 999_885_952, "Gemma"),
    KnownBase("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400, "Llama 3.2"),
    KnownBase("allenai/OLMo-2-0425-1B-Instruct", 1_484_916_736, "Apache-2.0"),
    KnownBase("ibm-granite/granite-3.3-2b-instruct", 2_533_539_840, "Apache-2.0"),
    KnownBase("HuggingFaceTB/SmolLM3-3B", 3_075_098_624, "Apache-2.0"),
    KnownBase("microsoft/Phi-4-mini-instruct", 3_836_021_760, "MIT"),
    KnownBase("mistralai/Mistral-7B-Instruct-v0.3", 7_248_023_552, "Apache-2.0"),
)


@dataclass(frozen=True)
class Machine:
    """The speed of this machine: multiplications and additions a second, and bytes of weights read a second."""

    flops: float
    bytes_per_second: float


@dataclass(frozen=True)
class Cost:
    """An estimate for one base: bytes of memory, seconds for 1,000 tokens of a prompt, and for one token of a reply."""

    memory_bytes: float
    prompt_seconds: float
    token_seconds: float


@torch.inference_mode()
def measure_machine(settings: Settings) -> Machine:
    """Multiply two matrices, and a matrix with a vector, with the threads of the settings."""
    torch.set_num_threads(settings.threads or torch.get_num_threads())
    square, tall = torch.randn(PRODUCT_SIZE, PRODUCT_SIZE), torch.randn(VECTOR_SIZE, VECTOR_SIZE)
    vector = torch.randn(VECTOR_SIZE)
    return Machine(
        2 * PRODUCT_SIZE**3 / _seconds(lambda: square @ square), 4 * VECTOR_SIZE**2 / _seconds(lambda: tall @ vector)
    )


def _seconds(work: Callable[[], object]) -> float:
    """Return the time of the fastest of several calls."""
    times = []
    for _ in range(CALLS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def estimate(parameters: int, machine: Machine, settings: Settings) -> Cost:
    """Return what a base costs on a CPU: prompts multiply every weight, a reply's token reads every weight once."""
    decode_bytes = 2 if settings.decode_dtype == "fp16" else 4
    copy_bytes = decode_bytes if decode_bytes == 2 else 0
    return Cost(
        FIXED_BYTES + parameters * (4 + copy_bytes),
        1000 * 2 * parameters / machine.flops,
        parameters * decode_bytes / machine.bytes_per_second,
    )


def memory_here(name: str, settings: Settings) -> str:
    """Return which memory a base has: shipped, fitted or none; for a base that is not in the cache, a dash."""
    try:
        folder = cached_base(name, settings.cache_dir)
        if folder is None:
            return "shipped" if shipped_name(name) else "–"
        return memory_kind(name, settings.cache_dir, fingerprint(folder)) or "none"
    except (BaseError, CheckpointError, OSError) as error:
        return f"cannot be read: {error}"
