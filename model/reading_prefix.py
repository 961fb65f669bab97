"""The reading prefix: trained keys and values at every layer, from which a base reads episodes better.

A small frozen base often does not use what it reads. The prefix stands after the episodes, as if it were an instruction
of P tokens whose keys and values were found by gradient descent (prefix tuning, Li and Liang 2021,
https://arxiv.org/abs/2101.00190; `research/training/reading.py`). A reply without episodes does not have it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from model import weights
from model.base.config import ModelConfig
from model.memory.row_layout import MemoryConfigError


@dataclass(frozen=True)
class ReadingPrefix:
    """Keys, rotated as of position `start` on, and values of P tokens, each `[L, H_kv, P, hd]`.

    untold_keys, untold_values: those that a reply reads where nothing was found; None: it then reads nothing at all.
    """

    keys: Tensor
    values: Tensor
    start: int
    untold_keys: Tensor | None = None
    untold_values: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Return P."""
        return self.keys.shape[2]

    def rows(self, *, untold: bool) -> tuple[Tensor, Tensor]:
        """Return the keys and values that a reply reads, which has found something or nothing."""
        if untold and self.untold_keys is not None and self.untold_values is not None:
            return self.untold_keys, self.untold_values
        return self.keys, self.values


def save_prefix(prefix: ReadingPrefix, path: Path) -> None:
    """Write a prefix to a file, in fp16."""
    tensors = {"keys": prefix.keys, "values": prefix.values}
    if prefix.untold_keys is not None and prefix.untold_values is not None:
        tensors |= {"untold_keys": prefix.untold_keys, "untold_values": prefix.untold_values}
    halves = {name: tensor.detach().to("cpu", torch.float16).contiguous() for name, tensor in tensors.items()}
    save_file(halves, path, metadata={"start": str(prefix.start)})


def load_prefix(path: Path, config: ModelConfig, *, device: torch.device, dtype: torch.dtype) -> ReadingPrefix:
    """Return the prefix of a file for a base. Raises `MemoryConfigError`."""
    try:
        metadata, tensors = weights.read(path)
        keys, values, start = tensors["keys"], tensors["values"], int(metadata["start"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise MemoryConfigError(f"{path}: is no reading prefix: {error}") from error
    untold = [tensors[name] for name in ("untold_keys", "untold_values") if name in tensors]
    shape = (len(config.layers), config.num_kv_heads, keys.shape[2] if keys.ndim == 4 else 0, config.head_dim)
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shape or shape[2] == 0:
            raise MemoryConfigError(
                f"{path}: {name} must have the shape {list(shape)} of this base, got {list(tensor.shape)}"
            )
    if not 0 <= start < config.max_context:
        raise MemoryConfigError(f"{path}: start must be within the context of {config.max_context} tokens, got {start}")
    return ReadingPrefix(
        keys.to(device, dtype), values.to(device, dtype), start, *(x.to(device, dtype) for x in untold)
    )
