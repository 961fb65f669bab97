"""Gather results on a second thread while the GPU runs the next step."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TypeVar

import torch

from model.device import has_streams, on_side_stream

T = TypeVar("T")
Post = Callable[[Callable[[], None]], None]


def new_gather_executor(device: torch.device, post: Post) -> GatherExecutor | None:
    """Return an executor for a GPU; None for a CPU, where there is nothing to wait for."""
    return GatherExecutor(device, post) if has_streams(device) else None


class GatherExecutor:
    """Runs work that waits for a GPU, in a thread and a stream of its own. Only the engine thread calls the methods."""

    def __init__(self, device: torch.device, post: Post) -> None:
        """Start without work; `post` hands a message to the engine's thread."""
        self._device, self._post_message = device, post
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="imprint-gather")

    def execute(self, work: Callable[[], T], on_done: Callable[[Future[T]], None]) -> None:
        """Run `work` after everything that was launched on the device so far.

        The engine's thread then calls `on_done` with the future of the work, which is done.
        """
        future = self._thread.submit(_run_on_stream, on_side_stream(self._device), work)
        future.add_done_callback(lambda future: self._post_message(lambda: on_done(future)))

    def stop(self) -> None:
        """Wait for the work that runs; drop the work that has not begun."""
        self._thread.shutdown(cancel_futures=True)


@torch.inference_mode()
def _run_on_stream(stream: AbstractContextManager[None], work: Callable[[], T]) -> T:
    with stream:
        return work()
