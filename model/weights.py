"""Slow weights in files and their identity: safetensors, with what they are of in the metadata."""

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
    """sha256 over the configuration and every tensor: the identity that a stored state is bound to."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def write(module: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Writes a module's tensors, on whatever device they are."""
    save_file({name: t.detach().cpu().contiguous() for name, t in module.state_dict().items()}, path, metadata=metadata)


def read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a file. Raises OSError or SafetensorError."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
