"""Work beside the engine's steps: what the device has computed is gathered while it computes what comes next."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TypeVar

import torch

from model.device import has_streams, on_side_stream

T = TypeVar("T")


class GatherExecutor:
    """Does work that waits for the device: on a GPU in a thread and a stream of its own, elsewhere, where there is
    nothing to wait for, at once. Only one thread uses it."""

    def __init__(self, device: torch.device, post: Callable[[Callable[[], None]], None]) -> None:
        """post: how that thread is asked to do something, from another one."""
        self._device, self._post_message = device, post
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="imprint-aside") if has_streams(device) else None

    def execute(self, work: Callable[[], T], on_done: Callable[[Callable[[], T]], None]) -> None:
        """Works on all that was launched up to now; `on_done` gets a function that returns the outcome, or raises
        it."""
        if self._thread is None:
            on_done(work)
            return
        done = self._thread.submit(_run_on_stream, on_side_stream(self._device), work)
        done.add_done_callback(lambda done: self._post_message(lambda: on_done(done.result)))

    def stop(self) -> None:
        """Waits for what is being done; what is not begun is dropped."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)


@torch.inference_mode()
def _run_on_stream(stream: AbstractContextManager[None], work: Callable[[], T]) -> T:
    with stream:
        return work()
