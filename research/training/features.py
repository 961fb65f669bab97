"""What the frozen base makes of a stream, computed once: all that training a memory at the output needs of it.

A stream is cut into requests whose attention ends at their edges, BOS before each. Its features lie in one folder as
plain numpy files, memory-mapped when they are read: `states` fp16 [n, d], `targets` int32 [n], `log_probs` and
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

ROWS = 256  # of logits at a time: a vocabulary of them is large
BYTES_PER_STATE = 2
QUERIES = 512  # targets of a chunk that a gradient is taken of
BOS_PLACEHOLDER = 0  # stands for BOS where requests are only compared with each other


class FeaturesError(Exception):
    """Features that cannot be stored, or that are not what they should be."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive requests of one stream, n tokens in all; `lengths` are theirs.

    states [n, d] fp32: final hidden states, each that from which the target of its position is predicted. targets [n]
    long. log_probs, entropy [n]: of the target and of the distribution, under the frozen base, in nats.
    """

    states: Tensor
    targets: Tensor
    log_probs: Tensor
    entropy: Tensor
    lengths: list[int]

    def sampled(self) -> Tensor:
        """Which targets a loss is taken of: all of them, or a random sample where gradients are wanted."""
        n, device = len(self.targets), self.targets.device
        if torch.is_grad_enabled() and n > QUERIES:
            return torch.randperm(n, device=device)[:QUERIES]
        return torch.arange(n, device=device)


def cut_lengths(tokens: int, shortest: int, longest: int, seed: str) -> list[int]:
    """Lengths of the requests that a stream of so many tokens is cut into, uniform in shortest..longest.

    The last one is what is left, dropped if it is too short. The same seed cuts a longer stream alike, further on.
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
    """Runs the base over the requests of a stream and writes `folder`, which appears whole or not at all.

    progress is told each request's tokens. Raises FeaturesError for states beyond fp16.
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
    """The features in a folder, memory-mapped. Raises FeaturesError if it holds none."""

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
        """How many requests the stream has."""
        return len(self.offsets) - 1

    @property
    def tokens(self) -> int:
        """How many targets they have together."""
        return self.offsets[-1]

    def chunk(self, first: int, count: int, device: torch.device | str = "cpu") -> Chunk:
        """At most `count` requests from number `first` on."""
        offsets = self.offsets[first : first + count + 1]
        part = slice(offsets[0], offsets[-1])
        arrays = {name: torch.from_numpy(array[part].copy()).to(device) for name, array in self._arrays.items()}
        lengths = [end - start for start, end in itertools.pairwise(offsets)]
        return Chunk(
            arrays["states"].float(), arrays["targets"].long(), arrays["log_probs"], arrays["entropy"], lengths
        )


def _score(backbone: Backbone, states: Tensor, targets: Tensor) -> Tensor:
    """[2, n]: log-probability of each target, and the entropy that it was drawn from."""
    base = base_prediction(backbone.logits(states))
    return torch.stack([base.log_prob(targets), base.entropy]).float()


def _write(folder: Path, **arrays: np.ndarray) -> None:
    scratch = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for name, array in arrays.items():
        np.save(scratch / f"{name}.npy", array)
    scratch.rename(folder)
