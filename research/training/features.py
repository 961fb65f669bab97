"""Features: the outputs of the frozen base on a stream, computed once for the training of memories at the output.

A stream is cut into requests. Each request begins with BOS, and attention ends at its edges. The features of a stream
are numpy files in one folder, memory-mapped for reading: `states` fp16 [n, d], `targets` int32 [n], `log_probs` and
`entropy` fp32 [n] (nats), `offsets` int64 [requests + 1].
"""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.base.backbone import Backbone
from model.memory.prediction import base_prediction

ROWS = 256  # rows of logits that are computed together
BYTES_PER_STATE = 2
QUERIES = 512  # targets of a chunk that have gradients, at most
BOS_PLACEHOLDER = 0  # replaces BOS where requests are only compared with each other


class FeaturesError(Exception):
    """An error of features that cannot be stored or read."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive requests of one stream, with n targets in total.

    states [n, d] fp32: final hidden state before each target
    targets [n] int64: token ids
    log_probs [n] fp32: log p of each target under the frozen base, in nats
    entropy [n] fp32: entropy of each prediction of the frozen base, in nats
    lengths: number of targets of each request
    """

    states: Tensor
    targets: Tensor
    log_probs: Tensor
    entropy: Tensor
    lengths: list[int]

    def sampled(self) -> Tensor:
        """Return the indices of the targets in the loss: all, or at most QUERIES random ones with gradients enabled."""
        n, device = len(self.targets), self.targets.device
        if torch.is_grad_enabled() and n > QUERIES:
            return torch.randperm(n, device=device)[:QUERIES]
        return torch.arange(n, device=device)


def cut_lengths(tokens: int, shortest: int, longest: int, seed: str) -> list[int]:
    """Return the lengths of the requests of a stream, uniform in shortest..longest.

    The last request takes the remaining tokens, unless these are too few. With the same seed, a longer stream begins
    with the same lengths.
    """
    rng, lengths = random.Random(seed), []
    while tokens >= shortest:
        lengths.append(min(rng.randint(shortest, longest), tokens))
        tokens -= lengths[-1]
    return lengths


@torch.inference_mode()
def compute_features(
    backbone: Backbone,
    token_ids: Sequence[int],
    lengths: Sequence[int],
    bos: int,
    folder: Path,
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Run the base over the requests of a stream, and write the features to `folder` atomically.

    progress: called with the number of tokens of each request
    Raises FeaturesError for states beyond fp16.
    """
    device, offsets = backbone.embedding.device, np.cumsum([0, *lengths])
    targets = np.asarray(token_ids[: offsets[-1]], dtype=np.int32)
    states = np.empty((len(targets), backbone.config.hidden_size), np.float16)
    log_probs, entropy = np.empty((2, len(targets)), np.float32)
    for start, length in zip(offsets, lengths, strict=False):
        part = slice(start, start + length)
        ids = torch.from_numpy(targets[part]).long().to(device)
        final = backbone(torch.cat([ids.new_tensor([bos]), ids[:-1]])[None])[0]
        states[part] = final.half().cpu().numpy()
        scored = [_score(backbone, *rows) for rows in zip(final.split(ROWS), ids.split(ROWS), strict=True)]
        log_probs[part], entropy[part] = torch.cat(scored, dim=1).cpu().numpy()
        progress(length)
    if not np.isfinite(states).all():
        raise FeaturesError("the base's final states must fit fp16 (up to 65504), this base has larger ones")
    _write(folder, states=states, targets=targets, log_probs=log_probs, entropy=entropy, offsets=offsets)


class StreamFeatures:
    """The memory-mapped features of a stream. The constructor raises FeaturesError for a folder without features."""

    def __init__(self, folder: Path) -> None:
        try:
            self._arrays = {
                name: np.load(folder / f"{name}.npy", mmap_mode="r")
                for name in ("states", "targets", "log_probs", "entropy")
            }
            self.offsets: list[int] = np.load(folder / "offsets.npy").tolist()
        except (OSError, ValueError) as error:
            raise FeaturesError(f"cannot read the features in {folder}: {error}") from error

    @property
    def requests(self) -> int:
        """Return the number of requests."""
        return len(self.offsets) - 1

    @property
    def tokens(self) -> int:
        """Return the number of targets of all requests."""
        return self.offsets[-1]

    def chunk(self, first: int, count: int, device: torch.device | str = "cpu") -> Chunk:
        """Return at most `count` requests from request `first` on."""
        offsets = self.offsets[first : first + count + 1]
        part = slice(offsets[0], offsets[-1])
        arrays = {name: torch.from_numpy(array[part].copy()).to(device) for name, array in self._arrays.items()}
        lengths = [end - start for start, end in itertools.pairwise(offsets)]
        return Chunk(
            arrays["states"].float(), arrays["targets"].long(), arrays["log_probs"], arrays["entropy"], lengths
        )


def _score(backbone: Backbone, states: Tensor, targets: Tensor) -> Tensor:
    """Return [2, n]: the log-probability of each target, and the entropy of each prediction, in nats."""
    base = base_prediction(backbone.logits(states))
    return torch.stack([base.log_prob(targets), base.entropy]).float()


def _write(folder: Path, **arrays: np.ndarray) -> None:
    """Write arrays to a folder beside `folder`, and rename it at the end."""
    scratch = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for name, array in arrays.items():
        np.save(scratch / f"{name}.npy", array)
    scratch.rename(folder)
