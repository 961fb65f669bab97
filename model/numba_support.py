"""Parts that the compiled kernels for CPUs share: the compiler's options, threads, and functions that LLVM vectorises.

Each kernel is in the package of the code that it replaces: `model.decode.numba_step`,
`model.memory.lexical.numba_backend`, `model.policies.numba_step`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.numba_cache import KernelCache

MIN_EXP_INPUT = np.float32(-87.0)  # below this input, exp is 0 within fp32's rounding
MIN_ROWS_PER_THREAD = 8  # with fewer rows, waking up a thread takes longer than the work

Array = NDArray[Any]
T = TypeVar("T")

_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    # Sums may be vectorised: their order depends on their length only.
    "fastmath": {"reassoc", "contract", "nsz", "nnan"},
    # Without inlining, a process that compiles a kernel may link the kernels that it calls as they were compiled on
    # their own, whereas a process that loads the kernel from the cache links its private copies. The two differ in how
    # LLVM has vectorised sums, and so in bits.
    "forceinline": True,
}


def cached_njit(function: Callable[..., T]) -> Callable[..., T]:
    """Compile a function to machine code at its first call, and keep the code on disk where a directory can be
    written."""
    kernel = numba.njit(**_OPTIONS)(function)
    with suppress(RuntimeError):  # no directory can be written
        kernel._cache = KernelCache(function, _OPTIONS)
    compiled: Callable[..., T] = kernel
    return compiled


def as_arrays(*tensors: Tensor) -> list[Array]:
    """Return CPU tensors as contiguous arrays, copying only tensors that are not contiguous.

    Numba compiles a kernel anew for each combination of layouts.
    """
    return [(each.detach() if each.requires_grad else each).contiguous().numpy() for each in tensors]


def parallel_rows(kernel: Callable[..., None], n: int, *args: Any) -> None:
    """Call `kernel(first, last, *args)` for all of `n` rows, on up to as many threads as torch's operators use."""
    threads = max(1, min(torch.get_num_threads(), n // MIN_ROWS_PER_THREAD))
    parallel_ranges(kernel, [n * i // threads for i in range(threads + 1)], *args)


def parallel_ranges(kernel: Callable[..., None], bounds: Sequence[int], *args: Any) -> None:
    """Call `kernel(first, last, *args)` for each pair of neighbouring bounds, each on its own thread."""
    others = [_thread_pool().submit(kernel, *part, *args) for part in pairwise(bounds[1:])]
    kernel(bounds[0], bounds[1], *args)
    for other in others:
        other.result()


@cache
def _thread_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="rows")


@cached_njit
def exp(x: Any) -> Any:
    """Return exp(x) for x ≤ 88 in fp32, in operations that LLVM vectorises.

    exp(x) = 2ⁿ · exp(r) with |r| ≤ ½ log 2, by the polynomial of expf in Cephes (Moshier 1989).
    """
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
    """Return log(x) for x ≥ 1 in fp32, in operations that LLVM vectorises.

    log(x) = n · log 2 + log(1 + r) with √½ ≤ 1 + r < √2, by the polynomial of logf in Cephes.
    """
    bits = np.float32(x).view(np.int32) - np.int32(0x3F3504F3)  # minus the bits of √½
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
    """Return the largest number of a row, as fp32.

    LLVM vectorises comparisons of integers but not of floats. Read as integers, floats keep their order once all bits
    but the sign of the negative ones are inverted.
    """
    bits = row.view(np.int32) if row.itemsize == 4 else row.astype(np.float32).view(np.int32)
    top = np.int32(-(2**31))
    for i in range(len(bits)):
        top = max(top, np.int32(bits[i] ^ ((bits[i] >> np.int32(31)) & np.int32(0x7FFFFFFF))))
    return np.int32(top ^ ((top >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)
