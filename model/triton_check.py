"""The acceptance of Triton kernels on a GPU: Triton is installed, and a check on small random inputs passes.

A check compares each kernel with its reference in torch operators; each check is in the package of its kernels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def has_triton(device: torch.device) -> bool:
    """Return True if the device is a GPU and Triton is installed."""
    return device.type == "cuda" and find_spec("triton") is not None


def passes_check(check: Callable[[torch.device], None], device: torch.device) -> bool:
    """Return True if `check` raises nothing on the device; log the reason otherwise."""
    try:
        check(device)
    except Exception as error:  # no C compiler, an unknown GPU, a wrong result: torch operators work in every case
        log.warning("Triton kernels cannot be used on this GPU, torch operators take their place: %s", error)
        return False
    return True


def assert_close(name: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Raise RuntimeError if an output of the kernel `name` differs from that of its reference by more than 1e-3."""
    for one, other in zip(found, expected, strict=True):
        if not torch.allclose(one.float(), other.float(), atol=1e-3, rtol=1e-3):
            raise RuntimeError(f"the kernel {name} does not compute what its reference does")
