"""Results kept on disk as they come, so that a run that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import model
from model import weights


class ResultCache:
    """A folder of results, each under the hash of all that it depends on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def load(self, key: str) -> tuple[dict[str, Tensor], Any] | None:
        """The tensors and the note kept under a key, if there are any."""
        path = self._folder / f"{key}.safetensors"
        if not path.is_file():
            return None
        try:
            metadata, tensors = weights.read(path)
            return tensors, json.loads(metadata["note"])
        except (SafetensorError, KeyError, ValueError):
            return None  # of another version, or damaged: made again

    def save(self, key: str, tensors: dict[str, Tensor], note: Any) -> None:
        """Keeps tensors and a JSON value; all or nothing of them."""
        path = self._folder / f"{key}.safetensors"
        part = path.with_suffix(".part")
        save_file({name: t.contiguous() for name, t in tensors.items()}, part, metadata={"note": json.dumps(note)})
        part.replace(path)


def key(*parts: object) -> str:
    """The hash that stands for these values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def code_hash(device: torch.device, *files: str) -> str:
    """Return the hash of all that computes a result: the sources of `model`, the named files of this package (such as
    "evaluation/arms.py"), torch's version and the device."""
    digest = hashlib.sha256(f"{torch.__version__} {device}".encode())
    here = Path(__file__).parent
    for file in [*sorted(Path(model.__file__).parent.rglob("*.py")), *(here / name for name in files)]:
        digest.update(file.read_bytes())
    return digest.hexdigest()
