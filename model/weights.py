"""Slow weights in safetensors files, with their configuration in the metadata, and the identity of slow weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def fingerprint(config: Mapping[str, Any], module: nn.Module) -> str:
    """Return the sha256 of the configuration and every tensor: the identity to which a stored state is bound."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def write(module: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Write the tensors of a module, from any device, and the metadata to a file."""
    save_file({name: t.detach().cpu().contiguous() for name, t in module.state_dict().items()}, path, metadata=metadata)


def read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata and the tensors of a file. Raise OSError or SafetensorError."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
