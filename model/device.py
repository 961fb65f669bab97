"""What the device decides: which kernels run. Everything else of a GPU's own lies in `kernels`, `paged` and `graphs`."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch


@cache
def kernels_for(device: torch.device) -> ModuleType | None:
    """Our Triton kernels where they run: on a GPU, with Triton installed. None elsewhere: torch's operators do it."""
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    from model import kernels

    return kernels
