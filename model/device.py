"""Transfers between host and device, and streams other than the device's default stream.

Which kernels run is chosen in the packages of the kernels: `model.memory.backend`, `model.decode`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def has_streams(device: torch.device) -> bool:
    """Return whether the device works on while the host waits for a part of its work."""
    return device.type == "cuda"


def upload(data: Tensor | NDArray[Any], device: torch.device) -> Tensor:
    """Copy a small amount of the host's data to the device. The host does not wait for the copy."""
    data = torch.as_tensor(data)
    if device.type != "cuda":
        return data.to(device)
    # The copy is asynchronous from pinned memory only, which torch keeps until the copy is done.
    return data.pin_memory().to(device, non_blocking=True)


def upload_on_side_stream(data: Tensor, device: torch.device) -> Tensor:
    """Copy a large amount of the host's data to the device on a stream of its own.

    The host does not wait, and work that was launched earlier goes on during the copy. Work that is launched later
    waits for the copy, on the device.
    """
    if device.type != "cuda":
        return data.to(device)
    main_stream, side_stream = torch.cuda.current_stream(device), _stream(device, "load")
    with torch.cuda.stream(side_stream):
        copied = upload(data, device)
    main_stream.wait_stream(side_stream)
    copied.record_stream(main_stream)  # torch must not reuse the memory before the main stream has read the copy
    return copied


def copy_to_host(data: Tensor) -> Tensor:
    """Copy the device's data to the host, through pinned memory, and wait for the copy."""
    if data.device.type != "cuda":
        return data.cpu()
    copied = torch.empty(data.shape, dtype=data.dtype, pin_memory=True)
    copied.copy_(data, non_blocking=True)
    torch.cuda.current_stream(data.device).synchronize()
    return copied


def on_side_stream(device: torch.device) -> AbstractContextManager[None]:
    """Return a context for a second thread, within which the thread launches its work on a stream of its own.

    The work waits for all that was launched before this call, and runs at the same time as all that is launched later.
    """
    if device.type != "cuda":
        return nullcontext()
    launched = torch.cuda.current_stream(device).record_event()
    return _on_side_stream(device, launched)


@contextmanager
def _on_side_stream(device: torch.device, launched: torch.cuda.Event) -> Iterator[None]:
    stream = _stream(device, "side")
    stream.wait_event(launched)
    with torch.cuda.stream(stream):
        yield


@cache
def _stream(device: torch.device, name: str) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
