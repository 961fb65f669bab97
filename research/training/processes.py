"""The processes of a training run (torchrun), their devices, and the allocator settings that training needs."""

from __future__ import annotations

import ctypes
import os
import platform

import torch
import torch.distributed as dist

from service.errors import CommandError
from service.settings import Settings


def rank() -> int:
    """Return the number of this process, from 0 on."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def training_device(settings: Settings) -> torch.device:
    """Return the device of this process. Raises CommandError if CUDA is required and missing."""
    if settings.device == "cpu" or not torch.cuda.is_available():
        if settings.device == "cuda":
            raise CommandError("IMPRINT_DEVICE is cuda, but this machine has no CUDA device that torch can use")
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def feature_dtype(device: torch.device) -> torch.dtype:
    """Return the number format in which the base computes features fastest. Features tolerate rounding."""
    # Some CPUs multiply bf16 six times as fast as fp32, the others slower.
    fast_bf16 = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast_bf16 else torch.float32


def configure_malloc() -> None:
    """Make glibc keep freed memory.

    Each step needs hundreds of megabytes again. Page faults for fresh memory took two thirds of the time of a step.
    """
    if platform.libc_ver()[0] == "glibc":
        libc, trim_threshold, mmap_max = ctypes.CDLL(None), -1, -4  # M_… of malloc.h
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_max, 0)


def trim_malloc() -> None:
    """Return fragmented memory to the system. Without trims 200 steps grew to 12 GB, where a step needs 3 or 4 GB."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
