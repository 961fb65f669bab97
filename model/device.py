"""What the device decides: which kernels run, and how data gets there. The rest of what only GPUs do lies in `kernels`,
`paged` and `graphs`."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor


@cache
def kernels_for(device: torch.device) -> ModuleType | None:
    """Our Triton kernels where they run: on a GPU, with Triton installed. None elsewhere: torch's operators do it."""
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    from model import kernels

    return kernels


def upload(data: Tensor, device: torch.device) -> Tensor:
    """`data` of the host on the device, which works on meanwhile: the host waits for nothing."""
    if device.type != "cuda":
        return data.to(device)
    # From pinned memory, which torch keeps until the copy is done.
    return data.pin_memory().to(device, non_blocking=True)
