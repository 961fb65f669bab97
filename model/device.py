"""What the device decides: which kernels run, and how data gets there. The rest of what only GPUs do lies in `kernels`,
`paged` and `graphs`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def has_streams(device: torch.device) -> bool:
    """Whether the device goes on by itself while the host waits for a part of what it does."""
    return device.type == "cuda"


def upload(data: Tensor | NDArray[Any], device: torch.device) -> Tensor:
    """A little of the host's data on the device. The host does not wait for it."""
    data = torch.as_tensor(data)
    if device.type != "cuda":
        return data.to(device)
    # From pinned memory, which torch keeps until the copy is done.
    return data.pin_memory().to(device, non_blocking=True)


def load(data: Tensor, device: torch.device) -> Tensor:
    """Much of the host's data on the device, over a stream of its own: the host does not wait, what is under way goes
    on, and what is launched from now on waits on the device alone."""
    if device.type != "cuda":
        return data.to(device)
    steps, side_stream = torch.cuda.current_stream(device), _stream(device, "load")
    with torch.cuda.stream(side_stream):
        copied = upload(data, device)
    steps.wait_stream(side_stream)
    copied.record_stream(steps)  # its memory is not given to others before the steps are done with it
    return copied


def copy_to_host(data: Tensor) -> Tensor:
    """The device's data in the host's memory, by way of pinned memory; waits for it."""
    if data.device.type != "cuda":
        return data.cpu()
    copied = torch.empty(data.shape, dtype=data.dtype, pin_memory=True)
    copied.copy_(data, non_blocking=True)
    torch.cuda.current_stream(data.device).synchronize()
    return copied


def on_side_stream(device: torch.device) -> AbstractContextManager[None]:
    """For another thread: what it launches within comes after all that was launched up to this call, on a stream of its
    own, beside what is launched from now on."""
    if device.type != "cuda":
        return nullcontext()
    launched = torch.cuda.current_stream(device).record_event()
    return _on_side_stream(device, launched)


@contextmanager
def _on_side_stream(device: torch.device, launched: torch.cuda.Event) -> Iterator[None]:
    stream = _stream(device, "beside")
    stream.wait_event(launched)
    with torch.cuda.stream(stream):
        yield


@cache
def _stream(device: torch.device, name: str) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
