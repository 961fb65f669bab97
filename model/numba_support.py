"""What all compiled kernels for CPUs share: how Numba compiles them, in which threads they run, and functions that LLVM
takes in vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MIN_EXP_INPUT = np.float32(-87.0)  # below it, exp is as good as 0 in fp32
MIN_ROWS_PER_THREAD = 8  # fewer are done before another thread has woken up

Array = NDArray[Any]
T = TypeVar("T")


def cached_njit(function: Callable[..., T]) -> Callable[..., T]:
    """The function as machine code, from its first call on. Sums may be taken in vectors, of one order for a length."""
    fastmath_flags = {"reassoc", "contract", "nsz", "nnan"}
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": fastmath_flags}
    try:
        jitted: Callable[..., T] = numba.njit(**options, cache=True)(function)
    except RuntimeError:  # there is no place to keep it
        jitted = numba.njit(**options)(function)
    return jitted


def as_arrays(*tensors: Tensor) -> list[Array]:
    """In the one layout for which kernels are compiled, each other one being compiled for again; nothing that lies so
    is copied."""
    return [(each.detach() if each.requires_grad else each).contiguous().numpy() for each in tensors]


def parallel_rows(kernel: Callable[..., None], n: int, *args: Any) -> None:
    """kernel(first, last, …) for all of n rows, on as many threads as torch's operators would take."""
    threads = max(1, min(torch.get_num_threads(), n // MIN_ROWS_PER_THREAD))
    parallel_ranges(kernel, [n * i // threads for i in range(threads + 1)], *args)


def parallel_ranges(kernel: Callable[..., None], bounds: Sequence[int], *args: Any) -> None:
    """kernel(first, last, …) between each two bounds, each on a thread of its own."""
    others = [_thread_pool().submit(kernel, *part, *args) for part in pairwise(bounds[1:])]
    kernel(bounds[0], bounds[1], *args)
    for other in others:
        other.result()


@cache
def _thread_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="rows")


@cached_njit
def exp(x: Any) -> Any:
    """exp(x) for x ≤ 88 in fp32, also as a vector: 2ⁿ·exp(r), |r| ≤ ½ log 2, by the polynomial of Cephes' expf."""
    x = max(x, MIN_EXP_INPUT)
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return (p * r * r + r + np.float32(1.0)) * power


@cached_njit
def log(x: Any) -> Any:
    """log(x) for x ≥ 1 in fp32, also as a vector: n·log 2 + log(1 + r), √½ ≤ 1 + r < √2, by that of Cephes' logf."""
    bits = np.float32(x).view(np.int32) - np.int32(0x3F3504F3)  # less √½
    n = np.float32(bits >> np.int32(23))
    r = np.int32((bits & np.int32(0x7FFFFF)) + np.int32(0x3F3504F3)).view(np.float32) - np.float32(1.0)
    p = np.float32(7.0376836292e-2)
    p = p * r - np.float32(1.1514610310e-1)
    p = p * r + np.float32(1.1676998740e-1)
    p = p * r - np.float32(1.2420140846e-1)
    p = p * r + np.float32(1.4249322787e-1)
    p = p * r - np.float32(1.6668057665e-1)
    p = p * r + np.float32(2.0000714765e-1)
    p = p * r - np.float32(2.4999993993e-1)
    p = p * r + np.float32(3.3333331174e-1)
    return n * np.float32(0.69314718) + (p * r * r * r - np.float32(0.5) * r * r + r)


@cached_njit
def row_max(row: Array) -> Any:
    """The largest of a row, within fp32. Whole numbers are compared in vectors, where LLVM compares floats one by one;
    with the bits of the negative ones turned round, floats are ordered as they are."""
    bits = row.view(np.int32) if row.itemsize == 4 else row.astype(np.float32).view(np.int32)
    top = np.int32(-(2**31))
    for i in range(len(bits)):
        top = max(top, np.int32(bits[i] ^ ((bits[i] >> np.int32(31)) & np.int32(0x7FFFFFFF))))
    return np.int32(top ^ ((top >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)
