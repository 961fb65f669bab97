"""Work beside the engine's steps: results are gathered from a GPU while the GPU computes the next step."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TypeVar

import torch

from model.device import has_streams, on_side_stream

T = TypeVar("T")


class GatherExecutor:
    """Runs work that waits for the device; only the engine's thread uses the executor.

    On a GPU the work runs in a thread and a stream of its own. On a CPU there is nothing to wait for, and the work runs
    at once.
    """

    def __init__(self, device: torch.device, post: Callable[[Callable[[], None]], None]) -> None:
        """Store the device and `post`, by which another thread hands a message to the engine's thread."""
        self._device, self._post_message = device, post
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="imprint-aside") if has_streams(device) else None

    def execute(self, work: Callable[[], T], on_done: Callable[[Callable[[], T]], None]) -> None:
        """Run `work` after everything that was launched on the device so far.

        `on_done` gets a function that returns the result of the work, or raises the error of the work.
        """
        if self._thread is None:
            on_done(work)
            return
        done = self._thread.submit(_run_on_stream, on_side_stream(self._device), work)
        done.add_done_callback(lambda done: self._post_message(lambda: on_done(done.result)))

    def stop(self) -> None:
        """Wait for the work that runs; drop the work that has not begun."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)


@torch.inference_mode()
def _run_on_stream(stream: AbstractContextManager[None], work: Callable[[], T]) -> T:
    with stream:
        return work()
